"""Layers of families that attend alone: latent and sliding attention, larger heads, experts of many kinds.

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dryfit.analytic.decoder import Heads
from dryfit.analytic.hybrids import FP32, Hybrid, Plan, Weight
from dryfit.analytic.plan_parts import (
    BOTH_NORMS,
    Sizes,
    experts_of,
    hybrid_of,
    kinds_of_layers,
    latent_parts,
    linear,
    mlp_of,
    norms_of,
    projections,
    rotated_share,
    routed_sizes,
    sizes_of,
)

# --- latent attention -------------------------------------------------------------------------------------------------


def deepseek(c: Sizes) -> Hybrid:
    """DeepSeek-V3, GLM-4.7 Flash: latent attention; experts beside what every token goes through, but in the first."""
    weights, own, heads = latent_parts(c)
    sizes = sizes_of(c) | own
    return _after_dense_layers(c, sizes, [Plan("plain", "latent", "", weights, heads)] * c.num_hidden_layers)


def sparse_deepseek(c: Sizes) -> Hybrid:
    """DeepSeek-V3.2, GLM-5: the same, but each token attends to the keys that an indexer chooses.

    Some layers of GLM-5 have none, and take what the layer before has chosen.
    """
    weights, own, heads = latent_parts(c)
    heads = replace(heads, selects=True)
    count, narrow = c.index_n_heads, c.index_head_dim
    own |= {"in": count, "id": narrow, "ix": count * narrow, "top": c.index_topk}
    indexer = (
        linear("indexer.wq_b", "ix", "q", reached=False),
        linear("indexer.wk", "id", reached=False),
        Weight("indexer.k_norm", "norms", ("id",), bias=True, reached=False),
        linear("indexer.weights_proj", "in", reached=False),
    )
    kinds = c.get("indexer_types", None) or ["full"] * c.num_hidden_layers
    mixers = [
        Plan(
            "plain",
            "latent",
            "",
            weights if kind == "shared" else (*weights, *indexer),
            heads,
            frozenset({"hands_on"} if "shared" in kinds[index + 1 : index + 2] else ()),
        )
        for index, kind in enumerate(kinds)
    ]
    return _after_dense_layers(c, sizes_of(c) | own, mixers)


def glm(c: Sizes) -> Hybrid:
    normed = c.get("use_qk_norm", False)
    weights = projections(Heads(), qkv=c.get("attention_bias", False))
    weights += norms_of("q_norm", "k_norm", size="d") if normed else ()
    options = frozenset({"normed"} if normed else ())
    mixer = Plan("plain", "grouped", "", weights, Heads(), options, rotated_share(c, 0.5))
    return _after_dense_layers(c, sizes_of(c), [mixer] * c.num_hidden_layers)


def _after_dense_layers(c: Sizes, sizes: dict[str, int], mixers: Sequence[Plan]) -> Hybrid:
    """Experts, after a few layers without; PEFT adapts experts and no dense MLP. ``mixers``: each layer's."""
    width = c.get("n_shared_experts", 1) * c.moe_intermediate_size
    sizes = sizes | routed_sizes(c, "n_routed_experts", "moe_intermediate_size", shared=width)
    kinds = c.get("mlp_layer_types", None)
    first = c.get("first_k_dense_replace", 0)
    plans = []
    for index, mixer in enumerate(mixers):
        if kinds[index] == "dense" if kinds else index < first:
            mlp, run = mlp_of(adapted=False), "gated"
        else:
            mlp = (*experts_of(FP32), *mlp_of("S", "shared_experts.", adapted=False))
            run = "routed_beside"
        plans.append(replace(mixer, mlp=run, weights=(*mixer.weights, *mlp, *BOTH_NORMS)))
    return hybrid_of(c, plans, sizes, adapts_experts=True, router="grouped_scores")


# --- sliding attention ------------------------------------------------------------------------------------------------


