"""What a LoRA adapter does to each tensor of its base, worked out from the two folders' headers alone.

The semantics are those of PEFT 0.21 (``peft/tuners/lora``): for a linear layer ``W + scale * B @ A`` with
``scale = alpha / r`` (``alpha / sqrt(r)`` for rsLoRA); DoRA rescales each output's row to a learned length;
``modules_to_save``, trained biases and saved embeddings replace the base's tensor. Whatever else PEFT can do
is refused by name rather than merged wrongly.
"""

import json
import math
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import own_file, read_json
from scripts.common.checkpoint import (
    FLOAT_DTYPES,
    StoredTensor,
    WeightFolder,
    read_shard,
    read_tensor,
    refuse_pickles,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

# Fields of LoraConfig that a merge reads, or that say nothing about the weights.
MERGED_FIELDS = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
}
NEUTRAL_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "megatron_core",
    "eva_config",
}
# Initializations that leave the base's weights as they are. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the
# base when the adapter is created, so B @ A alone is not the difference to the original base.
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?$"
)


@dataclass(frozen=True)
class Update:
    """What happens to one tensor of the base; the strings are keys of the adapter file."""

    replace: str | None = None  # tensor that takes the base's place before anything is added
    # Low-rank factors: ``a`` is (r, in), ``b`` is (out, r)
    a: str | None = None
    b: str | None = None
    bias: str | None = None  # ``lora_B``'s bias, times ``scale`` added to the base's bias
    magnitude: str | None = None  # DoRA's length of each output
    scale: float = 1.0  # ``alpha / r`` or ``alpha / sqrt(r)``
    transposed: bool = False  # the base stores (in, out): GPT-2's Conv1D and embeddings
    # The base's tensor to start from, where it has another name: the embedding of a tied output layer
    source: str | None = None

    @property
    def keys(self) -> dict[str, str]:
        """The adapter's tensors that it takes, by use; none where the tensor stays as it is."""
        uses = ("replace", "a", "b", "bias", "magnitude")
        return {use: key for use in uses if (key := getattr(self, use)) is not None}


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration and the place of each of its tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def path(self) -> Path:
        return self.folder / WEIGHTS

    def read(self, key: str) -> Any:
        """One tensor in float32, the precision in which PEFT loads and merges adapters."""
        return read_tensor(self.tensors[key]).float()


@dataclass(frozen=True)
class MergePlan:
    """A base, an adapter, and what the one does to the other."""

    base: WeightFolder
    adapter: Adapter
    updates: dict[str, Update]  # by name of the tensor in the merged folder
    untied: str | None = (
        None  # name of the output layer's tensor where it no longer is the embedding's
    )

    def update(self, name: str) -> Update:
        """What happens to a tensor of the merged folder."""
        return self.updates.get(name, Update())

    def source(self, name: str) -> StoredTensor:
        """The base's tensor that a tensor of the merged folder starts from."""
        return self.base.tensors[self.update(name).source or name]


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
        raise UserError(
            "The adapter's folder has no adapter_config.json, so its scale is unknown.",
            where=folder,
        )
    config = read_json(own_file(folder / CONFIG))
    if not isinstance(config, dict):
        raise UserError("adapter_config.json must hold one JSON object.", where=folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        refuse_pickles(folder, "adapter")
        raise UserError("The adapter's folder has no weights.", where=folder, allowed=WEIGHTS)
    _check_settings(config, folder / CONFIG)
    shard = read_shard(own_file(folder / WEIGHTS))
    adapter = Adapter(folder, config, {tensor.name: tensor for tensor in shard.tensors})
    for tensor in adapter.tensors.values():
        if tensor.dtype not in FLOAT_DTYPES:
            raise use_peft(
                f"The adapter's tensor {tensor.name} of dtype {tensor.dtype}", adapter.path
            )
        if not torch.isfinite(read_tensor(tensor)).all():
            problem = "The adapter holds NaN or infinity: its training diverged."
            raise UserError(problem, where=f"{adapter.path}, tensor {tensor.name}")
    return adapter


def _check_settings(config: dict[str, Any], where: Path) -> None:
    """Refuse every setting that changes the meaning of the weights in a way that isn't merged here."""
    if config.get("peft_type") != "LORA":
        raise use_peft(f"An adapter of type {config.get('peft_type')}", where)
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_INITIALIZATIONS:
        raise use_peft(
            f"An adapter started with init_lora_weights={start!r}, which may have changed its base,",
            where,
        )
    for name, value in sorted(config.items()):
        # An unknown field with a value may be a variant that a later PEFT brings.
        if value and name not in MERGED_FIELDS | NEUTRAL_FIELDS:
            raise use_peft(f"An adapter with {name}", where)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UserError(
            "Unknown bias setting.",
            where=where,
            found=config["bias"],
            allowed="none, all, lora_only",
        )
    for name, least in (("r", 1), ("lora_alpha", 0)):
        value = config.get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value < least
        ):
            problem = f"The adapter's {name} must be a number."
            raise UserError(problem, where=where, found=value, allowed=f"{least} or more")


