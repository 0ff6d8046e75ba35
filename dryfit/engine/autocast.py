"""Mixed precision for tensors that autocast ignores: those on ``meta``.

``torch.autocast`` acts through dispatch keys of CPU and CUDA tensors. Inside :func:`emulated` a region of it, whatever
device it names, makes the same policy act on calls of functions: operands of matrix products are cast to 16 bits, of
numerically delicate functions to fp32, and the casts of fp32 weights are kept until the outermost region ends, as
autocast's cache keeps them. Libraries that ask whether autocast is on are told so.

Source of the lists: ATen ``autocast_mode.h``, ``AT_FORALL_LOWER_PRECISION_FP``, ``AT_FORALL_FP32``,
``AT_FORALL_FP32_SET_OPT_DTYPE``, ``AT_FORALL_PROMOTE`` (CUDA) and ``autocast_mode.cpp`` (CPU, which casts far fewer
functions to fp32); which casts are cached: ``cached_cast`` there; when the cache goes: ``torch/amp/autocast_mode.py``,
``autocast.__exit__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp import autocast_mode
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .patching import patched

_LOWER = """
    addbmm addmm addmv attention_operands baddbmm bmm chain_matmul conv1d conv2d conv3d einsum linear matmul mm
    multi_dot mv prelu scaled_dot_product_attention __matmul__ __rmatmul__
"""
_FP32_CUDA = """
    acos asin cdist cosh cosine_similarity erfinv exp expm1 group_norm huber_loss kl_div l1_loss layer_norm log log10
    log1p log2 logsumexp mse_loss native_layer_norm nll_loss norm pow reciprocal renorm rsqrt sinh smooth_l1_loss
    softplus tan __pow__ __rpow__
"""
_FP32_RESULT_CUDA = (
    "cumprod cumsum log_softmax prod softmax sum"  # asked for a result in fp32 instead
)
_FP32_CPU = "binary_cross_entropy grid_sampler mse_loss nll_loss polar prod quantile stft"
_PROMOTE_ALL = "cat index_copy stack"
_PROMOTE_CUDA = "addcdiv addcmul atan2 bilinear cross dot grid_sample scatter_add tensordot vdot"


def attention_operands(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value as a fused attention operator gets them: cast where autocast is emulated."""
    if has_torch_function(tensors):
        return handle_torch_function(attention_operands, tensors, *tensors)
    return tensors


