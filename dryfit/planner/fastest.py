"""The ways to take a step that train the most tokens a second and fit: what writes a tool's file chooses among them.

For each way (checkpointing, packing, kernels, optimizer) the largest micro-batch that the estimate lets through; the
most promising ways by :data:`SPEED` are answered, each with the largest micro-batch that fits.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dryfit.analytic.certainty import Needs
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import estimate
from dryfit.cards.gpus import Gpu
from dryfit.derived.step import if_recorded
from dryfit.planner.calibrated import CalibratedEstimator
from dryfit.scenario.scenario import Scenario

TRACED = 4  # ways whose largest micro-batch is answered
LENIENT = 0.9  # where layers alike stand in for others: they were up to 3 % off, and up to 11 % at more tokens
# How many tokens a second a way takes beside the tool's first one, roughly. Checkpointing runs a forward pass again:
# four passes' worth of products for three. The others only break ties before times are traced.
SPEED = {
    ("checkpointing", "off"): 4 / 3,
    ("checkpointing", "offload"): 0.98,
    ("kernels", "liger"): 1.1,
    ("optimizer", "adamw_8bit"): 0.99,
    ("attention", "flash"): 1.01,
}
Way = Mapping[str, str]  # a tool's knobs, with their values


class StepQuestion(Protocol):
    """A question about a step."""

    scenario: Scenario
    gpu: Gpu | None

    @property
    def where(self) -> str: ...


@dataclass(frozen=True)
class Candidate:
    """A way to take the step, as the tool's file; ``answer`` None: not answered yet."""

    way: Way
    micro_batch: int
    text: str
    asked: StepQuestion
    answer: Mapping[str, Any] | None = None

    @property
    def fits(self) -> bool:
        return bool(self.answer and self.answer["fits"])

    def tokens_per_second(self, fill: float) -> float | None:
        """Tokens of the data, without padding, that all GPUs take in a second; None: nobody knows the card's speed."""
        time = (self.answer or {}).get("time")
        return (
            time["tokens_per_second"] * (1 if self.way.get("packing") == "on" else fill)
            if time
            else None
        )

    @property
    def required_bytes(self) -> int | None:
        """What the step needs: traced, or estimated; None: nobody said."""
        answer = self.answer or {}
        known = answer.get("trace") or answer.get("analytic") or {}
        return known.get("required_bytes") or known.get("peak_allocated_bytes")

    def is_too_large_with(self, rows: int) -> bool:
        """Whether the trace of more rows rules out so many: what is not resident shrinks with the rows at most."""
        answer = self.answer or {}
        if not answer.get("trace") or not answer.get("gpu"):
            return False
        peak, resident = answer["trace"]["peak_allocated_bytes"], answer["trace"]["resident_bytes"]
        return (
            resident + (peak - resident) * rows // self.micro_batch > answer["gpu"]["usable_bytes"]
        )

    def prior(self, fill: float) -> float:
        """The same as a ratio, before times are known."""
        return prior(self.way, self.micro_batch, fill)


def prior(way: Way, micro_batch: int, fill: float) -> float:
    """How many tokens a second a way takes beside another one of the tool, by :data:`SPEED`."""
    speed = 1.0 if way.get("packing") == "on" else fill
    for knob, value in way.items():
        speed *= SPEED.get((knob, value), 1.0)
    return speed * (
        1 - 0.5 ** (1 + micro_batch)
    )  # a larger batch feeds the card better, ever less so


