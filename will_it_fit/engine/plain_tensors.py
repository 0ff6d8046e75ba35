"""The plain tensors that a tensor is made of.

Some tensors have no memory of their own: those that are divided among several GPUs, sparse ones, and subclasses that
quantize (torchao's 4-bit weights, optimizer states in 8 bits, float8). Who asks them for their storage gets that of the
tensor which they stand for, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor, on this GPU; for a plain one itself."""
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
        yield tensor
    elif hasattr(tensor, "_local_tensor"):
        yield from parts(tensor._local_tensor)
    elif made_of_others(type(tensor)):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    else:
        yield tensor


def made_of_others(kind: type) -> bool:
    """Whether tensors of a class consist of other tensors, to which their operators come down."""
    return hasattr(kind, "__tensor_flatten__")


def those_on_meta(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors on ``meta`` among an operator's arguments, in lists too."""
    for item in args:
        if isinstance(item, torch.Tensor):
            if item.is_meta:
                yield item
        elif isinstance(item, (tuple, list)):
            yield from those_on_meta(item)
