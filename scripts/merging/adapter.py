"""What a LoRA adapter does to each tensor of its base, worked out from the two folders' headers alone.

The semantics are those of PEFT 0.21 (``peft/tuners/lora``): for a linear layer ``W + scale * B @ A`` with
``scale = alpha / r`` (``alpha / sqrt(r)`` for rsLoRA); DoRA rescales each output's row to a learned length;
``modules_to_save``, trained biases and saved embeddings replace the base's tensor. Whatever else PEFT can do
is refused by name rather than merged wrongly.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_json
from scripts.merging.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    Shard,
    Tensor,
    read_shard,
    read_tensor,
    refuse_pickles,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

# Fields of LoraConfig that a merge reads, or that say nothing about the weights.
MERGED_FIELDS = {
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_alpha", "lora_bias", "modules_to_save",
    "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora", "init_lora_weights",
}  # fmt: skip
NEUTRAL_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type", "megatron_core", "eva_config",
}  # fmt: skip
# Initializations that leave the base's weights as they are. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the
# base when the adapter is created, so B @ A alone is not the difference to the original base.
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)$"
)


@dataclass(frozen=True)
class Update:
    """What happens to one tensor of the base; the strings are keys of the adapter file.

    Attributes
    ----------
    replace
        Tensor that takes the base's place before anything is added.
    a, b
        Low-rank factors: ``a`` is (r, in), ``b`` is (out, r).
    bias
        ``lora_B``'s bias, times ``scale`` added to the base's bias.
    scale
        ``alpha / r`` or ``alpha / sqrt(r)``.
    transposed
        The base stores (in, out): GPT-2's Conv1D and embeddings.
    magnitude
        DoRA's length of each output.
    source
        The base's tensor to start from, where it has another name: the embedding of a tied output layer.
    """

    replace: str | None = None
    a: str | None = None
    b: str | None = None
    bias: str | None = None
    scale: float = 1.0
    transposed: bool = False
    magnitude: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration and the place of each of its tensors."""

    folder: Path
    config: dict[str, Any]
    shard: Shard
    tensors: dict[str, Tensor]

    def read(self, key: str) -> Any:
        """One tensor in float32, the precision in which PEFT loads and merges adapters."""
        return read_tensor(self.shard, self.tensors[key]).float()


@dataclass(frozen=True)
class Plan:
    """Updates by name of the tensor in the merged folder, and whether tied embeddings come apart."""

    updates: dict[str, Update]
    untied: str | None = None  # name of the output layer's tensor that the merged folder has and the base has not


def use_peft(what: str, where: object) -> UserError:
    """The error for what PEFT can merge and this can't."""
    return UserError(
        f"{what} is not merged here: use PEFT.",
        where=where,
        write="PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output)",
    )


