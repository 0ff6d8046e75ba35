"""bitsandbytes' layers and optimizers on ``meta``: what quantizing leaves, what products allocate, earlier versions.

**8-bit products** (LLM.int8). The autograd function quantizes each row of the inputs, multiplies to 32-bit integers,
scales these to fp16, and casts to the inputs' dtype; backward unpacks the weight and multiplies in that dtype. The
function itself is bitsandbytes', so that what it keeps is what a GPU keeps: it holds its inputs outside of what
autograd saves, until the graph goes, and activation checkpointing does not let go of them. Columns of the inputs with a
value of 6 or more would be kept in 16 bits besides; on ``meta`` there are no values, and none are taken to be so large.
Sources: bitsandbytes 0.50 ``autograd/_functions.py``, ``MatMul8bitLt`` and ``MatMul8bitFp``; ``backends/cuda/ops.py``,
``int8_vectorwise_quant``, ``int8_linear_matmul``, ``int8_mm_dequant``; ``backends/default/ops.py``,
``int8_mixed_scaled_mm``; ``csrc/ops.cu``, ``igemmlt``, which gives cublasLt no workspace.

**Earlier 4-bit layers.** Before 0.43.2 a layer kept its input, in an attribute of its node in the graph: it was not
freed when the node had run, but with the graph, which a loop holds by its loss until the next one is there. Before 0.43
weights were packed as fp16 whatever they were, so that each use of another dtype made a copy. Sources: bitsandbytes
0.42.0, 0.43.1 and 0.43.2, autograd/_functions.py, MatMul4Bit, and nn/modules.py, Params4bit.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from . import costs
from .bitsandbytes_rules import NESTED_BLOCK, PAGED_FROM, packed
from .errors import TraceError
from .patching import patched

_FREES_INPUTS, _KEEPS_DTYPES = (0, 43, 2), (0, 43, 0)  # versions since when 4-bit layers do so


# --- what quantizing leaves, and the states of optimizers ---


def quantize_4bit(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give bitsandbytes' 4-bit layers on ``meta`` what quantizing would leave behind: packed weights and statistics.

    Parameters
    ----------
    module
        A ``Linear4bit``, or a model with such layers that are not packed yet.
    dtype
        That a layer's weight had, and is unpacked to; None: its own.
    """
    for layer in module.modules():
        if is_linear_4bit(layer) and layer.weight.quant_state is None:
            _pack(layer, dtype or layer.weight.dtype)


def is_linear_4bit(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' ``Linear4bit``, or a library's class of it; PEFT's wrapper has the same name."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes")
        for kind in type(layer).__mro__
    )


def quantize_8bit(module: nn.Module) -> None:
    """The same for the layers of LLM.int8: weights of one byte, and a scale for each row."""
    for layer in module.modules():
        by_bitsandbytes = type(layer).__module__.startswith("bitsandbytes")
        if (
            by_bitsandbytes
            and type(layer).__name__ == "Linear8bitLt"
            and layer.weight.is_floating_point()
        ):
            from bitsandbytes.nn import Int8Params

            packed = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
            scales = torch.empty(layer.out_features, dtype=torch.float32, device="meta")
            layer.weight = Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)


