"""Fields of a scenario that have parts: their values, and how each is read from a file.

Every wrong part is a :class:`UserError` that shows the corrected line. Nothing heavier than PyYAML is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.common.errors import UserError
from scripts.common.schema import problems
from scripts.settings.fields import MOST
from scripts.settings.model import found_beside


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: B (out x rank) times A (rank x in), scaled by alpha / rank, beside each target module."""

    rank: int
    alpha: int
    dropout: float
    target_modules: str | tuple[str, ...]  # "all-linear" (every linear layer but the output head) or names


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes packs the base of ``method: qlora``; ``compute`` is None where 4-bit layers compute in the
    dtype of the other weights. Of ``type: int8`` (LLM.int8) there is one kind only.
    """

    type: str
    double: bool
    storage: str
    compute: str | None


@dataclass(frozen=True)
class Allocator:
    """Settings of PyTorch's caching allocator."""

    expandable_segments: bool


@dataclass(frozen=True)
class Parallel:
    """How a step is spread over several GPUs."""

    strategy: str
    gpus: int
    reshard_after_forward: bool = True
    offload: str = "none"

    @property
    def sharded(self) -> bool:
        """Whether FSDP, the one or the other, divides weights, gradients and optimizer states."""
        return self.strategy in ("fsdp1", "fsdp2")

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        return {"zero2": 2, "zero3": 3}.get(self.strategy, 0)

    @property
    def divided(self) -> bool:
        """Whether FSDP or ZeRO divides anything among the GPUs."""
        return self.sharded or self.zero_stage > 0


@dataclass(frozen=True)
class Preference:
    """What an objective takes beside its rows; a reference of None is what TRL takes by default."""

    reference: str | None
    generations: int
    completion_length: int | None


@dataclass(frozen=True)
class Versions:
    """Versions of libraries that are meant instead of those installed."""

    bitsandbytes: str | None


# The fields with parts that are values of their own; a mapping of these parts makes one.
PARTS = {
    "allocator": Allocator,
    "parallel": Parallel,
    "preference": Preference,
    "quantization": Quantization,
    "versions": Versions,
}


def checked_lora(value: Mapping[str, Any], where: object) -> Lora:
    """Adapters in the short form, `lora`; its numbers are checked by the schema."""
    targets = value["target_modules"]
    if isinstance(targets, (list, tuple)):
        targets = tuple(targets)
        good = bool(targets) and all(isinstance(name, str) and name for name in targets)
    else:
        good = targets == "all-linear"
    if not good:
        listed = [targets] if isinstance(targets, str) and targets else ["q_proj", "v_proj"]
        raise UserError(
            "`lora.target_modules` must be the word all-linear or a list of module names.",
            where=where,
            found=value["target_modules"],
            allowed="all-linear, or a list such as [q_proj, v_proj]",
            write=f"lora: {{target_modules: [{', '.join(listed)}]}}",
        )
    return Lora(value["rank"], value["alpha"], value["dropout"], targets)


def checked_adapter(value: Any, given: Mapping[str, Any], where: object) -> dict[str, Any] | None:
    """A PEFT configuration as a mapping; what its fields mean only PEFT knows (:mod:`scripts.training.adapters`)."""
    if value is None:
        return None
    example = "adapter: {peft_type: LORA, r: 16, target_modules: all-linear}"
    if "lora" in given:
        raise UserError(
            "`lora` and `adapter` both say what the adapters are.",
            where=where,
            found={"adapter": value, "lora": given["lora"]},
            allowed="one of them: `lora` is the short form of an `adapter` with peft_type LORA",
            write=example,
        )
    if isinstance(value, str):
        path = found_beside(value, where)
        if path is None:
            raise UserError(
                "`adapter` is not a path to a file.", where=where, found=value,
                allowed="an adapter_config.json, its folder, or the configuration as a mapping", write=example,
            )  # fmt: skip
        path = path / "adapter_config.json" if path.is_dir() else path
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"The adapter's configuration can't be read: {error}.", where=path) from None
    if not isinstance(value, Mapping) or not isinstance(value.get("peft_type"), str):
        raise UserError(
            "`adapter` needs a `peft_type`: it says which of PEFT's methods the other fields belong to.",
            where=where,
            found=value,
            allowed="a PEFT configuration as adapter_config.json writes it",
            write=example,
        )
    return json.loads(json.dumps(dict(value), default=str))


_GPU = {
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "examples": ["rtx-3090"]},
        "vram_gib": {"type": "number", "exclusiveMinimum": 0, "examples": [24]},
        "count": {"type": "integer", "minimum": 1, "maximum": MOST, "examples": [2]},
    },
}


def checked_gpu(value: Any, where: object) -> str | dict[str, Any] | None:
    """A GPU, or several of a kind, as a scenario says it.

    Returns
    -------
    str, dict or None
        A name (looked up in config/gpus.yaml by who needs the GPU), ``{vram_gib: number}`` or ``{name: text}``; with
        ``count`` where there are several.

    Raises
    ------
    UserError
        With the line to write.
    """
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1000 <= value < 10_000:
        return str(value)  # a card's number, `gpu: 4090`, which YAML reads as one
    if isinstance(value, Mapping) and ("name" in value) != ("vram_gib" in value):
        if wrong := problems(value, _GPU, where, within="gpu"):
            raise UserError.several(wrong)
        size = {"vram_gib": float(value["vram_gib"])} if "vram_gib" in value else {}
        return value["name"] if list(value) == ["name"] else {**value, **size}
    gib = value if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else 24
    raise UserError(
        "`gpu` must be a name or a size.",
        where=where,
        found=value,
        allowed="a name in config/gpus.yaml, {vram_gib: number}, {name: rtx-3090, count: 2} for several, or null",
        write=f"gpu: {{vram_gib: {gib if gib < 1000 else 24}}}",
    )