def open_adapter(folder: str | os.PathLike) -> Adapter:
    """Open an adapter folder; every tensor must be finite and every setting one that is merged here."""
    import torch

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("The adapter's folder does not exist.", where=folder)
    if not (folder / CONFIG).exists():
        raise UserError("The adapter's folder has no adapter_config.json, so its scale is unknown.", where=folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError("adapter_config.json must hold one JSON object.", where=folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        refuse_pickles(folder, "adapter")
        raise UserError("The adapter's folder has no weights.", where=folder, allowed=WEIGHTS)
    _check_settings(config, folder / CONFIG)
    shard = read_shard(folder / WEIGHTS)
    for tensor in shard.tensors:
        if tensor.dtype not in FLOAT_DTYPES:
            raise use_peft(f"The adapter's tensor {tensor.name} of dtype {tensor.dtype}", shard.path)
        if not torch.isfinite(read_tensor(shard, tensor)).all():
            raise UserError(
                "The adapter holds NaN or infinity: its training diverged.",
                where=f"{shard.path}, tensor {tensor.name}",
            )
    return Adapter(folder, config, shard, {tensor.name: tensor for tensor in shard.tensors})


def _check_settings(config: dict[str, Any], where: Path) -> None:
    """Refuse every setting that changes the meaning of the weights in a way that isn't merged here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise use_peft(f"An adapter of type {kind}", where)
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_INITIALIZATIONS:
        raise use_peft(f"An adapter started with init_lora_weights={start!r}, which may have changed its base,", where)
    for name, value in sorted(config.items()):
        # An unknown field with a value may be a variant that a later PEFT brings.
        if value and name not in MERGED_FIELDS | NEUTRAL_FIELDS:
            raise use_peft(f"An adapter with {name}", where)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UserError("Unknown bias setting.", where=where, found=config["bias"], allowed="none, all, lora_only")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UserError(f"The adapter's {name} must be a number.", where=where, found=value)


def _pattern_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that matches the end of the module's path decides, as in PEFT's ``get_pattern_key``."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


class _Names:
    """From a module's path in the adapter to the tensor's name in the base's files.

    They are the same unless the folder was saved from the model without its head (``h.0...`` for GPT-2's
    ``transformer.h.0...``), where transformers adds the first part of the path on loading.
    """

    def __init__(self, base: Checkpoint, modules: list[str]) -> None:
        self.tensors = base.tensors
        self.strip = not any(f"{module}.weight" in self.tensors for module in modules) and any(
            f"{module.partition('.')[2]}.weight" in self.tensors for module in modules
        )

    def __call__(self, name: str) -> str:
        if self.strip and name not in self.tensors and name.partition(".")[2] in self.tensors:
            return name.partition(".")[2]
        return name


def plan_merge(base: Checkpoint, adapter: Adapter) -> Plan:
    """Match the adapter with its base: one :class:`Update` for each tensor that changes.

    Raises
    ------
    UserError
        The adapter belongs to another base (names, shapes or vocabulary), is incomplete, or targets nothing.
    """
    where = adapter.shard.path
    modules: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for key in adapter.tensors:
        if not key.startswith(PREFIX):
            raise use_peft(f"The adapter's tensor {key}", where)
        path = key.removeprefix(PREFIX)
        if match := LORA_KEY.match(path):
            # Once the embedding is a LoRA layer itself, a layer inside it can't be; base_layer never nests here.
            modules.setdefault(match["module"], {})[match["part"].removesuffix("vector.weight")] = key
        elif "lora_" in path or ".token_adapter." in path or ".modules_to_save." in path:
            raise use_peft(f"The adapter's tensor {key}", where)
        else:
            replacements[path.replace(".base_layer.", ".")] = key
    names = _Names(base, list(modules) or [name.rpartition(".")[0] for name in replacements])
    _check_targets(base, adapter, list(modules), names)
    _check_vocabulary(base, adapter)

    updates: dict[str, Update] = {}
    for name, key in replacements.items():
        updates[names(name)] = Update(replace=key)
    for module, parts in modules.items():
        _add_low_rank(updates, names, base, adapter, module, parts)

    plan = _settle_ties(base, adapter, updates)
    for name, update in plan.updates.items():
        _check_shapes(base, adapter, name, update)
    return plan


def _check_targets(base: Checkpoint, adapter: Adapter, modules: list[str], names: _Names) -> None:
    """Every target has its tensors, and a layer that is adapted in one block is adapted in all."""
    config, where = adapter.config, adapter.folder / CONFIG
    if not modules and not config.get("modules_to_save"):
        raise UserError("The adapter holds no LoRA tensors: it changes nothing.", where=adapter.shard.path)
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # "all-linear", a regular expression, or none: the tensors themselves are the list
    present = {target for target in targets if any(m == target or m.endswith(f".{target}") for m in modules)}
    for target in targets:
        if target not in present:
            in_base = any(re.search(rf"(^|\.){re.escape(target)}\.weight$", name) for name in base.tensors)
            raise UserError(
                "The adapter targets a layer that its file has no tensors for: it is incomplete."
                if in_base
                else "The adapter's target matches nothing in the base model.",
                where=where,
                found=target,
                write=f'"target_modules": {json.dumps(sorted(present))}' if present and not in_base else None,
            )
    chosen_by_number = any(re.search(r"\d", target) for target in targets)
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None or chosen_by_number:
        return
    adapted = {names(f"{module}.weight") for module in modules}
    kinds = {without_numbers(name) for name in adapted}
    for name in base.tensors:
        if name not in adapted and without_numbers(name) in kinds:
            raise UserError(
                "The adapter has no tensors for a layer that it targets: it is incomplete, or made for a base "
                "with fewer layers.",
                where=adapter.shard.path,
                found=f"nothing for {name.removesuffix('.weight')}",
            )


def without_numbers(name: str) -> str:
    """The same text for the same layer of every block."""
    return re.sub(r"\.\d+\.", ".N.", name)


def _check_vocabulary(base: Checkpoint, adapter: Adapter) -> None:
    """A tokenizer saved beside the adapter must be the base's, or the tokens mean something else."""
    ours, theirs = base.folder / "tokenizer.json", adapter.folder / "tokenizer.json"
    if not (ours.exists() and theirs.exists()):
        return
    vocabularies = []
    for path in (ours, theirs):
        tokenizer = read_json(path)
        vocabularies.append((tokenizer.get("model") or {}).get("vocab"))
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            "The adapter's tokenizer has another vocabulary than the base's: it was trained on another base.",
            where=theirs,
            found=f"{len(vocabularies[1] or ())} tokens",
            allowed=f"the {len(vocabularies[0] or ())} tokens of {ours}",
        )


def _add_low_rank(
    updates: dict[str, Update],
    names: _Names,
    base: Checkpoint,
    adapter: Adapter,
    module: str,
    parts: dict[str, str],
) -> None:
    """Turn the LoRA tensors of one module into the updates of its weight and bias."""
    config, where = adapter.config, adapter.shard.path
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = (
        parts.get("lora_embedding_A" if embedding else "lora_A.weight"),
        parts.get("lora_embedding_B" if embedding else "lora_B.weight"),
    )
    if a is None or b is None:
        raise UserError(
            "The adapter holds one of the two factors of a layer: it is incomplete.", where=where, found=module
        )
    a_shape, b_shape = adapter.tensors[a].shape, adapter.tensors[b].shape
    if len(a_shape) != 2 or len(b_shape) != 2:
        raise use_peft(f"LoRA on a convolution ({module})", where)
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    if a_shape[0] != rank or b_shape[1] != rank:
        raise UserError(
            "The adapter's tensors have another rank than its adapter_config.json says.",
            where=f"{where}, {module}",
            found=f"A {a_shape}, B {b_shape}",
            allowed=f"rank {rank}",
        )
    magnitude = parts.get("lora_magnitude_vector") or parts.get("lora_magnitude_")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise UserError(
            "The adapter's tensors and its use_dora setting disagree.", where=f"{where}, {module}", found=sorted(parts)
        )
    weight = names(f"{module}.weight")
    shape = base.tensors[weight][1].shape if weight in base.tensors else None
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    before = updates.get(weight, Update())
    updates[weight] = Update(
        replace=before.replace,
        a=a,
        b=b,
        scale=scale,
        transposed=embedding or _is_transposed(base, adapter, module, shape, a_shape, b_shape),
        magnitude=magnitude,
    )
    if "lora_B.bias" in parts:
        name = names(f"{module}.bias")
        if name not in base.tensors:
            raise UserError("lora_bias needs a bias in the base, and this layer has none.", where=where, found=module)
        updates[name] = Update(replace=updates.get(name, Update()).replace, bias=parts["lora_B.bias"], scale=scale)


def _is_transposed(
    base: Checkpoint,
    adapter: Adapter,
    module: str,
    shape: tuple[int, ...] | None,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
) -> bool:
    """Whether the base stores this weight as (in, out).

    ``fan_in_fan_out`` in adapter_config.json can't be trusted: PEFT sets it from the last layer it met. The
    shape decides; for a square weight, the kind of layer in the model's skeleton.
    """
    straight, turned = (b_shape[0], a_shape[1]), (a_shape[1], b_shape[0])
    if shape is None or straight != turned:
        return shape == turned and straight != turned
    if shape != straight:
        return False
    if not adapter.config.get("fan_in_fan_out") and "gpt" not in str(base.config.get("model_type")):
        return False
    return module in skeleton(base)["conv1d"]


def skeleton(base: Checkpoint) -> dict[str, Any]:
    """What only the model's code knows: its Conv1D layers, its embeddings' names and whether they are tied.

    Built on the meta device, without any weight, and only for the few adapters that need it.
    """
    return _skeleton(base.folder, json.dumps(base.config, sort_keys=True))


@cache
def _skeleton(folder: Path, config_text: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise use_peft(f"An adapter on a model that transformers can't build by itself ({error})", folder) from error
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {
        "conv1d": {name for name, module in model.named_modules() if isinstance(module, Conv1D)},
        "embedding": f"{names[id(embedding)]}.weight" if embedding is not None else None,
        "head": f"{names[id(head)]}.weight" if head is not None else None,
        "tied": embedding is not None and head is not None and embedding.weight is head.weight,
    }


def _settle_ties(base: Checkpoint, adapter: Adapter, updates: dict[str, Update]) -> Plan:
    """Decide what becomes of embeddings that share one tensor with the output layer.

    An update of one of the two alone makes them different, as they are in the model with the adapter: the merged
    folder gets both and says that they are no longer tied. Trained as one (``ensure_weight_tying``) they stay one.
    """
    vocabulary = base.config.get("vocab_size") or (base.config.get("text_config") or {}).get("vocab_size")
    touches_vocabulary = any(name not in base.tensors or vocabulary in base.tensors[name][1].shape for name in updates)
    if not touches_vocabulary:
        return Plan(updates)
    model = skeleton(base)
    if not model["tied"]:
        return Plan(updates)
    names = _Names(base, [model["embedding"].removesuffix(".weight")])
    embedding, head = names(model["embedding"]), model["head"]
    if embedding not in updates and head not in updates:
        return Plan(updates)
    updates = dict(updates)
    if adapter.config.get("ensure_weight_tying") and _same_change(adapter, updates.get(embedding), updates.get(head)):
        updates.pop(head, None)
        return Plan(updates)
    if head in updates:
        updates[head] = Update(**{**updates[head].__dict__, "source": None if head in base.tensors else embedding})
    else:
        updates[head] = Update(source=None if head in base.tensors else embedding)
    return Plan(updates, untied=head)


def _same_change(adapter: Adapter, embedding: Update | None, head: Update | None) -> bool:
    """Whether both ends of tied weights change alike; saved for the embedding alone, it is meant for both."""
    import torch

    if embedding is None or head is None:
        return head is None
    pairs = [(embedding.replace, head.replace, False), (embedding.a, head.b, True), (embedding.b, head.a, True)]
    for ours, theirs, turned in pairs:
        if ours is None or theirs is None:
            if ours is not theirs:
                return False
            continue
        first, second = adapter.read(ours), adapter.read(theirs)
        if not torch.equal(first.T if turned else first, second):
            return False
    return embedding.scale == head.scale and embedding.magnitude is None and head.magnitude is None


def _check_shapes(base: Checkpoint, adapter: Adapter, name: str, update: Update) -> None:
    """The tensor exists in the base, has a floating dtype and the shape that the adapter was made for."""
    where = adapter.shard.path
    source = update.source or name
    if source not in base.tensors:
        raise UserError(
            "The adapter changes a tensor that the base does not have: it was made for another base.",
            where=where,
            found=name,
            allowed=f"one of the {len(base.tensors)} tensors of {base.folder}",
        )
    tensor = base.tensors[source][1]
    if tensor.dtype not in FLOAT_DTYPES:
        raise UserError(
            "The base's tensor is not a floating-point weight; merge into the unquantized base.",
            where=base.folder,
            found=f"{name}: {tensor.dtype}",
            allowed=", ".join(sorted(FLOAT_DTYPES.values())),
        )
    wanted: tuple[int, ...] | None = None
    if update.replace is not None:
        wanted = adapter.tensors[update.replace].shape
    if update.a is not None and update.b is not None and wanted in (None, tensor.shape):
        wanted = (adapter.tensors[update.b].shape[0], adapter.tensors[update.a].shape[1])
        wanted = wanted[::-1] if update.transposed else wanted
    if update.bias is not None and wanted in (None, tensor.shape):
        wanted = adapter.tensors[update.bias].shape
    if wanted is not None and wanted != tensor.shape:
        rows = base.config.get("vocab_size")
        vocabulary = rows is not None and rows in tensor.shape and len(tensor.shape) == 2
        raise UserError(
            "The adapter was made for a base with another vocabulary."
            if vocabulary
            else "The adapter was made for a base with other shapes.",
            where=f"{where}, {name}",
            found=f"shape {wanted}",
            allowed=f"shape {tensor.shape}, the base's",
        )
    outputs = tensor.shape[-1] if update.transposed else tensor.shape[0]
    if update.magnitude is not None and adapter.tensors[update.magnitude].shape != (outputs,):
        raise use_peft(f"DoRA with a magnitude of shape {adapter.tensors[update.magnitude].shape}", where)