@dataclass(frozen=True)
class Search:
    """What is searched, and how one candidate is made and answered."""

    # All ways, and the one that is answered where none of the chosen fits: the first of ``saving`` that can be
    ways: Sequence[Way]
    saving: Sequence[Way]
    sizes: Sequence[int]  # micro-batches, the largest first
    fill: float  # share of a padded row that is no padding
    is_traced: bool  # whether a trace answers, and not the estimate
    make: Callable[[Way, int], Candidate]
    answer: Callable[[StepQuestion], Mapping[str, Any]]

    def answered(
        self,
        watch: Callable[[str, int, Sequence[Any]], None] | None,
        name: Callable[[Candidate], str],
    ) -> list[Candidate]:
        """The most promising ways, each answered with its largest micro-batch that fits, or with the smallest."""
        chosen, done = self._promising(), list[Candidate]()
        for place, one in enumerate(chosen):
            if watch:
                watch(name(one), len(chosen) - place - 1, [other for other in done if other.fits])
            done.append(self._largest(one))
        if not any(one.fits for one in done):
            smallest = [self.make(way, self.sizes[-1]) for way in self.saving]
            done += [
                self._with_answer(one)
                for one in [one for one in smallest if self._is_told(one)][:1]
            ]
        return [one for one in done if one.required_bytes]

    def _promising(self) -> list[Candidate]:
        """The ways that are best by :data:`SPEED`, some with and some without checkpointing.

        A way is estimated only while its largest micro-batch could still bring it among the best.
        """
        groups: dict[Any, list[Way]] = {}
        most, fill = self.sizes[0], self.fill
        for way in sorted(self.ways, key=lambda way: -prior(way, most, fill)):
            groups.setdefault(way.get("checkpointing"), []).append(way)
        chosen = []
        for group in groups.values():
            count, best = max(1, TRACED // len(groups)), []
            for way in group:
                if len(best) == count and best[-1].prior(fill) >= prior(way, most, fill):
                    break
                if self._is_told(one := self._estimated(way)):
                    best = sorted([*best, one], key=lambda one: -one.prior(fill))[:count]
            chosen += best
        return sorted(chosen, key=lambda one: -one.prior(fill))

    def _estimated(self, way: Way) -> Candidate:
        """The largest micro-batch that the estimate does not rule out; the smallest where it rules out all."""
        at = bisect_left(self.sizes, True, key=lambda size: _may_fit(self.make(way, size).asked))
        return self.make(way, self.sizes[min(at, len(self.sizes) - 1)])

    def _largest(self, one: Candidate) -> Candidate:
        for size in [size for size in self.sizes if size <= one.micro_batch]:
            if size > self.sizes[-1] and one.is_too_large_with(size):
                continue
            one = self._with_answer(one if size == one.micro_batch else self.make(one.way, size))
            if one.fits:
                break
        return one

    def _with_answer(self, one: Candidate) -> Candidate:
        return replace(one, answer=self.answer(one.asked))

    def _is_told(self, one: Candidate) -> bool:
        return self.is_traced or (
            one.asked.scenario.loss != "liger" and _peak(one.asked) is not None
        )


def _step(asked: StepQuestion) -> Scenario:
    """The step. Liger's loss, which neither the estimate nor a record has, is a little less than one in chunks."""
    step = asked.scenario
    return step.changed(loss="chunked", kernels="transformers") if step.loss == "liger" else step


def _peak(asked: StepQuestion) -> int | None:
    """The peak by the estimate or a record."""
    step = _step(asked)
    analytic = estimate(step, asked.where, blocks=False, recorded=False).analytic
    if analytic is None:
        exact = if_recorded(step, asked.gpu and asked.gpu.capability)
        return exact.peak_allocated_bytes if exact else None
    return analytic["peak_allocated_bytes"]


def _may_fit(asked: StepQuestion) -> bool:
    """Whether the estimate does not rule a step out; a step that nothing describes without a trace is not ruled out."""
    peak = _peak(asked)
    if peak is None and asked.gpu:
        with suppress(NotDescribed):
            step = _step(asked)
            peak = round(LENIENT * CalibratedEstimator(step, asked.gpu).formula(step))
    return peak is None or Needs(asked.scenario, peak, asked.gpu and asked.gpu.capability).may_fit(
        asked.gpu
    )
