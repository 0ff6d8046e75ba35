"""torchtune's configurations (dryfit/data/readers/torchtune.yaml): its recipes that fine-tune, with LoRA or fully.

A file says which models and settings, and not which recipe; the recipe stands in the command of its comments. Files of
recipes whose step isn't described are refused by a key that only they have.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_yaml
from dryfit.readers import common
from dryfit.readers.launch import Launch, behind
from dryfit.readers.reading import (
    EITHER_WAY,
    TABLES,
    TOO_HIGH,
    FileValues,
    Reading,
    begin,
    checked,
    keys,
)
from dryfit.readers.shell import Command, with_file
from dryfit.scenario.hub import MODELS, repository_of
from dryfit.scenario.model import size

TABLE = ("torchtune",)
_ROW_TOKENS = 2048  # where a file cuts no rows off
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_WHOLE = (
    "batch_size",
    "gradient_accumulation_steps",
    "model.lora_rank",
    "model.lora_alpha",
    "tokenizer.max_seq_len",
    "dataset.max_seq_len",
    "tensor_parallel_dim",
    "context_parallel_dim",
    "data_parallel_replicate_dim",
    "data_parallel_shard_dim",
)
_DISTRIBUTED = (
    "fsdp_cpu_offload",
    "fsdp.cpu_offload",
    "fsdp_reshard_after_forward",
    "tensor_parallel_dim",
    "context_parallel_dim",
    "data_parallel_shard_dim",
    "data_parallel_replicate_dim",
    "custom_sharded_layers",
)


def from_command(launch: Launch, command: Command, script: Path) -> Mapping[str, Any] | None:
    """The settings of ``tune run RECIPE --config FILE``; None: torchtune is not called."""
    words = launch.words
    if words[:2] != ["tune", "run"]:
        return None
    started = behind(words[2:], script, "nproc_per_node", "nnodes")
    launch.processes = started.processes
    return with_file(started.words[1:], script, ": torchtune's own by `tune cp`")


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields, with the defaults of torchtune's recipes and builders.

    UserError: if the file is another recipe's, or its model isn't known here.
    """
    table = read_yaml(TABLES / "torchtune.yaml")
    flat = {
        key: _resolved(value, mapping) for key, value in common.dotted(mapping)
    }  # dotted overrides come last, and win
    for key in _WHOLE:
        flat |= {key: checked(key, flat[key], file, "a whole number")} if key in flat else {}
    _refuse_other_recipes(flat, table, file)
    get, reading = begin(flat, keys(*TABLE), file)
    builder = _model(get, reading, table)
    _refuse_unknown_arguments(reading)
    _rows(get, reading)
    _method(get, reading, builder)
    _precision(get, reading)
    reading.set(
        gradient_checkpointing=bool(get("enable_activation_checkpointing", False)),
        attention="eager"
        if builder.startswith("gemma2")
        else "sdpa",  # gemma2/_attention.py: scores in memory
        loop="trainer",  # the recipes delete the logits before the backward pass
    )
    _optimizer(get, reading, table)
    _parallel(get, reading, gpus)
    _loss(get, reading)
    if get("enable_activation_offloading"):
        common.offloaded(reading, "enable_activation_offloading")
    compiled = get("compile.model", False) if "compile.model" in flat else get("compile")
    common.compiled(reading, compiled, None, layers=True, key="compile")
    why = "torchtune's own layers are read as transformers' of the same sizes"
    reading.approximates("model._component_", get("model._component_"), EITHER_WAY, why)
    return reading


def _resolved(value: Any, mapping: Mapping[str, Any]) -> Any:
    """A value that stands elsewhere in the file: OmegaConf's ``${batch_size}``."""
    for _ in range(4):
        named = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if named is None:
            return value
        value = dict(common.dotted(mapping)).get(named[1])
    return value


