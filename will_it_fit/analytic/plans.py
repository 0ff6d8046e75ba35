"""The layers of models of 2025 and 2026, from the configuration alone: one function a family.

Symbols beside those of :mod:`will_it_fit.analytic.decoder`:

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
====  =====================================================

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from will_it_fit.analytic.decoder import Heads, NotDescribed
from will_it_fit.analytic.families import Family
from will_it_fit.analytic.hybrids import FP32, Hybrid, Plan, Weight
from will_it_fit.analytic.parameters import Sizes, kinds_of_layers, lfm_width

_FLA = frozenset({"fla", "causal-conv1d"})
_MAMBA = frozenset({"mamba-ssm", "causal-conv1d"})


# --- parts that families share --------------------------------------------------------------------------------------


def _linear(name: str, outputs: str, inputs: str = "h", *, bias: bool = False, adapted: bool = True) -> Weight:
    return Weight(name, "linear", (outputs, inputs), bias, adapted)


def _norms(*names: str, size: str = "h") -> tuple[Weight, ...]:
    return tuple(Weight(name, "norms", (size,)) for name in names)


def _projections(
    heads: Heads, *, gated: bool = False, qkv: bool = False, output: bool = False, last: str = "o_proj"
) -> tuple[Weight, ...]:
    """Queries, keys and values, and the way back; ``gated``: the queries' matrix brings a gate too."""
    return (
        _linear("q_proj", f"{heads.queries}+{heads.queries}" if gated else heads.queries, bias=qkv),
        _linear("k_proj", heads.keys, bias=qkv),
        _linear("v_proj", heads.values, bias=qkv),
        _linear(last, "h", heads.out, bias=output),
    )


def _mlp(
    width: str = "i", prefix: str = "", *, adapted: bool = True, names: str = "gate_proj up_proj down_proj"
) -> tuple[Weight, ...]:
    gate, up, down = names.split()
    return (
        _linear(prefix + gate, width, adapted=adapted),
        _linear(prefix + up, width, adapted=adapted),
        _linear(prefix + down, "h", width, adapted=adapted),
    )


def _experts(router: str = "router", *, gated: bool = True, inputs: str = "h") -> tuple[Weight, ...]:
    """A router of a group of weights, and all experts."""
    up = "gate_up_proj" if gated else "experts.up_proj"
    return (
        Weight("gate", router, ("E", "h")),
        Weight(up, "experts", ("E", "m+m" if gated else "m", inputs)),
        Weight("experts.down_proj", "experts", ("E", inputs, "m")),
    )


def _state_space(*, convolution: bool, normed: bool = True, adapted: bool = True) -> tuple[Weight, ...]:
    """A state space's weights; ``convolution``: whether it has a bias, ``adapted``: whether its last matrix is."""
    return (
        *(Weight(name, "other", ("N",)) for name in ("dt_bias", "A_log", "D")),
        Weight("conv1d", "other", ("y+G+G", "f"), bias=convolution),
        _linear("in_proj", "y+y+G+G+N"),
        *(_norms("norm", size="y") if normed else ()),
        _linear("out_proj", "h", "y", adapted=adapted),
    )


def _sizes(c: Sizes) -> dict[str, int]:
    """Symbols of attention, MLP and the ends of the model."""
    head, heads = c.head(), c.num_attention_heads
    groups = c.get("num_key_value_heads", None) or heads
    sizes = {"1": 1, "h": c.hidden_size, "V": c.vocab_size, "d": head, "H": heads}
    return sizes | {"K": groups, "a": heads * head, "k": groups * head, "i": c.get("intermediate_size", None) or 0}


def _routed(c: Sizes, count: str, width: str, *, shared: int = 0) -> dict[str, int]:
    sizes = {"E": getattr(c, count), "e": c.get("num_experts_per_tok", None) or c.num_experts_per_token}
    return sizes | {"m": getattr(c, width), "S": shared}


