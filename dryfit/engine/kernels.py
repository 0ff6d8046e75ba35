"""What CUDA's kernels allocate that the meta device's shape functions don't.

The trace sees each operator's outputs. Where a GPU needs memory of its own for an operator, fuses what meta takes in
two steps, or keeps workspaces, :mod:`dryfit.engine.cuda_rules` says how much, and in which source that stands;
here it is applied to the operators as they run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from . import costs, cuda_rules
from .attention import DTYPES, attention_on, backward_temporaries
from .bitsandbytes_layers import int8_products
from .card import active_simulation
from .cuda_rules import DEFAULT_CAPABILITY
from .patching import patched

_BACKWARD_OF_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
)
_REDUCED_WHERE_THEY_STAND = (
    "aten::mse_loss",
    "aten::smooth_l1_loss",
    "aten::binary_cross_entropy",
    "aten::soft_margin_loss",
)
_BEGUN_AS_THEIR_INPUT = ("aten::im2col", "aten::col2im")
_SOFTMAX = ("aten::_softmax", "aten::_log_softmax")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::gemm_4bit")
_Temporaries = tuple[
    list[int], list[int]
]  # bytes of what is allocated before an operator's outputs, and after them


class CudaKernels:
    """The memory that operators need on a card beside their outputs. One object for each trace.

    ``capability``: compute capability of the card, ``(7, 5)`` for a T4. How many multiprocessors it has is the
    simulated card's answer; without one, the most that a card of this capability has. ``torch_version``: whose kernels:
    the installed PyTorch's by default.
    """

    def __init__(
        self, capability: tuple[int, int] | None = None, torch_version: str = torch.__version__
    ) -> None:
        self.capability = capability or DEFAULT_CAPABILITY
        simulation = active_simulation()
        self._processors = (
            simulation.card.multiprocessors
            if simulation
            else cuda_rules.most_processors(self.capability)
        )
        self._keeps_lt = cuda_rules.keeps_cublaslt_workspace(torch_version)
        self._softmax_keeps_input = cuda_rules.softmax_keeps_its_input(torch_version)
        self.stream = 0  # on which operators run: a library keeps workspaces for each
        self._workspaces: set[tuple[int, bool, str]] = set()

    def concerns(self, func: Any) -> bool:
        """Whether an operator may need something."""
        return self._rule(func) is not None or func._schema.name in _SOFTMAX

    def unknown(self, func: Any) -> str | None:
        """A warning where an operator takes memory that no rule knows."""
        return cuda_rules.unknown_temporaries(func._schema.name)

    def _rule(self, func: Any) -> Callable[[str, Sequence, dict], _Temporaries] | None:
        """What says the temporaries of an operator by its name and arguments; None: it has none."""
        name = func._schema.name
        kind = cuda_rules.kind_of(name, func._schema.overload_name)
        if kind is not None:
            return partial(self._of_reduction, func, kind)
        return partial(_RULES[name], self) if name in _RULES else None

    def persistent(self, func: Any, args: Sequence, kwargs: dict | None = None) -> Iterator[int]:
        """Yield the bytes that this call is the first to need and that stay until the process ends.

        They count as there once the next is asked for: an allocation may fail, and then the next call needs them.
        """
        name = func._schema.name
        if name not in _PRODUCTS:
            return
        backward = (
            torch._C._current_graph_task_id() >= 0
        )  # the autograd thread has a handle of its own
        needed = [("cublas", cuda_rules.cublas_workspace_bytes(self.capability))]
        if self._keeps_lt and _has_bias(name, args, kwargs or {}):
            needed.append(("lt", cuda_rules.CUBLASLT_WORKSPACE_BYTES))
        for kind, count in needed:
            if (self.stream, backward, kind) not in self._workspaces:
                yield count
                self._workspaces.add((self.stream, backward, kind))

    def forget_workspaces(self) -> None:
        """Somebody has freed them: the next call needs them again."""
        self._workspaces.clear()

    def temporaries(self, func: Any, args: Sequence, kwargs: dict | None = None) -> _Temporaries:
        """Return the bytes of what exists while the operator runs: allocated before its outputs, and after them.

        All of it is freed when the operator returns.
        """
        rule = self._rule(func)
        return ([], []) if rule is None else rule(func._schema.name, args, kwargs or {})

    def _of_product(self, name: str, args: Sequence, kwargs: dict) -> _Temporaries:
        if name == "bitsandbytes::gemm_4bit":
            return _dequantized(args, kwargs), []
        passing = not self._keeps_lt and _has_bias(name, args, kwargs)
        return [], [cuda_rules.CUBLASLT_WORKSPACE_BYTES] if passing else []

    def _of_attention(self, name: str, args: Sequence, _: dict) -> _Temporaries:
        return [], backward_temporaries(name, args, self.capability)

    def _of_softmax_backward(self, _: str, args: Sequence, __: dict) -> _Temporaries:
        return [], [
            args[0].numel() * args[0].element_size()
        ]  # a structured kernel: its output is there first

    def _of_losses(self, _: str, args: Sequence, __: dict) -> _Temporaries:
        """Each element's loss, where they are reduced."""
        if not (args[2] if len(args) > 2 else 1):
            return [], []
        return [], [
            prod(torch.broadcast_shapes(args[0].shape, args[1].shape)) * args[0].element_size()
        ]

    def _of_embedding_backward(self, _: str, args: Sequence, __: dict) -> _Temporaries:
        grad, indices, words = args[:3]
        return cuda_rules.embedding_backward_bytes(
            indices.numel(), words, grad.shape[-1], indices.element_size()
        ), []

    def _of_sort(self, _: str, args: Sequence, kwargs: dict) -> _Temporaries:
        given = args[0]
        dims = [
            value for value in args[1:] if isinstance(value, int) and not isinstance(value, bool)
        ]
        dim = kwargs.get("dim", dims[0] if dims else -1)
        row = given.shape[dim] if given.dim() else 1
        last = not given.dim() or given.stride(dim) == 1
        return [], cuda_rules.sort_bytes(given.numel(), row, given.element_size(), last=last)

    def _of_group_norm(self, name: str, args: Sequence, _: dict) -> _Temporaries:
        backward = name.endswith("_backward")
        samples, channels, positions, groups = args[5:9] if backward else args[3:7]
        return [], cuda_rules.group_norm_bytes(
            samples, channels, groups, positions, backward=backward
        )

    def _of_index_put(self, _: str, args: Sequence, kwargs: dict) -> _Temporaries:
        if not (args[3] if len(args) > 3 else kwargs.get("accumulate")):
            return [], []
        given = [index.shape for index in args[1] if index is not None]
        return cuda_rules.index_put_bytes(prod(torch.broadcast_shapes(*given))), []

    def _of_reduction(
        self, func: Any, kind: cuda_rules.ReductionKind, _: str, args: Sequence, kwargs: dict
    ) -> _Temporaries:
        """A copy where the input is summed in another dtype, and what the blocks of threads leave for each other."""
        if not args[0].dim() or args[0].is_complex():
            return [], []
        asked = {
            argument.name: value
            for argument, value in zip(func._schema.arguments, args, strict=False)
        } | kwargs
        given, dims, copied = args[0], asked.get("dim"), []
        dtype = asked.get("dtype") or given.dtype
        if kind is cuda_rules.SUM and not (dtype.is_floating_point or asked.get("dtype")):
            dtype = torch.int64
        strides = given.stride()
        if dtype != given.dtype and not (given.element_size() == 2 and dtype == torch.float32):
            copied = [
                given.numel() * dtype.itemsize
            ]  # ATen native/ReduceOpsUtils.h, make_reduction
            strides = torch.empty_like(given, dtype=dtype).stride()
        summed = dtype if copied else given.dtype
        every = range(given.dim())
        gone = every if dims is None or dims == [] else (dims,) if isinstance(dims, int) else dims
        left = cuda_rules.reduction_bytes(
            tuple(given.shape),
            strides,
            frozenset(every[index] for index in gone),
            summed.itemsize,
            dtype.itemsize,
            kind,
            self.capability,
            self._processors,
        )
        return [], [*copied, *left]

    def keep(self, func: Any, args: Sequence, output: Any) -> None:
        """Hold what the backward pass needs besides what autograd saves, as long as the output is there."""
        if self._softmax_keeps_input and func._schema.name in _SOFTMAX and args[0].requires_grad:
            weakref.finalize(output.untyped_storage(), _let_go, args[0].detach())


