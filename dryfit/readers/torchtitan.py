"""torchtitan's files: TOML until February 2026, and the functions of a ``config_registry.py`` after it.

``dryfit/data/readers/torchtitan.yaml`` says what each key means, and which models its flavors are. A registry is
read as a syntax tree and never run: ``FILE.py:llama3_8b`` names one of its functions. Either way a file becomes keys
such as ``training.seq_len``, and the rest is one.
"""

import ast
import operator
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.readers import common
from dryfit.readers.reading import (
    EITHER_WAY,
    TABLES,
    TOO_HIGH,
    TOO_LOW,
    FileValues,
    Reading,
    begin,
    checked,
    keys,
)

TABLE = ("torchtitan",)
NODE = 8  # the GPUs of a machine, where a file shards over as many as there are
_SCHEDULES = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "interleaved1f1b": "interleaved",
    "interleavedzerobubble": "zero_bubble",
}


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields of a TOML file, with torchtitan's defaults."""
    return _read(dict(common.dotted(mapping)), file, gpus)


def _read(flat: Mapping[str, Any], file: Path, gpus: int | None) -> Reading:
    get, reading = begin(flat, keys(*TABLE), file)
    reading.set(model=_model(get, file))
    degrees = _Degrees(get, file)
    _rows(get, reading, degrees)
    weights = common.dtype(get("training.dtype", "float32"))
    computed = common.dtype(get("training.mixed_precision_param", "bfloat16"))
    reading.set(
        precision="bf16-mixed" if (weights, computed) == ("fp32", "bf16") else weights,
        method="full",
    )
    _parallel(get, reading, degrees, gpus)
    _checkpointing(get, reading)
    usual = "foreach" if "training.batch_size" in get else "fused"  # until 2025
    fused = get("optimizer.fused", get("optimizer.implementation", usual) == "fused")
    name = str(get("optimizer.name", "AdamW")).lower()
    common.optimizer(
        reading, "optimizer.name", f"{name}_torch_fused" if name == "adamw" and fused else name
    )
    reading.set(loop="trainer", attention="sdpa")
    if get("loss.kind") == "chunked":
        if reading.fields.get("parallel", {}).get("strategy", "none") in ("none", "ddp"):
            reading.set(loss="chunked")
        else:
            why = (
                "the loss is taken in chunks outside the forward pass; read as one over all scores"
            )
            reading.approximates("loss.kind", "chunked", TOO_HIGH, why, "logits")
    _eight_bits(get, reading)
    common.compiled(reading, get("training.compile") or get("compile.enable"), None, layers=True)
    return reading


def _model(get: FileValues, file: Path) -> Any:
    known = read_yaml(TABLES / "torchtitan.yaml")["models"]
    name, flavor = get("model.name", "llama3"), get("model.flavor", "debugmodel")
    if (found := known.get(f"{name} {flavor}")) is None:
        own = [words.partition(" ")[2] for words in known if words.startswith(f"{name} ")]
        raise UserError(
            "No model here has the sizes of this flavor of torchtitan's.",
            where=f"{file}: model.flavor",
            found=f"{name} {flavor}",
            allowed=", ".join(own or known),
            write=f'flavor = "{own[0]}"' if own else "--set model=NAME",
        )
    return found


class _Degrees:
    """How a file divides: what its keys say, by the names of ``parallel``; ``shard`` -1 for the rest of the GPUs."""

    def __init__(self, get: FileValues, file: Path) -> None:
        def degree(key: str, *sections: str, default: int = 1) -> int:
            for section in sections:
                name = f"{section}.{key}"
                if name in get:
                    return checked(name, get(name), file, "a whole number")
            return default

        old = degree("data_parallel_degree", "training", default=-1)
        self.shard = degree("data_parallel_shard_degree", "parallelism", "training", default=old)
        self.replicate = degree("data_parallel_replicate_degree", "parallelism", "training")
        self.tensor = degree("tensor_parallel_degree", "parallelism", "training")
        self.context = degree("context_parallel_degree", "parallelism", "experimental")
        self.pipeline = degree("pipeline_parallel_degree", "parallelism", "experimental")
        self.expert = degree("expert_parallel_degree", "parallelism")

    @property
    def others(self) -> int:
        """The product without the shards."""
        return prod((self.replicate, self.tensor, self.context, self.pipeline))

    @property
    def mesh(self) -> dict[str, int]:
        """The parts of ``parallel`` that are not 1."""
        names = ("replicate", "tensor", "context", "pipeline", "expert")
        return {name: size for name in names if (size := getattr(self, name)) > 1}


