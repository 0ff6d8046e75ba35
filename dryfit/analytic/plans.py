"""The layers of models of 2025 and 2026, from the configuration alone: one function a family.

Here are those with linear attention, state spaces and short convolutions; the others stand in
:mod:`dryfit.analytic.attention_plans`. The symbols: :mod:`dryfit.analytic.plan_parts`.

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dryfit.analytic import attention_plans as attention
from dryfit.analytic.decoder import Heads, NotDescribed
from dryfit.analytic.hybrids import FP32, Hybrid, Plan, Weight
from dryfit.analytic.plan_parts import (
    BOTH_NORMS,
    Sizes,
    experts_of,
    hybrid_of,
    kinds_of_layers,
    latent_parts,
    lfm_width,
    linear,
    mlp_of,
    norms_of,
    projections,
    rotated_share,
    routed_sizes,
    sizes_of,
    state_space_parts,
)

FLA = frozenset({"fla", "causal-conv1d"})
MAMBA = frozenset({"mamba-ssm", "causal-conv1d"})


# --- linear attention -------------------------------------------------------------------------------------------------


def _qwen(c: Sizes) -> Hybrid:
    """Qwen3-Next, Qwen3.5: three layers of linear attention by the gated delta rule, one of gated attention."""
    old, routed = c.model["model_type"] == "qwen3_next", c.get("num_experts", None) is not None
    projected = [("in_proj_qkv", "x+x+y"), ("in_proj_z", "y"), ("in_proj_b", "N"), ("in_proj_a", "N")]
    if old:
        projected = [("in_proj_qkvz", "x+x+y+y"), ("in_proj_ba", "N+N")]
    delta = (
        *(Weight(name, "other", ("N",)) for name in ("dt_bias", "A_log")),
        Weight("conv1d", "other", ("x+x+y", "f")),
        *norms_of("norm", size="w"),
        *(linear(name, outputs) for name, outputs in projected),
        linear("out_proj", "h", "y"),
    )
    heads, keys = c.linear_num_value_heads, c.linear_num_key_heads
    u, w = c.linear_key_head_dim, c.linear_value_head_dim
    sizes = sizes_of(c) | {"N": heads, "u": u, "w": w, "x": keys * u, "X": heads * u, "y": heads * w}
    mlp, run = mlp_of(), "gated"
    if routed:
        mlp = (*experts_of(), *mlp_of("S", "shared_expert.", adapted=not old), linear("shared_expert_gate", "1"))
        sizes |= routed_sizes(c, "num_experts", "moe_intermediate_size", shared=c.shared_expert_intermediate_size)
        run = "routed_beside_gated"
    attention = (*projections(Heads(), gated=True), *norms_of("q_norm", "k_norm", size="d"))
    options = frozenset({"gated", "normed"})
    kinds = {
        "linear_attention": Plan("plain", "delta", run, (*delta, *mlp, *BOTH_NORMS), Heads(), rotary=0.0),
        "full_attention": Plan(
            "plain", "grouped", run, (*attention, *mlp, *BOTH_NORMS), Heads(), options, rotated_share(c, 0.25)
        ),
    }
    plans = [kinds[kind] for kind in kinds_of_layers(c)]
    kernel = c.get("linear_conv_kernel_dim", 4)
    return hybrid_of(c, plans, sizes, norm="gemma", kernel=kernel, packages=FLA, adapts_experts=old and routed)


def _olmo_hybrid(c: Sizes) -> Hybrid:
    """OLMo Hybrid: the gated delta rule after a norm, and OLMo's attention before one, with positions or without."""
    heads, keys, u, w = c.linear_num_value_heads, c.linear_num_key_heads, c.linear_key_head_dim, c.linear_value_head_dim
    sizes = sizes_of(c) | {"N": heads, "u": u, "w": w, "x": keys * u, "X": heads * u, "y": heads * w}
    delta = (
        Weight("dt_bias", "other", ("N",)),
        Weight("A_log", FP32, ("N",)),
        Weight("conv1d", "other", ("x+x+y", "f")),
        linear("delta.q_proj", "x"),
        linear("delta.k_proj", "x"),
        linear("delta.v_proj", "y"),
        linear("a_proj", "N"),
        linear("b_proj", "N"),
        linear("g_proj", "y"),
        *norms_of("o_norm", size="w"),
        linear("delta.o_proj", "h", "y"),
    )
    biased = c.get("attention_bias", False)
    attends = (*projections(Heads(), qkv=biased, output=biased), *norms_of("q_norm", size="a"))
    attends += (*norms_of("k_norm", size="k"), *mlp_of())
    attends += norms_of("post_attention_layernorm", "post_feedforward_layernorm")
    rotary = 1.0 if (c.get("rope_parameters", None) or {}).get("rope_theta") else 0.0
    negative = frozenset({"negative"} if c.get("linear_allow_neg_eigval", True) else ())
    kinds = {
        "linear_attention": Plan(
            "plain", "separate_delta", "gated", (*delta, *mlp_of(), *BOTH_NORMS), Heads(), negative, 0.0
        ),
        "full_attention": Plan("after", "grouped", "gated", attends, Heads(), frozenset({"rotated_in_fp32"}), rotary),
    }
    plans = [kinds[kind] for kind in kinds_of_layers(c)]
    return hybrid_of(c, plans, sizes, norm="gemma", kernel=c.get("linear_conv_kernel_dim", 4), packages=FLA)


