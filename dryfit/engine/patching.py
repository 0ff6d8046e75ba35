"""Attributes of modules and classes replaced for a while; and ``meta`` in the place of a device.

What a program builds before its first step is built on ``meta`` as a GPU would have it.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What is exchanged for the program's sake alone, in order: place, name, what was there, whether it was the place's own,
# and what is there instead.
_hidden: list[tuple[Any, str, Any, bool, Any]] = []
_depth = 0  # of :func:`as_it_was`


@contextmanager
def patched(attributes: list[tuple[Any, str, Any]], *, hidden: bool = False) -> Iterator[None]:
    """Put other objects in the place of attributes, as ``(module or class, name, object)``, for a while.

    ``hidden``: a compiler must not see them, and :func:`as_it_was` takes them away meanwhile.
    """
    entries = [
        (place, name, _current(place, name), name in vars(place), replacement)
        for place, name, replacement in attributes
    ]
    try:
        for place, name, _, _, replacement in entries:
            setattr(place, name, replacement)
        if hidden:
            _hidden.extend(entries)
        yield
    finally:
        if hidden:
            del _hidden[len(_hidden) - len(entries) :]
        for place, name, original, own, _ in entries:
            _put_back(place, name, original, own)


@contextmanager
def as_it_was() -> Iterator[None]:
    """What is exchanged for the program's sake is PyTorch's own inside; nested, the outermost counts."""
    global _depth
    if not _depth:
        for place, name, original, own, _ in reversed(_hidden):
            _put_back(place, name, original, own)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            for place, name, _, _, replacement in _hidden:
                setattr(place, name, replacement)


def _put_back(place: Any, name: str, original: Any, own: bool) -> None:
    if own:
        setattr(place, name, original)
    else:  # a class had it from its base, a module from the language, or nobody had it
        delattr(place, name)


def _current(place: Any, name: str) -> Any:
    if name in vars(place):
        return vars(place)[name]  # a class's static method as it stands there
    return getattr(place, name) if hasattr(place, name) else getattr(builtins, name, None)


class _Sorted(set):
    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))


def sorted_sets(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Patches for transformers' models that go through a set of words, such as Gemma 3's kinds of layers.

    Python hashes words otherwise in each process. So a step makes its tensors in one order or another, and what a GPU
    must have may differ by a segment; here it is always the same.
    """
    names = sorted({type(module).__module__ for module in model.modules()})
    return [
        (sys.modules[name], "set", _Sorted)
        for name in names
        if name.startswith("transformers.models.")
    ]


@contextmanager
def on_meta(target: str = "cuda") -> Iterator[None]:
    """Build a model, a batch and an optimizer on ``meta``: tensors without data, and the optimizer's own choices.

    PyTorch decides by the device's name whether an optimizer may take all tensors at once (``foreach``) or one kernel
    for everything (``fused``); here ``meta`` counts as ``target``, as it does while a step is traced.
    """
    with torch.device("meta"), patched(device_lists(target)):
        yield


def device_lists(target: str) -> list[tuple[Any, str, Any]]:
    """What to exchange so that PyTorch's lists of devices name ``meta`` beside ``target``.

    ``torch/utils/_foreach_utils.py`` and ``torch/optim/optimizer.py`` keep them; other modules import the functions.
    """
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    def beside(function: Callable[..., list[str]]) -> Callable[..., list[str]]:
        def devices(*args: Any) -> list[str]:
            names = function(*args)
            return [*names, "meta"] if target in names else names

        return devices

    support = (
        _foreach_utils._device_has_foreach_support
    )  # the CPU has it, though it is not in the list

    def has_foreach_support(device: torch.device) -> bool:
        return support(torch.device(target) if device.type == "meta" else device)

    new = {
        "_get_foreach_kernels_supported_devices": beside(
            _foreach_utils._get_foreach_kernels_supported_devices
        ),
        "_get_fused_kernels_supported_devices": beside(
            _foreach_utils._get_fused_kernels_supported_devices
        ),
        "_get_capturable_supported_devices": beside(optimizer._get_capturable_supported_devices),
        "_device_has_foreach_support": has_foreach_support,
    }
    places = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("torch.optim", "torch.nn.utils", "torch.utils._foreach_utils"))
        and module is not None
    ]
    return [
        (module, name, function)
        for module in places
        for name, function in new.items()
        if name in vars(module)
    ]