def plan_merge(base: WeightFolder, adapter: Adapter) -> MergePlan:
    """Match the adapter with its base: one :class:`Update` for each tensor that changes.

    UserError: the adapter belongs to another base (names, shapes or vocabulary), is incomplete, or targets nothing.
    """
    modules: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for key in adapter.tensors:
        path = key.removeprefix(PREFIX)
        if match := LORA_KEY.match(path):
            # Once the embedding is a LoRA layer itself, a layer inside it can't be; base_layer never nests here.
            modules.setdefault(match["module"], {})[match["part"]] = key
        elif (
            path == key
            or "lora_" in path
            or ".token_adapter." in path
            or ".modules_to_save." in path
        ):
            raise use_peft(f"The adapter's tensor {key}", adapter.path)
        else:
            replacements[path.replace(".base_layer.", ".")] = key
    strip = _misses_first_part(
        base, list(modules) or [name.rpartition(".")[0] for name in replacements]
    )
    adapted = {module: strip(f"{module}.weight") for module in modules}
    _check_targets(base, adapter, adapted)
    _check_vocabulary(base, adapter)
    updates = {strip(name): Update(replace=key) for name, key in replacements.items()}
    for module, parts in modules.items():
        weight = _low_rank_update(base, adapter, module, adapted[module], parts)
        updates[adapted[module]] = replace(
            weight, replace=updates.get(adapted[module], Update()).replace
        )
        if "lora_B.bias" in parts:
            name = strip(f"{module}.bias")
            if name not in base.tensors:
                problem = "lora_bias needs a bias in the base, and this layer has none."
                raise UserError(problem, where=adapter.path, found=module)
            updates[name] = replace(
                updates.get(name, Update()), bias=parts["lora_B.bias"], scale=weight.scale
            )
    plan = _settle_ties(MergePlan(base, adapter, updates), strip)
    for name in plan.updates:
        _check_shapes(plan, name)
    return plan


def _misses_first_part(base: WeightFolder, modules: list[str]) -> Any:
    """A function from a tensor's name in the model to its name in the base's files.

    They are the same unless the folder was saved from the model without its head (``h.0...`` for GPT-2's
    ``transformer.h.0...``), where transformers adds the first part of the path on loading.
    """
    bare = not any(f"{module}.weight" in base.tensors for module in modules) and any(
        f"{module.partition('.')[2]}.weight" in base.tensors for module in modules
    )

    def strip(name: str) -> str:
        shorter = name.partition(".")[2]
        return shorter if bare and name not in base.tensors and shorter in base.tensors else name

    return strip


def _check_targets(base: WeightFolder, adapter: Adapter, adapted: dict[str, str]) -> None:
    """Every target has its tensors, and a layer that is adapted in one block is adapted in all."""
    config = adapter.config
    if not adapted and not config.get("modules_to_save"):
        raise UserError(
            "The adapter holds no LoRA tensors: it changes nothing.", where=adapter.path
        )
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # "all-linear", a regular expression, or none: the tensors themselves are the list
    present = {
        target
        for target in targets
        if any(f".{module}".endswith(f".{target}") for module in adapted)
    }
    for target in sorted(set(targets) - present):
        in_base = any(f".{name}".endswith(f".{target}.weight") for name in base.tensors)
        raise UserError(
            "The adapter targets a layer that its file has no tensors for: it is incomplete."
            if in_base
            else "The adapter's target matches nothing in the base model.",
            where=adapter.folder / CONFIG,
            found=target,
            write=f'"target_modules": {json.dumps(sorted(present))}'
            if present and not in_base
            else None,
        )
    chosen_by_number = any(re.search(r"\d", target) for target in targets)
    if (
        config.get("exclude_modules")
        or config.get("layers_to_transform") is not None
        or chosen_by_number
    ):
        return
    kinds = {without_numbers(name) for name in adapted.values()}
    for name in base.tensors:
        if without_numbers(name) in kinds and name not in adapted.values():
            raise UserError(
                "The adapter has no tensors for a layer that it targets: it is incomplete, or made for a base "
                "with fewer layers.",
                where=adapter.path,
                found=f"nothing for {name.removesuffix('.weight')}",
            )


