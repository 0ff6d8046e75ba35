"""Hours, cost and energy of a run: the time of its step, as often as the rows and epochs make it.

Nobody's prices are shipped, since they go stale: whoever asks names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from scripts.memory.gpus import Gpu
from scripts.memory.step_time import speed_of
from scripts.settings.scenario import Scenario

LEFT_OUT = "starting, loading the data, evaluation and merging are not counted"


@dataclass(frozen=True)
class Asked:
    """What is asked about a run.

    Attributes
    ----------
    price_per_hour
        Of one card, by its name in config/gpus.yaml.
    deadline_hours, grams_per_kwh
        None: not asked for. Grams of CO2.
    """

    rows: int
    epochs: float = 1.0
    price_per_hour: Mapping[str, float] = field(default_factory=dict)
    deadline_hours: float | None = None
    grams_per_kwh: float | None = None


@dataclass(frozen=True)
class RunTime:
    """How long a run takes on a card, and what that costs.

    Attributes
    ----------
    hours_range
        As far as steps of the card's kind were off; None where none was measured.
    cost, cost_range
        In the currency of the price; None without a price.
    kwh_at_most, co2_kg_at_most
        As if the boards took all that they can, all the time. CO2 is None where nobody said how much a kWh makes.
    in_time
        Whether the run ends by the deadline, by the upper end of the range where there is one; None: no deadline.
    """

    gpu: str
    gpus: int
    rows: int
    epochs: float
    steps: int
    tokens_per_row: int
    hours: float
    hours_range: tuple[float, float] | None
    price_per_hour: float | None
    cost: float | None
    cost_range: tuple[float, float] | None
    kwh_at_most: float
    co2_kg_at_most: float | None
    in_time: bool | None

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def run_time(time: Mapping[str, Any], gpu: Gpu, scenario: Scenario, asked: Asked) -> RunTime:
    """The run whose steps take ``time`` (:class:`scripts.memory.step_time.StepTime` as a mapping).

    Every row counts as ``sequence_length`` tokens, the longest that it can be.
    """
    gpus, steps = scenario.parallel.gpus, steps_of(scenario, asked)
    hours = steps * time["seconds_per_step"] / 3600
    ends = time["range"] and tuple(steps * seconds / 3600 for seconds in time["range"])
    price = asked.price_per_hour.get(gpu.name)
    kwh, grams = speed_of(gpu.name).board_watts * gpus * hours / 1000, asked.grams_per_kwh
    deadline = asked.deadline_hours
    return RunTime(
        gpu=gpu.name,
        gpus=gpus,
        rows=asked.rows,
        epochs=asked.epochs,
        steps=steps,
        tokens_per_row=scenario.sequence_length,
        hours=hours,
        hours_range=ends,
        price_per_hour=price,
        cost=None if price is None else hours * gpus * price,
        cost_range=None if price is None or ends is None else tuple(end * gpus * price for end in ends),
        kwh_at_most=kwh,
        co2_kg_at_most=None if grams is None else kwh * grams / 1000,
        in_time=None if deadline is None else (ends[1] if ends else hours) <= deadline,
    )


def steps_of(scenario: Scenario, asked: Asked) -> int:
    """How many steps see all rows as often as asked."""
    rows_of_a_step = scenario.micro_batch * scenario.gradient_accumulation * scenario.parallel.gpus
    return ceil(asked.rows * asked.epochs / rows_of_a_step)


def order(fits: bool, run: RunTime | None) -> tuple[Any, ...]:
    """A key to sort cards by: what fits, what ends in time, then the price; unpriced cards come after the others."""
    if run is None:
        return (not fits, True)
    by_hours = run.in_time is False or run.cost is None
    return (not fits, False, run.in_time is False, run.cost is None, run.hours if by_hours else run.cost)


def cheapest(runs: Sequence[RunTime]) -> RunTime | None:
    """Of runs that fit, the cheapest of those that end in time and have a price; None where none does."""
    possible = [run for run in runs if run.in_time is not False and run.cost is not None]
    return min(possible, key=lambda run: (run.cost, run.hours), default=None)
