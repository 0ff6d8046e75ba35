"""How many parameters a model of 2025 and 2026 has, from its configuration alone, without torch.

Its layers are of several kinds, so no table of one layer says it, as :mod:`decoder` has for decoders whose layers are
alike. Here each family is a function that adds up its layers, of parts that several families share: grouped, latent and
linear attention, state spaces, short convolutions, experts. A configuration has to name its sizes, as files that
transformers writes do.

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from will_it_fit.analytic.decoder import FAMILIES, NotDescribed, describe
from will_it_fit.scenario.model import size


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
_RATIOS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def kinds_of_layers(c: Sizes) -> list[str]:
    """What each layer is: listed, or by an older key from which transformers makes the list."""
    if listed := c.get("layer_types", None) or c.get("layers_block_type", None):
        return listed
    if pattern := c.get("hybrid_override_pattern", None):
        return [_LETTERS[letter] for letter in pattern]
    if ratios := c.get("compress_ratios", None):
        return [_RATIOS[ratio] for ratio in ratios]
    every = c.full_attention_interval
    return ["linear_attention" if (index + 1) % every else "full_attention" for index in range(c.num_hidden_layers)]


Layer = Callable[[Sizes, int], int]  # parameters of one layer, by its index


def parameter_count(model: Mapping[str, Any]) -> int:
    """Parameters of a model.

    Raises
    ------
    NotDescribed
        For a family that is not known here, or a configuration that leaves a size out.
    """
    kind = model["model_type"]
    if kind in FAMILIES:
        return describe(model).parameter_counts()["total"]
    if kind not in _LAYERS:
        raise NotDescribed(f"the analytic estimate does not describe the architecture {kind}")
    sizes = Sizes(model)
    h, tied = sizes.hidden_size, sizes.get("tie_word_embeddings", kind in _TIED)
    outside = sizes.vocab_size * h * (1 if tied else 2) + h + _OUTSIDE.get(kind, lambda sizes: 0)(sizes)
    count = len(kinds_of_layers(sizes)) if kind == "nemotron_h" else sizes.num_hidden_layers
    return outside + sum(_LAYERS[kind](sizes, index) for index in range(count))


# --- parts that families share --------------------------------------------------------------------------------------


def _grouped(c: Sizes, head: int, *, qkv: bool = False, output: bool = False, gated: bool = False) -> int:
    """Attention whose keys and values are shared by groups of queries; biases of the projections, a gate of its own."""
    a, k, h = c.num_attention_heads * head, c.get("num_key_value_heads", c.num_attention_heads) * head, c.hidden_size
    return h * (a * (3 if gated else 2) + 2 * k) + (a + 2 * k if qkv else 0) + (h if output else 0)


def _latent(c: Sizes) -> int:
    """Attention whose keys and values, and mostly queries, come from a narrow latent vector, which has a norm."""
    h, n, latent = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    queries = n * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    narrow = c.get("q_lora_rank", None)
    q = h * narrow + narrow + narrow * queries if narrow else h * queries
    kv = h * (latent + c.qk_rope_head_dim) + latent + latent * n * (c.qk_nope_head_dim + c.v_head_dim)
    return q + kv + n * c.v_head_dim * h


def _delta(c: Sizes) -> int:
    """Linear attention by the gated delta rule: projections, a convolution, decays, a gated norm."""
    h, heads = c.hidden_size, c.linear_num_value_heads
    k, v = c.linear_num_key_heads * c.linear_key_head_dim, heads * c.linear_value_head_dim
    convolution = (2 * k + v) * c.get("linear_conv_kernel_dim", 4)
    return h * (2 * k + 2 * v + 2 * heads) + v * h + convolution + 2 * heads + c.linear_value_head_dim


def _kimi_delta(c: Sizes) -> int:
    """Kimi's delta attention: a decay for each channel, two gates through a narrow projection."""
    h, heads, d = c.hidden_size, c.linear_num_heads, c.linear_head_dim
    wide = heads * d
    gates = 2 * (h * d + d * wide)
    return 4 * h * wide + 3 * wide * c.get("linear_conv_kernel_dim", 4) + gates + h * heads + d + wide + heads


def _state_space(
    c: Sizes, inner: int, heads: int, state: int, groups: int, width: int, biased: bool, normed: bool = True
) -> int:
    """Mamba 2: one projection in, a convolution, a decay, skip and step for each head, a norm, one projection out."""
    h, channels = c.hidden_size, inner + 2 * groups * state
    convolution = channels * (width + (1 if biased else 0))
    return h * (inner + channels + heads) + convolution + 3 * heads + (inner if normed else 0) + inner * h


