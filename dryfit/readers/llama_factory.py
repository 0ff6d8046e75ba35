"""LLaMA-Factory's YAML files, those of `examples/v1` too (dryfit/data/readers/llama-factory.yaml)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.readers import common, unsloth
from dryfit.readers.launch import Launch, visible_gpus
from dryfit.readers.reading import EITHER_WAY, TOO_HIGH, TOO_LOW, FileValues, Reading, begin, keys
from dryfit.readers.shell import Command, with_file

TABLE = ("llama-factory", "transformers")
_OPTIMIZER_FLAGS = {
    "use_muon": "muon",
    "use_galore": "galore_adamw",
    "use_apollo": "apollo_adamw",
    "use_adam_mini": "adam_mini",
}
_OBJECTIVES = {"dpo": "dpo", "kto": "kto", "rm": "reward", "ppo": "grpo"}
_COMMANDS = ("llamafactory-cli", "lmf")
_PROGRAMS = ("train.py", "train_bash.py", "run_exp.py", "llamafactory.launcher")


def from_command(launch: Launch, command: Command, script: Path) -> Mapping[str, Any] | None:
    """The settings of a command that trains, of its file and of its own; None: LLaMA-Factory is not called.

    UserError: if it does other work, or names a file that isn't there.
    """
    words, name = launch.words, launch.program.rpartition("/")[2]
    if name in _COMMANDS:
        if words[1:2] != ["train"]:
            raise UserError(
                "This command of LLaMA-Factory trains nothing.",
                where=script,
                found=" ".join(words[:2]),
                allowed="llamafactory-cli train",
            )
        given = words[2:]
    elif name in _PROGRAMS and any(
        word.partition("=")[0] in ("--stage", "--finetuning_type") for word in words
    ):
        given = words[1:]
    else:
        return None
    settings = with_file(given, script)
    count = command.count("NPROC_PER_NODE") or visible_gpus(command.environment)
    if name in _COMMANDS and count:
        launch.processes = count * (command.count("NNODES") or 1)
    if command.environment.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true"):
        settings |= {"model_hub": "modelscope"}
    return settings


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields of a file, with LLaMA-Factory's defaults."""
    get, reading = begin(mapping, keys(*TABLE), file)
    if "model_name_or_path" not in get:
        _newer(get, reading, gpus)
        return reading
    _refuse_other_work(mapping, file)
    name = get("model_name_or_path")
    if get("model_hub") == "modelscope":
        common.of_modelscope(reading, name)
    common.model(reading, name, get("model_revision"))
    reading.set(
        sequence_length=get("cutoff_len", 2048),
        micro_batch=get("per_device_train_batch_size", 8),
        gradient_accumulation=get("gradient_accumulation_steps", 1),
    )
    common.spread(get, reading, gpus)
    _method(get, reading)
    _precision(get, reading)
    strategy = reading.fields.get("parallel", {}).get("strategy")
    reentrant = get("use_reentrant_gc", True) and strategy != "fsdp2"
    common.checkpointing(reading, not get("disable_gradient_checkpointing"), reentrant)
    common.attention(reading, "flash_attn", get("flash_attn", "auto"))
    reading.pads = not get("packing", get("stage", "sft") == "pt")
    flag = next((name for key, name in _OPTIMIZER_FLAGS.items() if get(key)), None)
    common.optimizer(reading, "optim", flag or get("optim", "adamw_torch_fused"))
    if get("enable_liger_kernel"):
        common.liger(reading)
    elif get("use_unsloth"):
        unsloth.take_the_step(
            reading, offloads=True
        )  # model/model_utils/unsloth.py asks for its checkpointing
        reading.approximates("use_unsloth", True, TOO_HIGH, unsloth.UPPER_END, "step")
    if get("moe_aux_loss_coef"):
        common.router_loss(reading, "moe_aux_loss_coef")
    stage = get("stage", "sft")
    if stage in _OBJECTIVES:
        objective = "orpo" if get("pref_loss") in ("orpo", "simpo") else _OBJECTIVES[stage]
        common.preference(reading, objective, "stage", reading.fields["micro_batch"])
    common.compiled(reading, get("torch_compile"), get("torch_compile_mode"))
    common.evaluation(reading, mapping)
    reading.pad(reading.fields)
    return reading


def _refuse_other_work(mapping: Mapping[str, Any], file: Path) -> None:
    """Files that train nothing: merging, exporting, chatting."""
    trains = (
        mapping.get("do_train")
        or "per_device_train_batch_size" in mapping
        or "finetuning_type" in mapping
    )
    other = "export_dir" in mapping or "infer_backend" in mapping or mapping.get("do_predict")
    if other and not (mapping.get("do_train") or "per_device_train_batch_size" in mapping):
        work = next(
            key for key in ("export_dir", "do_predict", "infer_backend") if mapping.get(key)
        )
        raise UserError(
            "This file of LLaMA-Factory trains nothing.",
            where=file,
            found=f"{work}: {mapping[work]}" + ("" if trains else ", no do_train"),
            allowed="a file with do_train: true; for serving a model: `dryfit serve` and its name",
            write="dryfit serve " + str(mapping.get("model_name_or_path", "MODEL")),
        )


