"""Fields of a scenario that have parts: their values, and how each is read from a file.

Every wrong part is a :class:`UserError` that shows the corrected line. Nothing heavier than PyYAML is imported here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from will_it_fit.common.errors import UserError
from will_it_fit.common.schema import problems
from will_it_fit.scenario.fields import MOST
from will_it_fit.scenario.model import found_beside
from will_it_fit.scenario.strategies import STRATEGIES, Strategy


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
    def kind(self) -> Strategy:
        """What the strategy does with the model."""
        return STRATEGIES[self.strategy]

    @property
    def sharded(self) -> bool:
        """Whether FSDP, the one or the other, divides weights, gradients and optimizer states."""
        return self.kind.fsdp > 0

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        return self.kind.zero

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
            change={"lora": {"target_modules": listed}},
        )
    return Lora(value["rank"], value["alpha"], value["dropout"], targets)


def checked_adapter(value: Any, given: Mapping[str, Any], where: object) -> dict[str, Any] | None:
    """A PEFT configuration as a mapping; what its fields mean only PEFT knows (:mod:`will_it_fit.step.adapters`)."""
    if value is None:
        return None
    example = {"adapter": {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}}
    if "lora" in given:
        raise UserError(
            "`lora` and `adapter` both say what the adapters are.",
            where=where,
            found={"adapter": value, "lora": given["lora"]},
            allowed="one of them: `lora` is the short form of an `adapter` with peft_type LORA",
            change=example,
        )
    if isinstance(value, str):
        path = found_beside(value, where)
        if path is None:
            raise UserError(
                "`adapter` is not a path to a file.", where=where, found=value,
                allowed="an adapter_config.json, its folder, or the configuration as a mapping", change=example,
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
            change=example,
        )
    return json.loads(json.dumps(dict(value), default=str))


# Several of a kind as people write it: "8 x h100", "h100 x8".
_SEVERAL = re.compile(
    r"^\s*(?:(?P<before>\d{1,3})\s*[x×*]\s*(?P<rest>.+?)|(?P<name>.+?)\s*[x×*]\s*(?P<after>\d{1,3}))\s*$", re.I
)


def counted(text: str) -> tuple[str, int | None]:
    """A GPU's name without the number of GPUs in front of it or behind, and that number; None: the text says none."""
    match = _SEVERAL.match(text)
    if not match:
        return text, None
    return match["rest"] or match["name"], int(match["before"] or match["after"])


def gpu_count(value: Any) -> int:
    """How many GPUs a scenario's ``gpu`` means, as text or as a mapping; 1 where it does not say."""
    if isinstance(value, str):
        return counted(value)[1] or 1
    count = (value.get("count") or gpu_count(value.get("name"))) if isinstance(value, Mapping) else 1
    return count if isinstance(count, int) else 1


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
    if value is None:
        return value
    if isinstance(value, str) and value:
        return _counted_gpu({"name": value}, where)
    if isinstance(value, int) and not isinstance(value, bool) and 1000 <= value < 10_000:
        return str(value)  # a card's number, `gpu: 4090`, which YAML reads as one
    if isinstance(value, Mapping) and ("name" in value) != ("vram_gib" in value):
        if wrong := problems(value, _GPU, where, within="gpu"):
            raise UserError.several(wrong)
        size = {"vram_gib": float(value["vram_gib"])} if "vram_gib" in value else {}
        return _counted_gpu({**value, **size}, where)
    gib = value if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else 24
    raise UserError(
        "`gpu` must be a name or a size.",
        where=where,
        found=value,
        allowed="a name in config/gpus.yaml, {vram_gib: number}, {name: rtx-3090, count: 2} for several, or null",
        change={"gpu": {"vram_gib": gib if gib < 1000 else 24}},
    )


def _counted_gpu(gpu: dict[str, Any], where: object) -> str | dict[str, Any]:
    """A checked GPU whose count, where its name says one, stands beside the name."""
    name, count = counted(gpu.get("name", ""))
    if count is not None:
        if count < 1 or gpu.get("count", count) != count:
            raise UserError(
                "`gpu` says two numbers of GPUs." if count else "There is no such number of GPUs.",
                where=where, found=gpu if "count" in gpu else gpu["name"], allowed="one number, of at least 1",
                change={"gpu": f"{gpu.get('count') or 2}x{name}"},
            )  # fmt: skip
        gpu = {"name": name, "count": count} if count > 1 else {"name": name}
    return gpu["name"] if list(gpu) == ["name"] else gpu


# --- images: how many tokens each becomes, and what the batch holds for it ---------------------------

_IMAGES = {"images": {"count": 1, "height": 896, "width": 896, "trained": "language"}}
# By families, after transformers' processors and `modeling_*.py` of each.
# A picture of one size becomes a square grid of patches; the default size is that of transformers' configuration.
_FIXED = ("gemma3", "llava")
_FIXED_SIZE, _FIXED_PATCH = 224, 14
# A picture of any size becomes patches, of which merge x merge together are a token; the usual patch.
_GRIDS = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
_EXAMPLE_SIZE = 448  # pixels: few enough tokens for rows of 512
_MERGE, _FRAMES = 2, 2  # a picture counts as two frames
FAMILIES = (*_FIXED, *_GRIDS)


