"""What CUDA's kernels allocate that the meta device's shape functions don't.

The trace sees each operator's outputs. On a GPU some operators also need memory of their own while they run, some are
fused where meta takes two steps, and cuBLAS keeps workspaces. Every row below is read in the source that it names,
none is fitted:

==============================  ==================================================================================
operator                        on CUDA, and where it says so
==============================  ==================================================================================
``_softmax_backward_data``      gradient times output as a tensor of its own first: ATen ``native/cuda/SoftMax.cu``,
                                ``softmax_backward_cuda_out`` (2.4 to 2.14)
``softmax``, ``log_softmax``    of half with ``dtype=float32``: one kernel with ``half_to_float``, no cast, only for
                                half: ATen ``native/SoftMax.cpp``, ``softmax`` and ``log_softmax``
``dropout``                     one kernel that keeps a mask of one byte an element instead of noise of the input's
                                dtype: ATen ``native/Dropout.cpp``, ``dropout``, ``is_fused_kernel_acceptable``
``embedding_dense_backward``    over 3,072 indices: sorted copies and fp32 partial sums: ATen ``native/cuda/
                                Embedding.cu``, ``EmbeddingBackwardKernel.cu``
matrix products                 a cuBLAS workspace for each thread that multiplies (forward, autograd): ATen
                                ``cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``: 8,519,680 bytes
                                (``:4096:2:16:8``), 32 MiB on compute capability 9.0
products with a bias            through cublasLt, 1 MiB more for each thread: ``parseCUDABlasLtWorkspaceSize``; ATen
                                ``native/cuda/Blas.cpp``, ``addmm_out_cuda_impl``
``bitsandbytes::gemm_4bit``     dequantizes the weight, for nested statistics the absmax twice: bitsandbytes 0.50
                                ``backends/cuda/ops.py``, ``_dequant_linear_fallback`` (its fused kernel takes over
                                for few tokens only: 1,536 at most, mostly under 128)
``scaled_dot_product_           the fused kernel that takes the tensors, else a formula: ATen ``native/transformers/
attention``                     attention.cpp``, ``cuda/sdp_utils.cpp``, ``sdp_utils_cpp.cpp``
memory-efficient attention      output, fp32 log-sum-exp for queries padded to 32; backward: gradients, fp32 delta,
                                and a workspace: ATen ``native/transformers/cuda/attention.cu``,
                                ``attention_backward.cu``, ``mem_eff_attention/kernel_forward.h``,
                                ``kernel_backward.h``, ``kernels/cutlassB.h``
FlashAttention-2                output, fp32 log-sum-exp; backward: gradients, fp32 row sums and query gradient with
                                the length padded to 128 and the head to 32, keys' and values' gradients for every
                                query head when they are grouped: ATen ``native/transformers/cuda/flash_attn/
                                flash_api.cpp``, ``mha_fwd``, ``mha_bwd``; the package flash-attn has the same
==============================  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from scripts.common.errors import UserError
from scripts.memory.core.autocast import attention_operands

MIB = 2**20
DEFAULT_CAPABILITY = (8, 0)  # of a card that the scenario doesn't name
_LT_WORKSPACE = MIB
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::gemm_4bit")


def workspace_bytes(capability: tuple[int, int]) -> int:
    """Bytes of a thread's cuBLAS workspace."""
    return 32 * MIB if capability == (9, 0) else 2 * 4096 * 1024 + 8 * 16 * 1024


class CudaKernels:
    """The memory that operators need on a card beside their outputs. One object for each trace.

    Parameters
    ----------
    capability
        Compute capability of the card, ``(7, 5)`` for a T4.
    """

    def __init__(self, capability: tuple[int, int] | None = None) -> None:
        self.capability = capability or DEFAULT_CAPABILITY
        self._workspaces: set[tuple[bool, str]] = set()

    def persistent(self, func: Any, args: Sequence, kwargs: dict | None = None) -> list[int]:
        """Return the bytes that this call is the first to need and that stay until the process ends."""
        name = func._schema.name
        if name not in _PRODUCTS:
            return []
        backward = torch._C._current_graph_task_id() >= 0  # the autograd thread has a handle of its own
        needed = [("cublas", workspace_bytes(self.capability))]
        if _has_bias(name, args, kwargs or {}):
            needed.append(("lt", _LT_WORKSPACE))
        new = [(kind, count) for kind, count in needed if (backward, kind) not in self._workspaces]
        self._workspaces.update((backward, kind) for kind, _ in new)
        return [count for _, count in new]

    def temporaries(self, func: Any, args: Sequence, kwargs: dict | None = None) -> tuple[list[int], list[int]]:
        """Return the bytes of what exists while the operator runs: allocated before its outputs, and after them.

        All of it is freed when the operator returns.
        """
        name = func._schema.name
        if name == "aten::_softmax_backward_data":  # a structured kernel: its output is there first
            return [], [args[0].numel() * args[0].element_size()]
        if name == "bitsandbytes::gemm_4bit":
            return _dequantized(args, kwargs or {}), []
        if name == "aten::embedding_dense_backward":
            return _embedding_backward(*args[:3]), []
        return [], []


