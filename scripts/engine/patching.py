"""Attributes of modules and classes replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(attributes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put other objects in the place of attributes, as ``(module or class, name, object)``, for a while."""
    originals = [(place, name, getattr(place, name), name in vars(place)) for place, name, _ in attributes]
    try:
        for place, name, replacement in attributes:
            setattr(place, name, replacement)
        yield
    finally:
        for place, name, original, own in originals:
            if own:
                setattr(place, name, original)
            else:  # a class had it from its base
                delattr(place, name)