def _mamba_1(c: Sizes) -> int:
    """Jamba's: the first Mamba with norms of its step and states."""
    h, state, step = c.hidden_size, c.mamba_d_state, c.mamba_dt_rank
    inner = c.get("mamba_expand", 2) * h
    convolution = inner * (c.get("mamba_d_conv", 4) + (1 if c.get("mamba_conv_bias", True) else 0))
    projections = h * 2 * inner + inner * (step + 2 * state) + step * inner + inner + inner * h
    return projections + convolution + inner * state + inner + step + 2 * state


def _short(c: Sizes) -> int:
    """A short convolution between two gates."""
    h = c.hidden_size
    return h * c.get("conv_L_cache", 7 if c.model["model_type"] == "lfm3" else 3) + 4 * h * h


def _gated_mlp(c: Sizes, width: int) -> int:
    return 3 * c.hidden_size * width


def _experts(c: Sizes, count: int, width: int, shared: int = 0, matrices: int = 3) -> int:
    """A router and its experts; ``shared``: the width of what every token goes through."""
    h = c.hidden_size
    return count * (matrices * h * width + h) + matrices * h * shared


# --- families: one layer --------------------------------------------------------------------------------------------


def _qwen(c: Sizes, index: int) -> int:
    h, head = c.hidden_size, c.head()
    full = kinds_of_layers(c)[index] == "full_attention"
    mixer = _grouped(c, head, gated=True) + 2 * head if full else _delta(c)
    if size(c.model, "num_experts") is None:
        return mixer + _gated_mlp(c, c.intermediate_size) + 2 * h
    shared = c.shared_expert_intermediate_size
    return mixer + _experts(c, c.num_experts, c.moe_intermediate_size, shared) + h + 2 * h


def _olmo_hybrid(c: Sizes, index: int) -> int:
    head = c.head()
    if c.layer_types[index] != "full_attention":
        mixer = _delta(c)
    else:
        groups = c.get("num_key_value_heads", c.num_attention_heads)
        mixer = _grouped(c, head) + (c.num_attention_heads + groups) * head
    return mixer + _gated_mlp(c, c.intermediate_size) + 2 * c.hidden_size


def _kimi(c: Sizes, index: int) -> int:
    mixer = _latent(c) if c.layer_types[index] == "full_attention" else _kimi_delta(c)
    return mixer + _latent_mlp(c, index, c.num_experts, c.get("num_shared_experts", 1)) + 2 * c.hidden_size


def _latent_mlp(c: Sizes, index: int, experts: int, shared: int) -> int:
    """The MLP of families whose first layers are dense."""
    dense = c.get("mlp_layer_types", None)
    is_dense = dense[index] == "dense" if dense else index < c.get("first_k_dense_replace", 0)
    if is_dense:
        return _gated_mlp(c, c.intermediate_size)
    return _experts(c, experts, c.moe_intermediate_size, shared * c.moe_intermediate_size)


def _deepseek(c: Sizes, index: int) -> int:
    shared = c.get("n_shared_experts", 1)
    layer = _latent(c) + _latent_mlp(c, index, c.n_routed_experts, shared) + 2 * c.hidden_size
    kinds = c.get("indexer_types", None)
    if c.model["model_type"] in ("glm_moe_dsa", "deepseek_v32") and (kinds is None or kinds[index] == "full"):
        narrow, heads, d = c.q_lora_rank, c.index_n_heads, c.index_head_dim
        layer += narrow * heads * d + c.hidden_size * (d + heads) + 2 * d
    return layer


def _glm(c: Sizes, index: int) -> int:
    head = c.head()
    attention = _grouped(c, head, qkv=c.get("attention_bias", False)) + (2 * head if c.get("use_qk_norm", False) else 0)
    mlp = _latent_mlp(c, index, c.n_routed_experts, c.get("n_shared_experts", 1))
    return attention + mlp + 2 * c.hidden_size


def _lfm(c: Sizes, index: int) -> int:
    h, head, kind = c.hidden_size, c.head(), c.model["model_type"]
    gate = c.num_attention_heads * h if kind == "lfm3" and c.get("use_attention_gate", True) else 0
    mixer = _short(c) if c.layer_types[index] == "conv" else _grouped(c, head) + 2 * head + gate
    if kind == "lfm2_moe" and index >= c.num_dense_layers:
        mlp = _experts(c, c.num_experts, c.moe_intermediate_size)
    else:
        mlp = _gated_mlp(c, lfm_width(c) if kind == "lfm2" else c.intermediate_size)
    return mixer + mlp + (4 if kind == "lfm3" and c.get("use_sandwich_norm", True) else 2) * h


