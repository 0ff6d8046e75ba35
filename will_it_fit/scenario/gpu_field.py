"""A scenario's ``gpu``: a name, a size, or several of a kind, as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from will_it_fit.common.errors import UserError
from will_it_fit.common.schema import problems
from will_it_fit.scenario.description import MOST

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
        "context_mib": {"type": "number", "minimum": 0, "examples": [530]},
    },
}


def checked_gpu(value: Any, where: object) -> str | dict[str, Any] | None:
    """A GPU, or several of a kind, as a scenario says it.

    Returns
    -------
    str, dict or None
        A name (looked up in config/gpus.yaml by who needs the GPU), ``{vram_gib: number}`` or ``{name: text}``; with
        ``count`` where there are several, and ``context_mib``, what your card holds beside the allocator.

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
        return str(value)  # a GPU's number, `gpu: 4090`, which YAML reads as one
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
        gpu = {**gpu, "name": name} | ({"count": count} if count > 1 else {})
    return gpu["name"] if list(gpu) == ["name"] else gpu