def asks_for_images(value: Any) -> bool:
    """Whether a scenario's field, with its defaults, asks for images."""
    return isinstance(value, Mapping) and value != {"count": None, "height": None, "width": None, "trained": "language"}


@dataclass(frozen=True)
class Images:
    """Images of each row, all of one size, as the model's processor hands them on; and what is trained."""

    count: int
    height: int
    width: int
    trained: str  # "language": the vision tower and the projector are frozen and get no adapters; "all"

    @classmethod
    def read(cls, value: Any, where: object) -> Images | None:
        """From a scenario's field; its parts' values are checked elsewhere.

        Raises
        ------
        UserError
            If the size is missing.
        """
        if not asks_for_images(value):
            return None
        missing = [part for part in ("height", "width") if value[part] is None]
        if missing:
            raise UserError(
                f"`images` needs {' and '.join(missing)}: the number of patches follows from them.",
                where=where,
                found={part: given for part, given in value.items() if given is not None},
                allowed="pixels, as the model's processor hands them on",
                change=_IMAGES,
            )
        return cls(**{**value, "count": value["count"] or 1})

    def check(self, model: Mapping[str, Any], sequence_length: int, where: object) -> None:
        """Refuse a model without images, a family that is not known, a size that the model doesn't take."""
        kind, vision = model.get("model_type"), model.get("vision_config")
        if kind not in FAMILIES or not isinstance(vision, Mapping):
            problem = "this model has no part for them" if not vision else "images of this family are not known here"
            raise UserError(
                f"`images` can't be predicted: {problem}.",
                where=where,
                found=f"model_type {kind}",
                allowed=f"a configuration with its vision_config, of {', '.join(FAMILIES)}; or images null, which gives"
                " the language model alone",
                field="images",
                change={"images": None},
            )
        height, width = self._nearest(model)
        if (height, width) != (self.height, self.width):
            raise UserError(
                f"A model of type {kind} takes no images of this size: its processor makes others of them.",
                where=where,
                found=f"{self.height} x {self.width}",
                allowed=f"{height} x {width}" if kind in _FIXED else f"multiples of {self._step(model)}",
                change={"images": {"count": self.count, "height": height, "width": width, "trained": self.trained}},
            )
        needed = 1 + self.count * (self.tokens(model) + 1)
        if needed > sequence_length:
            raise UserError(
                f"`sequence_length: {sequence_length}` has no room for the images of a row, which are its tokens too.",
                where=where,
                found=f"{self.count} x {self.tokens(model)} tokens, with a token between images",
                allowed=f"{needed} or more; fewer or smaller images",
                change={"sequence_length": needed},
            )

    @classmethod
    def example(cls, model: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fields that add an image to each row of a model, whose size it takes; None where its images are not known."""
        if model.get("model_type") not in FAMILIES or not isinstance(model.get("vision_config"), Mapping):
            return None
        one = cls(1, *cls(1, _EXAMPLE_SIZE, _EXAMPLE_SIZE, "language")._nearest(model), "language")
        return {"images": {"count": 1, "height": one.height, "width": one.width}, "tokens": one.tokens(model)}

    def tokens(self, model: Mapping[str, Any]) -> int:
        """Tokens that one image takes in a row."""
        kind = model["model_type"]
        if kind == "gemma3":
            return model.get("mm_tokens_per_image") or 256
        if kind == "llava":
            patch = model["vision_config"].get("patch_size") or _FIXED_PATCH
            whole = model.get("vision_feature_select_strategy") == "full"  # with the token of the whole image
            return (self.height // patch) * (self.width // patch) + whole
        return (self.height // self._step(model)) * (self.width // self._step(model))

    def pixels(self, model: Mapping[str, Any], rows: int) -> tuple[int, ...]:
        """The shape of a batch's ``pixel_values``."""
        images = rows * self.count
        if model["model_type"] in _FIXED:
            return images, 3, self.height, self.width
        patch = self._patch(model)
        return images * (self.height // patch) * (self.width // patch), 3 * _FRAMES * patch * patch

    def grid(self, model: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Patches of one image in time, height and width, where the batch says them (``image_grid_thw``)."""
        if model["model_type"] in _FIXED:
            return None
        return 1, self.height // self._patch(model), self.width // self._patch(model)

    def _nearest(self, model: Mapping[str, Any]) -> tuple[int, int]:
        if model["model_type"] in _FIXED:
            size = model["vision_config"].get("image_size") or _FIXED_SIZE
            return size, size
        step = self._step(model)
        return max(step, round(self.height / step) * step), max(step, round(self.width / step) * step)

    def _patch(self, model: Mapping[str, Any]) -> int:
        return model["vision_config"].get("patch_size") or _GRIDS[model["model_type"]]

    def _step(self, model: Mapping[str, Any]) -> int:
        return self._patch(model) * (model["vision_config"].get("spatial_merge_size") or _MERGE)
