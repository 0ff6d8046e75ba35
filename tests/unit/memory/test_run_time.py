"""Hours, cost and energy of a run, from a step's time that one can multiply by hand."""

from __future__ import annotations

import pytest

from scripts.memory.gpus import find
from scripts.memory.run_time import Asked, cheapest, order, run_time
from scripts.settings.scenario import Scenario

STEP = Scenario.from_mapping({"model": "smollm2-135m", "sequence_length": 64, "micro_batch": 2}, where="a test")
TIME = {"seconds_per_step": 36.0, "range": (27.0, 45.0)}


def run(gpu: str = "a100-80gb", time=TIME, scenario=STEP, **asked):
    return run_time(time, find(gpu), scenario, Asked(**{"rows": 100, "epochs": 2, **asked}))


def test_steps_hours_cost_and_energy():
    found = run(price_per_hour={"a100-80gb": 1.5}, grams_per_kwh=500, deadline_hours=1.2)
    assert (found.steps, found.hours, found.hours_range) == (100, 1.0, (0.75, 1.25))
    assert (found.cost, found.cost_range) == (1.5, (1.125, 1.875))
    assert found.kwh_at_most == pytest.approx(0.4) and found.co2_kg_at_most == pytest.approx(0.2)
    assert found.in_time is False  # by the upper end of the range
    assert run(deadline_hours=1.25).in_time and run().in_time is None


def test_several_cards_share_the_rows_and_each_is_paid():
    two = STEP.changed(parallel={"strategy": "ddp", "gpus": 2})
    found = run(scenario=two, price_per_hour={"a100-80gb": 1.5})
    assert (found.steps, found.hours, found.cost) == (50, 0.5, 1.5)
    assert found.kwh_at_most == pytest.approx(0.4)


def test_a_last_step_that_is_not_full_is_a_step():
    assert run(rows=3, epochs=1).steps == 2


def test_without_a_price_or_a_measurement_nothing_is_made_up():
    found = run("rtx-4090", {**TIME, "range": None}, price_per_hour={"a100-80gb": 1.5})
    assert found.cost is found.cost_range is found.hours_range is found.co2_kg_at_most is None


def test_what_fits_and_ends_in_time_comes_first_and_the_cheapest_of_it():
    prices = {"a100-80gb": 1.5, "t4": 0.1, "l4": 0.2}
    fast = run(price_per_hour=prices, deadline_hours=2)
    slow = run("t4", {"seconds_per_step": 360.0, "range": None}, price_per_hour=prices, deadline_hours=2)
    free = run("h200", deadline_hours=2)
    rows = [(False, fast), (True, None), (True, slow), (True, free), (True, fast)]
    assert [one for _, one in sorted(rows, key=lambda row: order(*row))] == [fast, free, slow, None, fast]
    assert cheapest([slow, free, fast]) is fast and cheapest([slow, free]) is None
