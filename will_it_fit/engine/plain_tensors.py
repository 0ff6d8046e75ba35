"""The plain tensors that a tensor is made of.

Some tensors have no memory of their own: those that are divided among several GPUs, sparse ones, and subclasses that
quantize (torchao's 4-bit weights, optimizer states in 8 bits, float8). Who asks them for their storage gets that of the
tensor which they stand for, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

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