def without_numbers(name: str) -> str:
    """The same text for the same layer of every block."""
    return re.sub(r"\.\d+\.", ".N.", name)


def _check_vocabulary(base: WeightFolder, adapter: Adapter) -> None:
    """A tokenizer saved beside the adapter must be the base's, or the tokens mean something else."""
    ours, theirs = base.folder / "tokenizer.json", adapter.folder / "tokenizer.json"
    if not (ours.exists() and theirs.exists()):
        return
    vocabulary, their_vocabulary = (
        (read_json(path).get("model") or {}).get("vocab") for path in (ours, theirs)
    )
    if vocabulary != their_vocabulary:
        raise UserError(
            "The adapter's tokenizer has another vocabulary than the base's: it was trained on another base.",
            where=theirs,
            found=f"{len(their_vocabulary or ())} tokens",
            allowed=f"the {len(vocabulary or ())} tokens of {ours}",
        )


def _low_rank_update(
    base: WeightFolder, adapter: Adapter, module: str, weight: str, parts: dict[str, str]
) -> Update:
    """Turn the LoRA tensors of one module into the update of its weight."""
    config, where = adapter.config, f"{adapter.path}, {module}"
    embedding = any(part.startswith("lora_embedding") for part in parts)
    a, b = (
        parts.get(f"lora_embedding_{factor}" if embedding else f"lora_{factor}.weight")
        for factor in "AB"
    )
    if a is None or b is None:
        raise UserError(
            "The adapter holds one of the two factors of a layer: it is incomplete.", where=where
        )
    a_shape, b_shape = adapter.tensors[a].shape, adapter.tensors[b].shape
    if len(a_shape) != 2 or len(b_shape) != 2:
        raise use_peft(f"LoRA on a convolution ({module})", adapter.path)
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    if a_shape[0] != rank or b_shape[1] != rank:
        raise UserError(
            "The adapter's tensors have another rank than its adapter_config.json says.",
            where=where,
            found=f"A {a_shape}, B {b_shape}",
            allowed=f"rank {rank}",
        )
    magnitude = parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        problem = "The adapter's tensors and its use_dora setting disagree."
        raise UserError(problem, where=where, found=sorted(parts))
    return Update(
        a=a,
        b=b,
        magnitude=magnitude,
        scale=alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank,
        transposed=embedding
        or _is_transposed(base, adapter, module, weight, (b_shape[0], a_shape[1])),
    )


def _pattern_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that matches the end of the module's path decides, as in PEFT's ``get_pattern_key``."""
    matching = (
        value
        for pattern, value in (patterns or {}).items()
        if re.match(rf"(.*\.)?({pattern})$", module)
    )
    return next(matching, default)


def _is_transposed(
    base: WeightFolder, adapter: Adapter, module: str, weight: str, straight: tuple[int, int]
) -> bool:
    """Whether the base stores this weight as (in, out) instead of ``straight``, (out, in).

    ``fan_in_fan_out`` in adapter_config.json can't be trusted: PEFT sets it from the last layer it met. The
    shape decides; for a square weight, the kind of layer in the model's skeleton.
    """
    if weight not in base.tensors:
        return False
    shape = base.tensors[weight].shape
    if shape != straight or shape != straight[::-1]:
        return shape == straight[::-1]
    if not adapter.config.get("fan_in_fan_out") and "gpt" not in str(base.config.get("model_type")):
        return False
    return module in _skeleton(base.folder)["conv1d"]


@cache
def _skeleton(folder: Path) -> dict[str, Any]:
    """What only the model's code knows: its Conv1D layers, its embeddings' names and whether they are tied.

    Built on the meta device, without any weight, and only for the few adapters that need it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise use_peft(
            f"An adapter on a model that transformers can't build by itself ({error})", folder
        ) from error
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {
        "conv1d": {name for module, name in names.items() if isinstance(module, Conv1D)},
        "embedding": f"{names[embedding]}.weight" if embedding is not None else None,
        "head": f"{names[head]}.weight" if head is not None else None,
        "tied": embedding is not None and head is not None and embedding.weight is head.weight,
    }


