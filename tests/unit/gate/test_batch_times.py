"""The hours of a run, from the shapes of its batches; a run that takes too long stops before it trains."""

from dataclasses import replace
from pathlib import Path

import pytest

from dryfit.cards.gpus import find
from dryfit.cards.verdict import Verdict
from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from dryfit.hours.run_time import RunHours
from dryfit.hours.step_time import speed_of
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.scenario_trace import Traced
from dryfit.tracing.trace import trace
from scripts.common.resource_table import judged
from scripts.gate import check_resources, gate_memory
from scripts.gate.batch_times import batch_shapes, evaluation_seconds, training_seconds
from scripts.gate.decision import Decision, StepDecision
from scripts.runs.cluster import training_minutes
from tests.dryfit.decoders import LLAMA_3_LAYERS

T4 = speed_of("t4")
NO_CPU = replace(
    T4, launch_seconds=0.0, shortest_kernel_seconds=0.0
)  # so small a model would wait for launches
STEP = Scenario.from_mapping(
    {
        "model": LLAMA_3_LAYERS,
        "sequence_length": 64,
        "micro_batch": 2,
        "method": "lora",
        "precision": "fp16",
    }
)
LOOP = {"epochs": 2, "max_steps": None, "rows_per_step": None, "seed": 1}


@pytest.fixture
def train(tmp_path: Path) -> str:
    import pandas

    rows = [{"input_ids": [1] * n, "labels": [-100] * (n - 2) + [1, 2]} for n in (64, 8, 8, 64, 30)]
    path = tmp_path / "train.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    write_report(tmp_path / "encode.json", {}, path)
    return str(path)


def seconds_of(rows: int, tokens: int) -> float:
    step = replace(STEP, micro_batch=rows, sequence_length=tokens)
    found = trace(step, timeline=False, capability=(7, 5), timed_on={"": NO_CPU})
    return found["times"][""]["seconds_per_step"]


def test_shapes_are_those_of_the_batches(train) -> None:
    shapes = batch_shapes(train, STEP, LOOP)
    assert len(shapes) == 6 and all(len(shares) == 1 and len(shares[0]) == 1 for shares in shapes)
    assert sum(rows for shares in shapes for rows, _ in shares[0]) == 10
    assert max(tokens for shares in shapes for _, tokens in shares[0]) == 64


def test_rows_of_a_step_that_need_more_batches_than_were_traced_are_refused_before_the_weights_come(
    train,
) -> None:
    packed = replace(STEP, packing="rows", micro_batch=1)
    with pytest.raises(UserError, match="need 3 micro-batches") as error:
        batch_shapes(train, packed, {**LOOP, "rows_per_step": 5})
    assert error.value.write == "gradient_accumulation: 3"
    enough = batch_shapes(
        train, replace(packed, gradient_accumulation=3), {**LOOP, "rows_per_step": 5}
    )
    assert [len(share) for shares in enough for share in shares] == [3, 3]


def test_steps_and_evaluations_are_added_up() -> None:
    short, long = seconds_of(2, 8), seconds_of(2, 64)
    assert short < long
    steps = [
        [[(2, 8)]],
        [[(2, 8)]],
        [[(2, 8)], [(2, 64)]],
    ]  # at last a GPU with little to do waits for the other
    assert training_seconds(steps, STEP, NO_CPU, capability=(7, 5)) == pytest.approx(
        2 * short + long
    )
    known = [
        judged(f"evaluation {name}", "GPU", 1, 2, "traced", seconds_at_most=seconds)
        for name, seconds in (("of base and tuned", 40.0), ("on the benchmark", 2.0))
    ]
    written = judged("evaluation and documents", "disk", 1, 2, "computed")
    assert evaluation_seconds([*known, written]) == 42.0
    assert (
        evaluation_seconds([*known, judged("evaluation elsewhere", "GPU", 1, 2, "traced")]) is None
    )


def test_hours_range_and_energy() -> None:
    hours = RunHours.of(
        10,
        3000.0,
        600.0,
        replace(T4, measured=T4.measured._replace(low=0.5, high=1.5), board_watts=100),
        gpus=2,
    )
    assert (hours.hours, hours.hours_range) == (1.0, (0.5, 1.5))
    assert hours.kwh_at_most == pytest.approx((2 * 3000 + 600) * 100 / 3.6e6)
    assert "10 training steps in 50.0 minutes, evaluation in at most 10.0 minutes" in hours.line
    unknown = RunHours.of(10, 3000.0, None, replace(T4, measured=None), gpus=1)
    assert unknown.hours_range is None and "not counted: evaluation, fetching" in unknown.line
    assert "don't plan by it" in unknown.line


def gate(train: str, **settings) -> dict:
    folder = Path(train).parent
    traced = Traced(STEP, trace(STEP, capability=(7, 5), timeline=False), (7, 5))
    write_report(folder / "trace.json", traced.to_mapping())
    gate_memory.main(
        str(folder / "trace.json"),
        {"gpu": "t4", "override": False, "hours": None, **settings},
        str(folder / "gate.json"),
        encoded=str(folder / "encode.json"),
        train=train,
        loop=LOOP,
    )
    return read_report(folder / "gate.json")


@pytest.mark.thorough
def test_a_training_that_takes_too_long_stops_but_for_an_override(train) -> None:
    with pytest.raises(UserError, match="takes too long") as caught:
        gate(train, hours=1e-9)
    assert str(caught.value.where) == "memory.gate.hours" and "hours: 1" in caught.value.write
    found = gate(train, hours=1e-9, override=True)
    assert found["overridden"] and found["hours"]["steps"] == 6
    assert (
        training_minutes(str(Path(train).parent / "gate.json")) == 31
    )  # what a cluster's job asks for


def test_without_a_limit_nothing_is_traced_for_the_hours(train) -> None:
    assert gate(train)["hours"] is None
    assert training_minutes(str(Path(train).parent / "gate.json")) == 720


def test_the_check_of_a_run_refuses_what_takes_too_long() -> None:
    hours = RunHours.of(10, 36000.0, None, T4, gpus=1)
    step = StepDecision(find("t4"), Verdict(1), "", 1, {}, {})
    stages = [judged("training step, as configured", "GPU", 1, 2, "traced")]
    checked = Decision(step, override=False, stages=stages, hours=hours, limit_hours=9.0)
    assert not checked.fits and "takes too long" in str(checked.refusal())
    with pytest.raises(UserError, match="takes too long"):
        checked.enforce()
    replace(checked, override=True).enforce()
    assert replace(checked, override=True).overridden == ["the run within 9 hours"]
    assert not replace(
        checked, limit_hours=11.0
    ).fits  # it may take longer: the upper end of the range is 14.2
    assert replace(checked, limit_hours=14.5).fits and replace(checked, hours=None).fits
    assert "hours: 15" in checked.refusal().write
    assert check_resources.to_mapping(checked)["hours"]["line"].startswith(
        "takes 10.0 hours (9.0 hours to 14.2 hours)"
    )
