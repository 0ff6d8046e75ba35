"""ms-swift's commands and YAML files (dryfit/data/readers/ms-swift.yaml)."""

from collections.abc import Mapping
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.readers import common, grpo, unsloth
from dryfit.readers.launch import Launch
from dryfit.readers.reading import EITHER_WAY, TOO_HIGH, TOO_LOW, FileValues, Reading, begin, keys
from dryfit.readers.shell import Command, beside, options

TABLE = ("ms-swift", "transformers")
TRAINS = ("sft", "pt", "rlhf")
_PROGRAMS = ("swift", "megatron")
_WORKS = (
    *TRAINS,
    "infer",
    "export",
    "deploy",
    "rollout",
    "eval",
    "app",
    "sample",
    "web-ui",
    "merge-lora",
)
# `--rlhf_type` and the nearest objective; GKD and PPO generate as GRPO does.
_OBJECTIVES = {
    "dpo": "dpo",
    "orpo": "orpo",
    "simpo": "orpo",
    "cpo": "orpo",
    "kto": "kto",
    "rm": "reward",
    "grpo": "grpo",
    "ppo": "grpo",
    "gkd": "grpo",
}
# With full fine-tuning and LoRA alone: other kinds of adapters are read as LoRA.
_LIKE_LORA = ("lora", "adalora", "longlora", "lora_llm", "dora")
_MEGATRON = "Megatron-SWIFT divides layers otherwise than any strategy here: not described."
_ROW_TOKENS, _BATCH = (
    2048,
    16,
)  # where a file says nothing: `max_length` is the model's own; rows of an update
_UTILIZATION = 0.9
# What arguments were called before version 3 (docs/source_en/Instruction/ReleaseNote3.0.md; Liger's after it).
_BEFORE_3 = {
    "model_id_or_path": "model",
    "sft_type": "train_type",
    "quantization_bit": "quant_bits",
    "dtype": "torch_dtype",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "use_flash_attn": "attn_impl",
    "lora_target_modules": "target_modules",
    "template_type": "template",
    "bnb_4bit_comp_dtype": "bnb_4bit_compute_dtype",
    "check_model_is_latest": "check_model",
    "use_liger": "use_liger_kernel",
}
_VALUES_BEFORE_3 = {
    "torch_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "AUTO": None},
    "target_modules": {"ALL": "all-linear", "DEFAULT": None},
    "attn_impl": {True: "flash_attn", False: None},
    "quant_bits": {0: None},
}


