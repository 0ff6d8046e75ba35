"""Hours, cost and energy of a run, from a step's time that one can multiply by hand."""

import pytest

from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.hours.run_time import Run, cheapest, order, run_time
from dryfit.scenario.scenario import Scenario

STEP = Scenario.from_mapping(
    {"model": "smollm2-135m", "sequence_length": 64, "micro_batch": 2}, where="a test"
)
TIME = {"seconds_per_step": 36.0, "range": (32.4, 39.6)}


def run(gpu: str = "a100-80gb", time=TIME, scenario=STEP, **asked):
    return run_time(time, find(gpu), scenario, Run(**{"rows": 100, "epochs": 2, **asked}))


def test_steps_hours_cost_and_energy():
    found = run(price_per_hour={"a100-80gb": 1.5}, grams_per_kwh=500, deadline_hours=1.05)
    assert (found.steps, found.hours, found.hours_range) == (100, 1.0, pytest.approx((0.9, 1.1)))
    assert (found.cost, found.cost_range) == (1.5, pytest.approx((1.35, 1.65)))
    assert found.kwh_at_most == pytest.approx(0.4) and found.co2_kg_at_most == pytest.approx(0.2)
    assert found.in_time is False  # by the upper end of the range
    assert run(deadline_hours=1.11).in_time and run().in_time is None
    two = STEP.changed(parallel={"strategy": "ddp", "gpus": 2})
    found = run(scenario=two, price_per_hour={"a100-80gb": 1.5})
    assert (found.steps, found.hours, found.cost) == (50, 0.5, 1.5)
    assert found.kwh_at_most == pytest.approx(0.4)
    assert run(rows=3, epochs=1).steps == 2
    found = run("rtx-4090", {**TIME, "range": None}, price_per_hour={"a100-80gb": 1.5})
    assert found.cost is found.cost_range is found.hours_range is found.co2_kg_at_most is None


def test_what_fits_and_ends_in_time_comes_first_and_the_cheapest_of_it():
    prices = {"a100-80gb": 1.5, "t4": 0.1, "l4": 0.2}
    fast = run(price_per_hour=prices, deadline_hours=2)
    slow = run(
        "t4", {"seconds_per_step": 360.0, "range": None}, price_per_hour=prices, deadline_hours=2
    )
    free = run("h200", deadline_hours=2)
    rows = [(False, fast), (True, None), (True, slow), (True, free), (True, fast)]
    assert [one for _, one in sorted(rows, key=lambda row: order(*row))] == [
        fast,
        free,
        slow,
        None,
        fast,
    ]
    assert cheapest([slow, free, fast]) is fast and cheapest([slow, free]) is None


def test_mean_lengths_and_prices_by_any_name():
    known = Run(100, tokens_per_row=16)
    assert known.typical_step(STEP).sequence_length == 16 and known.steps(STEP) == 50
    assert Run(100).typical_step(STEP) is STEP
    packed = STEP.changed(packing="rows")  # four rows of 16 fill a sequence of 64
    assert (
        known.typical_step(packed) is packed
        and known.steps(packed) == 13
        and Run(100).steps(packed) == 50
    )
    assert run(tokens_per_row=16).longest is False and run().tokens_per_row == 64
    assert Run(1, price_per_hour={"A100 80GB": 2}).price_per_hour == {"a100-80gb": 2}
    with pytest.raises(UserError):
        Run(1, price_per_hour={"b100": 2})


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"epochs": -1}, {"tokens_per_row": 0}, {"deadline_hours": float("nan")}]
)
def test_a_run_of_nothing_is_refused(wrong):
    with pytest.raises(UserError, match="above 0"):
        Run(**{"rows": 1, **wrong})
