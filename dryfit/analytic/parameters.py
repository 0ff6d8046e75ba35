"""How many parameters a model has, from its configuration alone, without torch.

Families that :mod:`dryfit.analytic.families` and :mod:`dryfit.analytic.hybrid_weights` describe weight by weight are
counted there. The layers of DeepSeek-V4 are added up here. Its configuration has to name its sizes, as files that
transformers writes do.

Source: transformers 5.24, models/deepseek_v4/modeling_deepseek_v4.py.
"""

from collections.abc import Mapping
from typing import Any

from dryfit.analytic.hybrid_weights import RATIOS, Sizes, kinds_of_layers
from dryfit.analytic.setting import describe


def parameter_count(model: Mapping[str, Any]) -> int:
    """Parameters of a model.

    NotDescribed: for a family that is not known here, or a configuration that leaves a size out.
    """
    if model["model_type"] != "deepseek_v4":
        return describe(dict(model, quantization_config=None)).parameter_counts()["total"]
    c = Sizes(model)
    h, copies = c.hidden_size, c.hc_mult
    ends = (
        c.vocab_size * h * (1 if c.get("tie_word_embeddings", False) else 2)
        + h
        + copies * (copies * h + 1)
        + 1
    )
    kinds = kinds_of_layers(c)
    return ends + sum(_deepseek_v4(c, kinds[index]) for index in range(c.num_hidden_layers))


def _deepseek_v4(c: Sizes, kind: str) -> int:
    """One layer: latent queries, one key and value for all heads, compressed tokens, a stream of several copies."""
    h, n, d, narrow, rank = (
        c.hidden_size,
        c.num_attention_heads,
        c.head_dim,
        c.q_lora_rank,
        c.o_lora_rank,
    )
    attention = (
        n + h * narrow + narrow + narrow * n * d + h * d + d + rank * n * d + h * c.o_groups * rank
    )
    if kind != "sliding_attention":
        rates = c.get("compress_rates", {kind: rate for rate, kind in RATIOS.items()})
        rate, wide = rates[kind], 2 * d if kind == "compressed_sparse_attention" else d
        attention += wide * (rate + 2 * h) + d
    if kind == "compressed_sparse_attention":
        heads, small = c.index_n_heads, c.index_head_dim
        attention += 2 * small * (rate + 2 * h) + small + narrow * heads * small + h * heads
    width = c.get("intermediate_size", None) or c.moe_intermediate_size
    experts = (
        c.n_routed_experts * (3 * h * width + h) + 3 * h * c.get("n_shared_experts", 1) * width
    )
    copies = c.hc_mult
    return attention + experts + 2 * h + 2 * ((2 + copies) * copies * (copies * h + 1) + 3)