def cpu_outputs(func: Any, args: Sequence, output: Any) -> Any:
    """What an operator returns on the CPU, where ``meta`` answers as a GPU would.

    Layer normalization keeps mean and deviation in the dtype of input and weight, not in fp32, unless the two differ:
    ATen ``native/layer_norm.cpp``, ``layer_norm_cpu``, ``param_scalar_type``.
    """
    if func._schema.name != "aten::native_layer_norm" or (args[2] is not None and args[2].dtype != args[0].dtype):
        return output
    normalized, *statistics = output
    return normalized, *(statistic.to(args[0].dtype) for statistic in statistics)


def _has_bias(name: str, args: Sequence, kwargs: dict) -> bool:
    if name == "bitsandbytes::gemm_4bit":
        return kwargs.get("bias") is not None or (len(args) > 6 and args[6] is not None)
    return name == "aten::addmm" and args[0].dim() == 1


def _dequantized(args: Sequence, kwargs: dict) -> list[int]:
    inputs, shape, absmax_8bit = args[0], args[2], kwargs.get("absmax_8bit")
    nested = [] if absmax_8bit is None else [absmax_8bit.numel() * 4] * 2
    return [*nested, prod(shape) * inputs.element_size()]


def _embedding_backward(grad: torch.Tensor, indices: torch.Tensor, words: int) -> list[int]:
    """Sorted and original indices, segment tables, and one fp32 row for each run of equal indices (10 at most).

    How many runs there are depends on the text; counted here as if every token were another word.
    """
    count = indices.numel()
    if count <= 3072:  # one kernel without temporaries
        return []
    segments = min(count, words)
    partial = segments + count // 10  # NROWS_PER_THREAD
    return [*[count * indices.element_size()] * 2, *[segments * 8] * 3, partial * grad.shape[-1] * 4]


@contextmanager
def dispatch(target: str, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Let functions on ``meta`` run the operators that ATen dispatches them to on ``cuda`` or ``cpu``.

    On both: attention. On CUDA also softmax of half in fp32, and dropout. The functions themselves are exchanged, since
    a function mode is off in the backward pass, where activation checkpointing runs the forward pass again.
    """
    functional = nn.functional
    exchanged = [(functional, "scaled_dot_product_attention", _attention(target, capability or DEFAULT_CAPABILITY))]
    if target == "cuda":
        exchanged.append((functional, "dropout", _dropout(functional.dropout)))
        for module in (torch, functional):
            for name, operator in (("softmax", torch._softmax), ("log_softmax", torch._log_softmax)):
                exchanged.append((module, name, _softmax(getattr(module, name), operator)))
    originals = [(module, name, getattr(module, name)) for module, name, _ in exchanged]
    try:
        for module, name, replacement in exchanged:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _softmax(original: Callable, operator: Callable) -> Callable:
    def softmax(input: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") is torch.float32 and input.dtype is torch.float16 and dim is not None:
            return operator(input, dim, True)
        return original(input, dim, *args, **kwargs)

    return softmax


def _dropout(original: Callable) -> Callable:
    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if training and not inplace and 0 < p < 1:
            return torch.native_dropout(input, p, True)[0]
        return original(input, p, training, inplace)

    return dropout


# --- attention ----------------------------------------------------------------------------------------------------


def _attention(target: str, capability: tuple[int, int]) -> Callable:
    """``scaled_dot_product_attention`` as ``target`` runs it. Shapes: batch, heads, tokens, head size."""
    formula = nn.functional.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        query, key, value = attention_operands(query, key, value)
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:  # convert_boolean_attn_mask
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
        choose = cuda_kernel if target == "cuda" else cpu_kernel
        kernel = choose(query, key, value, mask, dropout_p, capability)
        if kernel == SDPBackend.MATH:
            return formula(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if target == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
            )[0]
        if kernel == SDPBackend.FLASH_ATTENTION:
            return FlashAttention2.apply(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        if mask is not None and mask.shape[-1] % 8:  # pad_bias
            mask = nn.functional.pad(mask, (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
        return MemoryEfficientAttention.apply(query, key, value, mask, capability)

    return attention


def cuda_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    capability: tuple[int, int],
) -> SDPBackend:
    """Which kernel ``scaled_dot_product_attention`` takes on a card, among those that are enabled.

    ATen ``native/transformers/cuda/sdp_utils.cpp``: FlashAttention needs compute capability 8.0, 16-bit types, one head
    size for all of 256 at most, and no mask; the memory-efficient kernel takes no grouped keys and values, head sizes
    in whole 16 bytes, and bf16 from 8.0 on; else the plain formula.

    Raises
    ------
    UserError
        If the only kernels that are enabled can't take these tensors.
    """
    head, groups, half = query.shape[-1], query.shape[1] // key.shape[1], query.dtype != torch.float32
    flash = half and capability >= (8, 0) and head == value.shape[-1] and head <= 256 and mask is None
    if flash and torch.backends.cuda.flash_sdp_enabled():
        return SDPBackend.FLASH_ATTENTION
    aligned = all(size * query.element_size() % 16 == 0 for size in (head, value.shape[-1]))
    efficient = groups == 1 and aligned and (capability >= (8, 0) or query.dtype != torch.bfloat16)
    if efficient and torch.backends.cuda.mem_efficient_sdp_enabled():
        return SDPBackend.EFFICIENT_ATTENTION
    if torch.backends.cuda.math_sdp_enabled():
        return SDPBackend.MATH
    raise UserError(
        "The attention kernel that is asked for can't take this model's tensors.",
        where="attention",
        found=f"queries of {head} x {query.dtype}, values of {value.shape[-1]}, "
        f"{'a' if mask is not None else 'no'} mask, compute capability {capability[0]}.{capability[1]}",
        allowed="sdpa, which takes the kernel that fits, or eager",
        write="attention: sdpa",
    )


def cpu_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, dropout: float, capability: Any
) -> SDPBackend:
    """Which kernel it takes on the CPU (ATen ``sdp_utils_cpp.cpp``).

    The fused one takes one head size for all, no dropout, and no mask that is learned.
    """
    one_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
    fused = one_size and not dropout and (mask is None or not mask.requires_grad)
    return SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH


class MemoryEfficientAttention(torch.autograd.Function):
    """Allocates what PyTorch's memory-efficient kernel does. Shapes: batch, heads, tokens, head size."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        capability: tuple[int, int],
    ) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)
        sums = query.new_empty((batch, heads, _up(tokens, 32)), dtype=torch.float32)  # kAlignLSE
        ctx.save_for_backward(query, key, value, out, sums, bias)
        ctx.capability = capability
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        query, key, value, *_, bias = ctx.saved_tensors
        grad = grad.transpose(1, 2).contiguous()
        grads = [
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, key, value)
        ]
        batch, heads, tokens, _ = query.shape
        delta = query.new_empty((batch, heads, tokens), dtype=torch.float32)  # noqa: F841
        size = batch * heads * efficient_workspace(query, key, ctx.capability)
        workspace = query.new_empty(size, dtype=torch.uint8) if size else None  # noqa: F841
        of_bias = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        return *(x.transpose(1, 2) for x in grads), of_bias, None


