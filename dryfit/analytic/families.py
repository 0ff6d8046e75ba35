"""How families of decoders whose layers are all alike differ from Llama: a table, with their usual sizes.

The sizes are the defaults of transformers' configuration classes, since a configuration may leave a size out. Families
whose layers are of several kinds stand in :mod:`dryfit.analytic.hybrid_weights`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a family of decoders deviates from Llama. Source: transformers 5.24, models/<model_type>/."""

    defaults: Mapping[str, Any]
    qkv_bias: bool | str = False  # a key of the configuration, or always / never
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    norm: str = (
        "rms"  # rms | gemma (fp32 until after the weight) | layer (weight and bias, one kernel)
    )
    norm_bias: bool = False
    norms: int = 2  # per layer
    post_norms: bool = False  # attention and MLP outputs are normalized too (Gemma 2, 3)
    qk_norm: bool | str = False
    parallel: bool = False  # attention and MLP read the same norm's output (Phi)
    gated: bool = True
    fused_qkv: str | None = None  # name of the one matrix
    fused_gate_up: str | None = None
    names: tuple[str, str, str, str] = ("o_proj", "up_proj", "down_proj", "gate_proj")
    own_head_dim: int | None = None  # default head size where it isn't hidden size / heads
    positions: bool = False  # learned position embeddings
    scaled_embedding: bool = False  # the embedding is multiplied by a number (Gemma)
    activation: str = "hidden_act"  # the key of the configuration
    experts: str | None = None  # the key of their number
    expert_width: str = "intermediate_size"
    expert_names: tuple[str, str, str] = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )  # that targets of adapters go by
    conv1d: bool = False  # weights stored transposed (GPT-2)
    rotary: float = 1.0  # share of a head that is rotated; 0: none
    sdpa: bool = (
        True  # whether attention can go through scaled_dot_product_attention; else it is eager
    )
    softmax_fp32: bool = True  # of eager attention's scores
    holds_parts: bool = (
        False  # its code keeps names for embeddings and attention's output to the end (GPT-2)
    )
    dropout: tuple[str, ...] = ()  # keys: after embedding, after attention and MLP


# Sizes that a configuration may leave out, as transformers' configuration classes fill them in.
_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_KEYS += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "hidden_act")


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
_WINDOW = {"sliding_window": 4096}
_CAPPED = {
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
_UNCAPPED = {**_CAPPED, "final_logit_softcapping": None, "attn_logit_softcapping": None}
_LLAMA = dict(zip(_KEYS, (32000, 4096, 11008, 32, 32, None, 2048, False, "silu"), strict=True))
_QWEN2 = dict(zip(_KEYS, (151936, 4096, 22016, 32, 32, 32, 32768, False, "silu"), strict=True))
_MISTRAL = (
    dict(zip(_KEYS, (32000, 4096, 14336, 32, 32, 8, 131072, False, "silu"), strict=True)) | _WINDOW
)
_GEMMA = dict(
    zip(_KEYS, (256000, 3072, 24576, 28, 16, 16, 8192, True, "gelu_pytorch_tanh"), strict=True)
)
_GEMMA2 = dict(
    zip(_KEYS, (256000, 2304, 9216, 26, 8, 4, 8192, True, "gelu_pytorch_tanh"), strict=True)
) | dict(**_WINDOW, **_CAPPED)
_GEMMA3 = dict(
    zip(_KEYS, (262208, 2304, 9216, 26, 8, 4, 131072, True, "gelu_pytorch_tanh"), strict=True)
) | dict(**_WINDOW, **_UNCAPPED)
_PHI = (
    dict(zip(_KEYS, (51200, 2048, 8192, 24, 32, None, 2048, False, "gelu_new"), strict=True))
    | _NO_DROPOUT
    | {"partial_rotary_factor": 0.5}
)
_PHI3 = dict(zip(_KEYS, (32064, 3072, 8192, 32, 32, None, 4096, False, "silu"), strict=True)) | {
    "resid_pdrop": 0.0
}
_GPT2 = dict(zip(_KEYS, (50257, 768, None, 12, 12, None, 1024, True, None), strict=True)) | {
    "activation_function": "gelu_new"
}
_GPT2 |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
_MIXTRAL = {**_MISTRAL, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3_MOE = dict(
    zip(_KEYS, (151936, 2048, 6144, 24, 32, 4, 32768, False, "silu"), strict=True)
) | {"moe_intermediate_size": 768}
_QWEN3_MOE |= {"num_experts": 128, "num_experts_per_tok": 8}
_SMOLLM3 = dict(zip(_KEYS, (128256, 2048, 11008, 36, 16, 4, 32768, True, "silu"), strict=True))
_STARCODER2 = dict(
    zip(_KEYS, (49152, 3072, 12288, 30, 24, 2, 4096, True, "gelu_pytorch_tanh"), strict=True)
) | {"use_bias": True}

_GEMMA_LIKE = {
    "norm": "gemma",
    "own_head_dim": 256,
    "scaled_embedding": True,
    "qkv_bias": "attention_bias",
}
_GEMMA_LIKE |= {"o_bias": "attention_bias"}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        _LLAMA, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": Family(_MISTRAL),
    "qwen2": Family(_QWEN2, qkv_bias=True),
    "qwen3": Family(
        _QWEN2, qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, own_head_dim=128
    ),
    "smollm3": Family(
        _SMOLLM3, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "gemma": Family(_GEMMA, **_GEMMA_LIKE),
    "gemma2": Family(
        _GEMMA2, sdpa=False, norms=4, post_norms=True, activation="hidden_activation", **_GEMMA_LIKE
    ),
    "gemma3_text": Family(
        _GEMMA3,
        norms=4,
        post_norms=True,
        activation="hidden_activation",
        qk_norm=True,
        **_GEMMA_LIKE,
    ),
    "phi": Family(
        _PHI,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        norm="layer",
        norm_bias=True,
        norms=1,
        qk_norm="qk_layernorm",
        parallel=True,
        gated=False,
        names=("dense", "fc1", "fc2", ""),
        rotary=0.5,
        dropout=("embd_pdrop", "resid_pdrop"),
    ),
    "phi3": Family(
        _PHI3, fused_qkv="qkv_proj", fused_gate_up="gate_up_proj", dropout=("", "resid_pdrop")
    ),
    "starcoder2": Family(
        _STARCODER2,
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        norm="layer",
        norm_bias=True,
        gated=False,
        names=("o_proj", "c_fc", "c_proj", ""),
        dropout=("embedding_dropout", "residual_dropout"),
    ),
    "gpt2": Family(
        _GPT2,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        norm="layer",
        norm_bias=True,
        gated=False,
        fused_qkv="c_attn",
        names=("c_proj", "c_fc", "c_proj", ""),
        positions=True,
        activation="activation_function",
        conv1d=True,
        softmax_fp32=False,
        holds_parts=True,
        rotary=0.0,
        dropout=("embd_pdrop", "resid_pdrop"),
    ),
    "mixtral": Family(_MIXTRAL, experts="num_local_experts", expert_names=("w1", "w3", "w2")),
    "qwen3_moe": Family(
        _QWEN3_MOE,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        experts="num_experts",
        expert_width="moe_intermediate_size",
    ),
}