def _hybrid(
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
        residual_dropout=0.0,
        attention_dropout=float(c.get("attention_dropout", 0.0)),
        positions=0,
        window=0,
        experts=sizes.get("E", 0),
        plans=tuple(plans),
        **others,
    )


def _partial(c: Sizes, usual: float = 1.0) -> float:
    """The share of a head that is rotated."""
    rope = c.get("rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor") or c.get("partial_rotary_factor", usual))


_BOTH = _norms("input_layernorm", "post_attention_layernorm")


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
        *_norms("norm", size="w"),
        *(_linear(name, outputs) for name, outputs in projected),
        _linear("out_proj", "h", "y"),
    )
    heads, keys = c.linear_num_value_heads, c.linear_num_key_heads
    u, w = c.linear_key_head_dim, c.linear_value_head_dim
    sizes = _sizes(c) | {"N": heads, "u": u, "w": w, "x": keys * u, "X": heads * u, "y": heads * w}
    mlp, run = _mlp(), "gated"
    if routed:
        mlp = (*_experts(), *_mlp("S", "shared_expert.", adapted=not old), _linear("shared_expert_gate", "1"))
        sizes |= _routed(c, "num_experts", "moe_intermediate_size", shared=c.shared_expert_intermediate_size)
        run = "routed_beside_gated"
    attention = (*_projections(Heads(), gated=True), *_norms("q_norm", "k_norm", size="d"))
    options = frozenset({"gated", "normed"})
    kinds = {
        "linear_attention": Plan("plain", "delta", run, (*delta, *mlp, *_BOTH), Heads(), rotary=0.0),
        "full_attention": Plan(
            "plain", "grouped", run, (*attention, *mlp, *_BOTH), Heads(), options, _partial(c, 0.25)
        ),
    }
    plans = [kinds[kind] for kind in kinds_of_layers(c)]
    kernel = c.get("linear_conv_kernel_dim", 4)
    return _hybrid(c, plans, sizes, norm="gemma", kernel=kernel, packages=_FLA, adapts_experts=old and routed)


# --- state spaces -----------------------------------------------------------------------------------------------------


