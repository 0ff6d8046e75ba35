"""Hours, cost and energy of a run, from the seconds of its steps; the one rule for the gate, the deadline and the job.

The gate adds up the batches that the data really make (:mod:`scripts.gate.batch_times`). On the command line the rows
are a number: each is as long as the longest may be, or as the mean that is named. Nobody's prices are shipped, since
they go stale: whoever asks names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from dryfit.cards.gpus import Gpu, find
from dryfit.common.errors import UserError
from dryfit.hours.step_time import Speed, speed_of
from dryfit.scenario.scenario import Scenario

LEFT_OUT = "starting, loading the data, evaluation and merging are not counted"
NOT_COUNTED = "fetching, loading, saving, merging"


@dataclass(frozen=True)
class RunHours:
    """How long a run takes."""

    steps: int
    training_seconds: float  # of all steps
    evaluation_seconds: (
        float | None
    )  # at most, as if each answer went to the last token; None: not known
    # Of both; the range as far as steps of the GPU's kind were off, None where none was measured.
    hours: float
    hours_range: tuple[float, float] | None
    basis: str  # where the GPU's constants come from, in words
    not_counted: str
    # As if the boards took all that they can, all the time; None where their power is not known.
    kwh_at_most: float | None

    @classmethod
    def of(
        cls, steps: int, training: float, evaluation: float | None, speed: Speed, gpus: int
    ) -> RunHours:
        """From the seconds of its parts; training takes so many GPUs, evaluation one (None: not known)."""
        hours, measured = (training + (evaluation or 0.0)) / 3600, speed.measured
        ends = measured and (hours * measured.low, hours * measured.high)
        left_out = NOT_COUNTED if evaluation is not None else f"evaluation, {NOT_COUNTED}"
        watts = speed.board_watts
        kwh = (gpus * training + (evaluation or 0.0)) * watts / 3.6e6 if watts else None
        return cls(steps, training, evaluation, hours, ends, speed.basis, left_out, kwh)

    def to_mapping(self) -> dict[str, Any]:
        return {**asdict(self), "hours_at_most": self.hours_at_most, "line": self.line}

    @property
    def hours_at_most(self) -> float:
        """What limits and deadlines are held against: the upper end of the range, where there is one."""
        return self.hours_range[1] if self.hours_range else self.hours

    @property
    def line(self) -> str:
        """For a terminal."""
        between = (
            f" ({spoken(self.hours_range[0])} to {spoken(self.hours_range[1])})"
            if self.hours_range
            else ""
        )
        evaluation = self.evaluation_seconds
        parts = f"{self.steps:,} training steps in {spoken(self.training_seconds / 3600)}"
        if evaluation is not None:
            parts += f", evaluation in at most {spoken(evaluation / 3600)}"
        guess = (
            "" if self.hours_range else "; nothing was measured on this GPU, so don't plan by it"
        )
        return (
            f"takes {spoken(self.hours)}{between}: {parts}; not counted: {self.not_counted}{guess}"
        )


def spoken(hours: float) -> str:
    """Hours for people."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"


