"""vLLM's cache of keys and values, by its rules: layers' pages, groups of layers, blocks, tokens.

Read in vLLM 0.31.0 (``v1/kv_cache_interface.py``, ``v1/core/kv_cache_utils.py``). All groups draw blocks from one pool.
One of a model's layers has a page in each block of its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from dryfit.common.errors import UserError

FULL, SLIDING, LATENT, STATE = (
    "full_attention",
    "sliding_attention",
    "latent_attention",
    "linear_attention",
)
STATES_OF_REQUEST = (
    2  # with prefix caching, which is on: those of the last whole block, and those that change
)
CACHE_BYTES = {"auto": 2, "bf16": 2, "fp16": 2, "fp8": 1}  # of a number
BLOCK_TOKENS = 16  # vLLM's default on CUDA
# Families whose configurations give every so-manieth layer full attention, where they don't list the layers
# (transformers 5.24, configuration_*.py: the default of each). 0: every layer slides.
_FULL_EVERY = {
    "gemma2": 2,
    "gemma3_text": 6,
    "cohere2": 4,
    "olmo3": 4,
    "gpt_oss": 2,
    "mistral": 0,
    "mixtral": 0,
    "phi3": 0,
    "starcoder2": 0,
}
# A group takes as many layers as the rarest kind has, or the most frequent where that is not this much more.
_NEARLY_AS_MANY = 1.5


@dataclass(frozen=True)
class CacheLayer:
    """What a layer keeps of each token."""

    kind: str  # one of `FULL`, `SLIDING`, `LATENT`, `STATE`
    token_bytes: int  # of one token in one layer, on one GPU
    window: int = 0  # tokens that a sliding layer looks back
    state_bytes: int = 0  # of a request's states in a layer that keeps no tokens


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share a table of blocks.

    ``page_bytes``: of one layer in one block. ``states``: how many states a request has in layers without tokens.
    """

    layer: CacheLayer
    layers: int
    block_tokens: int
    page_bytes: int
    states: int = STATES_OF_REQUEST

    def blocks_of(self, tokens: int, tokens_in_flight: int) -> int:
        """Blocks that a request of so many tokens takes at most, while so many are computed at once."""
        if self.layer.kind == STATE:
            return self.states
        if self.layer.kind != SLIDING:
            return ceil(tokens / self.block_tokens)
        return ceil(min(self.layer.window - 1 + tokens_in_flight, tokens) / self.block_tokens) + 1


@dataclass(frozen=True)
class KvCache:
    """A model's cache, for a number of tokens in a block."""

    groups: tuple[CacheGroup, ...]

    @property
    def block_bytes(self) -> int:
        """Of one block: the pages of the largest group."""
        return max(group.layers * group.page_bytes for group in self.groups)

    def blocks(self, available_bytes: int) -> int:
        """Whole blocks in so much memory; the first is vLLM's null block and serves no request."""
        return max(available_bytes, 0) // self.block_bytes

    def blocks_of_request(self, tokens: int, tokens_in_flight: int) -> int:
        """Blocks of all groups that one request takes at most."""
        return sum(group.blocks_of(tokens, tokens_in_flight) for group in self.groups)

    def tokens(self, blocks: int, longest: int, tokens_in_flight: int) -> int:
        """What vLLM prints as the cache's size in tokens: of requests that are as long as ``longest``."""
        return int(blocks / self.blocks_of_request(longest, tokens_in_flight) * longest)


