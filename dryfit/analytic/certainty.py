"""How wrong the closed form may be: all that anything says of it stands here.

The form's peak lies within :data:`PEAK` of the trace's for what it describes. What a GPU must have is more than the
peak, by what lies free in fragments. By how much the peaks differ, by method and size, says :func:`peak_bound`.
Two things are known of what is needed, both from ``data/closed_form_errors.csv``, whose
rows ``validation/quick_verdicts.py`` measures on traces:

* how far it lies above the form's peak, by method, allocator and use of several GPUs. Beyond that range a verdict takes
  milliseconds (:func:`over_peak`);
* how far it lies beside what the allocator's model makes of the form's own allocations and of variations of them
  (:mod:`dryfit.analytic.allocations`). Inside the first range those are replayed at the GPU's own size, and
  where they don't agree it is too close to call (:func:`over_variations`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from typing import NamedTuple

from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.setting import describe
from dryfit.cards.beside import Process, beside, room_bytes
from dryfit.cards.gpus import Gpu
from dryfit.cards.verdict import Verdict, Word
from dryfit.data import data_path
from dryfit.derived.step import DerivedStep, if_recorded
from dryfit.engine.allocator import LARGE_SEGMENT
from dryfit.engine.capacities import capacities, served_at
from dryfit.engine.cuda_rules import Capability
from dryfit.scenario.scenario import Scenario

ROWS = data_path("closed_form_errors.csv")
PEAK = 0.1  # the form's peak is not further above the trace's: 0.04 but where chunks of a loss train an output head
WIDER = 1.5  # than what the rows show: other steps may lie beside them
LEAST = 0.004  # of what is needed: the least that is left to either side
FIRST_GUESS = 0.06  # of the peak: what fragments take, until something of the step is known
FIRST_GUESS_EXPANDABLE = 0.01  # the same with expandable segments
SIZES = (
    300_000_000,
    1_000_000_000,
)  # parameters: models below the first, between them, and from the second on
FEW = 8  # rows of a kind: with fewer those of more kinds count
OTHER_KERNELS = 0.03  # of a GPU: that near, other kernels are traced and not reckoned


class Share(NamedTuple):
    """What is needed as shares of what the form says: the least and the most."""

    low: float
    high: float


class Kind(NamedTuple):
    """What decides how wrong the form may be; ``strategy``: none, ddp or fsdp2."""

    method: str
    strategy: str
    expandable: bool


def kind_of(scenario: Scenario) -> Kind:
    """The kind of a scenario's step."""
    return Kind(scenario.method, scenario.parallel.strategy, scenario.allocator.expandable_segments)


def follows_allocations(scenario: Scenario) -> bool:
    """Whether the form knows allocations one by one. Else its peak alone is used."""
    experts = describe(scenario.model).experts > 0
    return _followed(scenario.parallel.strategy, scenario.method, scenario.loss, experts)


def _followed(strategy: str, method: str, loss: str, experts: bool) -> bool:
    """It knows neither DDP's buckets under accumulation, nor each buffer of experts, nor what chunks of a loss share
    where the output head is trained.
    """
    return strategy != "ddp" and not (loss == "chunked" and method == "full") and not experts


@cache
def _rows() -> tuple[Mapping[str, str], ...]:
    with ROWS.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


class PeakBound(NamedTuple):
    """Where traced peaks lay beside the form's, as shares of it less 1, in so many steps; ``of``: which steps."""

    low: float
    high: float
    steps: int
    of: str


@cache
def peak_bound(method: str, parameters: int) -> PeakBound:
    """Of traced steps of a method with models of this size; where they are few, of every size."""

    def size_class(count: int) -> int:
        return sum(count >= size for size in SIZES)

    own = size_class(parameters)
    rows = [row for row in _rows() if row["method"] == method]
    alike = [row for row in rows if size_class(int(row["parameters"])) == own]
    name = (
        ("below 0.3B", "from 0.3B to 1B", "from 1B on")[own]
        if len(alike) >= FEW
        else "of every size"
    )
    shares = [
        int(row["peak_trace"]) / int(row["peak_form"]) - 1
        for row in (alike if len(alike) >= FEW else rows)
    ]
    return PeakBound(
        round(min(shares), 4), round(max(shares), 4), len(shares), f"{method}, models {name}"
    )


@cache
def over_peak(kind: Kind) -> Share:
    """What is needed over the form's peak."""
    return _spread(kind, "peak_form", "peak_form", lambda row: True)


@cache
def over_variations(kind: Kind) -> Share:
    """What is needed over the least, and over the most, that the form's variations say."""

    def followed(row: Mapping[str, str]) -> bool:
        return _followed(row["strategy"], row["method"], row["loss"], row["experts"] != "0")

    return _spread(kind, "lowest_form", "highest_form", followed)


def _spread(
    kind: Kind, lowest: str, highest: str, counts: Callable[[Mapping[str, str]], bool]
) -> Share:
    """The range of a kind's rows that count, wider by :data:`WIDER`; where there are few, of more kinds together."""
    method, strategy, expandable = kind.method, kind.strategy, str(int(kind.expandable))
    wider = (
        lambda row: (
            (row["method"], row["strategy"], row["expandable"]) == (method, strategy, expandable)
        ),
        lambda row: (row["strategy"], row["expandable"]) == (strategy, expandable),
        lambda row: row["strategy"] == strategy,
        lambda row: True,
    )
    own = [row for row in _rows() if counts(row)]
    choices = ([row for row in own if alike(row)] for alike in wider)
    rows = next(sample for sample in choices if len(sample) >= FEW)
    low = min(int(row["least_trace"]) / int(row[lowest]) for row in rows)
    high = max(int(row["required_trace"]) / int(row[highest]) for row in rows)
    return Share(1 - max(WIDER * (1 - low), LEAST), 1 + max(WIDER * (high - 1), LEAST))