def _settle_ties(plan: MergePlan, strip: Any) -> MergePlan:
    """Decide how embeddings are merged that share one tensor with the output layer.

    An update of one of the two alone makes them different, as they are in the model with the adapter: the merged
    folder gets both and says that they are no longer tied. Trained as one (``ensure_weight_tying``) they stay one.
    """
    base, updates = plan.base, plan.updates
    vocabulary = base.config.get("vocab_size") or (base.config.get("text_config") or {}).get(
        "vocab_size"
    )
    if all(name in base.tensors and vocabulary not in base.tensors[name].shape for name in updates):
        return plan
    model = _skeleton(base.folder)
    if not model["tied"]:
        return plan
    embedding, head = strip(model["embedding"]), model["head"]
    if embedding not in updates and head not in updates:
        return plan
    if plan.adapter.config.get("ensure_weight_tying") and _same_change(plan, embedding, head):
        return replace(
            plan, updates={name: update for name, update in updates.items() if name != head}
        )
    source = None if head in base.tensors else embedding
    return replace(
        plan, updates={**updates, head: replace(plan.update(head), source=source)}, untied=head
    )


def _same_change(plan: MergePlan, embedding: str, head: str) -> bool:
    """Whether both ends of tied weights change alike; saved for the embedding alone, it is meant for both."""
    import torch

    if head not in plan.updates:
        return True
    ours, theirs = (
        {use: plan.adapter.read(key) for use, key in plan.update(x).keys.items()}
        for x in (embedding, head)
    )
    if plan.update(head).transposed != plan.update(embedding).transposed:
        ours |= {"a": ours["b"].T, "b": ours["a"].T} if "a" in ours else {}
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[use], theirs[use]) for use in ours)
        and "magnitude" not in ours
        and plan.update(embedding).scale == plan.update(head).scale
    )


def _check_shapes(plan: MergePlan, name: str) -> None:
    """The tensor exists in the base, has a floating dtype and the shape that the adapter was made for."""
    base, update, where = plan.base, plan.update(name), plan.adapter.path
    if (update.source or name) not in base.tensors:
        raise UserError(
            "The adapter changes a tensor that the base does not have: it was made for another base.",
            where=where,
            found=name,
            allowed=f"one of the {len(base.tensors)} tensors of {base.folder}",
        )
    source = plan.source(name)
    if source.dtype not in FLOAT_DTYPES:
        raise UserError(
            "The base's tensor is not a floating-point weight; merge into the unquantized base.",
            where=base.folder,
            found=f"{name}: {source.dtype}",
            allowed=", ".join(sorted(FLOAT_DTYPES.values())),
        )
    shapes = {use: plan.adapter.tensors[key].shape for use, key in update.keys.items()}
    wanted = [shapes[use] for use in ("replace", "bias") if use in shapes]
    if "a" in shapes:
        straight = (shapes["b"][0], shapes["a"][1])
        wanted.append(straight[::-1] if update.transposed else straight)
    for shape in wanted:
        if shape != source.shape:
            vocabulary = len(source.shape) == 2 and base.config.get("vocab_size") in source.shape
            raise UserError(
                f"The adapter was made for a base with {'another vocabulary' if vocabulary else 'other shapes'}.",
                where=f"{where}, {name}",
                found=f"shape {shape}",
                allowed=f"shape {source.shape}, the base's",
            )
    outputs = source.shape[-1] if update.transposed else source.shape[0]
    if "magnitude" in shapes and shapes["magnitude"] != (outputs,):
        raise use_peft(f"DoRA with a magnitude of shape {shapes['magnitude']}", where)