def _refuse_other_recipes(flat: Mapping[str, Any], table: Mapping[str, Any], file: Path) -> None:
    trains = "optimizer._component_" in flat or "training.optimizer._component_" in flat
    found = next((key for key in table["refused"] if flat.get(key) is not None), None)
    if trains and found:
        raise UserError(
            table["refused"][found],
            where=f"{file}: {found}",
            found=flat[found],
            allowed="a file of full_finetune_*, lora_finetune_* or *_dpo_*",
        )
    if not trains:
        works = {"tasks": "evaluates", "prompt": "generates", "quantizer": "quantizes"}
        work = next(
            (word for key, word in works.items() if any(k.partition(".")[0] == key for k in flat)),
            None,
        )
        raise UserError(
            f"This file of torchtune's {f'{work}, and ' if work else ''}trains nothing.",
            where=file,
            found="no optimizer._component_",
            allowed="a file of full_finetune_*, lora_finetune_* or *_dpo_*",
        )


def _model(get: FileValues, reading: Reading, table: Mapping[str, Any]) -> str:
    """Set the model; the builder's name without ``lora_`` and ``qlora_``."""
    component = checked("model._component_", get("model._component_"), reading.file, "text") or ""
    where = f"{reading.file}: model._component_"
    builder = re.sub(r"^q?lora_", "", component.rpartition(".")[2])
    for kind, why in table["no_decoders"].items():
        if kind in component:
            raise UserError(why, where=where, found=component, allowed="a builder of a decoder")
    if builder in table["builders"]:
        given = {
            name: get(f"model.{name}") for name in table["arguments"] if f"model.{name}" in get
        }
        kind = table["builders"][builder]
    elif builder in table["sizes"]:
        given, kind = table["sizes"][builder], "llama"
    elif builder in table["models"] and component.startswith("torchtune."):
        reading.set(model=table["models"][builder])
        return builder
    else:
        raise UserError(
            "torchtune's builder of this model is not known here.",
            where=where,
            found=component or None,
            allowed="--set model=NAME with a known builder's file; known: "
            + ", ".join([*table["models"], *table["sizes"], *table["builders"]]),
        )
    needed = [name for name in list(table["arguments"])[:6] if name not in given]
    if needed:
        raise UserError(
            f"The builder `{builder}` needs the sizes of its model.",
            where=where,
            found=component,
            allowed=", ".join(needed),
            write=f"{needed[0]}: ...",
        )
    sizes = {table["arguments"][name]: _number(value) for name, value in given.items()}
    reading.set(
        model={"model_type": kind, "tie_word_embeddings": False, **sizes}, model_name=builder
    )
    return builder


def _number(value: Any) -> Any:
    """YAML reads `1e-5` as text."""
    return (
        float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value) else value
    )


def _refuse_unknown_arguments(reading: Reading) -> None:
    """A builder's argument decides what the model is: none may be unknown."""
    for key, near in reading.unknown.items():
        if key.startswith("model."):
            raise UserError(
                "The model's builder gets an argument that is not known here.",
                where=f"{reading.file}: {key}",
                found=reading.own[key],
                allowed=", ".join(
                    one for one in keys(*TABLE).understood if one.startswith("model.")
                ),
                write=f"{near}: ..." if near else None,
            )


def _rows(get: FileValues, reading: Reading) -> None:
    length = get("tokenizer.max_seq_len", get("dataset.max_seq_len"))
    if length is None:
        reading.notes.append(
            f"the file cuts no rows off (tokenizer.max_seq_len: null): the longest has {_ROW_TOKENS:,} tokens here;"
            " -s says how many yours has"
        )
    reading.set(
        sequence_length=length or _ROW_TOKENS,
        micro_batch=get("batch_size", 1),
        gradient_accumulation=get("gradient_accumulation_steps", 1),
    )
    if get("dataset.packed") or get("packed"):
        why = "a packed row's flex attention is read as causal attention over the whole row"
        reading.approximates("dataset.packed", True, EITHER_WAY, why)