def _method(get: FileValues, reading: Reading) -> None:
    kind = get("finetuning_type", "lora")
    reading.set(method="full" if kind in ("full", "freeze") else "lora")
    if kind == "freeze":
        reading.approximates(
            "finetuning_type",
            kind,
            TOO_HIGH,
            "only some layers are trained; read as full fine-tuning",
            "frozen",
        )
    if get("quantization_bit"):
        bits, method = get("quantization_bit"), get("quantization_method", "bnb")
        if method not in ("bnb", "bitsandbytes"):
            reading.approximates(
                "quantization_method", method, EITHER_WAY, "read as bitsandbytes' NF4"
            )
        common.quantized(
            reading,
            8 if bits == 8 else 4,
            "quantization_bit",
            adapter=kind in ("lora", "oft"),
            double=get("double_quantization", True),
            type=get("quantization_type", "nf4"),
            storage=_compute(get),
        )
    if kind == "oft":
        block = {"oft_block_size": get("oft_block_size", 32), "r": get("oft_rank", 0)}
        targets = (
            "all-linear" if get("oft_target", "all") == "all" else get("oft_target").split(",")
        )
        reading.set(
            adapter={
                "peft_type": "OFT",
                **block,
                "module_dropout": get("module_dropout", 0.0),
                "target_modules": targets,
            }
        )
    elif kind == "lora":
        saved = get("additional_target")
        common.adapters(
            reading,
            rank=get("lora_rank", 8),
            alpha=get("lora_alpha"),
            dropout=get("lora_dropout", 0.0),
            targets=get("lora_target", "all"),
            more={
                "use_dora": get("use_dora"),
                "modules_to_save": saved.split(",") if isinstance(saved, str) else saved,
            },
        )


def _compute(get: FileValues) -> str:
    if get("bf16") or get("pure_bf16"):
        return "bf16"
    return (
        "fp16" if get("fp16") else "bf16"
    )  # as the model's own configuration says, which is bf16 nearly always


def _precision(get: FileValues, reading: Reading) -> None:
    """What is trained is cast to fp32 (``init_adapter``), but with pure_bf16; the rest has the compute dtype."""
    compute = _compute(get)
    pure, method = get("pure_bf16", False), reading.fields["method"]
    mixed = compute if (get("bf16") or get("fp16")) and not pure else None
    if not (pure or mixed):
        trained = "what is trained" if method == "full" else "adapters"
        reading.notes.append(
            f"the file sets none of bf16, fp16 and pure_bf16: LLaMA-Factory keeps {trained} in fp32"
        )
    zero3 = reading.fields.get("parallel", {}).get("strategy") == "zero3"
    if zero3 and not mixed and method != "qlora":
        # deepspeed.zero.Init takes the dtype from DeepSpeed's configuration, whose `bf16` follows the Trainer's.
        note = "ZeRO-3 divides the weights as they are made, in fp32 unless `bf16` is set: not by `pure_bf16`"
        reading.notes.extend([note] if pure else [])
        reading.set(precision="fp32")
        return
    if method == "full":
        reading.set(precision=compute if pure else f"{compute}-mixed" if mixed else "fp32")
        return
    reading.set(precision=compute, autocast=mixed)
    if pure:
        reading.set(adapter_precision="base")
    elif not mixed:
        reading.approximates(
            "bf16", False, TOO_LOW, "adapters in fp32 without autocast: their products are cast"
        )
        reading.set(autocast=compute)


def _newer(get: FileValues, reading: Reading, gpus: int | None) -> None:
    """The files of `examples/v1`: a model, and configurations of what is done with it."""
    peft, quantization = get("peft_config") or {}, get("quant_config") or {}
    distributed, kernels = get("dist_config") or {}, get("kernel_config") or {}
    reading.set(
        model=get("model"),
        sequence_length=get("cutoff_len", 2048),
        micro_batch=get("micro_batch_size", 1),
        method="lora" if peft.get("name") == "lora" else "full",
        precision="bf16",
        gradient_checkpointing=True,
        optimizer="adamw_fused",
        attention="flash" if "flash" in str(get("flash_attn", "")) else "sdpa",
    )
    if peft.get("name") == "freeze":
        why = "only some layers are trained; read as full fine-tuning"
        reading.approximates("peft_config.name", "freeze", TOO_HIGH, why, "frozen")
    elif peft:
        common.adapters(
            reading,
            rank=peft.get("r", 8),
            alpha=peft.get("lora_alpha"),
            dropout=peft.get("lora_dropout", 0.0),
            targets=peft.get("target_modules", "all"),
        )
    if quantization.get("quantization_bit"):
        bits = quantization["quantization_bit"]
        common.quantized(
            reading, bits, "quant_config", adapter=bool(peft), double=True, storage="bf16"
        )
    name = str(distributed.get("name", ""))
    if name.startswith("fsdp"):
        common.parallel(reading, "fsdp2", gpus)
    elif name == "deepspeed":
        common.deepspeed(
            reading,
            distributed["config_file"],
            reading.file.parent,
            gpus,
            "dist_config.config_file",
        )
    if "liger" in str(kernels.get("name", "")):
        common.liger(reading)
    if get("optim_config"):
        common.optimizer(reading, "optim_config", get("optim_config").get("name", "adamw_torch"))
