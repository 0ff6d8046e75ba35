"""Families of 2025 and 2026 by transformers' own code: on the CPU a trace is the measurement, to the byte."""

import os
import subprocess
import sys

import pytest

from dryfit.common.errors import UserError
from dryfit.step.adapters import WITHOUT_ADAPTER
from dryfit.step.model import skeleton
from dryfit.tracing.trace import trace
from tests.dryfit.families import FAMILIES
from tests.dryfit.tracing.test_measure import compare, scenario


def asked(family: str, method: str, **fields):
    return scenario(FAMILIES[family], method=method, **fields)


STEPS = (("full", True), ("full", False), ("lora", True))  # method, checkpointing
STEPS_OF_FAMILIES = [  # one of the three in each run, so that neighbours have others; all of them each night
    pytest.param(family, *step, marks=() if place == number % len(STEPS) else pytest.mark.nightly)
    for number, family in enumerate(sorted(FAMILIES))
    for place, step in enumerate(STEPS)
]


@pytest.mark.few(6, 12)
@pytest.mark.parametrize(("family", "method", "checkpointing"), STEPS_OF_FAMILIES)
def test_each_family_is_traced_to_the_byte(family, method, checkpointing):
    compare(asked(family, method, gradient_checkpointing=checkpointing))


@pytest.mark.few(1)
@pytest.mark.parametrize("family", sorted(set(WITHOUT_ADAPTER) & set(FAMILIES)))
def test_linear_layers_that_take_no_adapter_are_named(family):
    name = WITHOUT_ADAPTER[family]
    (note,) = [
        text
        for text in trace(asked(family, "lora"), "cpu", timeline=False)["notes"]
        if name in text
    ]
    assert note.startswith(f"all linear layers but {name} have adapters")


@pytest.mark.few(1, 3)
@pytest.mark.parametrize(
    "family",
    [
        "qwen3_5_text",
        "kimi_linear",
        "lfm2",
        "bamba",
        "jamba",
        "gemma4_text",
        "deepseek_v3",
        "deepseek_v4",
    ],
)
def test_a_quantized_base_is_traced_to_the_byte(family):
    compare(asked(family, "qlora", attention_mask="padding", micro_batch=3, autocast="bf16"))


@pytest.mark.few(1, 2)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5_moe_text", "lfm2_moe", "granitemoehybrid"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_routers_loss_is_traced_to_the_byte(family, method):
    compare(asked(family, method, experts={"router_loss": True}))


def test_an_architecture_without_a_routers_loss_says_so():
    with_loss = trace(
        asked("glm4_moe", "lora", experts={"router_loss": True}), "cpu", timeline=False
    )
    assert any("router_loss` adds nothing" in note for note in with_loss["notes"])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            {**FAMILIES["qwen3_5_text"], "layer_types": ["linear_attention"] * 3},
            ["`model.layer_types`", "3 entries"],
        ),
        (
            {**FAMILIES["kimi_linear"], "mlp_layer_types": ["dense"]},
            ["`model.mlp_layer_types`", "num_hidden_layers: 1"],
        ),
        (
            {"model_type": "qwen3_9", "hidden_size": 4096, "vocab_size": 248320},
            ["Is qwen3", "1.89 GiB", "lower bound"],
        ),
        (
            {"model_type": "nosuch", "hidden_size": 4096, "vocab_size": 248320},
            ["pip install -U transformers", "1.89 GiB"],
        ),
        ({"model_type": "lfm2_moe"}, ["the defaults of lfm2_moe describe no model", "config.json"]),
    ],
)
def test_a_configuration_that_describes_no_model_says_what_would(model, says):
    """And the least that the model takes, where that is known; no other model is named in its place."""
    with pytest.raises(UserError) as caught:
        trace(scenario(model), timeline=False)
    for text in says:
        assert text in str(caught.value)
    assert "qwen2" not in str(caught.value)


def test_a_models_sets_of_strings_come_in_one_order():
    model = skeleton(asked("gemma4_text", "full"))
    assert [*model.model.unique_layer_types] == ["full_attention", "sliding_attention"]
    assert [*sys.modules[type(model).__module__].set("fcbade")] == [*"abcdef"]


EVENTS = """
import sys
from dryfit.recorder.traces import events
from tests.dryfit.tracing.test_families import asked
for family in sys.argv[1:]:
    print(events(asked(family, "full"), (8, 0)))
"""


@pytest.mark.thorough
def test_a_trace_is_the_same_in_each_process_whatever_was_traced_before_it():
    """Python's hashes of strings differ, and with them the order in which sets are iterated."""
    found = []
    for seed, families in (
        ("0", ["gemma4_text"]),
        ("1", ["deepseek_v3", "gemma4_text"]),
    ):  # one has the other order
        run = [sys.executable, "-W", "ignore", "-c", EVENTS, *families]
        ended = subprocess.run(
            run,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(ended.stdout.splitlines()[-1])
    assert found[0] == found[1]