def _method(get: FileValues, reading: Reading, builder: str) -> None:
    name = str(get("model._component_")).rpartition(".")[2]
    adapter = name.startswith(("lora_", "qlora_"))
    reading.set(method="lora" if adapter else "full")
    if not adapter:
        return
    if name.startswith("qlora_") or get("model.quantize_base"):
        # modules/low_precision: torchao's NF4, scales quantized too, unpacked to the weights' dtype in both passes
        common.quantized(reading, 4, "model.quantize_base", adapter=True, double=True, type="nf4")
        why = "torchao's NF4 is read as bitsandbytes', which packs as much"
        reading.approximates("model.quantize_base", True, EITHER_WAY, why)
    chosen = checked(
        "model.lora_attn_modules",
        get("model.lora_attn_modules", []),
        reading.file,
        "text, or a list of texts",
    )
    targets = [_ATTENTION.get(target, target) for target in chosen]
    targets += _MLP if get("model.apply_lora_to_mlp") else ()
    targets += ["lm_head"] if get("model.apply_lora_to_output") else []
    common.adapters(
        reading,
        rank=get("model.lora_rank", 8),
        alpha=get("model.lora_alpha", 16),
        dropout=get("model.lora_dropout", 0.0),
        targets=targets,
        more={"use_dora": get("model.use_dora")},
    )


def _precision(get: FileValues, reading: Reading) -> None:
    """One dtype for weights, adapters, gradients and states: torchtune takes no autocast, and refuses fp16."""
    weights = common.dtype(get("dtype", "bf16"))
    if weights not in ("bf16", "fp32"):
        raise UserError(
            "torchtune's recipes train in bf16 or fp32.",
            where=f"{reading.file}: dtype",
            found=get("dtype"),
            allowed="bf16, fp32",
            write="dtype: bf16",
        )
    reading.set(precision=weights)
    if reading.fields["method"] != "full":
        reading.set(adapter_precision="base")


def _optimizer(get: FileValues, reading: Reading, table: Mapping[str, Any]) -> None:
    component = str(get("optimizer._component_"))
    name = table["optimizers"].get(component, component)
    if name == "adamw_torch" and get("optimizer.fused"):
        name = "adamw_torch_fused"
    common.optimizer(reading, "optimizer._component_", name)
    if component.endswith("CPUOffloadOptimizer"):
        why = "optimizer states lie on the host"
        reading.approximates("optimizer._component_", component, TOO_HIGH, why, "states")


def _parallel(get: FileValues, reading: Reading, gpus: int | None) -> None:
    """FSDP2 where several GPUs are asked about, or the file or the command in its comments divides."""
    started = _command(reading.file)
    divides = any(key in get for key in _DISTRIBUTED) or "distributed" in started
    if gpus is None and not divides:
        return
    count = gpus
    if gpus is None and (named := re.search(r"--nproc[_-]per[_-]node[ =](\d+)", started)):
        nodes = re.search(r"--nnodes[ =](\d+)", started)
        count = int(named[1]) * (int(nodes[1]) if nodes else 1)
        if count > 1:
            reading.notes.append(
                f"the command in its comments starts {count} processes (--gpu 4x80GiB says four)"
            )
    offload = get("fsdp_cpu_offload", get("fsdp.cpu_offload"))
    parts = {
        "reshard_after_forward": get("fsdp_reshard_after_forward", True),
        "offload": "cpu" if offload else "none",
    }
    common.parallel(reading, "fsdp2", count, **parts)
    names = {
        "replicate": "data_parallel_replicate_dim",
        "tensor": "tensor_parallel_dim",
        "context": "context_parallel_dim",
    }
    sizes = {axis: get(key, 1) for axis, key in names.items()}
    divided = next((names[axis] for axis, size in sizes.items() if size > 1), "")
    common.axes(reading, divided, sizes, count, max(get("data_parallel_shard_dim", 1), 1))
    if sizes["tensor"] > 1:
        why = "torchtune's plan for tensor parallel is read as transformers'"
        reading.approximates("tensor_parallel_dim", sizes["tensor"], EITHER_WAY, why)
    if reading.fields.get("quantization"):  # packed weights are sharded as they lie
        reading.set(
            quantization={**reading.fields["quantization"], "storage": reading.fields["precision"]}
        )