def layers_of(
    model: Mapping[str, Any], *, number_bytes: int = 2, tensor_parallel: int = 1
) -> list[CacheLayer]:
    """What each layer of a model keeps of a token.

    Parameters
    ----------
    model
        Its configuration.
    number_bytes
        Of a number of the cache (:data:`CACHE_BYTES`).
    tensor_parallel
        GPUs that share the heads; each keeps one at least.

    Raises
    ------
    UserError
        If a layer keeps states of a kind that is not described.
    """
    text = model.get("text_config") or model
    count, kind = text["num_hidden_layers"], str(text.get("model_type"))
    if text.get(
        "kv_lora_rank"
    ):  # one latent vector for all heads, and no values beside; not divided among GPUs
        size = (text["kv_lora_rank"] + text["qk_rope_head_dim"]) * number_bytes
        return [CacheLayer(LATENT, size)] * count
    queries = text.get("num_attention_heads") or 0  # a Mamba may have no attention
    head = queries and (text.get("head_dim") or text["hidden_size"] // queries)
    size = (
        max((text.get("num_key_value_heads") or queries) // tensor_parallel, 1)
        * 2
        * head
        * number_bytes
    )
    window = text.get("sliding_window") or 0
    if kind.startswith("qwen") and not text.get("use_sliding_window"):
        window = 0
    layers = []
    for name in _kinds(text, kind, count, window):
        states = name not in (FULL, SLIDING) and _state_bytes(text, tensor_parallel)
        if states:
            layers.append(CacheLayer(STATE, 0, state_bytes=states))
            continue
        if name not in (FULL, SLIDING):
            raise UserError(
                f"vLLM's cache of a layer of the kind {name} is not described.",
                where="model",
                found=f"model_type {kind}",
                allowed="keys and values, of all tokens, of a window or as latent vectors; states of gated delta nets,"
                " of Mamba and of short convolutions",
            )
        layers.append(CacheLayer(name, size, window if name == SLIDING else 0))
    return layers


def kv_cache(
    layers: Sequence[CacheLayer], block_tokens: int = BLOCK_TOKENS, *, aligned: bool = True
) -> KvCache:
    """Layers in groups: of one kind each, and of as many layers as the rarest kind has.

    A block grows until its keys and values take as much as a request's states (``platforms/interface.py``).
    ``aligned``: false on a CPU, where the pages of keys and values are padded instead.
    """
    state, token = (
        max(getattr(layer, name) for layer in layers) for name in ("state_bytes", "token_bytes")
    )
    if state and token and aligned:
        block_tokens *= ceil(state / (block_tokens * token))
    pages = {layer: (layer.token_bytes or token) * block_tokens for layer in dict.fromkeys(layers)}
    largest = max(*pages.values(), state)
    if not state and any(largest % page for page in pages.values()):
        raise UserError(
            "vLLM pads the pages of such layers, which is not described.",
            where="model",
            found=sorted(set(pages.values())),
            allowed="layers whose pages divide the largest",
        )
    counts = {layer: sum(each == layer for each in layers) for layer in pages}
    if len(counts) == 1:
        ((layer, count),) = counts.items()
        states = (
            STATES_OF_REQUEST if token else 1
        )  # without attention vLLM keeps no beginnings for other requests
        return KvCache((CacheGroup(layer, count, block_tokens, largest, states),))
    least, most = min(counts.values()), max(counts.values())
    size = most if most < _NEARLY_AS_MANY * least else least
    groups = []
    for layer, count in counts.items():
        number = ceil(count / size)
        block = block_tokens * (
            1 if state else largest // pages[layer]
        )  # a smaller page holds more tokens
        groups += [
            CacheGroup(layer, len(range(first, count, number)), block, largest)
            for first in range(number)
        ]
    return KvCache(tuple(groups))


def _state_bytes(text: Mapping[str, Any], tensor_parallel: int) -> int | None:
    """A layer's states, of the kind that the model has; None: a kind that is not described."""
    if text.get("linear_num_value_heads"):
        return _delta_net_bytes(text, tensor_parallel)
    if text.get("conv_L_cache"):  # a short convolution keeps its last inputs
        return (
            2
            * (text["conv_L_cache"] - 1)
            * (text.get("conv_dim") or text["hidden_size"])
            // tensor_parallel
        )
    mamba = _mamba(text)
    if mamba is None:
        return None
    heads, head, state, groups, kernel = mamba
    groups += 0 if groups % tensor_parallel == 0 else tensor_parallel - groups
    inputs = (heads * head + 2 * groups * state) // tensor_parallel * (kernel - 1)
    ssm = 2 if str(text.get("mamba_ssm_cache_dtype", "float32")).endswith("16") else 4
    return 2 * inputs + ssm * (heads // tensor_parallel) * head * state


# What a configuration of Mamba 2 calls heads, their size, the state's, groups, the convolution's kernel.
_MAMBA_2 = (
    (
        "mamba_n_heads",
        "mamba_d_head",
        "mamba_d_state",
        "mamba_n_groups",
        "mamba_d_conv",
    ),  # Falcon-H1, Bamba, Granite
    (
        "mamba_num_heads",
        "mamba_head_dim",
        "ssm_state_size",
        "n_groups",
        "conv_kernel",
    ),  # Nemotron-H
    ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel"),  # Mamba 2 alone
)


def _mamba(text: Mapping[str, Any]) -> tuple[int, int, int, int, int] | None:
    """Heads, their size, the state's, groups, the convolution's kernel. In the first Mamba each channel is a head."""
    for names in _MAMBA_2:
        if names[0] in text and names[2] in text:
            heads, head, state, groups, kernel = (text[name] for name in names)
            return heads, head, state, groups, kernel
    if (
        text.get("model_type") == "jamba"
    ):  # other models have its names too, and attention at places of their own
        return (
            text["hidden_size"] * text["mamba_expand"],
            1,
            text["mamba_d_state"],
            0,
            text["mamba_d_conv"],
        )
    if text.get("model_type") in ("mamba", "falcon_mamba"):
        return text["intermediate_size"], 1, text["state_size"], 0, text["conv_kernel"]
    return None


def _delta_net_bytes(text: Mapping[str, Any], tensor_parallel: int) -> int:
    """A gated delta net's states: the last inputs of its convolution in 16 bits, and a matrix for each head in fp32.

    ``model_executor/layers/mamba/mamba_utils.py``.
    """
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    inputs = (2 * keys + values) // tensor_parallel * (text["linear_conv_kernel_dim"] - 1)
    matrices = values // tensor_parallel * text["linear_key_head_dim"]
    return 2 * inputs + 4 * matrices


def _kinds(text: Mapping[str, Any], family: str, count: int, window: int) -> list[str]:
    pattern = text.get("hybrid_override_pattern") or text.get("layers_block_type")
    if (
        family == "nemotron_h" and pattern
    ):  # letters or words; layers without attention and states keep nothing
        words = {
            "M": "mamba",
            "mamba": "mamba",
            STATE: "mamba",
            "*": FULL,
            "attention": FULL,
            FULL: FULL,
        }
        return [words[sign] for sign in pattern if sign in words]
    if family == "falcon_h1":  # both in each layer
        return ["mamba", FULL] * count
    if family == "jamba":
        period, offset = text["attn_layer_period"], text["attn_layer_offset"]
        return [FULL if number % period == offset else "mamba" for number in range(count)]
    listed = text.get("layer_types")
    if listed:
        return [
            FULL if name == "attention" or (name == SLIDING and not window) else name
            for name in listed
        ]
    known_states = ("mamba", "linear_", "conv_", "ssm_", "layers_block_type", "attn_layer_indices")
    if any(str(key).startswith(known_states) for key in text):
        return ["state"] * count
    if not window or family not in _FULL_EVERY:
        return [FULL] * count
    every = (
        text.get("sliding_window_pattern")
        or text.get("_sliding_window_pattern")
        or _FULL_EVERY[family]
    )
    return [FULL if every and not (number + 1) % every else SLIDING for number in range(count)]