def _rows(get: FileValues, reading: Reading, degrees: _Degrees) -> None:
    """A step's rows; a pipeline cuts them into micro-batches."""
    tokens = get("training.max_context_length", get("training.seq_len", 2048))
    rows = get("training.local_batch_size", get("training.batch_size"))
    if rows is None:
        given = get("training.num_tokens_per_microbatch_per_dp_rank")
        rows = 8 if given is None else max(1, given // tokens)
    batches = 1
    if degrees.pipeline > 1:
        if each := get("parallelism.pipeline_parallel_microbatch_size"):
            batches = max(1, rows // each)
        else:
            named = get(
                "parallelism.num_pp_microbatches",
                get("experimental.pipeline_parallel_microbatches"),
            )
            batches = named or degrees.pipeline
        rows = max(1, rows // batches)
    reading.set(sequence_length=tokens, micro_batch=rows, gradient_accumulation=batches)


def _parallel(get: FileValues, reading: Reading, degrees: _Degrees, gpus: int | None) -> None:
    """FSDP2 over what other degrees leave; what the scenario can't combine, its own checks refuse."""
    shard, others = degrees.shard, degrees.others
    if shard < 0:
        count = gpus or max(NODE, others)
        if gpus is None:
            note = f"the file shards over as many GPUs as there are: {count} are assumed (--gpu 8x80GiB says eight)"
            reading.notes.append(note)
    else:
        count = shard * others
        if gpus not in (None, count):
            reading.notes.append(
                f"the file's degrees make {count} GPUs, and {gpus} were asked about"
            )
            count = gpus
    if count == 1:
        return
    parts: dict[str, Any] = dict(degrees.mesh)
    sharded = count > degrees.tensor * degrees.pipeline and not (
        shard == 1 and degrees.context == 1
    )
    if degrees.pipeline > 1:
        schedule = str(
            get(
                "parallelism.pipeline_parallel_schedule",
                get("experimental.pipeline_parallel_schedule", ""),
            )
        )
        parts["schedule"] = _SCHEDULES.get(schedule.lower() or "1f1b", "1f1b")
        if schedule and schedule.lower() not in _SCHEDULES:
            key = "parallelism.pipeline_parallel_schedule"
            reading.approximates(
                key, schedule, EITHER_WAY, "this schedule is not known, and is read as 1F1B"
            )
    if not sharded and degrees.replicate == count:
        parts.pop("replicate", None)
        common.parallel(reading, "ddp", count, **parts)
        return
    if sharded and degrees.pipeline == 1:
        parts["reduce_in_fp32"] = True
    if sharded and degrees.tensor == degrees.expert == degrees.pipeline == 1:
        never = get("parallelism.fsdp_reshard_after_forward") == "never"
        parts |= {"reshard_after_forward": False} if never else {}
        parts |= {"offload": "cpu"} if get("training.enable_cpu_offload") else {}
    elif sharded and get("training.enable_cpu_offload"):
        reading.approximates(
            "training.enable_cpu_offload", True, TOO_HIGH, "weights and states lie on the host"
        )
    if degrees.tensor > 1 and degrees.expert == degrees.context == 1:
        off = get("parallelism.disable_loss_parallel", get("training.disable_loss_parallel"))
        parts["sequence_parallel"] = get("parallelism.enable_sequence_parallel", True)
        parts["loss_parallel"] = get("parallelism.enable_loss_parallel", not off)
    elif degrees.tensor > 1:
        why = (
            "torchtitan divides hidden states along the row and the scores along the words; beside context and experts"
            " transformers' plan is taken, which does neither"
        )
        key = next(name for name, _ in get.items() if name.endswith("tensor_parallel_degree"))
        reading.approximates(key, degrees.tensor, TOO_HIGH, why)
    common.parallel(reading, "fsdp2" if sharded else "none", count, **parts)


def _checkpointing(get: FileValues, reading: Reading) -> None:
    mode = get("activation_checkpoint.mode", "selective")
    reading.set(gradient_checkpointing=mode != "none")
    if mode == "selective":
        why = "attention and every second product are kept beside the layers' inputs; read as full checkpointing"
        reading.approximates("activation_checkpoint.mode", mode, TOO_LOW, why)


def _eight_bits(get: FileValues, reading: Reading) -> None:
    converters = [str(one) for one in get("model.converters", [])]
    float8 = get("float8.enable_float8_linear") or any("float8" in one for one in converters)
    recipe = get("quantize.linear.float8.recipe_name") or get("float8.recipe_name") or "tensorwise"
    parts = reading.fields.get("parallel") or {}
    matrices = parts.get("tensor", 1) > 1 and not (
        parts.get("sequence_parallel") or parts.get("loss_parallel")
    )
    if float8 and (matrices or parts.get("pipeline", 1) > 1 or parts.get("expert", 1) > 1):
        why = "products in 8 bits are read as those of 16 beside a pipeline, context with tensor parallel, and experts"
        reading.approximates("model.converters", "float8", EITHER_WAY, why)
    elif float8 and find_spec("torchao") is not None:
        reading.set(float8=recipe)
        names = (
            "quantize.linear.float8.enable_fsdp_float8_all_gather",
            "float8.enable_fsdp_float8_all_gather",
        )
        if (
            recipe == "tensorwise"
            and parts.get("strategy") == "fsdp2"
            and any(get(name) for name in names)
        ):
            reading.set(parallel={**parts, "float8_all_gather": True})
    elif float8:
        why = "products in 8 bits are read as those of 16; with torchao installed they are followed"
        reading.approximates("model.converters", "float8", EITHER_WAY, why)
    for other in converters:
        if "float8" not in other:
            what = (
                "adapters are left out"
                if "lora" in other
                else "its products are read as those of 16 bits"
            )
            reading.approximates("model.converters", other, EITHER_WAY, what)


# --- registries: functions that make a Trainer.Config ----------------------------------------------------------------

_UNKNOWN = object()
_OPERATIONS = {
    ast.Mult: operator.mul,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_MODES = {"SelectiveAC": "selective", "FullAC": "full", "MemoryBudgetAC": "memory_budget"}


def is_registry(tree: ast.Module) -> bool:
    """Whether a program is one of torchtitan's registries."""
    imports = (node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return any(name.partition(".")[0] == "torchtitan" for name in imports) and bool(
        _functions(tree)
    )


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions without arguments whose result is a ``Trainer.Config``."""
    return {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.args.args
        and node.returns is not None
        and ast.unparse(node.returns).endswith(".Config")
    }


def read_registry(tree: ast.Module, file: Path, part: str | None, gpus: int | None) -> Reading:
    """The scenario's fields of one of a registry's functions.

    UserError: if none is named, or one that isn't there.
    """
    functions = _functions(tree)
    if part not in functions:
        first = next(iter(functions))
        raise UserError(
            "This file of torchtitan's has several configurations, and one has to be named."
            if part is None
            else "The file has no such configuration.",
            where=file,
            found=part,
            allowed=", ".join(functions),
            write=f"dryfit {file}:{first}",
        )
    flat = _Registry(functions).settings(part)
    flat.setdefault("model.name", file.resolve().parent.name)
    return _read(flat, file, gpus)


class _Registry:
    def __init__(self, functions: Mapping[str, ast.FunctionDef]) -> None:
        self.functions = functions

    def settings(self, name: str) -> dict[str, Any]:
        """What a function's configuration says; one that begins with another's takes over what that says."""
        names: dict[str, ast.expr] = {}
        found: dict[str, Any] = {}
        for line in self.functions[name].body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                names[line.targets[0].id] = line.value
                if (
                    isinstance(line.value, ast.Call)
                    and ast.unparse(line.value.func) in self.functions
                ):
                    found = self.settings(ast.unparse(line.value.func))
            elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Attribute):
                key = ast.unparse(line.targets[0]).partition(".")[2]
                for old in [each for each in found if each.startswith(f"{key}.")]:
                    del found[old]
                found |= dict(_said(key, line.value, names))
            elif isinstance(line, ast.Return) and isinstance(line.value, ast.Call):
                if ast.unparse(line.value.func) in self.functions:
                    found = self.settings(ast.unparse(line.value.func))
                for keyword in line.value.keywords:
                    found |= dict(_said(keyword.arg or "", keyword.value, names))
        return found


def _said(key: str, node: ast.expr, names: Mapping[str, ast.expr]) -> Iterator[tuple[str, Any]]:
    """The flat keys of an argument of ``Trainer.Config``, or of what a line assigns."""
    if isinstance(node, ast.Name) and node.id in names:
        node = names[node.id]
    if not isinstance(node, ast.Call):
        if (value := _value(node, names)) is not _UNKNOWN:
            yield key, value
        return
    kind = ast.unparse(node.func).removesuffix(".Config").rpartition(".")[2]
    if key == "model_spec":
        flavor = _value(node.args[0], names) if node.args else _UNKNOWN
        yield from [("model.flavor", flavor)] if flavor is not _UNKNOWN else []
        given = next(
            (one.value for one in node.keywords if one.arg in ("converters", "quantization")), None
        )
        yield (
            "model.converters",
            [_converter(one) for one in given.elts] if isinstance(given, ast.List) else [],
        )
    elif key == "loss":
        yield "loss.kind", "chunked" if "Chunked" in kind else "full"
    elif key == "optimizer":
        yield (
            "optimizer.name",
            "AdamW" if "adamw" in kind.lower() else kind.removeprefix("default_"),
        )
    elif key == "activation_checkpoint":
        yield "activation_checkpoint.mode", _MODES.get(kind, "selective")
    else:
        for keyword in node.keywords:
            yield from _said(f"{key}.{keyword.arg}", keyword.value, names)


def _converter(node: ast.expr) -> str:
    return (
        ast.unparse(node.func if isinstance(node, ast.Call) else node)
        .partition("Converter")[0]
        .lower()
    )


def _value(node: ast.expr, names: Mapping[str, ast.expr]) -> Any:
    """A constant, or arithmetic of constants."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return _value(names[node.id], names)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, names)
        return inner if inner is _UNKNOWN else -inner
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left, names), _value(node.right, names)
        return _UNKNOWN if _UNKNOWN in (left, right) else _OPERATIONS[type(node.op)](left, right)
    if isinstance(node, ast.List):
        items = [_value(item, names) for item in node.elts]
        return _UNKNOWN if _UNKNOWN in items else items
    return _UNKNOWN