_RULES = {
    **dict.fromkeys(_PRODUCTS, CudaKernels._of_product),
    **dict.fromkeys(_BACKWARD_OF_ATTENTION, CudaKernels._of_attention),
    **dict.fromkeys(_REDUCED_WHERE_THEY_STAND[:2], CudaKernels._of_losses),
    "aten::_softmax_backward_data": CudaKernels._of_softmax_backward,
    "aten::embedding_dense_backward": CudaKernels._of_embedding_backward,
    "aten::sort": CudaKernels._of_sort,
    "aten::native_group_norm": CudaKernels._of_group_norm,
    "aten::native_group_norm_backward": CudaKernels._of_group_norm,
    **dict.fromkeys(
        ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_"), CudaKernels._of_index_put
    ),
}  # temporaries by the operator's name; what is not here and no reduction has none


def _let_go(tensor: torch.Tensor) -> None:
    """Called when nothing needs the tensor any more."""


def device_outputs(func: Any, args: Sequence, output: Any) -> Any:
    """What an operator returns on every device, where ``meta`` answers otherwise.

    These losses reduce into a tensor that was made for all elements and is then resized, so its storage stays large:
    ATen ``native/BinaryOps.cpp`` (``TORCH_META_FUNC(mse_loss)``), ``native/cuda/Loss.cu``, ``native/Loss.cpp``. So do
    ``unfold`` and ``fold``, whose output begins as large as their input: ``native/Im2Col.cpp``, ``native/Col2Im.cpp``,
    ``native/cuda/Im2Col.cu``, ``native/cuda/Col2Im.cu``.
    """
    if func._schema.name in _BEGUN_AS_THEIR_INPUT:
        return output if output.numel() >= args[0].numel() else _shrunk(args[0].shape, output)
    if func._schema.name not in _REDUCED_WHERE_THEY_STAND or output.dim() or not args[0].dim():
        return output
    return _shrunk(torch.broadcast_shapes(args[0].shape, args[1].shape), output)