def efficient_workspace(query: torch.Tensor, key: torch.Tensor, capability: tuple[int, int]) -> int:
    """Bytes for each head of the backward kernel's workspace (``workspace_size`` in kernel_backward.h).

    ``cutlassB.h`` lists the kernels by block sizes and largest head; the first that the card's shared memory holds is
    taken. The gradient of the query is always summed in fp32 (splitting the keys is enabled), those of key and value
    only where they don't fit the registers.
    """
    tokens, head, keys = query.shape[-2], query.shape[-1], key.shape[-2]
    rows, columns, in_registers = _efficient_block(query.dtype, head, capability)
    blocks = -(-tokens // rows) * -(-head // columns)
    count = blocks * (16 + rows * columns * 4)  # GradQTempStorage: lock, counter, padding, fp32 accumulator
    if not in_registers:
        count += 2 * -(-keys // columns) * columns * _up(head, rows) * 4
    return _up(count, 16)


def _efficient_block(dtype: torch.dtype, head: int, capability: tuple[int, int]) -> tuple[int, int, bool]:
    """Block of queries, block of keys, and whether key and value gradients stay in registers."""
    if dtype == torch.float32:
        return (64, 64, False)
    if head <= 64:
        return (64, 64, True)
    if capability < (8, 0):
        return (128, 64, head <= 128)
    if capability in ((8, 6), (8, 9), (12, 0)):  # 99 KB of shared memory: the block of 128 x 128 doesn't fit
        return (128, 64, True) if head <= 96 and capability != (12, 0) else (64, 64, False)
    return (128, 128, True) if head <= 128 else (128, 64, False)


class FlashAttention2(torch.autograd.Function):
    """Allocates what FlashAttention-2 does, grouped keys and values as they are. Shapes: batch, tokens, heads, head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, tokens, heads, _ = query.shape
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        query, key, value, _, _ = ctx.saved_tensors
        batch, tokens, heads, head = query.shape
        grad = grad.contiguous()
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        padded, wide = _up(tokens, 128), _up(head, 32 if head <= 128 else 64)
        row = query.new_empty((batch, heads, padded), dtype=torch.float32)  # noqa: F841
        sum_query = query.new_empty((batch, padded, heads, wide), dtype=torch.float32)  # noqa: F841
        if key.shape[2] != heads:
            spread = [x.new_empty((batch, x.shape[1], heads, head)) for x in (key, value)]  # noqa: F841
        return tuple(grads)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def flash_attention_package() -> str:
    """Register what stands in for the package flash-attn, which takes capped scores too; returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def flash(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = attention_operands(query, key, value)
        return FlashAttention2.apply(*(x.transpose(1, 2) for x in (query, key, value))), None

    name = "trace_fa2"  # transformers loads packages for names with "flash"
    AttentionInterface.register(name, flash)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name
