"""The weights of families whose layers are of several kinds, from the configuration alone: one function a family.

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.hybrids import FP32, Hybrid, Weight
from dryfit.scenario.model import size

Layer = tuple[Weight, ...]


class Sizes:
    """A configuration's sizes by name; one that is missing and has no usual value is an error that names it."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        found = size(self.model, name)
        if found is None:
            raise NotDescribed(
                f"the configuration does not say {name}, which its parameters depend on"
            )
        return found

    def get(self, name: str, usual: Any) -> Any:
        """A size that files leave out, with what transformers takes then."""
        found = size(self.model, name)
        return usual if found is None else found

    @property
    def head(self) -> int:
        """Elements of an attention head."""
        return self.get("head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.get("num_key_value_heads", None) or self.num_attention_heads


_LETTERS = {
    "M": "linear_attention",
    "E": "moe",
    "*": "full_attention",
    "-": "mlp",
}  # of Nemotron's older files
RATIOS = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}


def kinds_of_layers(c: Sizes) -> list[str]:
    """What each layer is: listed, or by an older key from which transformers makes the list."""
    if listed := c.get("layer_types", None) or c.get("layers_block_type", None):
        return listed
    if pattern := c.get("hybrid_override_pattern", None):
        return [_LETTERS[letter] for letter in pattern]
    if ratios := c.get("compress_ratios", None):
        return [RATIOS[ratio] for ratio in ratios]
    every = c.full_attention_interval
    return [
        "linear_attention" if (index + 1) % every else "full_attention"
        for index in range(c.num_hidden_layers)
    ]


# --- parts that families share ----------------------------------------------------------------------------------------


def _linear(
    name: str, outputs: int, inputs: int, *, bias: bool = False, adapted: bool = True
) -> Weight:
    return Weight(name, "linear", (outputs, inputs), bias, adapted)


def _norms(width: int, *names: str) -> Layer:
    return tuple(Weight(name, "norms", (width,)) for name in names)


def _both_norms(c: Sizes) -> Layer:
    return _norms(c.hidden_size, "input_layernorm", "post_attention_layernorm")


def _vectors(width: int, *names: str) -> Layer:
    return tuple(Weight(name, "other", (width,)) for name in names)


def _attention(
    c: Sizes,
    head: int = 0,
    groups: int = 0,
    *,
    gated: bool = False,
    qkv: bool = False,
    output: bool = False,
    last: str = "o_proj",
) -> Layer:
    """Queries, keys and values, and the way back; ``gated``: the queries' matrix brings a gate too."""
    head, hidden = head or c.head, c.hidden_size
    queries, keys = c.num_attention_heads * head, (groups or c.groups) * head
    return (
        _linear("q_proj", 2 * queries if gated else queries, hidden, bias=qkv),
        _linear("k_proj", keys, hidden, bias=qkv),
        _linear("v_proj", keys, hidden, bias=qkv),
        _linear(last, hidden, queries, bias=output),
    )


def _mlp(
    c: Sizes,
    width: int,
    prefix: str = "",
    *,
    adapted: bool = True,
    names: str = "gate_proj up_proj down_proj",
) -> Layer:
    gate, up, down = (prefix + name for name in names.split())
    return (
        _linear(gate, width, c.hidden_size, adapted=adapted),
        _linear(up, width, c.hidden_size, adapted=adapted),
        _linear(down, c.hidden_size, width, adapted=adapted),
    )


def _experts(
    c: Sizes,
    count: int,
    width: int,
    router: str = "router",
    *,
    gated: bool = True,
    inputs: int | None = None,
) -> Layer:
    """A router of a group of weights, and all experts."""
    inputs = inputs or c.hidden_size
    up = ("gate_up_proj", 2 * width) if gated else ("experts.up_proj", width)
    return (
        Weight("gate", router, (count, c.hidden_size)),
        Weight(up[0], "experts", (count, up[1], inputs)),
        Weight("experts.down_proj", "experts", (count, inputs, width)),
    )


def _state_space(
    c: Sizes,
    inner: int,
    heads: int,
    state: int,
    kernel: int,
    *,
    convolution: bool,
    normed: bool = True,
    adapted: bool = True,
) -> Layer:
    """A state space; ``state``: of all groups; ``adapted``: whether its last matrix is."""
    return (
        *_vectors(heads, "dt_bias", "A_log", "D"),
        Weight("conv1d", "other", (inner + 2 * state, kernel), bias=convolution),
        _linear("in_proj", 2 * inner + 2 * state + heads, c.hidden_size),
        *(_norms(inner, "norm") if normed else ()),
        _linear("out_proj", c.hidden_size, inner, adapted=adapted),
    )


