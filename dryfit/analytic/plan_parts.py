"""Parts that the layers of several families share: their weights by name and dimension, and their sizes.

Symbols beside those of :mod:`dryfit.analytic.decoder`:

====  =====================================================
m, S  width of one expert, and of what every token goes through beside the experts
E, e  experts, and those of a token
y     linear attention: elements of a token's values; a state space: its inner width
x, X  linear attention: elements of a token's keys, and as often as there are heads of values
N     its heads; u, w: elements of a key and of a value
G, g  a state space: groups x state, and its state; w: elements of a head
A, B  queries and keys of full attention where it has heads of its own: J share keys, each D large
q, l  latent attention: width of its queries, and of its keys and values; z: elements of a head that are rotated
P, v  elements of a token's values, and of a head's
in    an indexer's heads; id, ix: elements of one and of all; chosen: keys that it chooses for a token, top at most
====  =====================================================

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.analytic.decoder import Heads, NotDescribed
from dryfit.analytic.families import Family
from dryfit.analytic.hybrids import Hybrid, Plan, Weight
from dryfit.scenario.model import size


class Sizes:
    """A configuration's sizes by name; one that is missing and has no usual value is an error that names it."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        found = size(self.model, name)
        if found is None:
            raise NotDescribed(f"the configuration does not say {name}, which its parameters depend on")
        return found

    def get(self, name: str, usual: Any) -> Any:
        """A size that files leave out, with what transformers takes then."""
        found = size(self.model, name)
        return usual if found is None else found

    def head(self) -> int:
        """Elements of an attention head."""
        return self.get("head_dim", None) or self.hidden_size // self.num_attention_heads


_LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}  # of Nemotron's older files
RATIOS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def kinds_of_layers(c: Sizes) -> list[str]:
    """What each layer is: listed, or by an older key from which transformers makes the list."""
    if listed := c.get("layer_types", None) or c.get("layers_block_type", None):
        return listed
    if pattern := c.get("hybrid_override_pattern", None):
        return [_LETTERS[letter] for letter in pattern]
    if ratios := c.get("compress_ratios", None):
        return [RATIOS[ratio] for ratio in ratios]
    every = c.full_attention_interval
    return ["linear_attention" if (index + 1) % every else "full_attention" for index in range(c.num_hidden_layers)]