def _pack(layer: nn.Module, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    weight = layer.weight
    nested, storage = weight.compress_statistics, weight.quant_storage
    parts = packed(weight.numel(), nested=nested, block=weight.blocksize, storage=storage.itemsize)

    def empty(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(parts[name][1], dtype=dtype, device="meta")

    state = QuantState(
        absmax=empty("absmax", torch.uint8 if nested else torch.float32),
        shape=torch.Size((layer.out_features, layer.in_features)),
        dtype=dtype,
        blocksize=weight.blocksize,
        code=empty("code"),
        quant_type=weight.quant_type,
    )
    if nested:
        state.offset, state.nested = empty("offset").squeeze(), True
        state.state2 = QuantState(
            absmax=empty("nested_absmax"),
            code=empty("nested_code"),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    layer.weight = Params4bit(
        empty("weight", storage)[:, None],
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=nested,
        quant_type=weight.quant_type,
        quant_storage=storage,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state


def keep_paged_states_outside(optimizer: torch.optim.Optimizer) -> None:
    """Leave the states of one of bitsandbytes' paged optimizers out of the count.

    They live in CUDA's managed memory, which PyTorch's allocator knows nothing of; bitsandbytes takes it from its C
    library, which can't be loaded without a GPU.
    """

    def get_state_buffer(
        parameter: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        if parameter.numel() < PAGED_FROM:
            return torch.zeros_like(parameter, dtype=dtype)
        with _disable_current_modes():
            state = torch.zeros_like(parameter, dtype=dtype, device="meta")
        state.outside_the_allocator = True
        return state

    optimizer.get_state_buffer = get_state_buffer


# --- 8-bit products ---


def int8_products(target: str) -> list[tuple[Any, str, Any]]:
    """What to exchange so that 8-bit layers on ``meta`` run as on ``cuda`` or ``cpu``; nothing without bitsandbytes.

    Older versions of it lack the functions that are exchanged. Their 8-bit layers are refused, and all else is traced.
    """
    package = sys.modules.get("bitsandbytes")
    if package is None or not hasattr(package, "matmul"):
        return []
    place, name = {
        "cpu": (sys.modules.get("bitsandbytes.autograd._functions"), "MatMul8bitFp"),
        "cuda": (package.functional, "int8_vectorwise_quant"),
    }[target]
    if not hasattr(place, name):
        return [(package, "matmul", _refused)]
    if target == "cpu":
        return [(package, "matmul", _on_cpu(package))]
    return [
        (package.functional, "int8_vectorwise_quant", _quantized_rows),
        (torch.ops.bitsandbytes, "int8_mixed_scaled_mm", _product),
    ]


def _refused(*arguments: Any, **named: Any) -> None:
    version = importlib.metadata.version("bitsandbytes")
    raise TraceError(
        f"The 8-bit layers of bitsandbytes {version} have functions of their own, which this trace does not know.",
        "Install bitsandbytes 0.49 or newer, or quantize to 4 bits.",
    )


def _on_cpu(package: Any) -> Any:
    """``bitsandbytes.matmul``, which looks at the device's name to choose the function for training on the CPU."""
    function = sys.modules["bitsandbytes.autograd._functions"].MatMul8bitFp

    def matmul(
        inputs: torch.Tensor,
        weight: torch.Tensor,
        out: Any = None,
        state: Any = None,
        threshold: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return function.apply(inputs, weight, out, bias, state)

    return matmul


def _quantized_rows(
    inputs: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    rows = inputs.numel() // inputs.shape[-1]
    scales = torch.empty(rows, device=inputs.device, dtype=torch.float32)
    packed = torch.empty(inputs.shape, device=inputs.device, dtype=torch.int8)
    columns = None
    if threshold > 0.0:
        large = inputs.abs() >= threshold
        any_large = large.any()  # noqa: F841
        columns = torch.empty(0, device=inputs.device, dtype=torch.int64)
    costs.memory_kernel("int8_vectorwise_quant", inputs, packed)
    return packed, scales, columns


def _product(
    inputs: torch.Tensor,
    packed: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    weight_scales: torch.Tensor,
    columns: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product, and an empty tensor: no large columns of the inputs are computed apart."""
    kept = torch.empty(0, device=inputs.device, dtype=inputs.dtype)
    sums = torch.empty(
        (*packed.shape[:-1], weight.shape[0]), device=inputs.device, dtype=torch.int32
    )
    costs.product("int8_linear_matmul", packed, weight, sums)
    output = torch.empty_like(sums, dtype=torch.float16)
    costs.memory_kernel("int8_mm_dequant", sums, output)
    if bias is not None and bias.dtype != torch.float16:
        output.add_(bias)
    return output.to(inputs.dtype), kept


# --- earlier 4-bit layers ---


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
            ctx: Any,
            inputs: torch.Tensor,
            packed: torch.Tensor,
            out: None,
            bias: torch.Tensor | None,
            state: Any,
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