def gpt_oss(c: Sizes) -> Hybrid:
    """Attention with sinks; experts with biases."""
    biased, window = c.get("attention_bias", True), c.get("sliding_window", 128)
    sizes = sizes_of(c) | {"E": c.num_local_experts, "e": c.get("num_experts_per_tok", 4), "m": c.intermediate_size}
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
        weights = (Weight("sinks", "other", ("H",)), *projections(heads, qkv=biased, output=biased))
        plans.append(Plan("plain", "with_sinks", "routed_biased", (*weights, *mlp, *BOTH_NORMS), heads))
    return hybrid_of(c, plans, sizes, sdpa=False, router="chosen_first")


def gemma(c: Sizes) -> Hybrid:
    """Gemma 4: sliding attention, and full attention with larger heads; keys and values that later layers take."""
    count, kinds = c.num_hidden_layers, kinds_of_layers(c)
    same, extra = c.get("attention_k_eq_v", False), c.get("hidden_size_per_layer_input", 0)
    large, shared = c.get("global_head_dim", None) or 512, c.get("num_kv_shared_layers", 0)
    groups = (c.get("num_global_key_value_heads", None) or c.num_key_value_heads) if same else c.num_key_value_heads
    sizes = sizes_of(c) | {"D": large, "J": groups, "A": c.num_attention_heads * large, "B": groups * large}
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
        stores = not reuses and kind not in kinds[index + 1 : first]
        plans.append(
            _gemma_layer(sliding if kind == "sliding_attention" else full, reuses, stores, same, extra, routed, c)
        )
    outside = (
        Weight("embed_tokens_per_layer", "embeddings", ("U", "Lp")),
        linear("per_layer_model_projection", "Lp"),
        *norms_of("per_layer_projection_norm", size="p4"),
    )
    activation = str(c.get("hidden_activation", "gelu_pytorch_tanh"))
    others = {"outside": outside if extra else (), "activation": activation, "tied": True, "scaled": True}
    return hybrid_of(c, plans, sizes, norm="gemma", **others)


def _gemma_layer(heads: Heads, reuses: bool, stores: bool, same: bool, extra: int, routed: bool, c: Sizes) -> Plan:
    own = [w for w in projections(heads) if not reuses or w.name in ("q_proj", "o_proj")]
    own = [w for w in own if w.name != "v_proj" or not same or heads.window]
    norms = norms_of("q_norm", *(() if reuses else ("k_norm",)), size=heads.head)
    weights = (*own, *norms, *mlp_of("i2" if reuses and c.get("use_double_wide_mlp", False) else "i"))
    weights += BOTH_NORMS + norms_of("pre_feedforward_layernorm", "post_feedforward_layernorm")
    if extra:
        weights += (linear("per_layer_input_gate", "p4"), linear("per_layer_projection", "h", "p4"))
        weights += norms_of("post_per_layer_input_norm")
    if routed:
        weights += (*experts_of()[1:], linear("router.proj", "E"), Weight("router.scale", "other", ("h",)))
        weights += (Weight("router.per_expert_scale", "other", ("E",)),)
        weights += norms_of(
            *(f"{name}_feedforward_layernorm_{n}" for name, n in (("post", 1), ("post", 2), ("pre", 2)))
        )
    options = {"normed", "normed_values"} | ({"reuses"} if reuses else set()) | ({"stores"} if stores else set())
    return Plan("sandwich", "grouped", "gated", weights, heads, frozenset(options))


