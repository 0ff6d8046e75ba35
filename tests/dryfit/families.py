"""Small models of the families of 2025 and 2026, two layers or one period of layers each.

Sizes are made up, and kept apart from one another so that no two terms of a step have the same bytes by chance. What a
family's layers are is in the order in which its configuration has them.
"""

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
# Queries and keys of 24, values of 16: heads of two sizes.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 24, "mamba_chunk_size": 32}
_OWN = {
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_next": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 40},
    "kimi_linear": _LATENT
    | _TOKENS
    | {
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 32,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "sliding_attention"],
        "head_dim": 16,
        "sliding_window": 32,
    }
    | _TOKENS,
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 16,
        "ssm_state_size": 24,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 32,
        "moe_shared_expert_intermediate_size": 40,
    }
    | _ROUTED,
    "granitemoehybrid": _MAMBA
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 40,
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "mamba_d_state": 24,
        "n_mamba_heads": 8,
        "chunk_size": 32,
        "adapter_rank": 8,
        "num_key_value_heads": 4,
    },
    "jamba": {
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "mamba2": {
        "intermediate_size": None,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 24,
        "n_groups": 2,
        "chunk_size": 32,
    }
    | _TOKENS,
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "head_dim": 16,
        "sliding_window": 32,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 12,
        "num_kv_shared_layers": 2,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "head_dim": 16,
        "sliding_window": 32,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 12,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "glm4_moe": _ROUTED | {"head_dim": 16, "first_k_dense_replace": 1},
    "glm4_moe_lite": _LATENT | _ROUTED | {"mlp_layer_types": ["dense", "sparse"]},
    "glm_moe_dsa": _LATENT
    | _ROUTED
    | {
        "mlp_layer_types": ["dense", "sparse"],
        "index_topk": 16,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "layer_types": ["indexed_attention", "indexed_attention"],
        "indexer_types": ["full", "full"],
    },
    "mimo_v2_flash": _ROUTED
    | {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "head_dim": 48,
        "v_head_dim": 32,
        "sliding_window": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v3": _LATENT | _ROUTED | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v4": _ROUTED
    | {
        "num_hidden_layers": 3,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "num_key_value_heads": 1,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 24,
        "o_lora_rank": 20,
        "o_groups": 2,
        "sliding_window": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 8,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
    },
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size_mlp": 80,
        "num_local_experts": 4,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 32,
    },
    "minimax": {
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 32,
        "head_dim": 16,
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "seed_oss": {"head_dim": 16},
    "olmo3": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        **_TOKENS,
    },
    "mistral4": _LATENT | _ROUTED | _TOKENS,
    "ministral3": {"head_dim": 16, **_TOKENS},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 32},
    "olmo_hybrid": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 24,
        "layer_types": ["linear_attention", "full_attention"],
    }
    | _TOKENS,
}
FAMILIES = {
    name: {
        key: value
        for key, value in {"model_type": name, **_SIZES, **own}.items()
        if value is not None
    }
    for name, own in _OWN.items()
}