def lfm_width(c: Sizes) -> int:
    """LFM2 takes two thirds of the configuration's width, rounded up to whole blocks."""
    width = c.get("intermediate_size", None) or c.block_ff_dim
    if c.get("block_auto_adjust_ff_dim", True):
        width = int(c.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        block = c.get("block_multiple_of", 256)
        width = block * -(-width // block)
    return width


def linear(
    name: str, outputs: str, inputs: str = "h", *, bias: bool = False, adapted: bool = True, reached: bool = True
) -> Weight:
    return Weight(name, "linear", (outputs, inputs), bias, adapted, reached)


def norms_of(*names: str, size: str = "h") -> tuple[Weight, ...]:
    return tuple(Weight(name, "norms", (size,)) for name in names)


def projections(
    heads: Heads, *, gated: bool = False, qkv: bool = False, output: bool = False, last: str = "o_proj"
) -> tuple[Weight, ...]:
    """Queries, keys and values, and the way back; ``gated``: the queries' matrix brings a gate too."""
    return (
        linear("q_proj", f"{heads.queries}+{heads.queries}" if gated else heads.queries, bias=qkv),
        linear("k_proj", heads.keys, bias=qkv),
        linear("v_proj", heads.values, bias=qkv),
        linear(last, "h", heads.out, bias=output),
    )


def mlp_of(
    width: str = "i", prefix: str = "", *, adapted: bool = True, names: str = "gate_proj up_proj down_proj"
) -> tuple[Weight, ...]:
    gate, up, down = names.split()
    return (
        linear(prefix + gate, width, adapted=adapted),
        linear(prefix + up, width, adapted=adapted),
        linear(prefix + down, "h", width, adapted=adapted),
    )


def experts_of(router: str = "router", *, gated: bool = True, inputs: str = "h") -> tuple[Weight, ...]:
    """A router of a group of weights, and all experts."""
    up = "gate_up_proj" if gated else "experts.up_proj"
    return (
        Weight("gate", router, ("E", "h")),
        Weight(up, "experts", ("E", "m+m" if gated else "m", inputs)),
        Weight("experts.down_proj", "experts", ("E", inputs, "m")),
    )


def state_space_parts(*, convolution: bool, normed: bool = True, adapted: bool = True) -> tuple[Weight, ...]:
    """A state space's weights; ``convolution``: whether it has a bias, ``adapted``: whether its last matrix is."""
    return (
        *(Weight(name, "other", ("N",)) for name in ("dt_bias", "A_log", "D")),
        Weight("conv1d", "other", ("y+G+G", "f"), bias=convolution),
        linear("in_proj", "y+y+G+G+N"),
        *(norms_of("norm", size="y") if normed else ()),
        linear("out_proj", "h", "y", adapted=adapted),
    )


def sizes_of(c: Sizes) -> dict[str, int]:
    """Symbols of attention, MLP and the ends of the model."""
    head, heads = c.head(), c.num_attention_heads
    groups = c.get("num_key_value_heads", None) or heads
    sizes = {"1": 1, "h": c.hidden_size, "V": c.vocab_size, "d": head, "H": heads}
    return sizes | {"K": groups, "a": heads * head, "k": groups * head, "i": c.get("intermediate_size", None) or 0}


def routed_sizes(c: Sizes, count: str, width: str, *, shared: int = 0) -> dict[str, int]:
    sizes = {"E": getattr(c, count), "e": c.get("num_experts_per_tok", None) or c.num_experts_per_token}
    return sizes | {"m": getattr(c, width), "S": shared}


def hybrid_of(
    c: Sizes,
    plans: Sequence[Plan],
    sizes: Mapping[str, int],
    *,
    norm: str = "rms",
    tied: bool = False,
    sdpa: bool = True,
    scaled: bool = False,
    **others: Any,
) -> Hybrid:
    """A decoder of plans; ``scaled``: whether its embedding is multiplied by a number."""
    return Hybrid(
        family=Family({}, norm=norm, sdpa=sdpa, scaled_embedding=scaled),
        model_type=c.model["model_type"],
        sizes={**sizes, "L": len(plans), "f": others.get("kernel", 4)},
        attention=(),
        mlp=(),
        tied=bool(c.get("tie_word_embeddings", tied)),
        activation=others.pop("activation", None) or str(c.get("hidden_act", "silu")),
        qk_norm=False,
        rotary=float(any(plan.rotary for plan in plans)),
        softcap=False,
        logit_softcap=bool(c.get("final_logit_softcapping", None)),
        embedding_dropout=0.0,
        residual_dropout=others.pop("residual_dropout", 0.0),
        attention_dropout=float(c.get("attention_dropout", others.pop("dropout", 0.0))),
        positions=0,
        window=0,
        experts=sizes.get("E", 0),
        plans=tuple(plans),
        **others,
    )


def rotated_share(c: Sizes, usual: float = 1.0) -> float:
    """The share of a head that is rotated."""
    rope = c.get("rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor") or c.get("partial_rotary_factor", usual))


BOTH_NORMS = (Weight("input_layernorm", "norms", ("h",)), Weight("post_attention_layernorm", "norms", ("h",)))


def latent_parts(c: Sizes) -> tuple[tuple[Weight, ...], dict[str, int], Heads]:
    """Weights, sizes and heads of attention through narrow vectors."""
    count, keys, rotated = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    head, value, narrow = keys + rotated, c.v_head_dim, c.get("q_lora_rank", None)
    sizes = {"H": count, "K": count, "d": head, "v": value, "a": count * head, "P": count * value}
    sizes |= {"k": count * head, "l": c.kv_lora_rank, "z": rotated, "q": narrow or 0, "F": count * (keys + value)}
    biased = c.get("attention_bias", False)
    queries = (linear("q_proj", "a"),)
    if narrow:
        queries = (
            linear("q_a_proj", "q", bias=biased),
            *norms_of("q_a_layernorm", size="q"),
            linear("q_b_proj", "a", "q"),
        )
    weights = (
        *queries,
        linear("kv_a_proj_with_mqa", "l+z", bias=biased),
        *norms_of("kv_a_layernorm", size="l"),
        linear("kv_b_proj", "F", "l"),
        linear("o_proj", "h", "P", bias=biased),
    )
    return weights, sizes, Heads(keys="a", values="P", out="P", value_head="v")
