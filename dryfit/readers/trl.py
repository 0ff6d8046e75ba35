"""TRL's YAML files (``trl sft --config FILE``) and the arguments of its classes (dryfit/data/readers/trl.yaml)."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.readers import common, grpo
from dryfit.readers.launch import Launch
from dryfit.readers.reading import FileValues, Reading, begin, keys
from dryfit.readers.shell import Command, with_file
from dryfit.scenario.objectives import OBJECTIVES, SUPERVISED

TABLE = ("trl", "transformers")


_SCRIPT = re.compile(r"\b(?:trl|examples)[/.](?:\w+[/.])*?(\w+?)(?:\.py)?$")


def from_command(launch: Launch, command: Command, script: Path) -> Mapping[str, Any] | None:
    """The settings of ``trl sft --config FILE`` and of TRL's own scripts; None: TRL is not called."""
    words = launch.words
    found = _SCRIPT.search(launch.program)
    if words[:1] == ["trl"] and words[1:2]:
        kind, given = words[1], words[2:]
    elif found:
        kind, given = found[1], words[1:]
    else:
        return None
    if kind not in OBJECTIVES:
        raise UserError(
            "This command of TRL's is not known as a training.",
            where=script,
            found=" ".join(words[:2]),
            allowed=", ".join(f"trl {name}" for name in OBJECTIVES),
        )
    return {**with_file(given, script), "command": kind}


def read(
    mapping: Mapping[str, Any],
    file: Path,
    gpus: int | None = None,
    trainer: str = "sft",
    stated: Collection[str] | None = None,
) -> Reading:
    """The scenario's fields, with TRL's defaults.

    ``trainer``: an objective; ``transformers``: its own Trainer, whose defaults differ (no checkpointing, no mixed
    precision, the model in the dtype of its files). ``stated``: the keys that somebody wrote, where ``mapping`` holds
    defaults too; None: all of them.
    """
    get, reading = begin(mapping, keys(*TABLE), file)
    trainer = _trainer(get, trainer)
    plain = trainer == "transformers"
    common.model(reading, get("model_name_or_path"), get("model_revision"))
    length = get("max_length") or get("max_seq_length") or 1024
    if trainer in OBJECTIVES and OBJECTIVES[trainer].generates:
        length = grpo.row_tokens(get, trainer)
    reading.set(
        sequence_length=length,
        micro_batch=get("per_device_train_batch_size", 8),
        gradient_accumulation=get("gradient_accumulation_steps", 1),
    )
    _precision(get, reading, plain)
    _method(get, reading, plain)
    kwargs = get("gradient_checkpointing_kwargs") or {}
    common.checkpointing(
        reading, get("gradient_checkpointing", not plain), kwargs.get("use_reentrant")
    )
    init = get("model_init_kwargs") or {}
    kernel = get("attn_implementation") or (
        init.get("attn_implementation") if isinstance(init, Mapping) else None
    )
    if kernel:
        common.attention(reading, "attn_implementation", kernel)
    reading.pads = not (get("packing") or get("padding_free"))
    common.optimizer(reading, "optim", get("optim", "adamw_torch_fused"))
    if get("use_liger_kernel"):
        common.liger(reading)
    elif trainer == "sft" and get("loss_type", "chunked_nll") == "chunked_nll":
        reading.set(loss="chunked")
    if get("activation_offloading"):
        common.offloaded(reading, "activation_offloading")
    common.spread(get, reading, gpus)
    _before(get, reading, trainer, mapping if stated is None else stated)
    if trainer in OBJECTIVES and trainer != SUPERVISED:
        predicted = common.preference(
            reading, trainer, "trainer", reading.fields["micro_batch"], answers=True
        )
        if OBJECTIVES[trainer].generates:
            grpo.answers(get, reading, trainer, predicted=predicted)
    common.compiled(reading, get("torch_compile"), get("torch_compile_mode"))
    common.evaluation(reading, mapping)
    reading.pad(reading.fields)
    return reading


