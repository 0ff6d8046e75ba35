"""Objectives of TRL: its trainer's whole ``train()``, predicted as a CPU measures it, to the byte in every phase."""

import pytest

from dryfit.analytic.estimate import estimate
from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.hours.step_time import speeds
from dryfit.scenario.contradictions import TRAINING, contradictions
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

needs_trl = pytest.mark.skipif("not __import__('importlib').util.find_spec('trl')")


def scenario(objective: str = "dpo", reference: str | None = None, **fields) -> Scenario:
    rows = {"grpo": 4}.get(objective, 2)
    fields = {"method": "lora", "precision": "bf16", "sequence_length": 32, "micro_batch": rows, **fields}
    preference = {"reference": reference, "generations": 4}
    return Scenario.from_mapping(
        {"model": DECODERS["qwen2"], "objective": objective, "preference": preference, **fields}
    )


CASES = {
    "dpo": {},
    "dpo of a 4-bit base": {"method": "qlora"},
    "dpo beside a second model": {"reference": "model"},
    "dpo with numbers from before": {"reference": "precomputed"},
    "dpo of all weights, padded": {"method": "full", "attention_mask": "padding"},
    "dpo of all weights, numbers from before": {"method": "full", "reference": "precomputed"},
    "orpo": {"objective": "orpo", "autocast": "bf16", "gradient_accumulation": 2},
    "orpo of a 4-bit base": {"objective": "orpo", "method": "qlora", "optimizer": "lion_8bit"},
    "kto": {"objective": "kto", "optimizer": "adafactor"},
    "kto with numbers from before": {"objective": "kto", "reference": "precomputed"},
    "reward": {"objective": "reward", "method": "full"},
    "reward of a 4-bit base": {"objective": "reward", "method": "qlora"},
    "grpo": {"objective": "grpo", "gradient_checkpointing": "reentrant"},
    "grpo with its base": {"objective": "grpo", "reference": "adapter_off", "gradient_checkpointing": False},
}


@pytest.mark.few(2)
@needs_trl
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_train_is_traced_to_the_byte(fields):
    asked = scenario(**fields)
    assert trace(asked, "cpu", timeline=False)["phases"] == measure(asked, "cpu", timeline=False)["phases"]


@pytest.mark.thorough
@needs_trl
def test_what_an_objective_keeps_costs_what_it_is(capsys):
    plain, second, before = (
        trace(scenario(reference=reference, method="full", sequence_length=64), timeline=False)
        for reference in (None, "model", "precomputed")
    )
    assert plain["phases"] == second["phases"]
    weights = before["components"]["weights_bf16"]
    assert second["components"]["weights_bf16"] == 2 * weights
    assert second["phases"]["backward"] - before["phases"]["backward"] > 0.9 * weights
    assert "trl's DPOTrainer" in " ".join(plain["notes"])
    assert capsys.readouterr().out == ""  # an answer is printed where a trainer's log would be


@needs_trl
def test_what_trl_refuses_is_said_in_words():
    lora = {"rank": 4, "target_modules": ["lm_head"]}
    with pytest.raises(UserError, match=r"DPOTrainer refuses this model or its adapters.*lm_head") as caught:
        trace(scenario(lora=lora), timeline=False)
    assert caught.value.write == "objective: sft"


@needs_trl
def test_the_time_of_an_objective_is_not_known():
    timed_on = speeds([find("rtx-4090")])
    assert any(timed_on.values())
    assert not any(trace(scenario(), timeline=False, timed_on=timed_on)["times"].values())


def test_an_objective_is_not_estimated_and_not_trained():
    answer = estimate(scenario())
    assert answer.analytic is None and "objective: dpo" in answer.reason
    (problem,) = contradictions(scenario(), "training", TRAINING, {"on_out_of_memory": "stop"})
    assert problem.write == "objective: sft"
    with pytest.raises(UserError, match="device: cpu"):
        measure(scenario(), "cuda")


def test_without_the_package_a_scenario_says_what_to_install(monkeypatch):
    monkeypatch.setattr("dryfit.scenario.scenario.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package trl, which is not installed") as caught:
        trace(scenario())
    assert caught.value.write == 'pip install "dryfit[trl]"'
