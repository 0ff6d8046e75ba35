"""Commands of ms-swift and of Megatron-LM, in a script for the shell (will_it_fit/data/readers/swift.yaml).

``swift sft`` trains with transformers. ``megatron sft`` and ``pretrain_gpt.py`` train with Megatron-Core, whose code
nothing here runs: their sizes are read as those of transformers' plan and PyTorch's schedules, and each answer says so.
A script is read word by word and never run; a variable that the script itself sets is filled in.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from will_it_fit.common.errors import UserError
from will_it_fit.common.files import yaml_value
from will_it_fit.readers import common
from will_it_fit.readers.reading import EITHER_WAY, TOO_HIGH, TOO_LOW, Reading, Values, begin, checked, keys

TABLE = ("swift",)
COMMAND = "command"  # the key of a script's mapping that says which command it gives
_PROCESSES = ("NPROC_PER_NODE", "NNODES")
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
_WORDS = 128256  # of the tokenizer where a command names none: Llama 3's
_TRAINS = ("sft", "pt", "rlhf")  # what follows `swift` and `megatron`
_SUM = re.compile(r"\$\((?:\(|expr)\s*(\d+)\s*\\?([*/+-])\s*(\d+)\s*\)+")
_VARIABLE = re.compile(r"\$\{?(\w+)(?::-[^}]*)?\}?")


def command_of(path: Path) -> dict[str, Any]:
    """The first training command of a script: ``command``, its flags with underscores, and variables before it.

    Raises
    ------
    UserError
        If the script has no such command.
    """
    variables: dict[str, str] = {}
    text = re.sub(r"\\\s*\n", " ", path.read_text(encoding="utf-8"))
    for line in text.splitlines():
        try:
            words = shlex.split(_filled(line, variables), comments=True)
        except ValueError:  # a line of the shell's own grammar
            continue
        kind = _kind(words)
        if kind:
            before, flags = _before(words), _flags(words, path)
            own = {name: value for name, value in {**variables, **before}.items() if name in _PROCESSES}
            return {COMMAND: kind, **own, **flags}
        variables |= _before(words)
    raise UserError(
        "No command of ms-swift or Megatron is in this script.",
        where=path,
        allowed="`swift sft ...`, `megatron sft ...`, or `torchrun ... pretrain_gpt.py ...`, with its flags there",
        write="will-it-fit MODEL --method lora -s 2048",
    )


def _kind(words: list[str]) -> str | None:
    first = next((at for at, word in enumerate(words) if word.startswith("--")), 0)
    for at, word in enumerate(words):
        name = word.rpartition("/")[2]
        if word.endswith(tuple(f"swift/cli/{kind}.py" for kind in _TRAINS)):
            return "swift"
        if name == "pretrain_gpt.py" or (name in ("swift", "megatron") and at < first and words[at + 1] in _TRAINS):
            return name
    return None


def _before(words: list[str]) -> dict[str, str]:
    """``NAME=value`` before a command, or alone on a line."""
    found = {}
    for word in words:
        name, equals, value = word.removeprefix("export ").partition("=")
        if equals and name.isidentifier():
            found[name] = value
        elif word != "export":
            break
    return found


def _filled(line: str, variables: Mapping[str, str]) -> str:
    """A line with the script's own variables, and sums of two numbers worked out."""

    def worked_out(match: re.Match) -> str:
        left, right = int(match[1]), int(match[3])
        signs = {"*": left * right, "+": left + right, "-": left - right, "/": left // right if right else left}
        return str(signs[match[2]])

    return _SUM.sub(worked_out, _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), line))


def _flags(words: list[str], where: object) -> dict[str, Any]:
    """A command's flags; one without a value is true, one with several a list."""
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].replace("-", "_").partition("=")
            found[name] = [value] if equals else []
        elif name is not None:
            found[name].append(word)
    return {name: _value(values, where) for name, values in found.items()}


def _value(values: list[str], where: object) -> Any:
    read = [yaml_value(value, where) for value in values]
    return True if not read else read[0] if len(read) == 1 else read


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields of a command, with the tools' defaults."""
    kind = mapping[COMMAND]
    mapping = {name: value for name, value in mapping.items() if name != COMMAND}
    get, reading = begin(mapping, keys(*TABLE), file)
    megatron = kind != "swift"
    reading.set(model=_model(get, file))
    reading.set(
        sequence_length=get("max_length") or get("seq_length") or 2048,
        micro_batch=get("micro_batch_size" if megatron else "per_device_train_batch_size", 1),
        loop="trainer",
    )
    _method(get, reading, "lora" if kind == "swift" else "full")
    if megatron:
        _as_megatron(get, reading, _count(mapping, gpus))
    else:
        _as_trainer(get, reading, _count(mapping, gpus))
    return reading


def _count(mapping: Mapping[str, Any], gpus: int | None) -> int | None:
    """The command's number of processes."""
    each = mapping.get("NPROC_PER_NODE") or mapping.get("nproc_per_node")
    nodes = mapping.get("NNODES") or mapping.get("nnodes") or 1
    try:
        return gpus or (int(each) * int(nodes) if each else None)
    except (TypeError, ValueError):
        return None