def gemma_3n(c: Sizes) -> Hybrid:
    """Gemma 3n: as Gemma 4 with inputs of each layer, over several residual streams."""
    count, kinds, shared = c.num_hidden_layers, kinds_of_layers(c), c.get("num_kv_shared_layers", 15)
    streams, extra, widths = c.get("altup_num_inputs", 4), c.hidden_size_per_layer_input, c.intermediate_size
    widths = list(widths) if isinstance(widths, Sequence) else [widths] * count
    sparse = c.get("activation_sparsity_pattern", None) or [0.95 * (count > 10 > index) for index in range(count)]
    sizes = sizes_of(c)
    sizes |= {"D": sizes["d"], "J": sizes["K"], "A": sizes["a"], "B": sizes["k"], "i": widths[0], "p4": extra}
    sizes |= {"Lp": count * extra, "U": c.vocab_size_per_layer_input, "lr": c.get("laurel_rank", 64)}
    sizes |= {"al": streams, "al-1": streams - 1, "al²": streams**2}
    sizes |= {f"i{width}": width for width in widths if width != widths[0]}
    sliding = Heads(window=c.get("sliding_window", 512))
    full = Heads("A", "B", "B", "A", "D", "D", "H", "J", rotated="D")
    first, plans = count - shared, []
    for index, kind in enumerate(kinds):
        heads = sliding if kind == "sliding_attention" else full
        reuses = index >= first > 0 and bool(shared)
        options = (
            {"normed", "normed_values"} | ({"reuses"} if reuses else set()) | ({"cut_off"} if sparse[index] else set())
        )
        options |= set() if reuses or kind in kinds[index + 1 : first] else {"stores"}
        options |= {"scaled_correction"} if c.get("altup_correct_scale", True) else set()
        width = "i" if widths[index] == widths[0] else f"i{widths[index]}"
        weights = [w for w in projections(heads) if not reuses or w.name in ("q_proj", "o_proj")]
        weights += (*norms_of("q_norm", *(() if reuses else ("k_norm",)), size=heads.head), *mlp_of(width), *_STREAMS)
        plans.append(Plan("alternating", "grouped", "gated", tuple(weights), heads, frozenset(options)))
    mixed = [f"altup_{name}projections.{index}" for name in ("", "unembed_") for index in range(streams - 1)]
    outside = (
        Weight("embed_tokens_per_layer", "embeddings", ("U", "Lp")),
        linear("per_layer_model_projection", "Lp"),
        *norms_of("per_layer_projection_norm", size="p4"),
        *(linear(name, "h") for name in mixed),
    )
    activation = str(c.get("hidden_activation", "gelu_pytorch_tanh"))
    others = {"outside": outside, "activation": activation, "tied": True, "scaled": True, "streams": streams}
    return hybrid_of(c, plans, sizes, norm="gemma", **others)


_STREAMS = (
    *BOTH_NORMS,
    *norms_of("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm"),
    *norms_of("laurel.post_laurel_norm", "altup.router_norm"),
    Weight("altup.correct_output_scale", "other", ("h",)),
    linear("altup.correction_coefs", "al", "al"),
    linear("altup.prediction_coefs", "al²", "al"),
    linear("altup.modality_router", "al"),
    linear("laurel.linear_left", "lr"),
    linear("laurel.linear_right", "h", "lr"),
    linear("per_layer_input_gate", "p4"),
    linear("per_layer_projection", "h", "p4"),
)


# --- norms after attention and MLP ------------------------------------------------------------------------------------


def olmo(c: Sizes) -> Hybrid:
    """OLMo 2 and 3: no norm before attention and MLP, one after; queries and keys are normalized whole."""
    plans = []
    for index in range(c.num_hidden_layers):
        kinds = c.get("layer_types", None)
        window = c.get("sliding_window", 4096) if kinds and kinds[index] == "sliding_attention" else 0
        heads = Heads(window=window)
        weights = (*projections(heads), *norms_of("q_norm", size="a"), *norms_of("k_norm", size="k"), *mlp_of())
        weights += norms_of("post_attention_layernorm", "post_feedforward_layernorm")
        plans.append(Plan("after", "grouped", "gated", weights, heads, frozenset({"rotated_in_fp32"})))
    return hybrid_of(c, plans, sizes_of(c), norm="gemma")