def _before(get: FileValues, reading: Reading, trainer: str, stated: Collection[str]) -> None:
    """What older versions do where nothing is stated: other defaults of memory's largest parts.

    TRL 0.22 of August 2025 began to checkpoint, 0.19 to compute under bf16, and 1.7 of June 2026 to compute the loss in
    chunks (trl/trainer/sft_config.py of these tags). transformers 5 began to load weights in the dtype of their files
    (PreTrainedModel.from_pretrained; fp32 before).
    """
    plain, older = trainer == "transformers", {}
    if not plain and not {"gradient_checkpointing", "activation_checkpointing"} & set(stated):
        older["gradient_checkpointing"] = False
    if reading.fields.get("loss") == "chunked" and "loss_type" not in stated:
        older["loss"] = "full"
    init = get("model_init_kwargs") or {}
    dtypes = {"dtype", "torch_dtype"} & (
        {*stated} | ({*init} if isinstance(init, Mapping) else set())
    )
    if not dtypes and not (get("load_in_4bit") or get("load_in_8bit")):
        half = next((name for name in ("bf16", "fp16") if name in stated and get(name)), None)
        older["precision"] = f"{half}-mixed" if half else "fp32"
    reading.older = {
        name: value for name, value in older.items() if value != reading.fields.get(name)
    }
    reading.older_is = "transformers before 5" if plain else "TRL before 1.7"


def _trainer(get: FileValues, named: str) -> str:
    """A file says by its keys alone which command it is for."""
    if named != "sft" or get("command"):
        return get("command", named)
    if "teacher_model_name_or_path" in get:
        return "distillation"
    if "num_generations" in get or "max_completion_length" in get:
        return "grpo"
    return (
        "dpo"
        if "precompute_ref_log_probs" in get or get("loss_type") in ("sigmoid", "ipo", "hinge")
        else "sft"
    )


def _precision(get: FileValues, reading: Reading, plain: bool) -> None:
    """TRL loads weights in float32 unless told, and computes under bf16 autocast."""
    init = get("model_init_kwargs") if isinstance(get("model_init_kwargs"), Mapping) else {}
    named = get("dtype") or get("torch_dtype") or init.get("dtype") or init.get("torch_dtype")
    weights = common.dtype(named) if named else ("bf16" if plain else "fp32")
    fp16 = bool(get("fp16"))
    bf16 = get("bf16", not fp16 and not plain)
    mixed = "bf16" if bf16 else "fp16" if fp16 else None
    if plain and not named:
        reading.notes.append("the dtype of the model's files is taken to be bf16")
    if get("load_in_4bit") or get("load_in_8bit"):
        reading.set(precision=weights or "bf16", autocast=mixed)
    else:
        common.precision(reading, weights or "bf16", mixed)


def _method(get: FileValues, reading: Reading, plain: bool) -> None:
    adapter = get("use_peft", False)
    reading.set(method="lora" if adapter else "full")
    if get("load_in_4bit"):
        common.quantized(
            reading,
            4,
            "load_in_4bit",
            adapter=adapter,
            double=get("use_bnb_nested_quant", False),
            type=get("bnb_4bit_quant_type", "nf4"),
            storage=common.dtype(get("bnb_4bit_quant_storage", "")),
        )
        if not plain:
            reading.set(
                adapter_precision="bf16"
            )  # sft_trainer.py: adapters of a quantized base are cast to bf16
    elif get("load_in_8bit"):
        common.quantized(reading, 8, "load_in_8bit", adapter=adapter)
    if adapter:
        targets = get("lora_target_modules")
        targets = targets[0] if isinstance(targets, list) and len(targets) == 1 else targets
        more = {
            "use_dora": get("use_dora"),
            "modules_to_save": get("lora_modules_to_save"),
            "target_parameters": get("lora_target_parameters"),
        }
        common.adapters(
            reading,
            rank=get("lora_r", 16),
            alpha=get("lora_alpha", 32),
            dropout=get("lora_dropout", 0.05),
            targets=targets,
            more=more,
        )