class MetaAutocast(TorchFunctionMode):
    """Casts as autocast of ``device`` would. :func:`emulated` turns it on and off.

    ``device``: whose policy: ``cuda`` or ``cpu``. ``on_cast``: called with each 16-bit copy of a weight that the cache
    keeps.
    """

    def __init__(self, device: str, on_cast: Callable[[torch.Tensor], None] | None = None) -> None:
        super().__init__()
        self.device = device
        self.enabled = False
        self.dtype = (
            torch.float16 if device == "cuda" else torch.bfloat16
        )  # what autocast takes when nothing is said
        self.caching = True
        self.nesting = 0
        self._on_cast = on_cast
        self._cache: dict[int, torch.Tensor] = {}
        on_card = device == "cuda"
        self._lower = frozenset(_LOWER.split())
        self._fp32 = frozenset((_FP32_CUDA if on_card else _FP32_CPU).split())
        self._fp32_result = frozenset(_FP32_RESULT_CUDA.split()) if on_card else frozenset()
        self._promote = frozenset((_PROMOTE_ALL + " " + (_PROMOTE_CUDA if on_card else "")).split())

    def enter(self, dtype: torch.dtype | None, enabled: bool, caching: bool | None) -> tuple:
        """Begin a region; returns what :meth:`leave` restores."""
        before = (self.enabled, self.dtype, self.caching)
        self.enabled, self.dtype = enabled, dtype or self.dtype
        self.caching = self.caching if caching is None else caching
        self.nesting += 1
        return before

    def leave(self, before: tuple) -> None:
        """End a region; the kept casts go with the outermost one."""
        self.nesting -= 1
        if not self.nesting:
            self._cache.clear()
        self.enabled, self.dtype, self.caching = before

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if (
            not isinstance(value, torch.Tensor)
            or not value.is_floating_point()
            or value.dtype in (dtype, torch.float64)
        ):
            return value
        weight = (
            value.is_leaf
            and value.requires_grad
            and not value._is_view()
            and value.dtype == torch.float32
        )
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

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.enabled:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in self._lower:
            dtype = self.dtype
        elif name in self._fp32:
            dtype = torch.float32
        elif name in self._fp32_result:
            if args[0].is_floating_point() and kwargs.get("dtype") is None:
                kwargs = kwargs | {"dtype": torch.float32}
            return func(*args, **kwargs)
        elif name in self._promote:
            dtypes = [item.dtype for item in tree_leaves((args, kwargs)) if _is_floating(item)]
            if torch.float32 not in dtypes:
                return func(*args, **kwargs)
            dtype = torch.float32
        elif name == "cross_entropy":
            return self._cross_entropy(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        if (
            kwargs.get("dtype") is not None or kwargs.get("out") is not None
        ):  # neither is autocast's
            return func(*args, **kwargs)
        with (
            torch._C.DisableTorchFunction()
        ):  # the last operand first: GCC evaluates the arguments of a call so
            leaves, tree = tree_flatten((args, kwargs))
            args, kwargs = tree_unflatten(
                [self._cast(leaf, dtype) for leaf in reversed(leaves)][::-1], tree
            )
            del leaves
        return func(*args, **kwargs)

    def _cross_entropy(
        self, input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The CPU's policy casts its input. CUDA's takes it for two operators (ATen ``LossNLL.cpp``), of which the
        log-softmax gives fp32.
        """
        if (
            input.dtype == torch.float32
            or not input.is_floating_point()
            or target.is_floating_point()
        ):
            return functional.cross_entropy(input, target, *args, **kwargs)
        names = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        options = dict(zip(names, args, strict=False)) | kwargs
        if options.pop("label_smoothing", 0.0) or self.device == "cpu":
            return functional.cross_entropy(input.float(), target, *args, **kwargs)
        logarithms = functional.log_softmax(input, 1 if input.dim() > 1 else 0, dtype=torch.float32)
        return functional.nll_loss(logarithms, target, **options)


def _is_floating(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.is_floating_point()


@contextmanager
def emulated(
    device: str, on_cast: Callable[[torch.Tensor], None] | None = None
) -> Iterator[MetaAutocast]:
    """Let ``torch.autocast`` act on tensors on ``meta`` as it does on ``device``, ``cuda`` or ``cpu``.

    The regions may name any device: a program on a machine without a GPU names another one than it will name later.
    """
    state = MetaAutocast(device, on_cast)
    kind = autocast_mode.autocast

    def start(
        self: Any,
        device_type: str,
        dtype: Any = None,
        enabled: bool = True,
        cache_enabled: Any = None,
    ) -> None:
        self.device, self.fast_dtype, self._enabled, self._cache_enabled = (
            device_type,
            dtype,
            enabled,
            cache_enabled,
        )

    def enter(self: Any) -> Any:
        self._before = state.enter(self.fast_dtype, self._enabled, self._cache_enabled)
        if self._enabled:
            state.__enter__()
        return self

    def leave(self: Any, *error: Any) -> bool:
        if self._enabled:
            state.__exit__(*error)
        state.leave(self._before)
        return False

    def is_enabled(device_type: str | None = None) -> bool:
        return state.enabled and (
            device_type is not None or device == "cuda"
        )  # without a name it asks for CUDA's

    places = [
        (kind, "__init__", start),
        (kind, "__enter__", enter),
        (kind, "__exit__", leave),
        (torch, "is_autocast_enabled", is_enabled),
        (torch, "is_autocast_cache_enabled", lambda: state.caching),
        (torch, "get_autocast_dtype", lambda device_type: state.dtype),
        (torch, "get_autocast_gpu_dtype", lambda: state.dtype),
        (torch.amp, "is_autocast_available", lambda device_type: True),
    ]
    with patched(places, hidden=True):
        yield state
