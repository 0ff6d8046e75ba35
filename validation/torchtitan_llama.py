"""torchtitan's Llama 3.1 of December 2024 (commit 9dec370), written from its settings, not run from its code.

RMSNorm in fp32, complex rotations, keys and values repeated for each query head, and the output head's scores in the
dtype that FSDP2 gathers; the loss casts them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import register_flop_formula

from dryfit.engine import cuda_rules
from dryfit.engine.costs import BACKWARD_ATTENTION


class LlamaSizes(NamedTuple):
    """Of a Llama: width, columns of the MLP, heads, heads of keys and values, layers, words."""

    width: int
    inner: int
    heads: int
    key_heads: int
    layers: int
    words: int = 128256


LLAMAS = {
    "8B": LlamaSizes(4096, 14336, 32, 8, 32),
    "70B": LlamaSizes(8192, 28672, 64, 8, 80),
    "405B": LlamaSizes(16384, 53248, 128, 8, 126),
}


# --- attention as one operator, which the policy of checkpointing can name; shapes: batch, heads, tokens, head size ---


@torch.library.custom_op("securecli::flash", mutates_args=())
def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("on `meta` alone")


@_flash.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("securecli::flash_backward", mutates_args=())
def _flash_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("on `meta` alone")


@_flash_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, head = query.shape
    padded, wide = cuda_rules.flash_padding(tokens, head)
    rows = query.new_empty((batch, heads, padded), dtype=torch.float32)
    sums = query.new_empty((batch, padded, heads, wide), dtype=torch.float32)
    return _like(query), _like(key), _like(value), rows, sums


_flash.one_kernel = _flash_backward.one_kernel = (
    True  # where a card is simulated, their shapes are all that runs
)


@register_flop_formula(torch.ops.securecli.flash)
def _flash_flops(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * query[0] * query[1] * query[2] * key[2] * query[3]  # causal: half of two products


@register_flop_formula(torch.ops.securecli.flash_backward)
def _flash_backward_flops(
    _: Any, query: tuple[int, ...], key: tuple[int, ...], *__: Any, **___: Any
) -> int:
    return int(BACKWARD_ATTENTION * _flash_flops(query, key))


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels' layout: batch, tokens, heads, head size."""
    return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, ...]:
    query, key, value, *_ = ctx.saved_tensors
    return _flash_backward(grad.transpose(1, 2).contiguous().transpose(1, 2), query, key, value)[:3]


_flash.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output)
)


def _one_operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _flash(query, key, value)[0]


def _any_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's function, which ``context_parallel`` exchanges."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def selective() -> Any:
    """What its selective checkpointing keeps: attention, and every second matrix product."""
    products: dict[bool, int] = defaultdict(int)

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        kept = operator is torch.ops.securecli.flash.default
        if operator is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            kept = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


# --- the model --------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(torch.pow(wide, 2).mean(-1, keepdim=True).add_(1e-5))
        return wide.mul(scale).type_as(hidden).mul(self.weight)


class _LlamaAttention(nn.Module):
    """The number of heads follows from the products' columns: tensor parallel divides them."""

    def __init__(self, sizes: LlamaSizes, kernel: Any) -> None:
        super().__init__()
        width, self.kernel = sizes.width, kernel
        self.head, self.groups = width // sizes.heads, sizes.heads // sizes.key_heads
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (
            nn.Linear(width, sizes.key_heads * self.head, bias=False) for _ in range(2)
        )

    def forward(self, hidden: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = hidden.shape
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        query, key, value = (x.view(batch, tokens, -1, self.head) for x in (query, key, value))
        query, key = (
            torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) for x in (query, key)
        )
        rotation = rotation[:tokens].view(1, tokens, 1, self.head // 2)
        query, key = (
            torch.view_as_real(x * rotation).flatten(3).type_as(hidden) for x in (query, key)
        )
        key, value = (self._repeated(x) for x in (key, value))
        mixed = self.kernel(*(x.transpose(1, 2) for x in (query, key, value)))
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, tokens, -1))

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, heads = x.shape[:3]
        groups = x.unsqueeze(3).expand(batch, tokens, heads, self.groups, self.head)
        return groups.reshape(batch, tokens, heads * self.groups, self.head)


class _FeedForward(nn.Module):
    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(sizes.width, sizes.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


class _Layer(nn.Module):
    def __init__(self, sizes: LlamaSizes, kernel: Any) -> None:
        super().__init__()
        self.attention, self.mlp = _LlamaAttention(sizes, kernel), _FeedForward(sizes)
        self.norm, self.norm_of_mlp = _Norm(sizes.width), _Norm(sizes.width)

    def forward(self, hidden: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm(hidden), rotation)
        return hidden + self.mlp(self.norm_of_mlp(hidden))


class Llama(nn.Module):
    """Layers ``first`` to ``last`` of it; with the embedding where it begins, with norm and head where it ends."""

    def __init__(
        self, sizes: LlamaSizes, tokens: int, *, whole_attention: bool, part: range | None = None
    ) -> None:
        super().__init__()
        part = range(sizes.layers) if part is None else part
        width, kernel = sizes.width, _one_operator if whole_attention else _any_kernel
        rotation = torch.empty(tokens, width // sizes.heads // 2, dtype=torch.complex64)
        self.register_buffer("rotation", rotation, persistent=False)
        self.embedding = nn.Embedding(sizes.words, width) if part.start == 0 else None
        self.layers = nn.ModuleList(_Layer(sizes, kernel) for _ in part)
        ends = part.stop == sizes.layers
        self.norm = _Norm(width) if ends else None
        self.head = nn.Linear(width, sizes.words, bias=False) if ends else None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Tokens (rows x tokens), or hidden states of the stage before (rows x tokens x width)."""
        hidden = given if self.embedding is None else self.embedding(given)
        for layer in self.layers:
            hidden = layer(hidden, self.rotation)
        return hidden if self.head is None else self.head(self.norm(hidden))
