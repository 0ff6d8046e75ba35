"""FlashAttention-3's module ``flash_attn_interface`` where a card is simulated: two operators that allocate as it does.

What it allocates stands in Dao-AILab/flash-attention, ``hopper/flash_api.cpp`` (``mha_fwd``, ``mha_bwd``), and has not
changed since its backward pass takes values of another head size (commit 37c816ab of April 2025). Wheels and kernels
of Hugging Face's hub are built from it. Their two operators are custom ones, so that a compiler sees them as one call
each; so are these. The hub's backward operator makes the gradients and returns them, as here; that of the main branch
gets them, which takes the same memory.

Shapes: batch, tokens, heads, head size; where ``cu_seqlens`` say where texts begin, without the batch.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from . import costs
from .card import active_simulation
from .cuda_rules import up
from .errors import TraceError
from .extensions import stands_in

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
_NAME, _SOURCE = "flash_attn_interface (FlashAttention-3)", "its hopper/flash_api.cpp"
_WINDOW = (-1, -1)


@torch.library.custom_op("dryfit::flash_attention_3", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],  # noqa: UP045, as PyTorch reads a schema
    causal: bool,
    left: int,
    right: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    stands_in(_NAME, _SOURCE)
    query, key, value = map(_with_dense_rows, (query, key, value))
    output, sums = _outputs(query, value, cu_seqlens)
    local = causal or left >= 0 or right >= 0
    texts = up(query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, 4)
    if cu_seqlens is not None:  # how each text is divided among the processors
        plan = query.new_empty(texts * (2 + (left < 0) + local) + 1, dtype=torch.int32)
    elif local:
        plan = query.new_empty(1 + texts * 2, dtype=torch.int32)  # noqa: F841
    costs.attention("flash", query, key, tokens_dim=-3, causal=causal, backward=False)
    return output, sums


@_forward.register_fake
def _(query, key, value, cu_seqlens, causal, left, right):
    return _outputs(query, value, cu_seqlens)


def _outputs(query: Any, value: Any, cu_seqlens: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out, and the logarithm of each query's sum."""
    dtype = torch.bfloat16 if query.dtype == torch.float8_e4m3fn else query.dtype
    *batch, tokens, heads, _ = query.shape
    output = query.new_empty((*batch, tokens, heads, value.shape[-1]), dtype=dtype)
    return output, query.new_empty((*batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("dryfit::flash_attention_3_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],  # noqa: UP045
    longest: int,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stands_in(_NAME, _SOURCE)
    grad, query, key, value, output = map(_with_dense_rows, (grad, query, key, value, output))
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    *_, heads, head = query.shape
    wide = _head_rounded(max(head, value.shape[-1]))
    left = left if left < longest - 1 else -1  # a window of everything is none
    rows, columns = _block(wide, causal or left >= 0 or right >= 0, causal and left < 0, softcap)
    if cu_seqlens is None:
        texts, apart = query.shape[0], (query.shape[0], heads, up(query.shape[1], rows))
        of_keys = (key.shape[0], key.shape[2], up(key.shape[1], columns))
    else:  # each text begins in a block of its own
        texts = cu_seqlens.shape[0] - 1
        apart = (heads, up(query.shape[0] + texts * rows, rows))
        of_keys = (key.shape[1], up(key.shape[0] + texts * columns, columns))
    scratch = [
        query.new_empty(apart, dtype=torch.float32) for _ in range(2)
    ]  # per row: gradient by output, sums
    scratch.append(query.new_empty((*apart, wide), dtype=torch.float32))
    if key.shape[-2] != heads:
        scratch += [query.new_empty((*of_keys, wide), dtype=torch.float32) for _ in range(2)]
    scratch.append(query.new_empty((-(-longest // rows), texts, heads), dtype=torch.int32))
    costs.attention("flash", query, key, tokens_dim=-3, causal=causal, backward=True)
    return grads


@_backward.register_fake
def _(grad, query, key, value, *rest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _head_rounded(head: int) -> int:
    return next(size for size in (64, 96, 128, 192, 256) if head <= size)


def _block(head: int, masked: bool, causal: bool, softcap: float) -> tuple[int, int]:
    """Rows of queries and of keys that a block of the backward pass takes."""
    capability = active_simulation().card.capability
    if capability >= (9, 0):
        rows = {
            64: 96 if causal and softcap > 0 else 128,
            128: 64 if masked or softcap > 0 else 80,
        }.get(head, 64)
        return rows, 128 if head <= 128 else 96 if head <= 192 else 80
    if capability in ((8, 6), (8, 9)):
        return 64 if head <= 192 else 32, {64: 128, 96: 128, 128: 96}.get(head, 64)
    return 128 if head <= 64 else 64, 128 if head <= 128 else 80 if head <= 192 else 64


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, cu_seqlens, longest, causal, window, softcap):
        output, sums = _forward(query, key, value, cu_seqlens, causal, *window)
        ctx.save_for_backward(query, key, value, output, sums, cu_seqlens)
        ctx.asked = longest, causal, *window, softcap
        ctx.set_materialize_grads(False)  # nobody needs a gradient by the sums
        return output, sums

    @staticmethod
    def backward(ctx, grad, *others):
        return *_backward(grad, *ctx.saved_tensors, *ctx.asked), *[None] * 5


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=_WINDOW,
    softcap=0.0,
    deterministic=False,
    return_attn_probs=False,
    **others,
):
    """Attention of texts of one length."""
    _refuse(others)
    output, sums = _Attention.apply(
        q, k, v, None, q.shape[1], causal, _window(window_size, causal), softcap
    )
    return (output, sums) if return_attn_probs else output


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=_WINDOW,
    softcap=0.0,
    deterministic=False,
    return_attn_probs=False,
    **others,
):
    """Attention of texts that stand one after the other."""
    _refuse(others)
    asked = causal, _window(window_size, causal), softcap
    output, sums = _Attention.apply(q, k, v, cu_seqlens_q, max_seqlen_q, *asked)
    return (output, sums) if return_attn_probs else output


def _window(asked, causal):
    return (asked[0], 0 if causal else asked[1])


def _refuse(others: dict) -> None:
    """Arguments that change what is allocated, and that are not modelled."""
    harmless = ("sm_margin", "pack_gqa", "q_descale", "k_descale", "v_descale", "attention_chunk")
    named = [name for name, given in others.items() if given and name not in harmless]
    if named and not (named == ["num_splits"] and others["num_splits"] == 1):
        raise TraceError(
            f"FlashAttention-3 is called with {', '.join(named)}, and what it allocates then is not modelled.",
            "Leave the argument out of the traced step.",
        )