def _shrunk(shape: Sequence[int], output: torch.Tensor) -> torch.Tensor:
    """An output in a storage that was made for a larger shape."""
    return torch.empty(shape, dtype=output.dtype, device="meta").resize_(output.shape)


def cpu_outputs(func: Any, args: Sequence, output: Any) -> Any:
    """What an operator returns on the CPU, where ``meta`` answers as a GPU would.

    Layer normalization keeps mean and deviation in the dtype of input and weight, not in fp32, unless the two differ:
    ATen ``native/layer_norm.cpp``, ``layer_norm_cpu``, ``param_scalar_type``.
    """
    if func._schema.name != "aten::native_layer_norm" or (
        args[2] is not None and args[2].dtype != args[0].dtype
    ):
        return device_outputs(func, args, output)
    normalized, *statistics = output
    return normalized, *(statistic.to(args[0].dtype) for statistic in statistics)


def _has_bias(name: str, args: Sequence, kwargs: dict) -> bool:
    if name == "bitsandbytes::gemm_4bit":
        return kwargs.get("bias") is not None or (len(args) > 6 and args[6] is not None)
    return name == "aten::addmm" and args[0].dim() == 1


def _dequantized(args: Sequence, kwargs: dict) -> list[int]:
    inputs, shape, absmax_8bit = args[0], args[2], kwargs.get("absmax_8bit")
    scales = 0 if absmax_8bit is None else absmax_8bit.numel()
    return cuda_rules.dequantization_bytes(prod(shape), inputs.element_size(), scales)