def exaone(c: Sizes) -> Hybrid:
    """EXAONE 4: the same with norms of heads; in models with windows full attention has no positions."""
    window, kinds = c.get("sliding_window", None), c.get("layer_types", None)
    plans = []
    for index in range(c.num_hidden_layers):
        sliding = bool(kinds) and kinds[index] == "sliding_attention"
        heads = Heads(window=window if sliding and window else 0)
        weights = (*projections(heads), *norms_of("q_norm", "k_norm", size="d"), *mlp_of())
        weights += norms_of("post_attention_layernorm", "post_feedforward_layernorm")
        rotary = 1.0 if sliding or not window else 0.0
        plans.append(Plan("after", "grouped", "gated", weights, heads, rotary=rotary))
    return hybrid_of(c, plans, sizes_of(c))


# --- experts and others -----------------------------------------------------------------------------------------------


def like_llama(c: Sizes) -> Hybrid:
    """Seed-OSS, with biases and dropout, and Ministral 3, whose queries are scaled by their position."""
    biased = c.model["model_type"] == "seed_oss"
    qkv, output = biased and c.get("attention_bias", True), biased and c.get("attention_out_bias", False)
    weights = (*projections(Heads(), qkv=qkv, output=output), *mlp_of(), *BOTH_NORMS)
    options = frozenset(() if biased else {"scaled_queries"})
    plans = [Plan("plain", "grouped", "gated", weights, Heads(), options)] * c.num_hidden_layers
    dropout = {"residual_dropout": float(c.get("residual_dropout", 0.1)), "dropout": 0.1} if biased else {}
    return hybrid_of(c, plans, sizes_of(c), **dropout)


def mistral4(c: Sizes) -> Hybrid:
    """Mistral 4: latent attention, queries scaled by their position, experts beside what every token goes through."""
    weights, own, heads = latent_parts(c)
    width = c.get("n_shared_experts", 1) * c.moe_intermediate_size
    sizes = sizes_of(c) | own | routed_sizes(c, "n_routed_experts", "moe_intermediate_size", shared=width)
    dense = Plan("plain", "latent", "gated", (*weights, *mlp_of(), *BOTH_NORMS), heads, frozenset({"scaled_queries"}))
    parts = (*weights, *experts_of(), *mlp_of("S", "shared_experts."), *BOTH_NORMS)
    routed = Plan("plain", "latent", "routed_beside", parts, heads, frozenset({"scaled_queries"}))
    first = c.get("first_k_dense_replace", 0)
    plans = [dense if index < first else routed for index in range(c.num_hidden_layers)]
    return hybrid_of(c, plans, sizes, router="softmax_16_bits")


def ernie(c: Sizes) -> Hybrid:
    """ERNIE 4.5: experts in some layers, routed in fp32; PEFT adapts experts and no dense MLP."""
    first, last = c.moe_layer_start_index, c.moe_layer_end_index
    every, shared = c.get("moe_layer_interval", 1), c.get("moe_num_shared_experts", 0) * c.moe_intermediate_size
    sizes = sizes_of(c) | {"E": c.moe_num_experts, "e": c.get("moe_k", 2), "m": c.moe_intermediate_size, "S": shared}
    attention, options = projections(Heads()), frozenset({"rotated_in_fp32", "copied_to_fp32"})
    dense = Plan("plain", "grouped", "gated", (*attention, *mlp_of(adapted=False), *BOTH_NORMS), Heads(), options)
    parts = (*attention, *experts_of(FP32), Weight("e_score_correction_bias", FP32, ("E",)))
    parts += (*(mlp_of("S", "shared_experts.", adapted=False) if shared else ()), *BOTH_NORMS)
    routed = Plan("plain", "grouped", "routed_after" if shared else "routed", parts, Heads(), options)
    plans = []
    for index in range(c.num_hidden_layers):
        expert = first <= index <= (last if last >= 0 else index) and (index + 1) % every == 0
        plans.append(routed if expert else dense)
    return hybrid_of(c, plans, sizes, adapts_experts=True, tied=True, router="softmax_fp32")