def _mamba(c: Sizes, inner: int | None = None, **more: bool) -> Layer:
    """The same by the names that Bamba, Granite and Falcon-H1 have for its sizes."""
    inner, state = (
        inner or c.get("mamba_expand", 2) * c.hidden_size,
        c.get("mamba_n_groups", 1) * c.mamba_d_state,
    )
    kernel, bias = c.get("mamba_d_conv", 4), c.get("mamba_conv_bias", True)
    return _state_space(c, inner, c.mamba_n_heads, state, kernel, convolution=bias, **more)


def _latent(c: Sizes) -> Layer:
    """Attention through narrow vectors."""
    count, narrow, hidden = c.num_attention_heads, c.get("q_lora_rank", None), c.hidden_size
    queries, biased = (
        count * (c.qk_nope_head_dim + c.qk_rope_head_dim),
        c.get("attention_bias", False),
    )
    projected: Layer = (_linear("q_proj", queries, hidden),)
    if narrow:
        projected = (
            _linear("q_a_proj", narrow, hidden, bias=biased),
            *_norms(narrow, "q_a_layernorm"),
            _linear("q_b_proj", queries, narrow),
        )
    return (
        *projected,
        _linear("kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, hidden, bias=biased),
        *_norms(c.kv_lora_rank, "kv_a_layernorm"),
        _linear("kv_b_proj", count * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        _linear("o_proj", hidden, count * c.v_head_dim, bias=biased),
    )


def _convolution(c: Sizes, kernel: int) -> Layer:
    hidden, bias = c.hidden_size, c.get("conv_bias", False)
    return (
        Weight("conv.conv", "other", (hidden, kernel), bias=bias),
        _linear("conv.in_proj", 3 * hidden, hidden, bias=bias),
        _linear("conv.out_proj", hidden, hidden, bias=bias),
    )


def _decoder(
    c: Sizes,
    layers: Sequence[Layer],
    outside: Layer = (),
    *,
    tied: bool = False,
    expert_names: tuple[str, ...] = (),
) -> Hybrid:
    """The layers with both ends of the model; ``tied``: its class's own choice."""
    words = c.vocab_size, c.hidden_size
    ends = (
        Weight("embedding", "embeddings", words),
        *outside,
        *_norms(c.hidden_size, "final norm"),
    )
    if not c.get("tie_word_embeddings", tied):
        ends += (Weight("output head", "output_head", words),)
    return Hybrid(tuple(layers), ends, expert_names)


_GATED_EXPERTS = ("gate_proj", "up_proj", "down_proj")

# --- linear attention -------------------------------------------------------------------------------------------------


def _qwen(c: Sizes) -> Hybrid:
    """Qwen3-Next, Qwen3.5: three layers of linear attention by the gated delta rule, one of gated attention."""
    hidden, old, routed = (
        c.hidden_size,
        c.model["model_type"] == "qwen3_next",
        c.get("num_experts", None) is not None,
    )
    heads, kernel = c.linear_num_value_heads, c.get("linear_conv_kernel_dim", 4)
    keys, values = c.linear_num_key_heads * c.linear_key_head_dim, heads * c.linear_value_head_dim
    projected = {
        "in_proj_qkv": 2 * keys + values,
        "in_proj_z": values,
        "in_proj_b": heads,
        "in_proj_a": heads,
    }
    if old:
        projected = {"in_proj_qkvz": 2 * keys + 2 * values, "in_proj_ba": 2 * heads}
    delta = (
        *_vectors(heads, "dt_bias", "A_log"),
        Weight("conv1d", "other", (2 * keys + values, kernel)),
        *_norms(c.linear_value_head_dim, "norm"),
        *(_linear(name, outputs, hidden) for name, outputs in projected.items()),
        _linear("out_proj", hidden, values),
    )
    attention = (*_attention(c, gated=True), *_norms(c.head, "q_norm", "k_norm"))
    if routed:
        mlp = (
            *_experts(c, c.num_experts, c.moe_intermediate_size),
            *_mlp(c, c.shared_expert_intermediate_size, "shared_expert.", adapted=not old),
            _linear("shared_expert_gate", 1, hidden),
        )
    else:
        mlp = _mlp(c, c.intermediate_size)
    mixers = {"linear_attention": delta, "full_attention": attention}
    layers = [(*mixers[kind], *mlp, *_both_norms(c)) for kind in kinds_of_layers(c)]
    return _decoder(c, layers, expert_names=_GATED_EXPERTS if old and routed else ())


def _olmo_hybrid(c: Sizes) -> Hybrid:
    """OLMo Hybrid: the gated delta rule after a norm, and OLMo's attention before one."""
    hidden, heads = c.hidden_size, c.linear_num_value_heads
    keys, values = c.linear_num_key_heads * c.linear_key_head_dim, heads * c.linear_value_head_dim
    delta = (
        *_vectors(heads, "dt_bias"),
        Weight("A_log", FP32, (heads,)),
        Weight("conv1d", "other", (2 * keys + values, c.get("linear_conv_kernel_dim", 4))),
        *(_linear(f"delta.{name}_proj", keys, hidden) for name in "qk"),
        _linear("delta.v_proj", values, hidden),
        *(_linear(f"{name}_proj", heads, hidden) for name in "ab"),
        _linear("g_proj", values, hidden),
        *_norms(c.linear_value_head_dim, "o_norm"),
        _linear("delta.o_proj", hidden, values),
    )
    biased = c.get("attention_bias", False)
    mixers = {
        "linear_attention": (*delta, *_both_norms(c)),
        "full_attention": (
            *_attention(c, qkv=biased, output=biased),
            *_whole_norms(c),
            *_norms_after(c),
        ),
    }
    return _decoder(
        c, [(*mixers[kind], *_mlp(c, c.intermediate_size)) for kind in kinds_of_layers(c)]
    )


def _kimi(c: Sizes) -> Hybrid:
    """Kimi-Linear: delta attention with a decay for each channel, latent attention, experts."""
    hidden, count, head = c.hidden_size, c.linear_num_heads, c.linear_head_dim
    wide = count * head
    delta = (
        *(_linear(f"delta.{name}_proj", wide, hidden) for name in "qkv"),
        Weight("conv1d", "other", (3 * wide, c.get("linear_conv_kernel_dim", 4))),
        Weight("dt_bias", FP32, (wide,)),
        *_vectors(count, "A_log"),
        _linear("f_a_proj", head, hidden),
        _linear("f_b_proj", wide, head),
        _linear("b_proj", count, hidden),
        _linear("g_a_proj", head, hidden),
        _linear("g_b_proj", wide, head),
        *_norms(head, "o_norm"),
        _linear("delta.o_proj", hidden, wide),
    )
    shared = c.get("num_shared_experts", 1) * c.moe_intermediate_size
    routed = (
        *_experts(c, c.num_experts, c.moe_intermediate_size, FP32),
        *_mlp(c, shared, "shared_experts."),
    )
    layers = []
    for kind, mlp in zip(kinds_of_layers(c), c.mlp_layer_types, strict=False):
        mixer = _latent(c) if kind == "full_attention" else delta
        layers.append(
            (*mixer, *(_mlp(c, c.intermediate_size) if mlp == "dense" else routed), *_both_norms(c))
        )
    return _decoder(c, layers)


def _minimax(c: Sizes) -> Hybrid:
    """MiniMax M1: attention in blocks without a softmax, and attention; every layer has experts."""
    hidden, wide = c.hidden_size, c.num_attention_heads * c.head
    blocks = (
        *_norms(wide, "lightning.norm"),
        _linear("qkv_proj", 3 * wide, hidden),
        _linear("lightning.out_proj", hidden, wide),
        _linear("output_gate", wide, hidden),
    )
    mixers = {"linear_attention": blocks, "full_attention": _attention(c)}
    rest = (*_experts(c, c.num_local_experts, c.intermediate_size), *_both_norms(c))
    return _decoder(
        c, [(*mixers[kind], *rest) for kind in kinds_of_layers(c)], expert_names=("w1", "w3", "w2")
    )


# --- state spaces -----------------------------------------------------------------------------------------------------


def _bamba(c: Sizes) -> Hybrid:
    attends = c.get("attn_layer_indices", None) or ()
    rest = (
        *_mlp(c, c.intermediate_size),
        *_norms(c.hidden_size, "input_layernorm", "pre_ff_layernorm"),
    )
    mixers = [
        _attention(c) if index in attends else _mamba(c) for index in range(c.num_hidden_layers)
    ]
    return _decoder(c, [(*mixer, *rest) for mixer in mixers])


def _granite(c: Sizes) -> Hybrid:
    hidden, shared, experts = (
        c.hidden_size,
        c.shared_intermediate_size,
        c.get("num_local_experts", 0),
    )
    mlp = (_linear("input_linear", 2 * shared, hidden), _linear("output_linear", hidden, shared))
    if experts:
        mlp = (*_experts(c, experts, c.intermediate_size), *mlp)
    attends = ("full_attention", "attention")
    mixers = [_attention(c) if kind in attends else _mamba(c) for kind in kinds_of_layers(c)]
    return _decoder(c, [(*mixer, *mlp, *_both_norms(c)) for mixer in mixers])


def _nemotron(c: Sizes) -> Hybrid:
    """One norm a layer, and one of four parts."""
    hidden, heads, kernel = c.hidden_size, c.mamba_num_heads, c.get("conv_kernel", 4)
    inner, state, bias = (
        heads * c.mamba_head_dim,
        c.n_groups * c.ssm_state_size,
        c.get("use_conv_bias", True),
    )
    space = _state_space(c, inner, heads, state, kernel, convolution=bias, adapted=False)
    routed: Layer = ()
    if c.get("n_routed_experts", None):
        width, narrow = c.moe_intermediate_size, c.get("moe_latent_size", None)
        shared = c.get("n_shared_experts", 1) * c.moe_shared_expert_intermediate_size
        routed = (
            *_experts(c, c.n_routed_experts, width, FP32, gated=False, inputs=narrow),
            *(
                (
                    _linear("fc1_latent_proj", narrow, hidden),
                    _linear("fc2_latent_proj", hidden, narrow),
                )
                * bool(narrow)
            ),
            _linear("shared_experts.up_proj", shared, hidden),
            _linear("shared_experts.down_proj", hidden, shared),
        )
    width = c.get("intermediate_size", None) or 0
    kinds = {
        **dict.fromkeys(("linear_attention", "mamba"), space),
        **dict.fromkeys(("full_attention", "attention"), _attention(c)),
        "moe": routed,
        "mlp": (_linear("up_proj", width, hidden), _linear("down_proj", hidden, width)),
    }
    return _decoder(c, [(*kinds[kind], *_norms(hidden, "norm.")) for kind in kinds_of_layers(c)])


def _falcon(c: Sizes) -> Hybrid:
    """Falcon-H1: a state space and attention side by side in every layer."""
    inner = c.get("mamba_d_ssm", None)
    space = _mamba(c, inner, normed=c.get("mamba_rms_norm", False), adapted=False)
    norms = _norms(c.hidden_size, "input_layernorm", "pre_ff_layernorm")
    return _decoder(
        c, [(*space, *_attention(c), *_mlp(c, c.intermediate_size), *norms)] * c.num_hidden_layers
    )


def _jamba(c: Sizes) -> Hybrid:
    """Jamba: the first Mamba, attention in some layers, experts in others."""
    hidden, inner, bias = (
        c.hidden_size,
        c.get("mamba_expand", 2) * c.hidden_size,
        c.get("mamba_proj_bias", False),
    )
    state, rank = c.mamba_d_state, c.mamba_dt_rank
    space = (
        Weight("A_log", "other", (inner, state)),
        *_vectors(inner, "D"),
        Weight(
            "conv1d",
            "other",
            (inner, c.get("mamba_d_conv", 4)),
            bias=c.get("mamba_conv_bias", True),
        ),
        _linear("in_proj", 2 * inner, hidden, bias=bias),
        _linear("x_proj", rank + 2 * state, inner),
        _linear("dt_proj", inner, rank, bias=True),
        _linear("out_proj", hidden, inner, bias=bias),
        *_norms(rank, "dt_layernorm"),
        *_norms(state, "b_layernorm", "c_layernorm"),
    )
    norms, layers = _norms(hidden, "input_layernorm", "pre_ff_layernorm"), []
    every, offset = c.get("expert_layer_period", 2), c.get("expert_layer_offset", 1)
    for index in range(c.num_hidden_layers):
        attends = index % c.attn_layer_period == c.attn_layer_offset
        routed = c.num_experts > 1 and index % every == offset
        mlp = (
            _experts(c, c.num_experts, c.intermediate_size)
            if routed
            else _mlp(c, c.intermediate_size)
        )
        layers.append((*(_attention(c) if attends else space), *mlp, *norms))
    return _decoder(c, layers)


def _mamba2(c: Sizes) -> Hybrid:
    """Mamba 2 alone: a norm and a state space a layer."""
    inner, kernel, bias = (
        c.get("expand", 2) * c.hidden_size,
        c.get("conv_kernel", 4),
        c.get("use_conv_bias", True),
    )
    state = c.n_groups * c.state_size
    space = _state_space(c, inner, c.num_heads, state, kernel, convolution=bias, adapted=False)
    return _decoder(c, [(*space, *_norms(c.hidden_size, "norm."))] * c.num_hidden_layers)


# --- short convolutions -----------------------------------------------------------------------------------------------


def _lfm_width(c: Sizes) -> int:
    """LFM2 takes two thirds of the configuration's width, rounded up to whole blocks."""
    width = c.get("intermediate_size", None) or c.block_ff_dim
    if c.get("block_auto_adjust_ff_dim", True):
        width = int(c.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        block = c.get("block_multiple_of", 256)
        width = block * -(-width // block)
    return width


def _lfm(c: Sizes) -> Hybrid:
    routed = c.model["model_type"] == "lfm2_moe"
    attention = (*_attention(c, last="out_proj"), *_norms(c.head, "q_layernorm", "k_layernorm"))
    dense = _mlp(c, c.intermediate_size if routed else _lfm_width(c), names="w1 w3 w2")
    experts = _experts(c, c.num_experts, c.moe_intermediate_size) if routed else ()
    layers = []
    for index, kind in enumerate(kinds_of_layers(c)):
        mixer = _convolution(c, c.get("conv_L_cache", 3)) if kind == "conv" else attention
        mlp = experts if routed and index >= c.num_dense_layers else dense
        layers.append((*mixer, *mlp, *_norms(c.hidden_size, "operator_norm", "ffn_norm")))
    return _decoder(c, layers, tied=True)


def _lfm3(c: Sizes) -> Hybrid:
    """LFM 3: short convolutions and attention with a gate of each head; norms before and after."""
    norms = ("operator_norm", "ffn_norm")
    norms += ("post_operator_norm", "post_ffn_norm") if c.get("use_sandwich_norm", True) else ()
    attention = (*_attention(c), *_norms(c.head, "q_norm", "k_norm"))
    if c.get("use_attention_gate", True):
        attention += (_linear("g_proj", c.num_attention_heads, c.hidden_size),)
    rest = (*_mlp(c, c.intermediate_size, names="w1 w3 w2"), *_norms(c.hidden_size, *norms))
    convolution = _convolution(c, c.get("conv_L_cache", 7))
    layers = [
        (*(convolution if kind == "conv" else attention), *rest) for kind in kinds_of_layers(c)
    ]
    return _decoder(c, layers, tied=True)


# --- latent attention -------------------------------------------------------------------------------------------------


def _deepseek(c: Sizes) -> Hybrid:
    """DeepSeek-V3, GLM-4.7 Flash: latent attention; experts beside what every token goes through, but in the first."""
    return _after_dense_layers(c, [_latent(c)] * c.num_hidden_layers)


def _sparse_deepseek(c: Sizes) -> Hybrid:
    """DeepSeek-V3.2, GLM-5: the same with an indexer, which some layers of GLM-5 don't have."""
    count, narrow, hidden = c.index_n_heads, c.index_head_dim, c.hidden_size
    indexer = (
        _linear("indexer.wq_b", count * narrow, c.q_lora_rank),
        _linear("indexer.wk", narrow, hidden),
        Weight("indexer.k_norm", "norms", (narrow,), bias=True),
        _linear("indexer.weights_proj", count, hidden),
    )
    kinds = c.get("indexer_types", None) or ["full"] * c.num_hidden_layers
    return _after_dense_layers(
        c, [_latent(c) + (() if kind == "shared" else indexer) for kind in kinds]
    )


def _glm(c: Sizes) -> Hybrid:
    mixer = _attention(c, qkv=c.get("attention_bias", False))
    mixer += _norms(c.head, "q_norm", "k_norm") if c.get("use_qk_norm", False) else ()
    return _after_dense_layers(c, [mixer] * c.num_hidden_layers)


def _mimo(c: Sizes) -> Hybrid:
    """MiMo-V2-Flash: wide queries and narrow values; with a window twice as many keys, and sinks."""
    count, hidden, bias, layers = (
        c.num_attention_heads,
        c.hidden_size,
        c.get("attention_bias", False),
        [],
    )
    for index in range(c.num_hidden_layers):
        sliding = index > 0 and (index + 1) % 6 > 0
        if listed := c.get("layer_types", None):
            sliding = listed[index] == "sliding_attention"
        kinds, groups = c.get("mlp_layer_types", None), c.groups * (2 if sliding else 1)
        is_dense = kinds[index] == "dense" if kinds else index == 0
        layers.append(
            (
                _linear("q_proj", count * c.head, hidden, bias=bias),
                _linear("k_proj", groups * c.head, hidden, bias=bias),
                _linear("v_proj", groups * c.v_head_dim, hidden, bias=bias),
                _linear("o_proj", hidden, count * c.v_head_dim),
                *(_vectors(count, "sinks") if sliding else ()),
                *(_mlp(c, c.intermediate_size) if is_dense else ()),
                *(
                    ()
                    if is_dense
                    else _experts(c, c.n_routed_experts, c.moe_intermediate_size, FP32)
                ),
                *_both_norms(c),
            )
        )
    return _decoder(c, layers)


def _after_dense_layers(c: Sizes, mixers: Sequence[Layer]) -> Hybrid:
    """Experts, after a few layers without; PEFT adapts experts and no dense MLP. ``mixers``: each layer's."""
    dense, width = (
        _mlp(c, c.get("intermediate_size", None) or 0, adapted=False),
        c.moe_intermediate_size,
    )
    shared = _mlp(c, c.get("n_shared_experts", 1) * width, "shared_experts.", adapted=False)
    routed = (*_experts(c, c.n_routed_experts, width, FP32), *shared)
    kinds, first, layers = c.get("mlp_layer_types", None), c.get("first_k_dense_replace", 0), []
    for index, mixer in enumerate(mixers):
        is_dense = kinds[index] == "dense" if kinds else index < first
        layers.append((*mixer, *(dense if is_dense else routed), *_both_norms(c)))
    return _decoder(c, layers, expert_names=_GATED_EXPERTS)


def _mistral4(c: Sizes) -> Hybrid:
    """Mistral 4: latent attention, experts beside what every token goes through."""
    width, first = c.moe_intermediate_size, c.get("first_k_dense_replace", 0)
    shared = _mlp(c, c.get("n_shared_experts", 1) * width, "shared_experts.")
    routed, dense = (
        (*_experts(c, c.n_routed_experts, width), *shared),
        _mlp(c, c.get("intermediate_size", None) or 0),
    )
    mlps = [dense if index < first else routed for index in range(c.num_hidden_layers)]
    return _decoder(c, [(*_latent(c), *mlp, *_both_norms(c)) for mlp in mlps])


# --- attention alone --------------------------------------------------------------------------------------------------


def _gpt_oss(c: Sizes) -> Hybrid:
    """Attention with sinks; experts with biases."""
    count, width, hidden = c.num_local_experts, c.intermediate_size, c.hidden_size
    biased = c.get("attention_bias", True)
    layer = (
        *_vectors(c.num_attention_heads, "sinks"),
        *_attention(c, qkv=biased, output=biased),
        Weight("gate", "router", (count, hidden), bias=True),
        Weight("gate_up_proj", "experts", (count, hidden, 2 * width)),
        Weight("gate_up_proj_bias", "biases", (count, 2 * width)),
        Weight("experts.down_proj", "experts", (count, width, hidden)),
        Weight("down_proj_bias", "biases", (count, hidden)),
        *_both_norms(c),
    )
    return _decoder(c, [layer] * c.num_hidden_layers)


def _gemma(c: Sizes) -> Hybrid:
    """Gemma 4: sliding attention, and full attention with larger heads; keys and values that later layers take."""
    count, kinds, hidden, width = (
        c.num_hidden_layers,
        kinds_of_layers(c),
        c.hidden_size,
        c.intermediate_size,
    )
    same, extra = c.get("attention_k_eq_v", False), c.get("hidden_size_per_layer_input", 0)
    large, shared = c.get("global_head_dim", None) or 512, c.get("num_kv_shared_layers", 0)
    groups = (c.get("num_global_key_value_heads", None) if same else None) or c.num_key_value_heads
    rest = _both_norms(c) + _norms(
        hidden, "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )
    if extra:
        rest += _inputs_of_a_layer(c, extra)
    if c.get("enable_moe_block", False):
        norms = (
            f"{name}_feedforward_layernorm_{n}"
            for name, n in (("post", 1), ("post", 2), ("pre", 2))
        )
        rest += _experts(c, c.num_experts, c.moe_intermediate_size)[1:]
        rest += (_linear("router.proj", c.num_experts, hidden), *_vectors(hidden, "router.scale"))
        rest += (*_vectors(c.num_experts, "router.per_expert_scale"), *_norms(hidden, *norms))
    layers = []
    for index, kind in enumerate(kinds):
        sliding, reuses = kind == "sliding_attention", index >= count - shared > 0 and bool(shared)
        left_out = {"k_proj", "v_proj"} if reuses else {"v_proj"} if same and not sliding else set()
        own = _attention(c) if sliding else _attention(c, large, groups)
        double = reuses and c.get("use_double_wide_mlp", False)
        layers.append(
            (
                *(weight for weight in own if weight.name not in left_out),
                *_norms(c.head if sliding else large, "q_norm", *(() if reuses else ("k_norm",))),
                *_mlp(c, 2 * width if double else width),
                *rest,
            )
        )
    return _decoder(c, layers, _inputs_of_all_layers(c, extra) if extra else (), tied=True)


def _inputs_of_a_layer(c: Sizes, extra: int) -> Layer:
    """What a layer does with what each token brings to it besides."""
    gate, back = (
        _linear("per_layer_input_gate", extra, c.hidden_size),
        _linear("per_layer_projection", c.hidden_size, extra),
    )
    return (gate, back, *_norms(c.hidden_size, "post_per_layer_input_norm"))


def _inputs_of_all_layers(c: Sizes, extra: int) -> Layer:
    wide = c.num_hidden_layers * extra
    return (
        Weight("embed_tokens_per_layer", "embeddings", (c.vocab_size_per_layer_input, wide)),
        _linear("per_layer_model_projection", wide, c.hidden_size),
        *_norms(extra, "per_layer_projection_norm"),
    )


def _gemma_3n(c: Sizes) -> Hybrid:
    """Gemma 3n: as Gemma 4 with inputs of each layer, over several residual streams."""
    count, hidden, shared = c.num_hidden_layers, c.hidden_size, c.get("num_kv_shared_layers", 15)
    streams, extra, widths = (
        c.get("altup_num_inputs", 4),
        c.hidden_size_per_layer_input,
        c.intermediate_size,
    )
    widths, low = (
        list(widths) if isinstance(widths, Sequence) else [widths] * count,
        c.get("laurel_rank", 64),
    )
    rest = (
        *_both_norms(c),
        *_norms(hidden, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        *_norms(hidden, "laurel.post_laurel_norm", "altup.router_norm"),
        *_vectors(hidden, "altup.correct_output_scale"),
        _linear("altup.correction_coefs", streams, streams),
        _linear("altup.prediction_coefs", streams**2, streams),
        _linear("altup.modality_router", streams, hidden),
        _linear("laurel.linear_left", low, hidden),
        _linear("laurel.linear_right", hidden, low),
        *_inputs_of_a_layer(c, extra),
    )
    layers = []
    for index, width in enumerate(widths):
        reuses = index >= count - shared > 0 and bool(shared)
        own = [
            weight for weight in _attention(c) if not reuses or weight.name in ("q_proj", "o_proj")
        ]
        norms = _norms(c.head, "q_norm", *(() if reuses else ("k_norm",)))
        layers.append((*own, *norms, *_mlp(c, width), *rest))
    mixed = [
        f"altup_{name}projections.{index}"
        for name in ("", "unembed_")
        for index in range(streams - 1)
    ]
    outside = (*_inputs_of_all_layers(c, extra), *(_linear(name, hidden, hidden) for name in mixed))
    return _decoder(c, layers, outside, tied=True)


def _whole_norms(c: Sizes) -> Layer:
    """Of queries and of keys, over all heads."""
    return _norms(c.num_attention_heads * c.head, "q_norm") + _norms(c.groups * c.head, "k_norm")


def _norms_after(c: Sizes) -> Layer:
    return _norms(c.hidden_size, "post_attention_layernorm", "post_feedforward_layernorm")


def _olmo(c: Sizes) -> Hybrid:
    """OLMo 2 and 3: no norm before attention and MLP, one after; queries and keys are normalized whole."""
    layer = (*_attention(c), *_whole_norms(c), *_mlp(c, c.intermediate_size), *_norms_after(c))
    return _decoder(c, [layer] * c.num_hidden_layers)


def _exaone(c: Sizes) -> Hybrid:
    """EXAONE 4: the same with norms of heads."""
    layer = (
        *_attention(c),
        *_norms(c.head, "q_norm", "k_norm"),
        *_mlp(c, c.intermediate_size),
        *_norms_after(c),
    )
    return _decoder(c, [layer] * c.num_hidden_layers)


def _like_llama(c: Sizes) -> Hybrid:
    """Seed-OSS, with biases, and Ministral 3."""
    biased = c.model["model_type"] == "seed_oss"
    qkv, output = (
        biased and c.get("attention_bias", True),
        biased and c.get("attention_out_bias", False),
    )
    layer = (*_attention(c, qkv=qkv, output=output), *_mlp(c, c.intermediate_size), *_both_norms(c))
    return _decoder(c, [layer] * c.num_hidden_layers)


def _ernie(c: Sizes) -> Hybrid:
    """ERNIE 4.5: experts in some layers; PEFT adapts experts and no dense MLP."""
    first, last, every = (
        c.moe_layer_start_index,
        c.moe_layer_end_index,
        c.get("moe_layer_interval", 1),
    )
    width, count, shared = (
        c.moe_intermediate_size,
        c.moe_num_experts,
        c.get("moe_num_shared_experts", 0),
    )
    routed = (*_experts(c, count, width, FP32), Weight("e_score_correction_bias", FP32, (count,)))
    routed += _mlp(c, shared * width, "shared_experts.", adapted=False) if shared else ()
    dense, layers = _mlp(c, c.intermediate_size, adapted=False), []
    for index in range(c.num_hidden_layers):
        expert = first <= index <= (last if last >= 0 else index) and (index + 1) % every == 0
        layers.append((*_attention(c), *(routed if expert else dense), *_both_norms(c)))
    return _decoder(c, layers, tied=True, expert_names=_GATED_EXPERTS)


def _minimax_m2(c: Sizes) -> Hybrid:
    """MiniMax M2: queries and keys are normalized whole; every layer has experts."""
    experts = _experts(c, c.num_local_experts, c.intermediate_size)
    layer = (*_attention(c), *_whole_norms(c), *experts, *_both_norms(c))
    return _decoder(c, [layer] * c.num_hidden_layers, expert_names=("w1", "w3", "w2"))


def _llama4(c: Sizes) -> Hybrid:
    """Llama 4: experts in some layers, beside what every token goes through."""
    width, count, hidden = c.intermediate_size, c.num_local_experts, c.hidden_size
    every = c.get("interleave_moe_layer_step", 1)
    routed = c.get("moe_layers", None) or range(every - 1, c.num_hidden_layers, every)
    experts = (
        Weight("gate", "router", (count, hidden)),
        Weight("gate_up_proj", "experts", (count, hidden, 2 * width)),
        Weight("experts.down_proj", "experts", (count, width, hidden)),
        *_mlp(c, width, "shared_expert."),
    )
    dense = _mlp(c, c.get("intermediate_size_mlp", 0))
    mlps = [experts if index in routed else dense for index in range(c.num_hidden_layers)]
    return _decoder(c, [(*_attention(c), *mlp, *_both_norms(c)) for mlp in mlps])


_FAMILIES: dict[str, Callable[[Sizes], Hybrid]] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _qwen),
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite"), _deepseek),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _sparse_deepseek),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _lfm),
    **dict.fromkeys(("olmo2", "olmo3"), _olmo),
    **dict.fromkeys(("ministral3", "seed_oss"), _like_llama),
    "bamba": _bamba,
    "ernie4_5_moe": _ernie,
    "exaone4": _exaone,
    "falcon_h1": _falcon,
    "gemma3n_text": _gemma_3n,
    "gemma4_text": _gemma,
    "glm4_moe": _glm,
    "gpt_oss": _gpt_oss,
    "granitemoehybrid": _granite,
    "jamba": _jamba,
    "mimo_v2_flash": _mimo,
    "kimi_linear": _kimi,
    "lfm3": _lfm3,
    "llama4_text": _llama4,
    "mamba2": _mamba2,
    "minimax": _minimax,
    "minimax_m2": _minimax_m2,
    "mistral4": _mistral4,
    "nemotron_h": _nemotron,
    "olmo_hybrid": _olmo_hybrid,
}


def hybrid(model: Mapping[str, Any]) -> Hybrid:
    """The weights of a decoder of several kinds of layers.

    NotDescribed: for a family that is not known here, or a configuration that leaves a size out.
    """
    kind = model["model_type"]
    if kind not in _FAMILIES:
        raise NotDescribed(f"the analytic estimate does not describe the architecture {kind}")
    return _FAMILIES[kind](Sizes(model))
