"""Commands of Megatron: ms-swift's ``megatron sft``, and Megatron-LM's ``pretrain_gpt.py`` (its table: megatron.yaml).

Nothing here runs Megatron-Core. Its sizes are read as those of transformers' plan and PyTorch's schedules, and each
answer says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.readers import common
from dryfit.readers.reading import EITHER_WAY, TOO_HIGH, TOO_LOW, FileValues, Reading, begin, checked, keys
from dryfit.readers.shell import Command, options

TABLE = ("megatron",)
MARKS = (("tensor_model_parallel_size", "micro_batch_size"),)
_TRAINS = ("sft", "pt")
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
_WORDS = 128256  # of the tokenizer where a command names none: Llama 3's


def from_command(command: Command, script: Path) -> Mapping[str, Any] | None:
    """A command's flags with underscores, and its number of processes; None: Megatron does not train here."""
    words = command.words
    first = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    names = [word.rpartition("/")[2] for word in words]
    shortly = any(name == "megatron" and words[at + 1] in _TRAINS for at, name in enumerate(names[: first - 1]))
    if not shortly and "pretrain_gpt.py" not in names:
        return None
    settings = options(words, script)
    counts = {name.lower(): count for name in ("NPROC_PER_NODE", "NNODES") if (count := command.count(name))}
    return settings | counts


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields of a command, with Megatron's defaults."""
    get, reading = begin(mapping, keys(*TABLE), file)
    reading.set(model=_model(get, file))
    reading.set(
        sequence_length=get("max_length") or get("seq_length") or 2048,
        micro_batch=get("micro_batch_size", 1),
        loop="trainer",
    )
    _method(get, reading)
    _weights(get, reading)
    each = get("nproc_per_node")
    _mesh(get, reading, gpus or (each * get("nnodes", 1) if isinstance(each, int) else None))
    return reading


def _model(get: FileValues, file: Path) -> Any:
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


def _method(get: FileValues, reading: Reading) -> None:
    kind = str(get("tuner_type", get("train_type", "full")))
    reading.set(method="full" if kind == "full" else "lora")
    if kind != "full":
        common.adapters(
            reading, rank=get("lora_rank", 8), alpha=get("lora_alpha", 32), dropout=get("lora_dropout", 0.05),
            targets=get("target_modules", "all-linear"), more={"modules_to_save": get("modules_to_save")},
        )  # fmt: skip


def _weights(get: FileValues, reading: Reading) -> None:
    """16-bit weights, gradients summed in fp32, and fp32 weights beside the states."""
    half = "fp16" if get("fp16") else "bf16"
    full = reading.fields["method"] == "full"
    reading.set(precision=f"{half}-mixed" if full else half, attention="sdpa", optimizer="adamw")
    if full:
        why = "Megatron keeps 16-bit weights and fp32 gradients beside fp32 weights; read as autocast over fp32 weights"
        reading.approximates("bf16", half, EITHER_WAY, why)
    reading.set(gradient_checkpointing=get("recompute_granularity") == "full")
    if (name := str(get("optimizer", "adam"))) != "adam":
        common.optimizer(reading, "optimizer", name)


def _mesh(get: FileValues, reading: Reading, gpus: int | None) -> None:
    """Tensor and pipeline sizes; the replicas beside them are alike, and one is answered for."""
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
        reading.approximates("nproc_per_node", gpus, TOO_LOW, why)
    if tensor > 1:  # its loss is always taken on parts of the logits
        parts |= {"sequence_parallel": bool(get("sequence_parallel")), "loss_parallel": True}
    common.parallel(reading, "none", places, **parts)