def minimax_m2(c: Sizes) -> Hybrid:
    """MiniMax M2: queries and keys are normalized whole, and rotated in part; every layer has experts."""
    weights = (*projections(Heads()), *norms_of("q_norm", size="a"), *norms_of("k_norm", size="k"))
    sizes = sizes_of(c) | routed_sizes(c, "num_local_experts", "intermediate_size")
    plan = Plan("plain", "grouped", "routed", (*weights, *experts_of(), *BOTH_NORMS), Heads(), rotary=rotated_share(c))
    names = {"adapts_experts": True, "expert_names": ("w1", "w3", "w2")}
    return hybrid_of(c, [plan] * c.num_hidden_layers, sizes, router="sigmoid", **names)


def minimax(c: Sizes) -> Hybrid:
    """MiniMax M1: attention in blocks without a softmax, and attention; every layer has experts."""
    routed = {"E": c.num_local_experts, "e": c.get("num_experts_per_tok", 2), "m": c.intermediate_size}
    sizes = sizes_of(c) | routed
    window = c.get("sliding_window", None) or 0
    blocks = (
        Weight("lightning.norm", "norms", ("a",)),
        linear("qkv_proj", "a+a+a"),
        linear("lightning.out_proj", "h", "a"),
        linear("output_gate", "a"),
    )
    kinds = {
        "linear_attention": ("lightning", blocks, Heads(), 0.0),
        "full_attention": ("grouped", projections(Heads()), Heads(window=window), rotated_share(c)),
    }
    plans = []
    for kind in kinds_of_layers(c):
        mixer, weights, heads, rotary = kinds[kind]
        parts = (*weights, *experts_of(), *BOTH_NORMS)
        plans.append(Plan("scaled_after_norm", mixer, "routed", parts, heads, rotary=rotary))
    names = {"adapts_experts": True, "expert_names": ("w1", "w3", "w2"), "chunk": c.get("block_size", 256)}
    return hybrid_of(c, plans, sizes, router="softmax_in_fp32", **names)


def llama4(c: Sizes) -> Hybrid:
    """Llama 4: attention in chunks and without positions in every fourth layer; every expert gets every token."""
    width = c.intermediate_size
    sizes = sizes_of(c) | {"E": c.num_local_experts, "m": width, "S": width, "i": c.get("intermediate_size_mlp", 0)}
    every = c.get("interleave_moe_layer_step", 1)
    routed = c.get("moe_layers", None) or range(every - 1, c.num_hidden_layers, every)
    kinds, rotates = c.get("layer_types", None), c.get("no_rope_layers", None)
    plans = []
    for index in range(c.num_hidden_layers):
        turned = bool(rotates[index]) if rotates else (index + 1) % c.get("no_rope_layer_interval", 4) != 0
        chunked = kinds[index] == "chunked_attention" if kinds else turned
        heads = Heads(window=c.get("attention_chunk_size", 8192) if chunked else 0)
        mlp, run = (mlp_of(), "gated")
        if index in routed:
            experts = (Weight("gate", "router", ("E", "h")), Weight("gate_up_proj", "experts", ("E", "h", "m+m")))
            mlp = (*experts, Weight("experts.down_proj", "experts", ("E", "m", "h")), *mlp_of("S", "shared_expert."))
            run = "every_expert"
        options = {"complex"} if turned else set()
        options |= {"unit_heads"} if turned and c.get("use_qk_norm", True) else set()
        options |= {"scaled_queries"} if not turned and c.get("attn_temperature_tuning", True) else set()
        weights = (*projections(heads), *mlp, *BOTH_NORMS)
        plans.append(Plan("plain", "grouped", run, weights, heads, frozenset(options), 1.0 if turned else 0.0))
    return hybrid_of(c, plans, sizes, norm="rms")