class Needs:
    """What a step needs of a GPU, by the closed form.

    ``peak_bytes``: of the analytic estimate for the scenario on a GPU of this compute capability. ``exact``: the step
    by the derived form, where a record covers it: then nothing is uncertain.
    """

    def __init__(
        self,
        scenario: Scenario,
        peak_bytes: int,
        capability: Capability | None,
        exact: DerivedStep | None = None,
    ) -> None:
        self.scenario, self.capability, self._exact = scenario, capability, exact
        self.peak_bytes = exact.peak_allocated_bytes if exact else peak_bytes
        self._expandable = scenario.allocator.expandable_segments

    @classmethod
    def of(cls, scenario: Scenario, where: object, capability: Capability | None) -> Needs:
        """By the scenario's record, or else by the estimate.

        NotDescribed: if neither knows the step.
        """
        exact = if_recorded(scenario, capability)
        if exact is not None:
            return cls(scenario, exact.peak_allocated_bytes, capability, exact)
        form = analytic_estimate(scenario, where, capability=capability, blocks=False)
        return cls(scenario, form["peak_allocated_bytes"], capability)

    @cached_property
    def _variations(self) -> list[list[tuple[int, int]]]:
        from dryfit.analytic.allocations import form_events, variations

        return list(variations(form_events(self.scenario, capability=self.capability)))

    @cached_property
    def about_bytes(self) -> int:
        """What is most likely needed, in bytes."""
        if self._exact:
            return self._exact.required_bytes
        return capacities(self._variations[0], expandable_segments=self._expandable).required_bytes

    def smallest(self, sizes: Iterable[int]) -> int | None:
        """The least of some numbers of bytes that suffices for all that the form can tell; None: none does."""
        return next((size for size in sorted(sizes) if self.fits(size)), None)

    def roughly(self, usable_bytes: int) -> bool | None:
        """Whether so many bytes suffice, by the peak alone; None: that can't tell."""
        if self._exact:
            return self._exact.fits(usable_bytes)
        share = over_peak(kind_of(self.scenario))
        if usable_bytes >= self.peak_bytes * share.high:
            return True
        return False if usable_bytes < self.peak_bytes * share.low else None

    def required_bytes(self, usable_bytes: int) -> int:
        """What is most likely needed; where the peak alone tells, the end of its range that is nearer to a GPU's."""
        rough = self.roughly(usable_bytes)
        if rough is None or self._exact:
            return self.about_bytes
        share = over_peak(kind_of(self.scenario))
        return round(self.peak_bytes * (share.high if rough else share.low))

    def fits(self, usable_bytes: int) -> bool | None:
        """Whether so many bytes suffice; None: too close to call. One segment counts on either side."""
        rough = self.roughly(usable_bytes)
        if rough is not None:
            return rough
        if not follows_allocations(self.scenario):
            return None
        share = over_variations(kind_of(self.scenario))
        sizes = (
            int(usable_bytes / share.high) - LARGE_SEGMENT,
            int(usable_bytes / share.low) + LARGE_SEGMENT,
        )
        verdict: bool | None = None
        for events in self._variations:
            served = [
                served_at(size, events, expandable_segments=self._expandable)[2] for size in sizes
            ]
            if served[0] != served[1] or (verdict is not None and verdict != served[0]):
                return None
            verdict = served[0]
        return verdict

    def word(self, gpu: Gpu, *, replayed: bool = True) -> Word | None:
        """The verdict on a GPU, with what is beside the step; None: its allocator is not modelled.

        ``replayed``: whether allocations are replayed near the border, which takes a browser seconds.
        """
        if not gpu.is_modelled:
            return Word.DOES_NOT_FIT if self.peak_bytes > gpu.usable_bytes else None
        own, fits = beside(Process.of(self.scenario), gpu), self.fits if replayed else self.roughly
        if fits(own.widest_bytes(gpu.usable_bytes)) is False:
            return Word.DOES_NOT_FIT
        return Word.FITS if fits(own.room_bytes(gpu.usable_bytes)) else Word.TOO_CLOSE

    def may_fit(self, gpu: Gpu) -> bool:
        """Whether the peak with more than fragments mostly take has room, so that a replay is worth its seconds."""
        return self.peak_bytes * (1 + WIDER * FIRST_GUESS) <= room_bytes(
            Process.of(self.scenario), gpu
        )

    def verdict(self, gpu: Gpu) -> Verdict:
        """The verdict with its figures: clear where all that the form allows is, on either side of what is beside."""
        own = beside(Process.of(self.scenario), gpu)
        needed = self.required_bytes(gpu.usable_bytes) if gpu.is_modelled else self.peak_bytes
        return Verdict(
            gpu.usable_bytes - needed,
            needed,
            own,
            is_modelled=gpu.is_modelled,
            estimated=self.word(gpu),
        )
