"""Attributes of modules and classes replaced for a while."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched(attributes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put other objects in the place of attributes, as ``(module or class, name, object)``, for a while."""
    originals = [(place, name, _current(place, name), name in vars(place)) for place, name, _ in attributes]
    try:
        for place, name, replacement in attributes:
            setattr(place, name, replacement)
        yield
    finally:
        for place, name, original, own in originals:
            if own:
                setattr(place, name, original)
            else:  # a class had it from its base, a module from the language, or nobody had it
                delattr(place, name)


def _current(place: Any, name: str) -> Any:
    return getattr(place, name) if hasattr(place, name) else getattr(builtins, name, None)


class _Sorted(set):
    """A set in the order of its elements' texts."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))


def sorted_sets(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Patches for transformers' models that go through a set of words, such as Gemma 3's kinds of layers.

    Python hashes words otherwise in each process. So a step makes its tensors in one order or another, and what a GPU
    must have may differ by a segment; here it is always the same.
    """
    names = sorted({type(module).__module__ for module in model.modules()})
    return [(sys.modules[name], "set", _Sorted) for name in names if name.startswith("transformers.models.")]
