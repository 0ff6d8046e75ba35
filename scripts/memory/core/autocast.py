"""Mixed precision for tensors that autocast ignores: those on ``meta``.

``torch.autocast`` acts through dispatch keys of CPU and CUDA tensors. Here the same policy acts on the calls of
functions: operands of matrix products are cast to 16 bits, of numerically delicate functions to fp32, and the casts
of weights are kept until the forward pass ends, as autocast's cache keeps them.

Source of the lists: ATen ``autocast_mode.h``, ``AT_FORALL_LOWER_PRECISION_FP``, ``AT_FORALL_FP32``,
``AT_FORALL_FP32_SET_OPT_DTYPE``, ``AT_FORALL_PROMOTE`` (CUDA) and ``autocast_mode.cpp`` (CPU, which casts far fewer
functions to fp32); which casts are cached: ``cached_cast`` there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import tree_map

_LOWER = """
    addbmm addmm addmv attention_operands baddbmm bmm chain_matmul conv1d conv2d conv3d einsum grouped_mm linear matmul
    mm multi_dot mv prelu scaled_dot_product_attention __matmul__ __rmatmul__ _grouped_mm
"""
_FP32_CUDA = """
    acos asin cdist cosh cosine_similarity erfinv exp expm1 group_norm huber_loss kl_div l1_loss layer_norm log log10
    log1p log2 logsumexp mse_loss native_layer_norm nll_loss norm pow reciprocal renorm rsqrt sinh smooth_l1_loss
    softplus tan __pow__ __rpow__
"""
_FP32_RESULT_CUDA = "cumprod cumsum log_softmax prod softmax sum"  # asked for a result in fp32 instead
_FP32_CPU = "binary_cross_entropy grid_sampler mse_loss nll_loss polar prod quantile stft"
_PROMOTE_ALL = "cat index_copy stack"
_PROMOTE_CUDA = "addcdiv addcmul atan2 bilinear cross dot grid_sample scatter_add tensordot vdot"


def attention_operands(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value as a fused attention operator gets them: cast where autocast is emulated."""
    if has_torch_function(tensors):
        return handle_torch_function(attention_operands, tensors, *tensors)
    return tensors


class MetaAutocast(TorchFunctionMode):
    """Casts as autocast of ``device`` would.

    Parameters
    ----------
    dtype
        The 16-bit type.
    device
        Whose policy: ``cuda`` or ``cpu``.
    on_cast
        Called with each 16-bit copy of a weight that the cache keeps.

    Attributes
    ----------
    caching
        Whether casts of weights are kept. True in the forward pass. In the backward pass, where checkpointed blocks
        are recomputed, each block has a cache of its own that ends with it and holds nothing twice.
    """

    def __init__(self, dtype: torch.dtype, device: str, on_cast: Any = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.caching = True
        self._on_cast = on_cast
        self._cache: dict[int, torch.Tensor] = {}
        on_card = device == "cuda"
        self._policy = dict.fromkeys(_LOWER.split(), dtype)
        self._policy |= dict.fromkeys((_FP32_CUDA if on_card else _FP32_CPU).split(), torch.float32)
        self._fp32_result = set(_FP32_RESULT_CUDA.split()) if on_card else set()
        self._promote = set((_PROMOTE_ALL + " " + (_PROMOTE_CUDA if on_card else "")).split())
        self._off = 0

    def clear(self) -> None:
        """Forget the kept casts: the outermost autocast region has ended."""
        self._cache.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave dtypes alone, as a region with ``autocast(enabled=False)`` does."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def disable_in(self, module: nn.Module) -> list[Any]:
        """Turn off in a module's forward pass; returns the hooks' handles."""

        def before(*_: Any) -> None:
            self._off += 1

        def after(*_: Any) -> None:
            self._off -= 1

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if (
            not isinstance(value, torch.Tensor)
            or not value.is_floating_point()
            or value.dtype in (dtype, torch.float64)
        ):
            return value
        weight = value.is_leaf and value.requires_grad and not value._is_view() and value.dtype == torch.float32
        if not weight or dtype != self.dtype:
            return value.to(dtype)
        copy = self._cache.get(id(value))
        if copy is None:
            copy = value.to(dtype)
            if self._on_cast is not None:
                self._on_cast(copy)
            if self.caching:
                self._cache[id(value)] = copy
        return copy

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._off:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        dtype = self._policy.get(name)
        if dtype is None and name in self._promote:
            found = [
                item.dtype
                for item in torch.utils._pytree.tree_leaves((args, kwargs))
                if isinstance(item, torch.Tensor) and item.is_floating_point()
            ]
            dtype = torch.float32 if torch.float32 in found else None
        if name in self._fp32_result and args[0].is_floating_point() and kwargs.get("dtype") is None:
            return func(*args, **kwargs, dtype=torch.float32)
        if dtype is None or kwargs.get("dtype") is not None:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        return func(*args, **kwargs)
