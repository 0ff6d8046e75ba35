"""Attention on ``meta``: which kernel a GPU or the CPU runs it with, and what that kernel allocates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import costs, cuda_rules
from .autocast import attention_operands
from .cuda_rules import up
from .errors import AttentionKernelError

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled),
    "mem_efficient": (
        SDPBackend.EFFICIENT_ATTENTION,
        torch.backends.cuda.mem_efficient_sdp_enabled,
    ),
    "math": (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
}


def attention_on(target: str, capability: tuple[int, int], platform: str) -> Callable:
    """``scaled_dot_product_attention`` as ``target`` runs it. Shapes: batch, heads, tokens, head size."""
    formula = nn.functional.scaled_dot_product_attention

    def choose(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, dropout: float
    ) -> SDPBackend:
        if target == "cuda":
            return cuda_kernel(query, key, value, mask, capability, platform)
        return cpu_kernel(query, key, value, mask, dropout)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **scale_and_groups: Any,
    ) -> torch.Tensor:
        query, key, value = attention_operands(query, key, value)
        if hasattr(
            query, "_local_tensor"
        ):  # DTensors: one operator, which context parallel answers by its ring
            kernel = choose(
                *(each._local_tensor for each in (query, key, value)), attn_mask, dropout_p
            )
            return by_operator(
                kernel, query, key, value, attn_mask, dropout_p, is_causal, **scale_and_groups
            )
        if not query.dtype == key.dtype == value.dtype:  # ATen attention.cpp, validate_sdpa_input
            raise RuntimeError(
                f"query, key and value differ in dtype ({query.dtype}, {key.dtype}, {value.dtype}), and no autocast is"
                " on"
            )
        mask = attn_mask
        as_given = mask is not None and not torch.is_autocast_enabled(
            target
        )  # it casts the mask, too
        if as_given and mask.dtype not in (
            torch.bool,
            torch.float32,
            query.dtype,
        ):  # validate_sdpa_input
            raise RuntimeError(
                "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype:"
                f" {mask.dtype} and query.dtype: {query.dtype} instead."
            )
        if mask is not None and mask.dtype == torch.bool:  # convert_boolean_attn_mask
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(
                mask.logical_not(), float("-inf")
            )
        kernel = choose(query, key, value, mask, dropout_p)
        if kernel == SDPBackend.MATH:
            if target == "cuda" and dropout_p > 0:
                return _formula_with_dropout(
                    query, key, value, mask, dropout_p, is_causal, **scale_and_groups
                )
            return formula(query, key, value, mask, dropout_p, is_causal, **scale_and_groups)
        if target == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query,
                key,
                value,
                dropout_p,
                is_causal,
                attn_mask=mask,
                scale=scale_and_groups.get("scale"),
            )[0]
        if _policies_decide():
            if kernel == SDPBackend.FLASH_ATTENTION:
                return torch.ops.aten._scaled_dot_product_flash_attention(
                    query, key, value, 0.0, is_causal
                )[0]
            keeps = any(each.requires_grad for each in (query, key, value))
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, keeps
            )[0]
        if kernel == SDPBackend.FLASH_ATTENTION:
            return FlashAttention2.apply(
                *(x.transpose(1, 2) for x in (query, key, value)), is_causal
            ).transpose(1, 2)
        if mask is not None and mask.shape[-1] % cuda_rules.BIAS_ALIGNMENT:
            mask = nn.functional.pad(mask, (0, -mask.shape[-1] % cuda_rules.BIAS_ALIGNMENT))[
                ..., : mask.shape[-1]
            ]
        return MemoryEfficientAttention.apply(query, key, value, mask, capability, is_causal)

    attention.__name__ = formula.__name__  # context_parallel exchanges the function by its own name
    return attention


def _formula_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """ATen's formula with dropout as CUDA has it: a mask of one byte a score, where ``meta`` keeps noise in fp32.

    ATen ``native/transformers/attention.cpp``, ``_scaled_dot_product_attention_math`` (16-bit operands become fp32
    unless ``allow_fp16_bf16_reduction_math_sdp`` is on); ``native/Dropout.cpp``, ``is_fused_kernel_acceptable``.
    """
    dtype = query.dtype
    if dtype.itemsize == 2 and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        query, key, value = (each.to(torch.float32) for each in (query, key, value))
    factor = abs(query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    query = query * factor
    if causal:
        ones = torch.ones(
            query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
        ).tril()
        mask = torch.zeros_like(ones, dtype=query.dtype).masked_fill_(
            ones.logical_not(), float("-inf")
        )
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key, value = (
            each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value)
        )
    product = torch.ops.aten.matmul.default  # inside one operator autocast changes nothing
    scores = product(query, key.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    scores = torch.ops.aten._safe_softmax.default(scores, -1)
    scores = torch.native_dropout(scores, dropout, True)[0]
    return product(scores, value).to(dtype)


def by_operator(
    kernel: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as the operator that ATen dispatches it to. Shapes: batch, heads, tokens, head size."""
    aten = torch.ops.aten
    if kernel == SDPBackend.EFFICIENT_ATTENTION:
        keeps = any(each.requires_grad for each in (query, key, value))
        operator = aten._scaled_dot_product_efficient_attention
        return operator(query, key, value, mask, keeps, dropout, causal, scale=scale)[0]
    if kernel == SDPBackend.MATH:
        operator = aten._scaled_dot_product_attention_math
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return operator(query, key, value, mask, dropout, causal, **options)[0]
    return aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, causal, scale=scale
    )[0]


