"""Small decoders that several modules test with, as mappings that a scenario takes for its model."""

from dryfit.scenario.model import MODELS

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # within the small vocabulary
_OWN = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 32},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 32},
    "gemma3_text": {"head_dim": 16, "sliding_window": 32},
    "phi": {},
    "phi3": _TOKENS,
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "olmo": _TOKENS,
    "olmo2": _TOKENS,
    "starcoder2": _TOKENS,
    "gpt_neox": _TOKENS,
}
DECODERS = {
    **{name: {"model_type": name, **SIZES, **own} for name, own in _OWN.items()},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 256,
        "vocab_size": 300,
    }
    | _TOKENS,
    # Queries and keys of 24, values of 16: heads of two sizes.
    "deepseek_v3": {
        **{"model_type": "deepseek_v3", **SIZES, **_TOKENS, "num_key_value_heads": 4},
        **{
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
        **{
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
        },
    },
    "bloom": {
        "model_type": "bloom",
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 300,
    }
    | _TOKENS,
}
# Large enough that another rank, length or micro-batch changes what a card must have by whole segments.
LLAMA_3_LAYERS = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 4000,
    "max_position_embeddings": 1024,
}

# A model that is built at once, and a step of a real one that a T4 has just no room for.
TINY = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
T4 = {
    "model": str(MODELS / "qwen2.5-coder-7b.json"),
    "precision": "fp16",
    "sequence_length": 1024,
    "gradient_checkpointing": False,
    "gpu": "t4",
}