def from_command(launch: Launch, command: Command, script: Path) -> Mapping[str, Any] | None:
    """The settings of a command that trains; None: ms-swift is not called.

    UserError: if it does other work, or is Megatron's.
    """
    words = command.words
    pairs = enumerate(pairwise(words))
    program = next(
        (place for place, (word, work) in pairs if word in _PROGRAMS and work in _WORKS), None
    )
    if program is None:
        return None
    tool, work = words[program], words[program + 1]
    if tool == "megatron" or work not in TRAINS:
        raise UserError(
            _MEGATRON if tool == "megatron" else "This command of ms-swift trains nothing.",
            where=script,
            found=f"{tool} {work}",
            allowed=", ".join(f"swift {name}" for name in TRAINS),
        )
    given = words[program + 2 :]
    settings = options(given, script)
    named = settings.pop("config", given[0] if given and not given[0].startswith("-") else None)
    if named and (path := beside(script, str(named))):
        settings = {**read_yaml(path), **settings}
    if work == "rlhf":
        settings.setdefault("rlhf_type", "dpo")
    if command.environment.get("USE_HF", "").lower() in ("1", "true"):
        settings.setdefault("use_hf", True)
    if count := command.count("NPROC_PER_NODE"):
        settings["nproc_per_node"] = count * (command.count("NNODES") or 1)
    return settings


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields, with ms-swift's defaults."""
    if "colocate_groups" in mapping or "micro_batch_size" in mapping:
        raise UserError(
            _MEGATRON, where=file, found="micro_batch_size", allowed="a file for `swift rlhf`"
        )
    mapping, renamed = _with_new_names(mapping)
    get, reading = begin(mapping, keys(*TABLE), file)
    if renamed:
        reading.notes.append(
            f"names of ms-swift before version 3 are read as those of today: {', '.join(renamed)}"
        )
    common.model(reading, get("model"), get("model_revision"))
    if not get("use_hf"):
        common.of_modelscope(reading, get("model"))
    gpus = gpus or get("nproc_per_node")
    rows, count = (
        get("per_device_train_batch_size", 1),
        max(1, (gpus or 1) // get("sequence_parallel_size", 1)),
    )
    reading.set(
        sequence_length=_row_tokens(get, reading),
        micro_batch=rows,
        gradient_accumulation=get("gradient_accumulation_steps", ceil(_BATCH / rows / count)),
    )
    _precision(get, reading)
    _method(get, reading)
    kwargs = get("gradient_checkpointing_kwargs") or {}
    reentrant = isinstance(kwargs, Mapping) and kwargs.get("use_reentrant")
    common.checkpointing(reading, get("gradient_checkpointing", True), reentrant)
    if kernel := get("attn_impl"):
        common.attention(reading, "attn_impl", kernel)
    reading.pads = not (get("packing") or get("padding_free"))
    if get("use_galore") and get("galore_optim_per_parameter"):
        why = "each gradient goes as soon as its parameter has stepped"
        reading.approximates("galore_optim_per_parameter", True, TOO_HIGH, why, "gradients")
    common.optimizer(
        reading, "optim", "galore_adamw" if get("use_galore") else get("optim", "adamw_torch_fused")
    )
    if (
        get("tuner_backend") == "unsloth"
    ):  # swift's prepare_model asks it for checkpointing without the host
        unsloth.take_the_step(reading, offloads=False)
        reading.approximates("tuner_backend", "unsloth", TOO_HIGH, unsloth.UPPER_END, "step")
    elif get("use_liger_kernel"):
        common.liger(reading)
    _parallel(get, reading, gpus)
    if kind := get("rlhf_type"):
        _objective(get, reading, str(kind), rows)
    common.compiled(reading, get("torch_compile"), get("torch_compile_mode"))
    reading.pad(reading.fields)
    return reading


def _with_new_names(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A file's settings by today's names, and which had another name; what is left to the default has no key."""
    renamed = [key for key in mapping if key in _BEFORE_3 and _BEFORE_3[key] not in mapping]
    settings = {key: value for key, value in mapping.items() if key not in renamed}
    for key in renamed:
        name, value = _BEFORE_3[key], mapping[key]
        known = _VALUES_BEFORE_3.get(name, {})
        value = known.get(value, value) if isinstance(value, (str, int)) else value
        if value is not None:
            settings[name] = value
    return settings, renamed


def _row_tokens(get: FileValues, reading: Reading) -> int:
    """Of prompt and answer: in a step that generates ``max_length`` is the prompt's alone."""
    length = get("max_length")
    answer = get("max_completion_length", get("response_length", grpo.ANSWER_TOKENS))
    generates = _OBJECTIVES.get(str(get("rlhf_type"))) == "grpo"
    if length is None:
        length = grpo.PROMPT_TOKENS if generates else _ROW_TOKENS
        what = "prompts have" if generates else "rows have"
        said = f"the file doesn't say how long rows are (max_length): {what} {length:,} tokens here"
        if generates:
            reading.notes.append(said)
        else:  # TemplateArguments takes the model's max_model_len
            why = f"{said}, and ms-swift cuts them at the model's own length"
            reading.approximates("max_length", None, TOO_LOW, why, "rows")
    most = get("vllm_max_model_len") if get("use_vllm") else None
    return min(length + answer, most or length + answer) if generates else length


def _precision(get: FileValues, reading: Reading) -> None:
    """``_init_mixed_precision``: bf16 weights train under bf16, others under fp16, unless the file says."""
    weights = common.dtype(get("torch_dtype", "bfloat16")) or "bf16"
    fp16, bf16 = get("fp16", weights != "bf16"), get("bf16", weights == "bf16")
    mixed = "bf16" if bf16 else "fp16" if fp16 else None
    common.precision(reading, weights, mixed)


def _method(get: FileValues, reading: Reading) -> None:
    kind = str(get("tuner_type", get("train_type", "lora")))
    reading.set(method="full" if kind == "full" else "lora")
    if kind not in ("full", "lora"):
        why = "read as LoRA" if kind in _LIKE_LORA else "adapters of this kind are read as LoRA"
        reading.approximates("tuner_type", kind, EITHER_WAY, why)
    if bits := get("quant_bits"):
        method = str(get("quant_method", "bnb"))
        if method != "bnb":
            reading.approximates("quant_method", method, EITHER_WAY, "read as bitsandbytes'")
        common.quantized(
            reading,
            8 if bits == 8 else 4,
            "quant_bits",
            adapter=kind != "full",
            type=get("bnb_4bit_quant_type", "nf4"),
            double=get("bnb_4bit_use_double_quant", True),
            storage=common.dtype(get("bnb_4bit_quant_storage", "")),
        )
    if kind != "full":
        more = {name: get(name) for name in ("use_dora", "modules_to_save", "target_parameters")}
        common.adapters(
            reading,
            rank=get("lora_rank", 8),
            alpha=get("lora_alpha", 32),
            dropout=get("lora_dropout", 0.05),
            targets=get("target_modules", "all-linear"),
            more=more,
        )


def _parallel(get: FileValues, reading: Reading, gpus: int | None) -> None:
    common.spread(get, reading, gpus)
    parts = get("sequence_parallel_size", 1)
    divided = (reading.fields.get("parallel") or {}).get(
        "strategy"
    ) == "ddp"  # without DeepSpeed's own Ulysses
    if parts > 1 and divided:
        whole = reading.fields["sequence_length"]
        reading.set(sequence_length=ceil(whole / parts))
        reading.notes.append(
            f"{parts} GPUs share a row of {whole:,} tokens; counted as rows of their part"
        )
        return
    common.ulysses(reading, "sequence_parallel_size", parts, "ms-swift's own")


def _objective(get: FileValues, reading: Reading, kind: str, rows: int) -> None:
    answers = kind == "grpo"
    predicted = common.preference(
        reading, _OBJECTIVES.get(kind, "grpo"), "rlhf_type", rows, answers=answers
    )
    if kind == "ppo":
        reading.approximates(
            "rlhf_type", kind, TOO_LOW, "a value model with its optimizer's states lies beside"
        )
    if kind == "gkd" and "teacher_model" in reading.own:
        reading.approximates(
            "rlhf_type", kind, TOO_LOW, "the teacher's logits lie beside the student's", "logits"
        )
    if not answers:
        return
    grpo.answers(_in_trls_words(get), reading, predicted=predicted)
    if predicted and not get("use_liger_kernel"):
        why = "ms-swift keeps the logits of answers whole, and this is TRL's step in tiles"
        reading.approximates("rlhf_type", kind, TOO_LOW, why, "logits")
    generation = reading.fields.get("generation") or {}
    if generation.get("engine") == "vllm":
        if generation["mode"] == "colocate":
            generation["sleep_level"] = get("sleep_level", 0)
        generation["cuda_graphs"] = not get("vllm_enforce_eager", False)
        generation["completions"] = get("vllm_max_num_seqs")
        if get("vllm_enable_lora") and reading.fields["method"] != "full":
            generation["lora_slots"] = 1


def _in_trls_words(get: FileValues) -> grpo.Get:
    own = {"vllm_max_model_length": "vllm_max_model_len"}
    defaults = {"beta": 0.04, "vllm_gpu_memory_utilization": _UTILIZATION}

    def value(name: str, default: Any = None) -> Any:
        if name == "vllm_enable_sleep_mode":
            return bool(get("sleep_level"))
        if name == "max_completion_length":
            return get(name, get("response_length", default))
        return get(own.get(name, name), defaults.get(name, default))

    return value