def _policies_decide() -> bool:
    """Whether selective checkpointing looks at each operator, to keep its output or to run it again."""
    stack = _get_current_dispatch_mode_stack()
    return len(stack) > 1 and any(
        type(mode).__module__ == "torch.utils.checkpoint" for mode in stack
    )


def backward_temporaries(name: str, args: Sequence, capability: tuple[int, int]) -> list[int]:
    """What the fused kernels need for a backward pass beside the gradients; as the stand-ins below allocate it."""
    query, key = args[1], args[2]
    batch, heads, tokens, head = query.shape
    if "flash" in name:
        padded, wide = cuda_rules.flash_padding(tokens, head)
        sizes = [batch * heads * padded * 4, batch * padded * heads * wide * 4]
        grouped = (
            batch * key.shape[2] * heads * head * key.element_size() if key.shape[1] != heads else 0
        )
        return sizes + [grouped] * 2 if grouped else sizes
    keys, dtype = key.shape[2], DTYPES[query.dtype]
    workspace = (
        cuda_rules.efficient_workspace_bytes(tokens, keys, head, dtype, capability) * batch * heads
    )
    return [batch * heads * tokens * 4, *([workspace] if workspace else [])]


def cuda_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    capability: tuple[int, int],
    platform: str = "linux",
) -> SDPBackend:
    """Which kernel ``scaled_dot_product_attention`` takes on a GPU, among those that are built in and enabled.

    Raises :class:`AttentionKernelError` if the only kernels that are enabled can't take these tensors.
    """
    head = query.shape[-1]
    chosen = cuda_rules.attention_kernel(
        DTYPES[query.dtype],
        head,
        value.shape[-1],
        grouped=query.shape[1] != key.shape[1],
        masked=mask is not None,
        capability=capability,
        enabled=[name for name in cuda_rules.PLATFORMS[platform] if _BACKENDS[name][1]()],
    )
    if chosen is not None:
        return _BACKENDS[chosen][0]
    raise AttentionKernelError(
        f"The attention kernel that is asked for can't take this model's tensors: queries of {head} x {query.dtype},"
        f" values of {value.shape[-1]}, {'a' if mask is not None else 'no'} mask, compute capability"
        f" {capability[0]}.{capability[1]}{', PyTorch for Windows' if platform == 'windows' else ''}.",
        "Let scaled_dot_product_attention choose among all of its kernels.",
    )


def cpu_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, dropout: float
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
        causal: bool = False,
    ) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)
        sums = query.new_empty(
            (batch, heads, up(tokens, cuda_rules.LOG_SUM_EXP_ALIGNMENT)), dtype=torch.float32
        )
        ctx.save_for_backward(query, key, value, out, sums, bias)
        ctx.capability, ctx.causal = capability, causal
        costs.attention("mem_efficient", query, key, tokens_dim=2, causal=causal, backward=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        query, key, value, *_, bias = ctx.saved_tensors
        costs.attention("mem_efficient", query, key, tokens_dim=2, causal=ctx.causal, backward=True)
        grad = grad.transpose(1, 2).contiguous()
        grads = [
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
            for x in (query, key, value)
        ]
        batch, heads, tokens, _ = query.shape
        delta = query.new_empty((batch, heads, tokens), dtype=torch.float32)  # noqa: F841
        head, dtype = query.shape[-1], DTYPES[query.dtype]
        size = cuda_rules.efficient_workspace_bytes(
            tokens, key.shape[-2], head, dtype, ctx.capability
        )
        size *= batch * heads
        workspace = query.new_empty(size, dtype=torch.uint8) if size else None  # noqa: F841
        of_bias = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        return *(x.transpose(1, 2) for x in grads), of_bias, None, None


class FlashAttention2(torch.autograd.Function):
    """Allocates what FlashAttention-2 does, grouped keys and values as they are. Shapes: batch, tokens, heads, head."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool = True
    ) -> torch.Tensor:
        batch, tokens, heads, _ = query.shape
        out = torch.empty_like(query)  # laid out as the queries are: flash_api.cpp, mha_fwd
        sums = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.causal = causal
        costs.attention("flash", query, key, tokens_dim=1, causal=causal, backward=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        query, key, value, out, _ = ctx.saved_tensors
        costs.attention("flash", query, key, tokens_dim=1, causal=ctx.causal, backward=True)
        batch, tokens, heads, head = query.shape
        grad, out = (
            grad.contiguous(),
            out.contiguous(),
        )  # attention_backward.cu, _flash_attention_backward
        grads = [torch.empty_like(x) for x in (query, key, value)]
        padded, wide = cuda_rules.flash_padding(tokens, head)
        row = query.new_empty((batch, heads, padded), dtype=torch.float32)  # noqa: F841
        sum_query = query.new_empty((batch, padded, heads, wide), dtype=torch.float32)  # noqa: F841
        if key.shape[2] != heads:
            spread = [x.new_empty((batch, x.shape[1], heads, head)) for x in (key, value)]  # noqa: F841
        return *grads, None


def flash_attention_package() -> str:
    """Register what stands in for the package flash-attn, which takes capped scores too; returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def flash(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = attention_operands(query, key, value)
        return FlashAttention2.apply(*(x.transpose(1, 2) for x in (query, key, value))), None

    name = "trace_fa2"  # transformers loads packages for names with "flash"
    AttentionInterface.register(name, flash)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name
