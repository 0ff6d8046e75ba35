"""``python -m validation.families``: the table of ``validation/data/families.md``.

Each family is a model of its configuration's default sizes with few layers, one period of them where they alternate.
Its LoRA step without checkpointing is traced on an H100: by the packages that its code asks for, where they are
installed here, and by transformers' own loop. Nobody measured these rows: they show how far the two ways lie apart.
"""

from __future__ import annotations

import sys
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.parameters import parameter_count
from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.kernel_packages import packages_of
from dryfit.tracing.trace import trace

MIB = 2**20
LAYERS, TOKENS = 4, 2048
CAPABILITY = (9, 0)
_LINEAR = ["linear_attention"] * 3 + ["full_attention"]
_CONVOLUTION = ["conv", "conv", "full_attention", "conv"]
_SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
# What a default configuration says for more layers than these.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "qwen3_next": {"layer_types": _LINEAR},
    "kimi_linear": {"layer_types": _LINEAR, "mlp_layer_types": ["dense", *["sparse"] * 3]},
    "olmo_hybrid": {"layer_types": _LINEAR},
    "lfm2": {"layer_types": _CONVOLUTION},
    "lfm2_moe": {"layer_types": _CONVOLUTION},
    "lfm3": {"layer_types": _CONVOLUTION},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "falcon_h1": {},
    "bamba": {"attn_layer_indices": [3]},
    "mamba2": {},
    "gemma4_text": {"layer_types": _SLIDING},
    "glm4_moe": {},
    "glm4_moe_lite": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "llama4_text": {},
    "minimax": {"layer_types": ["full_attention", "linear_attention"] * 2},
    "ernie4_5_moe": {"moe_layer_end_index": LAYERS - 1},
    "seed_oss": {},
    "olmo3": {"layer_types": _SLIDING},
    "mistral4": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v32": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "glm_moe_dsa": {
        "mlp_layer_types": ["dense", *["sparse"] * 3],
        "indexer_types": ["full", "shared", "shared", "full"],
    },
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
}


def default_model(family: str) -> dict[str, Any]:
    """A family's model with its class's sizes and few layers."""
    import transformers

    given = {"num_hidden_layers": LAYERS, **FAMILIES[family]}
    sizes = transformers.AutoConfig.for_model(family, **given).to_dict()
    return {key: value for key, value in sizes.items() if value is not None} | {
        "model_type": family
    }


def scenario(family: str, packages: list[str]) -> Scenario:
    """A LoRA step of a family's model with few layers."""
    step = {
        "method": "lora",
        "sequence_length": TOKENS,
        "gradient_checkpointing": False,
        "gpu": "h100-80gb",
    }
    return Scenario.from_mapping({"model": default_model(family), **step, "packages": packages})


def row(family: str) -> list[str]:
    """The cells of a family: parameters, the peak by packages and by the loop."""
    asked = scenario(family, [])
    packages = packages_of(asked)
    loop = trace(asked, capability=CAPABILITY, timeline=False)
    try:
        exact = (
            ""
            if parameter_count(asked.model) == loop["parameters"]
            else " (by the configuration: DIFFERENT)"
        )
    except NotDescribed as error:
        exact = f" ({error})"
    taken = ["-", "-"]
    if packages:
        by_them = scenario(family, packages)
        other = trace(by_them, capability=CAPABILITY, timeline=False)
        least = "at least " if "bounds" in other else ""
        taken = [", ".join(packages), f"{least}{other['peak_allocated_bytes'] / MIB:,.0f}"]
    own = f"{loop['peak_allocated_bytes'] / MIB:,.0f}"
    return [family, f"{loop['parameters'] / 1e6:,.0f}{exact}", *taken, own]


def main(families: list[str]) -> None:
    """Print the table, row by row."""
    print(
        "| family | parameters, millions | packages | by them, MiB | by transformers' own code, MiB |"
    )
    print("| --- | ---: | --- | ---: | ---: |")
    for family in families or FAMILIES:
        try:
            print(f"| {' | '.join(row(family))} |", flush=True)
        except UserError as error:
            print(f"| {family} | {error.problem} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