@contextmanager
def dispatch(
    target: str,
    capability: tuple[int, int] | None = None,
    torch_version: str = torch.__version__,
    platform: str = "linux",
) -> Iterator[None]:
    """Let functions on ``meta`` run the operators that ATen dispatches them to on ``cuda`` or ``cpu``.

    On both: attention, mish, and bitsandbytes' products with 8-bit weights. On CUDA also softmax of half in fp32,
    dropout and RMSNorm. The functions themselves are exchanged, since a function mode is off in the backward pass,
    where activation checkpointing runs the forward pass again.
    """
    functional = nn.functional
    shapes = torch._meta_registrations
    places = [
        (
            functional,
            "scaled_dot_product_attention",
            attention_on(target, capability or DEFAULT_CAPABILITY, platform),
        )
    ]
    if hasattr(shapes, "_meta_grouped_mm_common"):
        places.append((shapes, "_meta_grouped_mm_common", _grouped(shapes._meta_grouped_mm_common)))
    places += [*int8_products(target), (functional, "mish", _mish(functional.mish))]
    if target == "cuda":
        places.append((functional, "dropout", _dropout(functional.dropout)))
        if cuda_rules.fuses_rms_norm(torch_version):
            places += [
                (module, "rms_norm", _rms_norm(torch.rms_norm)) for module in (torch, functional)
            ]
        for module in (torch, functional):
            for name, operator in (
                ("softmax", torch._softmax),
                ("log_softmax", torch._log_softmax),
            ):
                places.append((module, name, _softmax(getattr(module, name), operator)))
    with patched(places, hidden=True):
        yield


def _softmax(original: Callable, operator: Callable) -> Callable:
    def softmax(
        input: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        direct = DTYPES.get(input.dtype) in cuda_rules.HALF_TO_FLOAT
        if kwargs.get("dtype") is torch.float32 and direct and dim is not None:
            return operator(input, dim, True)
        return original(input, dim, *args, **kwargs)

    return softmax


def _grouped(original: Callable) -> Callable:
    """The product of groups (experts) in every dtype: its shape function knows bf16 alone.

    In others CPU and CUDA multiply group by group into the same output: ATen ``native/GroupedMMUtils.h``,
    ``_grouped_mm_fallback``. Autocast leaves all of them as they are.
    """

    def grouped(mat_a: torch.Tensor, mat_b: torch.Tensor, **more: Any) -> torch.Tensor:
        if (
            more.get("scale_a") is not None
            or mat_a.dtype == torch.bfloat16
            or mat_a.dtype != mat_b.dtype
        ):
            return original(mat_a, mat_b, **more)
        make = torch._meta_registrations._create_grouped_mm_output_tensor
        return make(mat_a, mat_b, more.get("offs"), more.get("out_dtype"))

    return grouped


def _rms_norm(original: Callable) -> Callable:
    def rms_norm(
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        if weight is not None and weight.dtype != input.dtype:
            return original(input, list(normalized_shape), weight, eps)
        return FusedRmsNorm.apply(input, weight, len(normalized_shape))

    return rms_norm


class Mish(torch.autograd.Function):
    """One kernel each way on every device, where ``meta`` takes ``mish_backward`` apart (``math_mish_backward``).

    Of ATen's operators with a kernel for the CPU it is the only one that allocates otherwise on ``meta``, because it is
    ``CompositeImplicitAutograd`` there.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input)
        return torch.ops.aten.mish(input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (input,) = ctx.saved_tensors
        of_input = torch.empty_like(input)
        costs.memory_kernel("mish_backward", input, grad, input)
        return of_input


def _mish(original: Callable) -> Callable:
    def mish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return original(input, True) if inplace else Mish.apply(input)

    return mish


class FusedRmsNorm(torch.autograd.Function):
    """Allocates what ``_fused_rms_norm`` does (ATen ``cuda/layer_norm_kernel.cu``): it keeps a number for each row."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor | None, dims: int
    ) -> torch.Tensor:
        output = torch.empty_like(input, memory_format=torch.contiguous_format)
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        scale = input.new_empty((*input.shape[:-dims], *(1,) * dims), dtype=dtype)
        ctx.save_for_backward(input, weight, scale)
        costs.memory_kernel("rms_norm", input, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        input, weight, _ = ctx.saved_tensors
        of_input = torch.empty_like(input) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        costs.memory_kernel("rms_norm_backward", input, grad, input)
        return of_input, of_weight, None


def _dropout(original: Callable) -> Callable:
    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if training and not inplace and 0 < p < 1:
            return torch.native_dropout(input, p, True)[0]
        return original(input, p, training, inplace)

    return dropout