def _command(file: Path) -> str:
    """The command that the file's comments start it with, where they tell it; "": none."""
    if not file.is_file():
        return ""
    text = re.sub(r"\\\n#", " ", file.read_text(encoding="utf-8"))
    lines = (line for line in text.splitlines() if line.startswith("#") and "tune run" in line)
    return next((line for line in lines if "--config" in line), "")


def _loss(get: FileValues, reading: Reading) -> None:
    name = str(get("loss._component_", "")).rpartition(".")[2]
    if name == "DPOLoss":
        common.preference(reading, "dpo", "loss._component_", reading.fields["micro_batch"])
    elif name in ("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss"):
        # modules/loss/cross_entropy_loss.py: each chunk keeps its log-probabilities in fp32 for the backward pass
        why = "the loss in chunks keeps fp32 probabilities alone; read as one over all scores"
        reading.approximates("loss._component_", name, TOO_HIGH, why, "logits")
    elif name not in ("CrossEntropyLoss", ""):
        reading.approximates(
            "loss._component_", name, EITHER_WAY, "this loss is read as cross-entropy"
        )


# Sizes that tell the builders apart, by torchtune's names.
_ARGUMENTS = ("embed_dim", "intermediate_dim", "num_heads", "num_layers", "vocab_size")


def named_in_a_file(model: Mapping[str, Any], name: str, form: Mapping[str, Any]) -> dict[str, Any]:
    """What a file names for a model: a builder of its sizes, or its family's with the sizes as arguments.

    Parameters
    ----------
    name
        The model as it was asked for, a folder or a name.
    form
        torchtune's part of ``data/writers.yaml``, with its families and tokenizers.

    Raises
    ------
    UserError
        If torchtune has no builder for it.
    """
    table = read_yaml(TABLES / "torchtune.yaml")
    theirs = [table["arguments"][argument] for argument in _ARGUMENTS]

    def sizes(of: Mapping[str, Any]) -> list[Any]:
        groups = size(of, "num_key_value_heads") or size(of, "num_attention_heads")
        return [of["model_type"], groups, *(size(of, one) for one in theirs)]

    known = [
        builder
        for builder, same in table["models"].items()
        if builder.partition("_")[0] in form["families"]
        and sizes(model) == sizes(read_json(MODELS / f"{same}.json"))
    ]
    known += [
        builder
        for builder, given in table["sizes"].items()
        if builder.startswith(model["model_type"])
        and sizes(model)[2:] == [given[one] for one in _ARGUMENTS]
    ]
    kind = "instruct" if "instruct" in name.lower() else "base"
    builder = next((one for one in known if one.endswith(kind)), known[0] if known else "")
    module = next(
        (one for one in sorted(form["families"], key=len, reverse=True) if builder.startswith(one)),
        "",
    )
    arguments = ""
    if not builder:
        module = {kind: one for one, kind in table["builders"].items()}.get(model["model_type"], "")
        head = size(model, "hidden_size") // size(model, "num_attention_heads")
        if (
            not module
            or model.get("tie_word_embeddings")
            or model.get("head_dim") not in (None, head)
        ):
            raise UserError(
                "torchtune has no builder for this model.",
                where="--for",
                found="torchtune",
                allowed=f"another tool; or a model of torchtune's: {', '.join(sorted(set(table['models'].values())))}",
                field="--for",
                change={"--for": "axolotl"},
            )
        builder = module
        given = {one: size(model, own) for one, own in table["arguments"].items()}
        given["num_kv_heads"] = given["num_kv_heads"] or given["num_heads"]
        arguments = "".join(
            f"  {one}: {value}\n" for one, value in given.items() if value is not None
        )
    tokenizer, files = form["tokenizers"][form["families"][module]["tokenizer"]]
    folder = name if Path(name).is_dir() else f"models/{repository_of(name).rpartition('/')[2]}"
    return {
        "builder": builder,
        "module": module,
        "arguments": arguments,
        "folder": folder,
        "tokenizer": tokenizer,
        "tokenizer_files": "\n".join(f"  {key}: {folder}/{file}" for key, file in files.items()),
        "kind": form["families"][module]["checkpoint"],
    }