def _mamba_sizes(c: Sizes, inner: int, heads: int, state: int, groups: int) -> dict[str, int]:
    return {"y": inner, "N": heads, "g": state, "G": groups * state, "w": inner // heads}


def _mamba_of(c: Sizes, inner: int | None = None) -> dict[str, int]:
    inner = inner or c.get("mamba_expand", 2) * c.hidden_size
    return _mamba_sizes(c, inner, c.mamba_n_heads, c.mamba_d_state, c.get("mamba_n_groups", 1))


def _bamba(c: Sizes) -> Hybrid:
    norms = _norms("input_layernorm", "pre_ff_layernorm")
    space = _state_space(convolution=c.get("mamba_conv_bias", True))
    attends = c.get("attn_layer_indices", None) or ()
    attention = Plan(
        "plain", "grouped", "gated", (*_projections(Heads()), *_mlp(), *norms), Heads(), rotary=_partial(c)
    )
    mamba = Plan("plain", "state_space", "gated", (*space, *_mlp(), *norms), Heads(), rotary=0.0)
    plans = [attention if index in attends else mamba for index in range(c.num_hidden_layers)]
    chunk, kernel = c.get("mamba_chunk_size", 256), c.get("mamba_d_conv", 4)
    return _hybrid(c, plans, _sizes(c) | _mamba_of(c), chunk=chunk, kernel=kernel, packages=_MAMBA)


def _granite(c: Sizes) -> Hybrid:
    experts = c.get("num_local_experts", 0)
    sizes = _sizes(c) | _mamba_of(c) | {"S": c.shared_intermediate_size}
    mlp = (_linear("input_linear", "S+S"), _linear("output_linear", "h", "S"))
    if experts:
        mlp = (*_experts(), *mlp)
        sizes |= {"E": experts, "e": c.get("num_experts_per_tok", 8), "m": c.intermediate_size}
    run = "routed_beside_fused" if experts else "fused"
    rotary = _partial(c) if c.get("position_embedding_type", None) == "rope" else 0.0
    space = _state_space(convolution=c.get("mamba_conv_bias", True))
    kinds = {
        "full_attention": Plan(
            "scaled", "grouped", run, (*_projections(Heads()), *mlp, *_BOTH), Heads(), rotary=rotary
        ),
        "linear_attention": Plan("scaled", "state_space", run, (*space, *mlp, *_BOTH), Heads(), rotary=0.0),
    }
    kinds |= {"attention": kinds["full_attention"], "mamba": kinds["linear_attention"]}
    plans = [kinds[kind] for kind in kinds_of_layers(c)]
    chunk, kernel = c.get("mamba_chunk_size", 256), c.get("mamba_d_conv", 4)
    return _hybrid(
        c,
        plans,
        sizes,
        chunk=chunk,
        kernel=kernel,
        packages=_MAMBA,
        scaled=True,
        scaled_logits=True,
        router="chosen_first",
    )


def _nemotron(c: Sizes) -> Hybrid:
    """One norm a layer, and one of four parts."""
    heads = c.mamba_num_heads
    sizes = _sizes(c) | _mamba_sizes(c, heads * c.mamba_head_dim, heads, c.ssm_state_size, c.n_groups)
    norm, shared = _norms("norm."), ()
    if c.get("n_routed_experts", None):
        width = c.get("n_shared_experts", 1) * c.moe_shared_expert_intermediate_size
        sizes |= _routed(c, "n_routed_experts", "moe_intermediate_size", shared=width)
        shared = (_linear("shared_experts.up_proj", "S"), _linear("shared_experts.down_proj", "h", "S"))
    latent = c.get("moe_latent_size", None)
    narrow = (_linear("fc1_latent_proj", "l"), _linear("fc2_latent_proj", "h", "l")) if latent else ()
    sizes |= {"l": latent} if latent else {}
    experts = _experts(FP32, gated=False, inputs="l" if latent else "h")
    space = _state_space(convolution=c.get("use_conv_bias", True), adapted=False)
    mlp = (_linear("up_proj", "i"), _linear("down_proj", "h", "i"))
    kinds = {
        "linear_attention": Plan("single", "state_space", "", (*space, *norm), Heads(), rotary=0.0),
        "full_attention": Plan("single", "grouped", "", (*_projections(Heads()), *norm), Heads(), rotary=0.0),
        "moe": Plan("single", "", "routed_beside_squared", (*experts, *narrow, *shared, *norm), Heads(), rotary=0.0),
        "mlp": Plan("single", "", "squared", (*mlp, *norm), Heads(), rotary=0.0),
    }
    kinds |= {"attention": kinds["full_attention"], "mamba": kinds["linear_attention"]}
    plans = [kinds[kind] for kind in kinds_of_layers(c)]
    chunk, kernel = c.get("chunk_size", 128), c.get("conv_kernel", 4)
    return _hybrid(c, plans, sizes, norm="gemma", chunk=chunk, kernel=kernel, packages=_MAMBA, router="grouped_scores")


# --- short convolutions -----------------------------------------------------------------------------------------------


def _lfm(c: Sizes) -> Hybrid:
    routed = c.model["model_type"] == "lfm2_moe"
    heads = Heads()
    attention = (*_projections(heads, last="out_proj"), *_norms("q_layernorm", "k_layernorm", size="d"))
    convolution = (
        Weight("conv.conv", "other", ("h", "f"), bias=c.get("conv_bias", False)),
        _linear("conv.in_proj", "h+h+h", bias=c.get("conv_bias", False)),
        _linear("conv.out_proj", "h", bias=c.get("conv_bias", False)),
    )
    norms, sizes = _norms("operator_norm", "ffn_norm"), _sizes(c)
    sizes["i"] = c.intermediate_size if routed else lfm_width(c)
    sizes |= _routed(c, "num_experts", "moe_intermediate_size") if routed else {}
    plans = []
    for index, kind in enumerate(kinds_of_layers(c)):
        expert = routed and index >= c.num_dense_layers
        mlp = _experts() if expert else _mlp(names="w1 w3 w2")
        mixer = (convolution, "short") if kind == "conv" else (attention, "grouped")
        options = frozenset() if kind == "conv" else frozenset({"normed"})
        rotary = 0.0 if kind == "conv" else 1.0
        run = "routed" if expert else "gated"
        plans.append(Plan("plain", mixer[1], run, (*mixer[0], *mlp, *norms), heads, options, rotary))
    kernel = c.get("conv_L_cache", 3)
    packages = frozenset({"causal-conv1d"})
    return _hybrid(c, plans, sizes, tied=True, kernel=kernel, packages=packages, activation="silu", router="sigmoid")


# --- latent attention -------------------------------------------------------------------------------------------------


def _latent(c: Sizes) -> tuple[tuple[Weight, ...], dict[str, int], Heads]:
    """Weights, sizes and heads of attention through narrow vectors."""
    count, keys, rotated = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    head, value, narrow = keys + rotated, c.v_head_dim, c.get("q_lora_rank", None)
    sizes = {"H": count, "K": count, "d": head, "v": value, "a": count * head, "P": count * value}
    sizes |= {"k": count * head, "l": c.kv_lora_rank, "z": rotated, "q": narrow or 0, "F": count * (keys + value)}
    biased = c.get("attention_bias", False)
    queries = (_linear("q_proj", "a"),)
    if narrow:
        queries = (
            _linear("q_a_proj", "q", bias=biased),
            *_norms("q_a_layernorm", size="q"),
            _linear("q_b_proj", "a", "q"),
        )
    weights = (
        *queries,
        _linear("kv_a_proj_with_mqa", "l+z", bias=biased),
        *_norms("kv_a_layernorm", size="l"),
        _linear("kv_b_proj", "F", "l"),
        _linear("o_proj", "h", "P", bias=biased),
    )
    return weights, sizes, Heads(keys="a", values="P", out="P", value_head="v")


def _deepseek(c: Sizes) -> Hybrid:
    """DeepSeek-V3, GLM-4.7 Flash: latent attention; experts beside what every token goes through, but in the first."""
    weights, own, heads = _latent(c)
    sizes = _sizes(c) | own
    return _after_dense_layers(c, sizes, Plan("plain", "latent", "", weights, heads))


def _glm(c: Sizes) -> Hybrid:
    normed = c.get("use_qk_norm", False)
    weights = _projections(Heads(), qkv=c.get("attention_bias", False))
    weights += _norms("q_norm", "k_norm", size="d") if normed else ()
    options = frozenset({"normed"} if normed else ())
    return _after_dense_layers(c, _sizes(c), Plan("plain", "grouped", "", weights, Heads(), options, _partial(c, 0.5)))


def _after_dense_layers(c: Sizes, sizes: dict[str, int], mixer: Plan) -> Hybrid:
    """Experts, after a few layers without; PEFT adapts experts and no dense MLP."""
    width = c.get("n_shared_experts", 1) * c.moe_intermediate_size
    sizes = sizes | _routed(c, "n_routed_experts", "moe_intermediate_size", shared=width)
    dense = Plan(mixer.layer, mixer.mixer, "gated", (*mixer.weights, *_mlp(adapted=False), *_BOTH), mixer.heads,
                 mixer.options, mixer.rotary)  # fmt: skip
    parts = (*mixer.weights, *_experts(FP32), *_mlp("S", "shared_experts.", adapted=False), *_BOTH)
    routed = Plan(mixer.layer, mixer.mixer, "routed_beside", parts, mixer.heads, mixer.options, mixer.rotary)
    kinds = c.get("mlp_layer_types", None)
    first = c.get("first_k_dense_replace", 0)
    plans = [
        dense if (kinds[index] == "dense" if kinds else index < first) else routed
        for index in range(c.num_hidden_layers)
    ]
    return _hybrid(c, plans, sizes, adapts_experts=True, router="grouped_scores")


# --- sliding attention ------------------------------------------------------------------------------------------------


def _gpt_oss(c: Sizes) -> Hybrid:
    """Attention with sinks; experts with biases."""
    biased, window = c.get("attention_bias", True), c.get("sliding_window", 128)
    sizes = _sizes(c) | {"E": c.num_local_experts, "e": c.get("num_experts_per_tok", 4), "m": c.intermediate_size}
    mlp = (
        Weight("gate", "router", ("E", "h"), bias=True),
        Weight("gate_up_proj", "experts", ("E", "h", "m+m")),
        Weight("gate_up_proj_bias", "biases", ("E", "m+m")),
        Weight("experts.down_proj", "experts", ("E", "m", "h")),
        Weight("down_proj_bias", "biases", ("E", "h")),
    )
    plans = []
    for kind in c.get("layer_types", None) or ["sliding_attention", "full_attention"] * (c.num_hidden_layers // 2):
        heads = Heads(window=window if kind == "sliding_attention" else 0)
        weights = (Weight("sinks", "other", ("H",)), *_projections(heads, qkv=biased, output=biased))
        plans.append(Plan("plain", "with_sinks", "routed_biased", (*weights, *mlp, *_BOTH), heads))
    return _hybrid(c, plans, sizes, sdpa=False, router="chosen_first")


def _gemma(c: Sizes) -> Hybrid:
    """Gemma 4: sliding attention, and full attention with larger heads; keys and values that later layers take."""
    count, kinds = c.num_hidden_layers, kinds_of_layers(c)
    same, extra = c.get("attention_k_eq_v", False), c.get("hidden_size_per_layer_input", 0)
    large, shared = c.get("global_head_dim", None) or 512, c.get("num_kv_shared_layers", 0)
    groups = (c.get("num_global_key_value_heads", None) or c.num_key_value_heads) if same else c.num_key_value_heads
    sizes = _sizes(c) | {"D": large, "J": groups, "A": c.num_attention_heads * large, "B": groups * large}
    sizes |= {
        "p4": extra,
        "Lp": count * extra,
        "U": c.get("vocab_size_per_layer_input", 0),
        "i2": 2 * c.intermediate_size,
    }
    sliding = Heads(window=c.get("sliding_window", 512))
    full = Heads("A", "B", "B", "A", "D", "D", "H", "J", rotated="D")
    routed = c.get("enable_moe_block", False)
    sizes |= {"E": c.num_experts, "e": c.top_k_experts, "m": c.moe_intermediate_size} if routed else {}
    first = count - shared
    plans = []
    for index, kind in enumerate(kinds):
        reuses = index >= first > 0 and bool(shared)
        stores = not reuses and bool(shared) and kind not in kinds[index + 1 : first]
        plans.append(
            _gemma_layer(sliding if kind == "sliding_attention" else full, reuses, stores, same, extra, routed, c)
        )
    outside = (
        Weight("embed_tokens_per_layer", "embeddings", ("U", "Lp")),
        _linear("per_layer_model_projection", "Lp"),
        *_norms("per_layer_projection_norm", size="p4"),
    )
    activation = str(c.get("hidden_activation", "gelu_pytorch_tanh"))
    others = {"outside": outside if extra else (), "activation": activation, "tied": True, "scaled": True}
    return _hybrid(c, plans, sizes, norm="gemma", **others)


def _gemma_layer(heads: Heads, reuses: bool, stores: bool, same: bool, extra: int, routed: bool, c: Sizes) -> Plan:
    projections = [w for w in _projections(heads) if not reuses or w.name in ("q_proj", "o_proj")]
    projections = [w for w in projections if w.name != "v_proj" or not same or heads.window]
    norms = _norms("q_norm", *(() if reuses else ("k_norm",)), size=heads.head)
    weights = (*projections, *norms, *_mlp("i2" if reuses and c.get("use_double_wide_mlp", False) else "i"))
    weights += _BOTH + _norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
    if extra:
        weights += (_linear("per_layer_input_gate", "p4"), _linear("per_layer_projection", "h", "p4"))
        weights += _norms("post_per_layer_input_norm")
    if routed:
        weights += _experts()[1:] + (_linear("router.proj", "E"), Weight("router.scale", "other", ("h",)))
        weights += (Weight("router.per_expert_scale", "other", ("E",)),)
        weights += _norms(*(f"{name}_feedforward_layernorm_{n}" for name, n in (("post", 1), ("post", 2), ("pre", 2))))
    options = {"normed", "normed_values"} | ({"reuses"} if reuses else set()) | ({"stores"} if stores else set())
    return Plan("sandwich", "grouped", "gated", weights, heads, frozenset(options))


# --- others -------------------------------------------------------------------------------------------------------------


def _kimi(c: Sizes) -> Hybrid:
    """Kimi-Linear: delta attention with a decay for each channel, latent attention without positions, experts."""
    latent, own, heads = _latent(c)
    count, head = c.linear_num_heads, c.linear_head_dim
    wide = count * head
    sizes = _sizes(c) | own | {"N": count, "u": head, "w": head, "y": wide, "x": wide, "X": wide}
    width = c.get("num_shared_experts", 1) * c.moe_intermediate_size
    sizes |= _routed(c, "num_experts", "moe_intermediate_size", shared=width)
    delta = (
        *(_linear(f"delta.{name}_proj", "y") for name in "qkv"),
        Weight("conv1d", "other", ("y+y+y", "f")),
        Weight("dt_bias", FP32, ("y",)),
        Weight("A_log", "other", ("N",)),
        _linear("f_a_proj", "u"),
        _linear("f_b_proj", "y", "u"),
        _linear("b_proj", "N"),
        _linear("g_a_proj", "u"),
        _linear("g_b_proj", "y", "u"),
        *_norms("o_norm", size="u"),
        _linear("delta.o_proj", "h", "y"),
    )
    plans = []
    for index, kind in enumerate(kinds_of_layers(c)):
        dense = c.mlp_layer_types[index] == "dense"
        mlp = _mlp() if dense else (*_experts(FP32), *_mlp("S", "shared_experts."))
        mixer, weights = ("latent", latent) if kind == "full_attention" else ("kimi_delta", delta)
        run = "gated" if dense else "routed_beside"
        plans.append(Plan("plain", mixer, run, (*weights, *mlp, *_BOTH), heads, rotary=0.0))
    kernel = c.get("linear_conv_kernel_dim", 4)
    return _hybrid(c, plans, sizes, kernel=kernel, packages=_FLA, router="grouped_scores")


def _falcon(c: Sizes) -> Hybrid:
    """Falcon-H1: a state space and attention side by side in every layer."""
    inner = c.get("mamba_d_ssm", None) or c.get("mamba_expand", 2) * c.hidden_size
    space = _state_space(
        convolution=c.get("mamba_conv_bias", True), normed=c.get("mamba_rms_norm", False), adapted=False
    )
    weights = (*space, *_projections(Heads()), *_mlp(), *_norms("input_layernorm", "pre_ff_layernorm"))
    plan = Plan("side_by_side", "", "", weights, Heads(), frozenset({"scaled_keys"}))
    chunk, kernel = c.get("mamba_chunk_size", 256), c.get("mamba_d_conv", 4)
    sizes = _sizes(c) | _mamba_of(c, inner)
    others = {"chunk": chunk, "kernel": kernel, "packages": _MAMBA, "scaled": True, "scaled_logits": True}
    return _hybrid(c, [plan] * c.num_hidden_layers, sizes, **others)


_HYBRIDS: dict[str, Callable[[Sizes], Hybrid]] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _qwen),
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite"), _deepseek),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _lfm),
    "bamba": _bamba,
    "falcon_h1": _falcon,
    "gemma4_text": _gemma,
    "kimi_linear": _kimi,
    "glm4_moe": _glm,
    "gpt_oss": _gpt_oss,
    "granitemoehybrid": _granite,
    "nemotron_h": _nemotron,
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