def lfm_width(c: Sizes) -> int:
    """LFM2 takes two thirds of the configuration's width, rounded up to whole blocks."""
    width = c.get("intermediate_size", None) or c.block_ff_dim
    if c.get("block_auto_adjust_ff_dim", True):
        width = int(c.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        block = c.get("block_multiple_of", 256)
        width = block * -(-width // block)
    return width


def _nemotron(c: Sizes, index: int) -> int:
    h, kind = c.hidden_size, kinds_of_layers(c)[index]
    if kind in ("linear_attention", "mamba"):
        heads, groups = c.mamba_num_heads, c.n_groups
        part = _state_space(c, heads * c.mamba_head_dim, heads, c.ssm_state_size, groups, c.get("conv_kernel", 4), True)
    elif kind == "moe":
        shared = c.get("n_shared_experts", 1) * c.moe_shared_expert_intermediate_size
        width = c.get("moe_latent_size", None) or h
        experts = c.n_routed_experts * (2 * width * c.moe_intermediate_size + h)
        part = experts + 2 * h * shared + (2 * h * width if width != h else 0)
    else:
        part = _grouped(c, c.head()) if kind in ("full_attention", "attention") else 2 * h * c.intermediate_size
    return part + h


def _mamba_of(c: Sizes, *, normed: bool = True, inner: int | None = None) -> int:
    inner = inner or c.get("mamba_expand", 2) * c.hidden_size
    conv, biased = c.get("mamba_d_conv", 4), c.get("mamba_conv_bias", True)
    return _state_space(c, inner, c.mamba_n_heads, c.mamba_d_state, c.get("mamba_n_groups", 1), conv, biased, normed)


def _granite(c: Sizes, index: int) -> int:
    mixer = _mamba_of(c) if c.layer_types[index] != "full_attention" else _grouped(c, c.head())
    experts = c.get("num_local_experts", 0)
    mlp = _experts(c, experts, c.intermediate_size) + _gated_mlp(c, c.shared_intermediate_size)
    return mixer + mlp + 2 * c.hidden_size


def _falcon(c: Sizes, index: int) -> int:
    space = _mamba_of(c, normed=c.get("mamba_rms_norm", False), inner=c.get("mamba_d_ssm", None))
    return space + _grouped(c, c.head()) + _gated_mlp(c, c.intermediate_size) + 2 * c.hidden_size


def _bamba(c: Sizes, index: int) -> int:
    mixer = _grouped(c, c.head()) if index in c.get("attn_layer_indices", ()) else _mamba_of(c)
    return mixer + _gated_mlp(c, c.intermediate_size) + 2 * c.hidden_size


def _jamba(c: Sizes, index: int) -> int:
    attends = index % c.attn_layer_period == c.attn_layer_offset
    routed = c.num_experts > 1 and index % c.get("expert_layer_period", 2) == c.get("expert_layer_offset", 1)
    width = c.intermediate_size
    mlp = _experts(c, c.num_experts, width) if routed else _gated_mlp(c, width)
    return (_grouped(c, c.head()) if attends else _mamba_1(c)) + mlp + 2 * c.hidden_size


def _mamba2(c: Sizes, index: int) -> int:
    inner, heads = c.get("expand", 2) * c.hidden_size, c.num_heads
    return _state_space(c, inner, heads, c.state_size, c.n_groups, c.get("conv_kernel", 4), True) + c.hidden_size


def _llama4(c: Sizes, index: int) -> int:
    h, width = c.hidden_size, c.intermediate_size
    experts = _experts(c, c.num_local_experts, width, width)
    every = c.get("interleave_moe_layer_step", 1)
    routed = c.get("moe_layers", None) or range(every - 1, c.num_hidden_layers, every)
    mlp = experts if index in routed else _gated_mlp(c, c.intermediate_size_mlp)
    return _grouped(c, c.head()) + mlp + 2 * h


def _minimax(c: Sizes, index: int) -> int:
    h, wide = c.hidden_size, c.num_attention_heads * c.head()
    linear = wide + 3 * wide * h + 2 * wide * h
    mixer = _grouped(c, c.head()) if c.layer_types[index] == "full_attention" else linear
    return mixer + _experts(c, c.num_local_experts, c.intermediate_size) + 2 * h


def _ernie(c: Sizes, index: int) -> int:
    first, last, every = c.moe_layer_start_index, c.moe_layer_end_index, c.get("moe_layer_interval", 1)
    mlp = _gated_mlp(c, c.intermediate_size)
    if first <= index <= (last if last >= 0 else index) and (index + 1) % every == 0:
        shared = c.get("moe_num_shared_experts", 0) * c.moe_intermediate_size
        mlp = _experts(c, c.moe_num_experts, c.moe_intermediate_size, shared) + c.moe_num_experts
    return _grouped(c, c.head()) + mlp + 2 * c.hidden_size


def _olmo3(c: Sizes, index: int) -> int:
    groups, head = c.get("num_key_value_heads", c.num_attention_heads), c.head()
    norms = (c.num_attention_heads + groups) * head + 2 * c.hidden_size
    return _grouped(c, head) + _gated_mlp(c, c.intermediate_size) + norms


def _exaone(c: Sizes, index: int) -> int:
    return _grouped(c, c.head()) + 2 * c.head() + _gated_mlp(c, c.intermediate_size) + 2 * c.hidden_size


def _minimax_m2(c: Sizes, index: int) -> int:
    head, experts = c.head(), _experts(c, c.num_local_experts, c.intermediate_size)
    norms = (c.num_attention_heads + c.num_key_value_heads) * head + 2 * c.hidden_size
    return _grouped(c, head) + experts + norms


def _gpt_oss(c: Sizes, index: int) -> int:
    h, width, experts = c.hidden_size, c.intermediate_size, c.num_local_experts
    biased = c.get("attention_bias", True)
    attention = _grouped(c, c.head(), qkv=biased, output=biased) + c.num_attention_heads
    return attention + _experts(c, experts, width) + experts * (1 + 2 * width + h) + 2 * h


def _gemma4(c: Sizes, index: int) -> int:
    """Full attention has larger heads; the last layers take keys and values of earlier ones."""
    h, count, full = c.hidden_size, c.num_hidden_layers, c.layer_types[index] == "full_attention"
    head = c.get("global_head_dim", 512) if full else c.head()
    shares = index >= count - c.get("num_kv_shared_layers", 0) > 0
    same = full and c.get("attention_k_eq_v", False)
    groups = c.get("num_global_key_value_heads", c.num_key_value_heads) if same else c.num_key_value_heads
    own = 0 if shares else h * groups * head * (1 if same else 2) + head
    width = c.intermediate_size * (2 if shares and c.get("use_double_wide_mlp", False) else 1)
    extra = c.get("hidden_size_per_layer_input", 0)
    beside = 2 * h * extra + h if extra else 0
    if c.get("enable_moe_block", False):  # experts beside the MLP, with norms and scales of their own
        beside += _experts(c, c.num_experts, c.moe_intermediate_size) + 4 * h + c.num_experts
    return 2 * h * c.num_attention_heads * head + head + own + _gated_mlp(c, width) + 4 * h + beside


def _gemma4_outside(c: Sizes) -> int:
    """An embedding for each layer, which every token brings beside the one of all."""
    extra = c.get("hidden_size_per_layer_input", 0)
    width = c.num_hidden_layers * extra
    return width * (c.vocab_size_per_layer_input + c.hidden_size) + extra if extra else 0


def _deepseek_v4(c: Sizes, index: int) -> int:
    """Latent queries, one key and value for all heads, compressed tokens, and a residual stream of several copies."""
    h, n, d, narrow, kind = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank, kinds_of_layers(c)[index]
    rank = c.o_lora_rank
    attention = n + h * narrow + narrow + narrow * n * d + h * d + d + rank * n * d + h * c.o_groups * rank
    if kind != "sliding_attention":
        rates = c.get("compress_rates", {kind: rate for rate, kind in _RATIOS.items()})
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


def _plain(c: Sizes, index: int) -> int:
    kind = c.model["model_type"]
    attention = _grouped(c, c.head(), qkv=kind == "seed_oss" and c.get("attention_bias", True))
    return attention + _gated_mlp(c, c.intermediate_size) + 2 * c.hidden_size


_LAYERS: dict[str, Layer] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _qwen),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "mistral4"), _deepseek),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _lfm),
    **dict.fromkeys(("seed_oss", "ministral3"), _plain),
    "bamba": _bamba,
    "deepseek_v4": _deepseek_v4,
    "ernie4_5_moe": _ernie,
    "exaone4": _exaone,
    "falcon_h1": _falcon,
    "gemma4_text": _gemma4,
    "glm4_moe": _glm,
    "gpt_oss": _gpt_oss,
    "granitemoehybrid": _granite,
    "jamba": _jamba,
    "kimi_linear": _kimi,
    "llama4_text": _llama4,
    "mamba2": _mamba2,
    "minimax": _minimax,
    "minimax_m2": _minimax_m2,
    "nemotron_h": _nemotron,
    **dict.fromkeys(("olmo2", "olmo3"), _olmo3),
    "olmo_hybrid": _olmo_hybrid,
}
# Beside embeddings, head and the last norm.
_OUTSIDE: dict[str, Callable[[Sizes], int]] = {"deepseek_v4": _deepseek_v4_outside, "gemma4_text": _gemma4_outside}
_TIED = ("gemma4_text", "ernie4_5_moe", "lfm2", "lfm2_moe", "lfm3")  # where the configuration doesn't say it