@dataclass(frozen=True)
class Run:
    """What is asked about a run."""

    rows: int
    epochs: float = 1.0
    # Of one GPU, by its name in config/gpus.yaml; a number alone is that of the one GPU that is asked about.
    price_per_hour: Mapping[str, float] | float = field(default_factory=dict)
    # None: not asked for. Grams of CO2.
    deadline_hours: float | None = None
    grams_per_kwh: float | None = None
    tokens_per_row: float | None = (
        None  # on average; None: not known, so that each row counts as the longest
    )

    def __post_init__(self) -> None:
        for name in ("rows", "epochs", "deadline_hours", "grams_per_kwh", "tokens_per_row"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(
                    f"{name} has to be above 0.", where="the run", found=value, write=f"{name}=1"
                )
        prices = self.price_per_hour
        if isinstance(prices, Mapping):
            prices = {find(name, "price_per_hour").name: price for name, price in prices.items()}
            object.__setattr__(self, "price_per_hour", prices)

    def price_of(self, gpu: Gpu) -> float | None:
        """The price of a GPU; None where none was given."""
        prices = self.price_per_hour
        return prices.get(gpu.name) if isinstance(prices, Mapping) else prices

    def typical_step(self, scenario: Scenario) -> Scenario:
        """The step whose time counts: a batch's time grows with its tokens, so the mean length gives the mean time.

        Packs are full whatever the rows; there the mean length says how many of them there are. Where answers are
        generated, they are shorter and their prompts as long.
        """
        if self.tokens_per_row is None or scenario.packing != "none":
            return scenario
        length = max(1, round(self.tokens_per_row))
        if not scenario.aim.generates:
            return replace(scenario, sequence_length=length)
        answer = max(1, scenario.completion_length - (scenario.sequence_length - length))
        preference = replace(scenario.preference, completion_length=answer)
        return replace(scenario, sequence_length=length, preference=preference)

    def steps(self, scenario: Scenario) -> int:
        """Updates of the whole run. Where answers are generated a row is a prompt, which has several."""
        sequences = self.rows * self.epochs
        if scenario.aim.grouped:
            sequences *= scenario.preference.generations * scenario.generation.iterations
        if self.tokens_per_row is not None and scenario.packing != "none":
            sequences *= self.tokens_per_row / scenario.sequence_length
        return ceil(
            sequences
            / (
                scenario.micro_batch
                * scenario.gradient_accumulation
                * scenario.parallel.rows_at_once
            )
        )


@dataclass(frozen=True)
class RunTime:
    """How long a run takes on a GPU, and what that costs."""

    gpu: str
    gpus: int
    rows: int
    epochs: float
    steps: int
    tokens_per_row: float  # on average, or the most where `longest`
    longest: bool
    hours: float
    hours_range: (
        tuple[float, float] | None
    )  # as far as steps of the GPU's kind were off; None where none was measured
    price_per_hour: float | None
    # In the currency of the price; None without a price.
    cost: float | None
    cost_range: tuple[float, float] | None
    # As if the boards took all that they can, all the time. CO2 is None where nobody said how much a kWh makes.
    kwh_at_most: float
    co2_kg_at_most: float | None
    # Whether the run ends by the deadline, by the upper end of the range where there is one; None: no deadline.
    in_time: bool | None

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def run_time(time: Mapping[str, Any], gpu: Gpu, scenario: Scenario, asked: Run) -> RunTime:
    """The run of a scenario on a GPU.

    ``time``: of its typical step (:meth:`Run.typical_step`): a :class:`dryfit.hours.step_time.StepTime` as a mapping.
    """
    gpus, steps = scenario.parallel.gpus, asked.steps(scenario)
    speed = speed_of(gpu.name, scenario)
    if time["range"] is None:  # also of a step whose kind was not compared on this GPU
        speed = replace(speed, measured=None)
    whole = RunHours.of(steps, steps * time["seconds_per_step"], None, speed, gpus)
    hours, ends, kwh = whole.hours, whole.hours_range, whole.kwh_at_most
    price, grams, deadline = asked.price_of(gpu), asked.grams_per_kwh, asked.deadline_hours
    return RunTime(
        gpu=gpu.name,
        gpus=gpus,
        rows=asked.rows,
        epochs=asked.epochs,
        steps=steps,
        tokens_per_row=asked.tokens_per_row or scenario.sequence_length,
        longest=asked.tokens_per_row is None,
        hours=hours,
        hours_range=ends,
        price_per_hour=price,
        cost=None if price is None else hours * gpus * price,
        cost_range=None
        if price is None or ends is None
        else tuple(end * gpus * price for end in ends),
        kwh_at_most=kwh,
        co2_kg_at_most=None if grams is None else kwh * grams / 1000,
        in_time=None if deadline is None else whole.hours_at_most <= deadline,
    )


def order(fits: bool, run: RunTime | None) -> tuple[Any, ...]:
    """A key to sort GPUs by: what fits, what ends in time, then the price; unpriced GPUs come after the others."""
    if run is None:
        return (not fits, True)
    by_hours = run.in_time is False or run.cost is None
    return (
        not fits,
        False,
        run.in_time is False,
        run.cost is None,
        run.hours if by_hours else run.cost,
    )


def cheapest(runs: Sequence[RunTime]) -> RunTime | None:
    """Of runs that fit, the cheapest of those that end in time and have a price; None where none does."""
    possible = [run for run in runs if run.in_time is not False and run.cost is not None]
    return min(possible, key=lambda run: (run.cost, run.hours), default=None)
