"""bitsandbytes' products with 8-bit weights (LLM.int8) on ``meta``: what its code for CUDA or the CPU allocates.

Its autograd function quantizes each row of the inputs, multiplies to 32-bit integers, scales these to fp16, and casts
to the inputs' dtype; backward unpacks the weight and multiplies in that dtype. The function itself is bitsandbytes', so
that what it keeps is what a GPU keeps: it holds its inputs outside of what autograd saves, until the graph goes, and
activation checkpointing does not let go of them. Columns of the inputs with a value of 6 or more would be kept in
16 bits besides; on ``meta`` there are no values, and none are taken to be so large.

Sources: bitsandbytes 0.50 ``autograd/_functions.py``, ``MatMul8bitLt`` and ``MatMul8bitFp``; ``backends/cuda/ops.py``,
``int8_vectorwise_quant``, ``int8_linear_matmul``, ``int8_mm_dequant``; ``backends/default/ops.py``,
``int8_mixed_scaled_mm``; ``csrc/ops.cu``, ``igemmlt``, which gives cublasLt no workspace.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import torch

from . import costs
from .errors import TraceError


def products(target: str) -> list[tuple[Any, str, Any]]:
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
        inputs: torch.Tensor, weight: torch.Tensor, out: Any = None, state: Any = None, threshold: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        return function.apply(inputs, weight, out, bias, state)

    return matmul


def _quantized_rows(inputs: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, Any]:
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
    sums = torch.empty((*packed.shape[:-1], weight.shape[0]), device=inputs.device, dtype=torch.int32)
    costs.product("int8_linear_matmul", packed, weight, sums)
    output = torch.empty_like(sums, dtype=torch.float16)
    costs.memory_kernel("int8_mm_dequant", sums, output)
    if bias is not None and bias.dtype != torch.float16:
        output.add_(bias)
    return output.to(inputs.dtype), kept
