"""Small steps on several GPUs."""

from typing import Any

from dryfit.scenario.scenario import Scenario

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def scenario(
    method: str, strategy: str, *, gpus: int = 2, offload: str = "none", **fields: Any
) -> Scenario:
    """A step of a small Llama."""
    mapping = {
        "model": LLAMA,
        "method": method,
        "precision": "fp32",
        "sequence_length": 64,
        "micro_batch": 2,
        "parallel": {"strategy": strategy, "gpus": gpus, "offload": offload},
    }
    return Scenario.from_mapping(mapping | fields)


# Sizes of ZeRO that fit the small Llama: by DeepSpeed's own it would gather all of it once, and keep it.
SMALL = {
    "reduce_bucket_size": 50_000,
    "stage3_prefetch_bucket_size": 40_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_max_live_parameters": 150_000,
    "stage3_max_reuse_distance": 60_000,
}
