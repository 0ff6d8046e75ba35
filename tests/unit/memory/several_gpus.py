"""Small steps on several GPUs."""

from typing import Any

from scripts.scenario.scenario import Scenario

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


def scenario(method: str, strategy: str, *, gpus: int = 2, offload: str = "none", **fields: Any) -> Scenario:
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
