"""A late run is answered with changes that fit and end in time, each held against a trace of its own."""

import pytest

from dryfit.cards.gpus import Gpu, find
from dryfit.hours.run_time import Run, run_time
from dryfit.hours.step_time import speeds
from dryfit.planner.calibrated import CalibratedEstimator
from dryfit.planner.changes import apply, faster_moves
from dryfit.planner.deadline import Sooner, sooner
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

CARD = find("a100-80gb")
STEP = {
    "model": DECODERS["llama"],
    "method": "lora",
    "sequence_length": 64,
    "gradient_accumulation": 4,
}


def timed(scenario: Scenario, gpu: Gpu = CARD) -> dict:
    found = trace(scenario, capability=gpu.capability, timeline=False, timed_on=speeds([gpu]))
    return found | {"time": found.pop("times")[gpu.name]}


def answered(fields: dict, run: Run) -> list[Sooner]:
    scenario = Scenario.from_mapping(fields)
    return sooner(scenario, CARD, run, CalibratedEstimator(scenario, CARD, timed(scenario)))


def hours(fields: dict, rows: int) -> float:
    scenario = Scenario.from_mapping(fields)
    return run_time(timed(scenario)["time"], CARD, scenario, Run(rows)).hours


def test_what_is_proposed_fits_and_ends_in_time() -> None:
    deadline = hours(STEP, 10_000) * 0.9
    found = answered(STEP, Run(10_000, deadline_hours=deadline))
    assert found
    for item in found:
        candidate = apply(Scenario.from_mapping(STEP), item.changes)
        own = timed(candidate)
        assert item.required_bytes == own["required_bytes"] <= CARD.usable_bytes
        assert item.run == run_time(
            own["time"], CARD, candidate, Run(10_000, deadline_hours=deadline)
        )
        assert item.run.in_time and item.run.hours_range[1] <= deadline


def test_what_a_deadline_may_change() -> None:
    (move,) = [
        move for move in faster_moves(Scenario.from_mapping(STEP)) if "micro_batch" in move.name
    ]
    assert move.options == [
        {"micro_batch": 4, "gradient_accumulation": 1},
        {"micro_batch": 2, "gradient_accumulation": 2},
    ]
    step = Scenario.from_mapping(STEP)
    assert next(faster_moves(step, find("t4").capability)).options[0] == {"precision": "fp16"}
    assert "fp16" not in [move.name for move in faster_moves(step, CARD.capability)]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["no_checkpointing", "larger_micro_batch"]),
        ({"gradient_accumulation": 1}, ["no_checkpointing", "larger_batch"]),
        (
            {"attention": "eager", "gradient_checkpointing": False, "loss": "chunked"},
            ["fused_attention", "full_loss", "larger_micro_batch"],
        ),
        ({"method": "qlora"}, ["no_checkpointing", "lora", "larger_micro_batch"]),
        (
            {"activation_offload": True, "gradient_checkpointing": False},
            ["no_activation_offload", "larger_micro_batch"],
        ),
    ],
)
def test_changes_that_save_time(changes: dict, names: list[str]) -> None:
    assert [move.name for move in faster_moves(Scenario.from_mapping(STEP | changes))] == names


@pytest.mark.thorough
def test_the_soonest_is_named_and_the_time_is_that_of_mean_rows() -> None:
    (item,) = answered(STEP, Run(10_000_000, deadline_hours=0.001))
    assert item.run.in_time is False and item.move == "no_checkpointing+larger_micro_batch"
    assert item.run.hours < hours(STEP, 10_000_000)
    run = Run(10_000, deadline_hours=1e-6, tokens_per_row=16)
    (item,) = answered(STEP, run)
    candidate = apply(Scenario.from_mapping(STEP), item.changes)
    assert item.required_bytes == timed(candidate)["required_bytes"]
    assert item.run == run_time(timed(run.typical_step(candidate))["time"], CARD, candidate, run)