def _model(get: Values, file: Path) -> Any:
    name, revision = get("model"), get("model_revision")
    if name:
        return f"{name}@{revision}" if revision else name
    sizes = {name: checked(name, get(name), file, "a whole number") for name in _SIZES}
    if sizes["num_layers"] is None or sizes["hidden_size"] is None or sizes["num_attention_heads"] is None:
        raise UserError(
            "The command names no model.", where=file, allowed="--model NAME; or --num-layers, --hidden-size and"
            " --num-attention-heads", write="--set model=Qwen/Qwen3-8B",
        )  # fmt: skip
    return {
        "model_type": "llama",
        "num_hidden_layers": sizes["num_layers"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["ffn_hidden_size"] or 4 * sizes["hidden_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_query_groups"] or sizes["num_attention_heads"],
        "vocab_size": sizes["vocab_size"] or _WORDS,
        "tie_word_embeddings": not get("untie_embeddings_and_output_weights"),
    }


def _method(get: Values, reading: Reading, usual: str) -> None:
    kind = str(get("tuner_type", get("train_type", usual)))
    reading.set(method="full" if kind == "full" else "lora")
    if kind == "full":
        return
    if get("quant_bits") or get("quant_method"):
        given = {"type": get("bnb_4bit_quant_type", "nf4"), "double": get("bnb_4bit_use_double_quant", True)}
        bits = get("quant_bits", 4)
        common.quantized(reading, bits, "quant_bits", adapter=True, **(given if bits == 4 else {}))
    common.adapters(
        reading, rank=get("lora_rank", 8), alpha=get("lora_alpha", 32), dropout=get("lora_dropout", 0.05),
        targets=get("target_modules", "all-linear"),
        more={"use_dora": get("use_dora"), "modules_to_save": get("modules_to_save")},
    )  # fmt: skip


def _as_trainer(get: Values, reading: Reading, gpus: int | None) -> None:
    """``swift sft``: transformers' Trainer."""
    reading.set(gradient_accumulation=get("gradient_accumulation_steps", 1))
    weights = common.dtype(get("torch_dtype", "bfloat16"))
    reading.set(
        precision=weights, autocast="fp16" if get("fp16") else "bf16" if get("bf16", weights == "bf16") else None
    )
    reading.set(gradient_checkpointing=bool(get("gradient_checkpointing", True)))
    if kernel := get("attn_impl"):
        common.attention(reading, "attn_impl", kernel)
    reading.pads = not (get("packing") or get("padding_free"))
    common.optimizer(reading, "optim", get("optim", "adamw_torch_fused"))
    if get("use_liger_kernel"):
        common.liger(reading)
    if get("deepspeed"):
        common.deepspeed(reading, get("deepspeed"), reading.file, gpus)
    elif get("fsdp"):
        common.fsdp(reading, {}, 2, gpus)
    elif (gpus or 1) > 1:
        common.parallel(reading, "ddp", gpus)
    reading.pad(reading.fields)


def _as_megatron(get: Values, reading: Reading, gpus: int | None) -> None:
    """Megatron-Core: bf16 weights, gradients summed in fp32, and fp32 weights beside the states."""
    half = "fp16" if get("fp16") else "bf16"
    reading.set(precision=f"{half}-mixed" if reading.fields["method"] == "full" else half, attention="sdpa")
    why = "Megatron keeps 16-bit weights and fp32 gradients beside fp32 weights; read as autocast over fp32 weights"
    if reading.fields["method"] == "full":
        reading.approximates("bf16", half, EITHER_WAY, why)
    reading.set(gradient_checkpointing=get("recompute_granularity") == "full", optimizer="adamw")
    if (name := str(get("optimizer", "adam"))) != "adam":
        common.optimizer(reading, "optimizer", name)
    tensor, pipeline = get("tensor_model_parallel_size", 1), get("pipeline_model_parallel_size", 1)
    expert = get("expert_model_parallel_size", 1)
    places = tensor * pipeline
    whole = get("global_batch_size")
    replicas = max(1, (gpus or places) // places)
    batches = max(1, whole // (replicas * reading.fields["micro_batch"])) if whole else pipeline
    reading.set(gradient_accumulation=batches)
    if expert > 1:
        why = "experts are divided among replicas, which is described with FSDP2 alone; read as whole"
        reading.approximates("expert_model_parallel_size", expert, TOO_HIGH, why)
    if places == 1:
        if replicas > 1:
            common.parallel(reading, "ddp", replicas)
        return
    parts: dict[str, Any] = {name: size for name, size in (("tensor", tensor), ("pipeline", pipeline)) if size > 1}
    virtual = get("num_layers_per_virtual_pipeline_stage") or get("virtual_pipeline_model_parallel_size")
    if virtual and pipeline > 1:
        parts["schedule"] = "interleaved"
        reading.notes.append("an interleaved pipeline is read as one with two stages on each GPU")
    if replicas > 1:
        reading.notes.append(f"{replicas} replicas of {places} GPUs: the answer is for one of them")
        why = "buffers of the exchange among replicas come on top"
        reading.approximates("NPROC_PER_NODE", gpus, TOO_LOW, why)
    common.parallel(reading, "none", places, **parts)