# --- state spaces -----------------------------------------------------------------------------------------------------


def _mamba_sizes(c: Sizes, inner: int, heads: int, state: int, groups: int) -> dict[str, int]:
    return {"y": inner, "N": heads, "g": state, "G": groups * state, "w": inner // heads}


def _mamba_of(c: Sizes, inner: int | None = None) -> dict[str, int]:
    inner = inner or c.get("mamba_expand", 2) * c.hidden_size
    return _mamba_sizes(c, inner, c.mamba_n_heads, c.mamba_d_state, c.get("mamba_n_groups", 1))


def _bamba(c: Sizes) -> Hybrid:
    norms = norms_of("input_layernorm", "pre_ff_layernorm")
    space = state_space_parts(convolution=c.get("mamba_conv_bias", True))
    attends = c.get("attn_layer_indices", None) or ()
    attention = Plan(
        "plain", "grouped", "gated", (*projections(Heads()), *mlp_of(), *norms), Heads(), rotary=rotated_share(c)
    )
    mamba = Plan("plain", "state_space", "gated", (*space, *mlp_of(), *norms), Heads(), rotary=0.0)
    plans = [attention if index in attends else mamba for index in range(c.num_hidden_layers)]
    chunk, kernel = c.get("mamba_chunk_size", 256), c.get("mamba_d_conv", 4)
    return hybrid_of(c, plans, sizes_of(c) | _mamba_of(c), chunk=chunk, kernel=kernel, packages=MAMBA)


def _granite(c: Sizes) -> Hybrid:
    experts = c.get("num_local_experts", 0)
    sizes = sizes_of(c) | _mamba_of(c) | {"S": c.shared_intermediate_size}
    mlp = (linear("input_linear", "S+S"), linear("output_linear", "h", "S"))
    if experts:
        mlp = (*experts_of(), *mlp)
        sizes |= {"E": experts, "e": c.get("num_experts_per_tok", 8), "m": c.intermediate_size}
    run = "routed_beside_fused" if experts else "fused"
    rotary = rotated_share(c) if c.get("position_embedding_type", None) == "rope" else 0.0
    space = state_space_parts(convolution=c.get("mamba_conv_bias", True))
    kinds = {
        "full_attention": Plan(
            "scaled", "grouped", run, (*projections(Heads()), *mlp, *BOTH_NORMS), Heads(), rotary=rotary
        ),
        "linear_attention": Plan("scaled", "state_space", run, (*space, *mlp, *BOTH_NORMS), Heads(), rotary=0.0),
    }
    kinds |= {"attention": kinds["full_attention"], "mamba": kinds["linear_attention"]}
    plans = [kinds[kind] for kind in kinds_of_layers(c)]
    chunk, kernel = c.get("mamba_chunk_size", 256), c.get("mamba_d_conv", 4)
    return hybrid_of(
        c,
        plans,
        sizes,
        chunk=chunk,
        kernel=kernel,
        packages=MAMBA,
        scaled=True,
        scaled_logits=True,
        router="chosen_first",
    )


def _nemotron(c: Sizes) -> Hybrid:
    """One norm a layer, and one of four parts."""
    heads = c.mamba_num_heads
    sizes = sizes_of(c) | _mamba_sizes(c, heads * c.mamba_head_dim, heads, c.ssm_state_size, c.n_groups)
    norm, shared = norms_of("norm."), ()
    if c.get("n_routed_experts", None):
        width = c.get("n_shared_experts", 1) * c.moe_shared_expert_intermediate_size
        sizes |= routed_sizes(c, "n_routed_experts", "moe_intermediate_size", shared=width)
        shared = (linear("shared_experts.up_proj", "S"), linear("shared_experts.down_proj", "h", "S"))
    latent = c.get("moe_latent_size", None)
    narrow = (linear("fc1_latent_proj", "l"), linear("fc2_latent_proj", "h", "l")) if latent else ()
    sizes |= {"l": latent} if latent else {}
    experts = experts_of(FP32, gated=False, inputs="l" if latent else "h")
    space = state_space_parts(convolution=c.get("use_conv_bias", True), adapted=False)
    mlp = (linear("up_proj", "i"), linear("down_proj", "h", "i"))
    kinds = {
        "linear_attention": Plan("single", "state_space", "", (*space, *norm), Heads(), rotary=0.0),
        "full_attention": Plan("single", "grouped", "", (*projections(Heads()), *norm), Heads(), rotary=0.0),
        "moe": Plan("single", "", "routed_beside_squared", (*experts, *narrow, *shared, *norm), Heads(), rotary=0.0),
        "mlp": Plan("single", "", "squared", (*mlp, *norm), Heads(), rotary=0.0),
    }
    kinds |= {"attention": kinds["full_attention"], "mamba": kinds["linear_attention"]}
    plans = [kinds[kind] for kind in kinds_of_layers(c)]
    chunk, kernel = c.get("chunk_size", 128), c.get("conv_kernel", 4)
    return hybrid_of(c, plans, sizes, norm="gemma", chunk=chunk, kernel=kernel, packages=MAMBA, router="grouped_scores")


# --- short convolutions -----------------------------------------------------------------------------------------------


def _lfm(c: Sizes) -> Hybrid:
    routed = c.model["model_type"] == "lfm2_moe"
    heads = Heads()
    attention = (*projections(heads, last="out_proj"), *norms_of("q_layernorm", "k_layernorm", size="d"))
    convolution = (
        Weight("conv.conv", "other", ("h", "f"), bias=c.get("conv_bias", False)),
        linear("conv.in_proj", "h+h+h", bias=c.get("conv_bias", False)),
        linear("conv.out_proj", "h", bias=c.get("conv_bias", False)),
    )
    norms, sizes = norms_of("operator_norm", "ffn_norm"), sizes_of(c)
    sizes["i"] = c.intermediate_size if routed else lfm_width(c)
    sizes |= routed_sizes(c, "num_experts", "moe_intermediate_size") if routed else {}
    plans = []
    for index, kind in enumerate(kinds_of_layers(c)):
        expert = routed and index >= c.num_dense_layers
        mlp = experts_of() if expert else mlp_of(names="w1 w3 w2")
        mixer = (convolution, "short") if kind == "conv" else (attention, "grouped")
        options = frozenset() if kind == "conv" else frozenset({"normed"})
        rotary = 0.0 if kind == "conv" else 1.0
        run = "routed" if expert else "gated"
        plans.append(Plan("plain", mixer[1], run, (*mixer[0], *mlp, *norms), heads, options, rotary))
    kernel = c.get("conv_L_cache", 3)
    packages = frozenset({"causal-conv1d"})
    return hybrid_of(c, plans, sizes, tied=True, kernel=kernel, packages=packages, activation="silu", router="sigmoid")


def _kimi(c: Sizes) -> Hybrid:
    """Kimi-Linear: delta attention with a decay for each channel, latent attention without positions, experts."""
    latent, own, heads = latent_parts(c)
    count, head = c.linear_num_heads, c.linear_head_dim
    wide = count * head
    sizes = sizes_of(c) | own | {"N": count, "u": head, "w": head, "y": wide, "x": wide, "X": wide}
    width = c.get("num_shared_experts", 1) * c.moe_intermediate_size
    sizes |= routed_sizes(c, "num_experts", "moe_intermediate_size", shared=width)
    delta = (
        *(linear(f"delta.{name}_proj", "y") for name in "qkv"),
        Weight("conv1d", "other", ("y+y+y", "f")),
        Weight("dt_bias", FP32, ("y",)),
        Weight("A_log", "other", ("N",)),
        linear("f_a_proj", "u"),
        linear("f_b_proj", "y", "u"),
        linear("b_proj", "N"),
        linear("g_a_proj", "u"),
        linear("g_b_proj", "y", "u"),
        *norms_of("o_norm", size="u"),
        linear("delta.o_proj", "h", "y"),
    )
    plans = []
    for index, kind in enumerate(kinds_of_layers(c)):
        dense = c.mlp_layer_types[index] == "dense"
        mlp = mlp_of() if dense else (*experts_of(FP32), *mlp_of("S", "shared_experts."))
        mixer, weights = ("latent", latent) if kind == "full_attention" else ("kimi_delta", delta)
        run = "gated" if dense else "routed_beside"
        plans.append(Plan("plain", mixer, run, (*weights, *mlp, *BOTH_NORMS), heads, rotary=0.0))
    kernel = c.get("linear_conv_kernel_dim", 4)
    return hybrid_of(c, plans, sizes, kernel=kernel, packages=FLA, router="grouped_scores")


def _falcon(c: Sizes) -> Hybrid:
    """Falcon-H1: a state space and attention side by side in every layer."""
    inner = c.get("mamba_d_ssm", None) or c.get("mamba_expand", 2) * c.hidden_size
    space = state_space_parts(
        convolution=c.get("mamba_conv_bias", True), normed=c.get("mamba_rms_norm", False), adapted=False
    )
    weights = (*space, *projections(Heads()), *mlp_of(), *norms_of("input_layernorm", "pre_ff_layernorm"))
    plan = Plan("side_by_side", "", "", weights, Heads(), frozenset({"scaled_keys"}))
    chunk, kernel = c.get("mamba_chunk_size", 256), c.get("mamba_d_conv", 4)
    sizes = sizes_of(c) | _mamba_of(c, inner)
    others = {"chunk": chunk, "kernel": kernel, "packages": MAMBA, "scaled": True, "scaled_logits": True}
    return hybrid_of(c, [plan] * c.num_hidden_layers, sizes, **others)


def _jamba(c: Sizes) -> Hybrid:
    """Jamba: the first Mamba, attention without positions in some layers, experts in others."""
    inner = c.get("mamba_expand", 2) * c.hidden_size
    sizes = sizes_of(c) | {"y": inner, "g": c.mamba_d_state, "R": c.mamba_dt_rank}
    bias = c.get("mamba_proj_bias", False)
    space = (
        Weight("A_log", "other", ("y", "g")),
        Weight("D", "other", ("y",)),
        Weight("conv1d", "other", ("y", "f"), bias=c.get("mamba_conv_bias", True)),
        linear("in_proj", "y+y", bias=bias),
        linear("x_proj", "R+g+g", "y"),
        linear("dt_proj", "y", "R", bias=True),
        linear("out_proj", "h", "y", bias=bias),
        *norms_of("dt_layernorm", size="R"),
        *norms_of("b_layernorm", "c_layernorm", size="g"),
    )
    norms, plans = norms_of("input_layernorm", "pre_ff_layernorm"), []
    routed = {"E": c.num_experts, "e": c.get("num_experts_per_tok", 2), "m": c.intermediate_size}
    sizes |= routed if c.num_experts > 1 else {}
    for index in range(c.num_hidden_layers):
        attends = index % c.attn_layer_period == c.attn_layer_offset
        expert = c.num_experts > 1 and index % c.get("expert_layer_period", 2) == c.get("expert_layer_offset", 1)
        mlp, run = (experts_of(), "routed") if expert else (mlp_of(), "gated")
        mixer, weights = ("grouped", projections(Heads())) if attends else ("first_state_space", space)
        plans.append(Plan("plain", mixer, run, (*weights, *mlp, *norms), Heads(), rotary=0.0))
    return hybrid_of(c, plans, sizes, kernel=c.get("mamba_d_conv", 4), packages=MAMBA)


def _mamba2(c: Sizes) -> Hybrid:
    """Mamba 2 alone: a norm and a state space a layer."""
    inner, heads = c.get("expand", 2) * c.hidden_size, c.num_heads
    sizes = {"1": 1, "h": c.hidden_size, "V": c.vocab_size, "d": c.head_dim, "H": heads, "K": heads, "a": 0, "k": 0}
    sizes |= {"i": 0} | _mamba_sizes(c, inner, heads, c.state_size, c.n_groups)
    space = state_space_parts(convolution=c.get("use_conv_bias", True), adapted=False)
    wide = frozenset({"residual_in_fp32"} if c.get("residual_in_fp32", True) else ())
    plan = Plan("single", "state_space", "", (*space, *norms_of("norm.")), Heads(), wide, rotary=0.0)
    chunk, kernel = c.get("chunk_size", 256), c.get("conv_kernel", 4)
    return hybrid_of(c, [plan] * c.num_hidden_layers, sizes, chunk=chunk, kernel=kernel, packages=MAMBA)


def _lfm3(c: Sizes) -> Hybrid:
    """LFM 3: short convolutions and attention with a gate of each head; norms before and after."""
    bias, norms = c.get("conv_bias", False), norms_of("operator_norm", "ffn_norm")
    after = norms_of("post_operator_norm", "post_ffn_norm") if c.get("use_sandwich_norm", True) else ()
    convolution = (
        Weight("conv.conv", "other", ("h", "f"), bias=bias),
        linear("conv.in_proj", "h+h+h", bias=bias),
        linear("conv.out_proj", "h", bias=bias),
    )
    plans = []
    for kind in kinds_of_layers(c):
        heads = Heads(window=c.get("sliding_window", 256) if kind == "sliding_attention" else 0)
        gate = (linear("g_proj", "H"),) if c.get("use_attention_gate", True) else ()
        attends = (*projections(heads), *norms_of("q_norm", "k_norm", size="d"), *gate)
        mixer = ("short", convolution) if kind == "conv" else ("grouped", attends)
        weights = (*mixer[1], *mlp_of(names="w1 w3 w2"), *norms, *after)
        run = "between_norms" if after else "plain"
        plans.append(Plan(run, mixer[0], "gated", weights, heads, rotary=0.0 if kind == "conv" else 1.0))
    kernel, packages = c.get("conv_L_cache", 7), frozenset({"causal-conv1d"})
    return hybrid_of(c, plans, sizes_of(c), tied=True, kernel=kernel, packages=packages, activation="silu")


_HYBRIDS: dict[str, Callable[[Sizes], Hybrid]] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _qwen),
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite"), attention.deepseek),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), attention.sparse_deepseek),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _lfm),
    **dict.fromkeys(("olmo2", "olmo3"), attention.olmo),
    **dict.fromkeys(("ministral3", "seed_oss"), attention.like_llama),
    "bamba": _bamba,
    "ernie4_5_moe": attention.ernie,
    "exaone4": attention.exaone,
    "falcon_h1": _falcon,
    "gemma3n_text": attention.gemma_3n,
    "gemma4_text": attention.gemma,
    "glm4_moe": attention.glm,
    "gpt_oss": attention.gpt_oss,
    "granitemoehybrid": _granite,
    "jamba": _jamba,
    "kimi_linear": _kimi,
    "lfm3": _lfm3,
    "llama4_text": attention.llama4,
    "mamba2": _mamba2,
    "minimax": attention.minimax,
    "minimax_m2": attention.minimax_m2,
    "mistral4": attention.mistral4,
    "nemotron_h": _nemotron,
    "olmo_hybrid": _olmo_hybrid,
}


def hybrid(model: Mapping[str, Any]) -> Hybrid:
    """Describe a decoder of several kinds of layers.

    Raises
    ------
    NotDescribed
        For a family that is not known here, or a configuration that leaves a size out.
    """
    kind = model["model_type"]
    if kind not in _HYBRIDS:
        raise NotDescribed(f"the analytic estimate does not describe the architecture {kind}")
    return _HYBRIDS[kind](Sizes(model))
