"""How many parameters a model has whose step is not described, from its configuration alone, without torch.

Families that :mod:`dryfit.analytic.plans` and :mod:`dryfit.analytic.families` describe weight by weight are
counted there. Here each of the others is a function that adds up its layers. A configuration has to name its sizes, as
files that transformers writes do.

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dryfit.analytic.plan_parts import RATIOS, Sizes, kinds_of_layers
from dryfit.analytic.setting import describe

Layer = Callable[[Sizes, int], int]  # parameters of one layer, by its index


def parameter_count(model: Mapping[str, Any]) -> int:
    """Parameters of a model.

    Raises
    ------
    NotDescribed
        For a family that is not known here, or a configuration that leaves a size out.
    """
    kind = model["model_type"]
    if kind not in _LAYERS:
        return describe(dict(model, quantization_config=None)).parameter_counts()["total"]
    sizes = Sizes(model)
    h, tied = sizes.hidden_size, sizes.get("tie_word_embeddings", False)
    outside = sizes.vocab_size * h * (1 if tied else 2) + h + _OUTSIDE.get(kind, lambda sizes: 0)(sizes)
    return outside + sum(_LAYERS[kind](sizes, index) for index in range(sizes.num_hidden_layers))


# --- parts that families share --------------------------------------------------------------------------------------


def _experts(c: Sizes, count: int, width: int, shared: int = 0, matrices: int = 3) -> int:
    """A router and its experts; ``shared``: the width of what every token goes through."""
    h = c.hidden_size
    return count * (matrices * h * width + h) + matrices * h * shared


# --- families: one layer --------------------------------------------------------------------------------------------


def _deepseek_v4(c: Sizes, index: int) -> int:
    """Latent queries, one key and value for all heads, compressed tokens, and a residual stream of several copies."""
    h, n, d, narrow, kind = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank, kinds_of_layers(c)[index]
    rank = c.o_lora_rank
    attention = n + h * narrow + narrow + narrow * n * d + h * d + d + rank * n * d + h * c.o_groups * rank
    if kind != "sliding_attention":
        rates = c.get("compress_rates", {kind: rate for rate, kind in RATIOS.items()})
        rate, wide = rates[kind], 2 * d if kind == "compressed_sparse_attention" else d
        attention += wide * (rate + 2 * h) + d
    if kind == "compressed_sparse_attention":
        heads, small = c.index_n_heads, c.index_head_dim
        attention += 2 * small * (rate + 2 * h) + small + narrow * heads * small + h * heads
    width = c.get("intermediate_size", None) or c.moe_intermediate_size
    mlp = _experts(c, c.n_routed_experts, width, c.get("n_shared_experts", 1) * width)
    copies = c.hc_mult
    mixing = (2 + copies) * copies * (copies * h + 1) + 3
    return attention + mlp + 2 * h + 2 * mixing


def _deepseek_v4_outside(c: Sizes) -> int:
    return c.hc_mult * (c.hc_mult * c.hidden_size + 1) + 1


_LAYERS: dict[str, Layer] = {
    "deepseek_v4": _deepseek_v4,
}
# Beside embeddings, head and the last norm.
_OUTSIDE: dict[str, Callable[[Sizes], int]] = {"deepseek_v4": _deepseek_v4_outside}
