"""Layers of several kinds: which mixer, how much of a head is rotated, and how far each looks back."""

import pytest

from dryfit.analytic.setting import Setting, describe, described
from dryfit.analytic.step import TrainingStep
from dryfit.scenario.scenario import Scenario
from tests.dryfit.families import FAMILIES

# By transformers' modeling code: who rotates queries and keys, and which attention has a window.
LAYERS = {
    "qwen3_5_text": [("delta", 0.0, 0), ("grouped", 0.25, 0)],
    "kimi_linear": [("kimi_delta", 0.0, 0), ("latent", 0.0, 0)],
    "lfm2": [("short", 0.0, 0), ("grouped", 1.0, 0)],
    "lfm2_moe": [("short", 0.0, 0), ("grouped", 1.0, 0)],
    "lfm3": [("short", 0.0, 0), ("grouped", 1.0, 0), ("grouped", 1.0, 32)],
    "nemotron_h": [("state_space", 0.0, 0), ("", 0.0, 0), ("grouped", 0.0, 0), ("", 0.0, 0)],
    "jamba": [("first_state_space", 0.0, 0), ("grouped", 0.0, 0)],
    "gemma4_text": [("grouped", 1.0, 32), ("grouped", 1.0, 0)] * 2,
    "glm4_moe": [("grouped", 0.5, 0)] * 2,
    "llama4_text": [("grouped", 1.0, 32), ("grouped", 0.0, 0)],
    "minimax": [("lightning", 0.0, 0), ("grouped", 1.0, 0)],
    "gpt_oss": [("with_sinks", 1.0, 32), ("with_sinks", 1.0, 0)],
}


@pytest.mark.parametrize("family", LAYERS)
def test_who_rotates_and_who_has_a_window(family) -> None:
    plans = describe(FAMILIES[family]).plans
    assert [(plan.mixer, plan.rotary, plan.heads.window) for plan in plans] == LAYERS[family]


EXAONE = {"model_type": "exaone4", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
          "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 300,
          "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


@pytest.mark.parametrize(("window", "found"), [(None, [(0, 1.0), (0, 1.0)]), (8, [(8, 1.0), (0, 0.0)])])
def test_exaones_full_attention_has_positions_where_nothing_slides(window, found) -> None:
    plans = describe(EXAONE | {"sliding_window": window}).plans
    assert [(plan.heads.window, plan.rotary) for plan in plans] == found


def test_what_a_configuration_leaves_out_is_filled_in_for_every_layer() -> None:
    model = {key: value for key, value in FAMILIES["gpt_oss"].items() if key != "layer_types"}
    windows = [plan.heads.window for plan in describe(model | {"num_hidden_layers": 6}).plans]
    assert windows == [windows[0], 0] * 3 and windows[0] > 0
    shared = FAMILIES["gemma4_text"] | {"attention_k_eq_v": True, "num_global_key_value_heads": None}
    assert describe(shared).sizes["J"] == shared["num_key_value_heads"]


EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
KNOWN = {name: model for name, model in FAMILIES.items() if name not in ("deepseek_v4", "zamba2")}
MODELS = KNOWN | {"gemma4_text with experts": FAMILIES["gemma4_text"] | EXPERTS}


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_tensor_has_elements_of_a_dtypes_size(name, method) -> None:
    """In steps of more tokens than an embedding's gradient is summed up without scratch for."""
    fields = {"model": MODELS[name], "method": method, "precision": "bf16", "sequence_length": 4000, "packages": []}
    step = Scenario.from_mapping(fields)
    taken = TrainingStep(Setting(described(step), step, (9, 0)), blocks=False).run()
    widths = {term.formula.partition("·")[0] for term in taken._terms.values()}
    assert widths <= {"1", "2", "4", "8"}
