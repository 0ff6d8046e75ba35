"""Objectives of TRL: its trainer's whole ``train()``, predicted as a CPU measures it, to the byte in every phase."""

import pytest

from dryfit.analytic.estimate import estimate
from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.hours.step_time import speeds
from dryfit.planner.omissions import omissions
from dryfit.scenario.contradictions import TRAINING, contradictions
from dryfit.scenario.model import configuration
from dryfit.scenario.scenario import Scenario, check_packages
from dryfit.tracing.measure import measure
from dryfit.tracing.pairs import as_rows, reference_beside
from dryfit.tracing.trace import record, step_record, trace
from tests.dryfit.decoders import DECODERS

needs_trl = pytest.mark.skipif("not __import__('importlib').util.find_spec('trl')")


def scenario(objective: str = "dpo", reference: str | None = None, **fields) -> Scenario:
    rows = {"grpo": 4}.get(objective, 2)
    fields = {
        "method": "lora",
        "precision": "bf16",
        "sequence_length": 32,
        "micro_batch": rows,
        **fields,
    }
    preference = {"reference": reference, "generations": 4}
    return Scenario.from_mapping(
        {"model": DECODERS["qwen2"], **fields, "objective": objective, "preference": preference}
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
    "grpo with its base": {
        "objective": "grpo",
        "reference": "adapter_off",
        "gradient_checkpointing": False,
    },
}


@pytest.mark.few(2, 5)
@needs_trl
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_train_is_traced_to_the_byte(fields):
    asked = scenario(**fields)
    assert (
        trace(asked, "cpu", timeline=False)["phases"]
        == measure(asked, "cpu", timeline=False)["phases"]
    )


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
def test_fp16_is_traced_where_accelerate_knows_no_such_device():
    half = {
        name: trace(scenario(autocast=name), timeline=False)["peak_allocated_bytes"]
        for name in ("fp16", "bf16")
    }
    assert half["fp16"] == pytest.approx(half["bf16"], rel=0.01)


def test_what_trl_refuses_is_said_in_words():
    lora = {"rank": 4, "target_modules": ["lm_head"]}
    with pytest.raises(
        UserError, match=r"DPOTrainer refuses this model or its adapters.*lm_head"
    ) as caught:
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
    check_packages(scenario(parallel={"strategy": "ddp", "gpus": 2}))  # by rules
    with pytest.raises(UserError, match="needs the package trl, which is not installed") as caught:
        trace(scenario())
    assert caught.value.write == 'pip install "dryfit[trl]"'


@pytest.mark.few(1)
@needs_trl
@pytest.mark.parametrize("length", [256, 2048])
@pytest.mark.parametrize(
    "mixed", [{"precision": "bf16", "autocast": "bf16"}, {"precision": "bf16-mixed"}]
)
def test_pairs_on_several_gpus_follow_rules_that_hold_for_trls_own_step(mixed, length):
    """On one GPU TRL's trainer is traced itself: the rules' step and its reference take as much, to 8 %.

    Four layers weigh the output head more than all 24 do, with which eight such steps were within 2 %.
    """
    model, _ = configuration("qwen2.5-0.5b", "the test")
    asked = scenario(
        method="full", model={**model, "num_hidden_layers": 4}, sequence_length=length, **mixed
    )
    own = trace(asked, timeline=False)["peak_allocated_bytes"]
    reference = sum(one.reference.nbytes for one in reference_beside(asked))
    rules = trace(as_rows(asked), timeline=False)["peak_allocated_bytes"] + reference
    assert rules == pytest.approx(own, rel=0.08)


@pytest.mark.few(1, 1)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_reference_lies_beside_as_the_strategy_has_it(strategy):
    """Whole, or a part of it on each GPU; DeepSpeed casts it to the dtype that it computes in."""
    asked = scenario(
        method="full", precision="bf16-mixed", parallel={"strategy": strategy, "gpus": 4}
    )
    found, plain = trace(asked, timeline=False), trace(as_rows(asked), timeline=False)
    width, parts = (2 if "zero" in strategy else 4), (4 if strategy in ("fsdp2", "zero3") else 1)
    weights = found["parameters"] * width / parts
    assert found["peak_allocated_bytes"] - plain["peak_allocated_bytes"] == pytest.approx(
        weights, abs=4096
    )
    assert "supervised one of 2 rows for each pair" in found["notes"][-1]


@pytest.mark.thorough
def test_a_search_over_pairs_records_the_step_that_is_traced():
    asked = scenario(method="full", parallel={"strategy": "ddp", "gpus": 2})
    (reference,) = reference_beside(asked)
    assert (
        record(asked).peak_bytes() - record(as_rows(asked)).peak_bytes()
        == reference.reference.nbytes
    )
    assert len(step_record(asked).events) == len(step_record(as_rows(asked)).events) + 1


def test_a_second_model_is_kept_where_numbers_are_not_known():
    parallel = {"strategy": "zero2", "gpus": 2}
    assert not reference_beside(scenario(parallel=parallel))
    assert not reference_beside(scenario(method="full", reference="precomputed", parallel=parallel))
    assert not reference_beside(scenario("orpo", method="full", parallel=parallel))
    on_host = {
        "zero": {"offload_param": "cpu", "offload_optimizer": "cpu"},
        "precision": "bf16-mixed",
    }
    parallel = {"strategy": "zero3", "gpus": 2}
    assert not reference_beside(scenario(method="full", parallel=parallel, **on_host))
    asked = scenario(
        "orpo", method="full", parallel={"strategy": "zero3", "gpus": 2}, autocast="bf16"
    )
    logits = 2 * asked.tokens * asked.model["vocab_size"]
    answer = {"trace": {"phases": {"backward": 10**9}, "peak_allocated_bytes": 10**9}}
    (found,) = omissions((), asked, answer)
    assert found.too_low_bytes == 6 * logits and found.too_high_bytes in (0, None)
