"""Images in the rows of a step: how many tokens each becomes, and what the batch holds for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dryfit.common.errors import UserError
from dryfit.scenario.description import ANY, described

_IMAGES = {"images": {"count": 1, "height": 896, "width": 896, "trained": "language"}}
# By families, after transformers' processors and `modeling_*.py` of each.
# A picture of one size becomes a square grid of patches; the default size is that of transformers' configuration.
_FIXED = ("gemma3", "llava")
_FIXED_SIZE, _FIXED_PATCH = 224, 14
# A picture of any size becomes patches, of which merge x merge together are a token; the usual patch.
_GRIDS = {
    "qwen2_vl": 14,
    "qwen2_5_vl": 14,
    "qwen3_vl": 16,
    "qwen3_vl_moe": 16,
    "qwen3_5": 16,
    "qwen3_5_moe": 16,
}
# A picture of any size becomes patches, which are filled up to the most that the model takes; pool x pool together are
# a token (models/gemma4/image_processing_gemma4.py).
_PADDED = {"gemma4": 16}
_POOL, _SOFT_TOKENS = 3, 280
_EXAMPLE_SIZE = 448  # pixels: few enough tokens for rows of 512
_MERGE, _FRAMES = 2, 2  # a picture counts as two frames
FAMILIES = (*_FIXED, *_GRIDS, *_PADDED)


@dataclass(frozen=True)
class Images:
    """Images of each row, all of one size, as the model's processor hands them on; and what is trained."""

    count: int = described("Images of a row; `null`: one.", least=1, nullable=True, example=1)
    height: int = described(
        "Pixels, as the model's processor hands them on; `null`: no images.",
        least=1,
        nullable=True,
        example=896,
    )
    width: int = described("Pixels, likewise.", least=1, nullable=True, example=896)
    trained: str = described(
        "`language`: the vision tower and the projector are frozen and get no adapters. `all`:"
        " the method's weights or adapters everywhere.",
        words=("language", "all"),
        default="language",
        closed_form=ANY,
    )

    @classmethod
    def read(cls, value: Mapping[str, Any], where: object) -> Images:
        """From a scenario's field; its parts' values are checked elsewhere.

        UserError: if the size is missing.
        """
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
            problem = (
                "this model has no part for them"
                if not vision
                else "images of this family are not known here"
            )
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
                allowed=f"{height} x {width}"
                if kind in _FIXED
                else f"multiples of {self._step(model)}",
                change={
                    "images": {
                        "count": self.count,
                        "height": height,
                        "width": width,
                        "trained": self.trained,
                    }
                },
            )
        if kind in _PADDED and self.tokens(model) > (most := self._most_tokens(model)):
            small = _EXAMPLE_SIZE // self._step(model) * self._step(model)
            raise UserError(
                f"A model of type {kind} takes no images of this size: its processor makes them smaller.",
                where=where,
                found=f"{self.height} x {self.width}, {self.tokens(model)} tokens",
                allowed=f"at most {most} tokens of {self._step(model)} x {self._step(model)} pixels",
                change={
                    "images": {
                        "count": self.count,
                        "height": small,
                        "width": small,
                        "trained": self.trained,
                    }
                },
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
        if model.get("model_type") not in FAMILIES or not isinstance(
            model.get("vision_config"), Mapping
        ):
            return None
        one = cls(1, *cls(1, _EXAMPLE_SIZE, _EXAMPLE_SIZE, "language")._nearest(model), "language")
        return {
            "images": {"count": 1, "height": one.height, "width": one.width},
            "tokens": one.tokens(model),
        }

    def tokens(self, model: Mapping[str, Any]) -> int:
        """Tokens that one image takes in a row."""
        kind = model["model_type"]
        if kind == "gemma3":
            return model.get("mm_tokens_per_image") or 256
        if kind == "llava":
            patch = model["vision_config"].get("patch_size") or _FIXED_PATCH
            whole = (
                model.get("vision_feature_select_strategy") == "full"
            )  # with the token of the whole image
            return (self.height // patch) * (self.width // patch) + whole
        return (self.height // self._step(model)) * (self.width // self._step(model))

    def pixels(self, model: Mapping[str, Any], rows: int) -> tuple[int, ...]:
        """The shape of a batch's ``pixel_values``."""
        images = rows * self.count
        if model["model_type"] in _FIXED:
            return images, 3, self.height, self.width
        patch = self._patch(model)
        if model["model_type"] in _PADDED:
            return images, self.patches(model)[2], 3 * patch * patch
        return images * (self.height // patch) * (self.width // patch), 3 * _FRAMES * patch * patch

    def patches(self, model: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Patches of one image in height and width, and how many the model takes with those that fill it up; None: the
        batch does not say where a patch is."""
        if model["model_type"] not in _PADDED:
            return None
        patch, pool = self._patch(model), self._pool(model)
        return self.height // patch, self.width // patch, self._most_tokens(model) * pool * pool

    def grid(self, model: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Patches of one image in time, height and width, where the batch says them (``image_grid_thw``)."""
        if model["model_type"] not in _GRIDS:
            return None
        return 1, self.height // self._patch(model), self.width // self._patch(model)

    def _nearest(self, model: Mapping[str, Any]) -> tuple[int, int]:
        if model["model_type"] in _FIXED:
            size = model["vision_config"].get("image_size") or _FIXED_SIZE
            return size, size
        step = self._step(model)
        return max(step, round(self.height / step) * step), max(
            step, round(self.width / step) * step
        )

    def _patch(self, model: Mapping[str, Any]) -> int:
        return model["vision_config"].get("patch_size") or (_GRIDS | _PADDED)[model["model_type"]]

    def _pool(self, model: Mapping[str, Any]) -> int:
        return model["vision_config"].get("pooling_kernel_size") or _POOL

    def _most_tokens(self, model: Mapping[str, Any]) -> int:
        return model.get("vision_soft_tokens_per_image") or _SOFT_TOKENS

    def _step(self, model: Mapping[str, Any]) -> int:
        if model["model_type"] in _PADDED:
            return self._patch(model) * self._pool(model)
        return self._patch(model) * (model["vision_config"].get("spatial_merge_size") or _MERGE)
