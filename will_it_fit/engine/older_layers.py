"""bitsandbytes' 4-bit layers as earlier versions had them.

Before 0.43.2 a layer kept its input, in an attribute of its node in the graph: it was not freed when the node had run,
but with the graph, which a loop holds by its loss until the next one is there. Before 0.43 weights were packed as fp16
whatever they were, so that each use of another dtype made a copy. Sources: bitsandbytes 0.42.0, 0.43.1 and 0.43.2,
autograd/_functions.py, MatMul4Bit, and nn/modules.py, Params4bit.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import TraceError
from .patching import patched

_FREES_INPUTS, _KEEPS_DTYPES = (0, 43, 2), (0, 43, 0)


@contextmanager
def layers_of(version: str | None) -> Iterator[None]:
    """Let 4-bit layers be those of a version of bitsandbytes; None: of the installed one."""
    if version is not None and not re.fullmatch(r"\d+(\.\d+){1,2}", version):
        raise TraceError(f"{version!r} is no version of bitsandbytes.", "Write it as 0.43.1.")
    numbers = tuple(int(part) for part in (version or "1.0").split("."))
    if numbers >= _FREES_INPUTS:
        yield
        return
    from bitsandbytes import functional
    from bitsandbytes.autograd import _functions

    def unpacked(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
        if numbers < _KEEPS_DTYPES:
            state = copy.copy(state)
            state.dtype = torch.float16
        return functional.dequantize_4bit(packed, state).to(dtype)

    class MatMul4Bit(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, out: None, bias: torch.Tensor | None, state: Any
        ) -> torch.Tensor:
            ctx.state, ctx.tensors = state, (inputs, packed)
            return torch.nn.functional.linear(inputs, unpacked(packed, state, inputs.dtype), bias)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple:
            gradient = torch.matmul(grad, unpacked(ctx.tensors[1], ctx.state, grad.dtype))
            of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
            return gradient, None, None, of_bias, None

    with patched([(_functions, "MatMul4Bit", MatMul4Bit)]):
        yield
