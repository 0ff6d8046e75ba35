"""The largest length, or number of rows, that fits a GPU: a border below which everything was seen to fit.

Without expandable segments what a step needs does not grow evenly: where blocks fit together well, a longer row may fit
and a shorter one not. So the border that is given is the value below the first that does not fit, and not the last that
does. It is found in replays of the step's own events (:mod:`dryfit.engine.interpolate`), not by a formula: every
value of the search's steps from a tenth below the border up to the first failure is run through the allocator, and some
below that. What fits above the first failure fits by luck, and is not given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dryfit.analytic.certainty import FIRST_GUESS, FIRST_GUESS_EXPANDABLE, PEAK
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.kernels import LONGEST, kernels_of
from dryfit.cards.gpus import Gpu
from dryfit.common.terminal import now_doing
from dryfit.common.text import gib
from dryfit.derived.step import if_recorded
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY, cublas_workspace_bytes
from dryfit.scenario.scenario import Scenario

if TYPE_CHECKING:
    from dryfit.engine.interpolate import Recording, Scaled
    from dryfit.tracing.trace import Recorder

MOST = 2**16  # where a search for rows ends
LENGTH_STEP = 64  # of a search for a length, up to 64 steps to a doubling
ROUNDED = 128  # what attention kernels round a length up to
SEEN_BELOW = 0.1  # share of a border, of which every step below is replayed
SPOTS_BELOW = (0.8, 0.65, 0.5)  # shares of it that are replayed too
# Where no estimate says where borders may lie: a small step beside the smallest, how often traces may point to one, and
# how far beyond it the next trace lies.
SMALL = {"sequence_length": 1024, "micro_batch": 8}
POINTED = 3
BEYOND = 1.05


@dataclass(frozen=True)
class Border:
    """What fits a GPU."""

    value: int  # the border; 0: not even the smallest fits
    seen_from: int  # from here on every step of the search was replayed
    limited: bool  # whether the model's positions end it, or the search's own limit, not the memory


def steps(field: str, limit: int) -> list[int]:
    """The values of a search: not finer than 64 to a doubling, the limit the last."""
    unit = LENGTH_STEP if field == "sequence_length" else 1
    values, value = [], unit
    while value <= limit:
        values.append(value)
        value += unit * max(1, 2 ** ((value // unit).bit_length() - 7))
    return values or [limit]


class Traces:
    """Recordings of a step at any length and number of rows, for GPUs that run the same kernels: each traced once.

    ``beside``: those of the same step for GPUs with other kernels, whose models are taken. ``derived``: where the
    family's record has the events of a trace, they are taken from there. They do not say which are cuBLAS's workspaces,
    so such recordings are for one GPU.
    """

    def __init__(
        self,
        capability: tuple[int, int] | None,
        beside: Traces | None = None,
        *,
        derived: bool = False,
    ) -> None:
        self.capability, self._beside, self._derived = capability, beside, derived
        self._recorder: Recorder | None = None
        self._known: dict[tuple[int, int], Recording] = {}

    def __call__(self, scenario: Scenario) -> Recording:
        key = scenario.sequence_length, scenario.micro_batch
        if key not in self._known:
            now_doing(
                f"tracing a step of {scenario.micro_batch:,} x {scenario.sequence_length:,} tokens"
            )
            self._known[key] = self._of_record(scenario) or self.recorder(scenario)(
                scenario, self.capability
            )
        return self._known[key]

    def _of_record(self, scenario: Scenario) -> Recording | None:
        from dryfit.engine.interpolate import Recording

        step = if_recorded(scenario, self.capability) if self._derived else None
        return step and Recording(step.orders)

    def recorder(self, scenario: Scenario) -> Recorder:
        """What traces steps; made when the first one has to be."""
        if self._recorder is None:
            from dryfit.tracing.imports import import_quietly

            import_quietly(scenario)  # before the trace's module, which imports transformers whole
            from dryfit.tracing.trace import Recorder

            self._recorder = Recorder(self._beside and self._beside.recorder(scenario))
        return self._recorder

    def known(self, scenario: Scenario, recording: Recording) -> None:
        """Take a recording that was come by in another way."""
        self._known.setdefault((scenario.sequence_length, scenario.micro_batch), recording)


class Borders:
    """Borders of one step by one field, on GPUs that run the same kernels.

    Parameters
    ----------
    scenario
        The step; all but the field stays as it is. Kernels that ask for the card hear of the scenario's own.
    field
        ``sequence_length`` or ``micro_batch``.
    capability
        Compute capability of the GPUs; others with the same kernels may be asked about.
    capacities
        Usable bytes of the GPUs that will be asked about: traces are taken at the ends.
    traces
        Recordings that others of the step's borders share.
    """

    def __init__(
        self,
        scenario: Scenario,
        field: str,
        capability: tuple[int, int] | None,
        capacities: Iterable[int],
        traces: Traces | None = None,
    ) -> None:
        self.scenario, self.field, self.capability = scenario, field, capability
        positions = scenario.size("max_position_embeddings") or LONGEST
        self.values = steps(field, positions if field == "sequence_length" else MOST)
        self._capacities = sorted(capacities)
        # By value and allocator: between which capacities the verdict is the same, and which it is.
        self._verdicts: dict[tuple[int, bool], list[tuple[int, int, bool]]] = {}
        self._shares = {
            False: FIRST_GUESS,
            True: FIRST_GUESS_EXPANDABLE,
        }  # that fragments took at the last border
        self._peaks: dict[int, int] = {}
        self._required: dict[int, dict[str, dict[str, Any]]] = {}
        self._traces = traces
        self._steps: Scaled | None = None
        self._source: Borders | None = None

    def for_capability(self, capability: tuple[int, int] | None) -> Borders:
        """The same borders on GPUs whose kernels differ in nothing but the workspaces of cuBLAS."""
        if workspace_bytes(capability) == workspace_bytes(self.capability):
            return self
        other = copy(self)
        other.capability, other._source, other._steps = capability, self, None
        other._verdicts, other._peaks, other._required = {}, {}, {}
        return other

    @property
    def scaled(self) -> Scaled:
        """The step by the field, traced at both ends of what may be asked, and for a length once between."""
        if self._steps is None and self._source is not None:
            self._steps = self._source.scaled.with_workspaces(workspace_bytes(self.capability))
        elif self._steps is None:
            from dryfit.engine.interpolate import Scaled

            traces = self._traces or Traces(self.capability)
            period = ROUNDED if self.field == "sequence_length" else 1
            made = self._steps = Scaled(lambda value: traces(self.scenario_at(value)), period)
            if self._described:
                low, high = sorted(self._unrounded(value) for value in self._ends())
            else:
                low, high = self._ends_by_traces(made)
            for value in {low, high}:
                made.record(value)
            middle = self._unrounded((low + high) // 2) + LENGTH_STEP
            if (
                self.field == "sequence_length" and low < middle < high
            ):  # bytes are linear in rows, not always in it
                made.record(middle)
                if made.bends(low, high):
                    made.record(self._unrounded((low + high) // 2))
        return self._steps

    @property
    def has_traced(self) -> bool:
        """Whether anything had to be traced."""
        return self._steps is not None

    def scenario_at(self, value: int) -> Scenario:
        """The step at a value of the field."""
        return replace(self.scenario, **{self.field: value})

    def required(self, value: int) -> dict[str, dict[str, Any]]:
        """What a GPU must have at a value, by the allocator's setting, as the verdict reads it."""
        if value not in self._required:
            from dryfit.engine.capacities import Capacities

            step = self.scaled.at(value)
            self._required[value] = {
                name: Capacities.of_all(
                    step.capacities(expandable_segments=expandable, sizes=self._capacities)
                ).to_mapping()
                for name, expandable in {"default": False, "expandable_segments": True}.items()
            }
        return self._required[value]

    def fits(self, value: int, capacity: int, *, expandable: bool) -> bool:
        """Whether the step fits so many bytes. That it does says nothing of more."""
        known = self._verdicts.setdefault((value, expandable), [])
        for low, high, fits in known:
            if low <= capacity < high:
                return fits
        least = self.scaled.least_bytes(value)
        if capacity < least:
            known.append((0, least, False))
        else:
            now_doing(f"replaying {self.field.replace('_', ' ')} {value:,} on {gib(capacity)}")
            known.append(self.scaled.at(value).served_at(capacity, expandable_segments=expandable))
        return known[-1][2]

    def largest(self, capacity: int, *, expandable: bool = False) -> Border:
        """The border on a GPU with so many usable bytes."""
        if self._surely_too_large(self.values[0], capacity):
            return Border(0, 0, False)
        first = self._first(capacity, expandable)
        index, border = self._walk_down(first, capacity, expandable)
        if border is None:
            return Border(0, 0, False)
        while border == first and border + 1 < len(self.values):
            if not self.fits(self.values[border + 1], capacity, expandable=expandable):
                break
            border = first = border + 1
        value = self.values[border]
        around = [
            self._least(self.values[near])
            for near in (border, min(border + 1, len(self.values) - 1))
        ]
        share = (
            sum(capacity / least - 1 for least in around) / 2
        )  # the first fits so, the second does not
        self._shares = {**self._shares, expandable: min(max(0.0, share), 2 * FIRST_GUESS)}
        return Border(value, self.values[index], border == len(self.values) - 1)

    def _walk_down(self, first: int, capacity: int, expandable: bool) -> tuple[int, int | None]:
        """From an index down to where enough is seen: that index, and the border's; None: nothing fits."""
        index, border = first, None
        thorough = not expandable and self.scaled.alike

        def fits(at: int) -> bool:
            return self.fits(self.values[at], capacity, expandable=expandable)

        while index >= 0:
            if not fits(index):
                border = None
            elif border is None:
                border = index
            if border is not None and (not thorough or self._seen_enough(border, index)):
                spots = self._spots(border) if thorough else ()
                bad = next((spot for spot in spots if spot < index and not fits(spot)), None)
                if bad is None:
                    return index, border
                index, border = bad, None
            index -= 1
        return 0, border

    def largest_traced(self, capacity: int, *, expandable: bool = False) -> Border:
        """The border, and the first value that does not fit, both traced: what refutes the replays corrects them."""
        while True:
            largest = self.largest(capacity, expandable=expandable)
            if not largest.value:
                return largest
            above = bisect_right(self.values, largest.value)
            around = [largest.value, *self.values[above : above + 1]]
            untraced = [value for value in around if not self.scaled.at(value).traced]
            if not untraced:
                return largest
            self.scaled.record(untraced[0])
            self._verdicts.clear()

    def _seen_enough(self, border: int, index: int) -> bool:
        return border - index >= 4 and self.values[index] <= self.values[border] * (1 - SEEN_BELOW)

    def _spots(self, border: int) -> list[int]:
        values = (self.values[border] * share for share in SPOTS_BELOW)
        return [place for value in values if (place := bisect_right(self.values, value) - 1) >= 0]

    def _guess(self, capacity: int, share: float, peak: Callable[[int], int]) -> int:
        """Index of the largest value whose peak leaves a share for fragments: peaks grow nearly evenly."""
        values, most = self.values, capacity / (1 + share)
        low, high = 0, len(values) - 1
        least, largest = peak(values[low]), peak(values[high])
        if largest <= most:
            return high
        tries = 0
        while high - low > 1:
            reached = values[low] + (values[high] - values[low]) * (most - least) / max(
                largest - least, 1
            )
            guess = bisect_right(values, reached) - 1 if tries < 4 else (low + high) // 2
            tries, middle = tries + 1, min(max(guess, low + 1), high - 1)
            size = peak(values[middle])
            if size <= most:
                low, least = middle, size
            else:
                high, largest = middle, size
        return low

    def _ends(self) -> tuple[int, int]:
        """Values around all borders that will be asked about: what is surely below the least, and above the most."""
        possible = [
            size for size in self._capacities if not self._surely_too_large(self.values[0], size)
        ]
        if not possible:
            return self.values[0], self.values[0]
        least = self.values[self._guess(possible[0], 0.15, self._about)] * SPOTS_BELOW[-1]
        low = self.values[max(0, bisect_right(self.values, least) - 1)]
        high = self.values[
            min(self._guess(possible[-1], -PEAK, self._about) + 1, len(self.values) - 1)
        ]
        return low, high

    def _ends_by_traces(self, made: Scaled) -> tuple[int, int]:
        """The same without an estimate: small steps are traced, then one beyond the border to which they point."""
        low, high = (
            self._unrounded(min(value, self.values[-1]))
            for value in (self.values[0], SMALL[self.field])
        )
        for _ in range(POINTED):
            least, most = made.least_bytes(low), made.least_bytes(high)
            if not low < high < self.values[-1] or not least < most < self._capacities[-1]:
                break
            reached = high + (self._capacities[-1] - most) * (high - low) / (most - least)
            high = self._unrounded(min(int(reached * BEYOND) + 1, self.values[-1]))
        return low, high

    def _first(self, capacity: int, expandable: bool) -> int:
        """Index of the value to begin with. Without an estimate what the step needs there corrects the guess."""
        first = self._guess(capacity, self._shares[expandable], self._least)
        for _ in range(0 if self._described else POINTED):
            value = self.values[first]
            needed = self.scaled.at(value).required_bytes(
                expandable_segments=expandable, sizes=[capacity]
            )
            share = max(0.0, needed / self.scaled.least_bytes(value) - 1)
            before, first = first, self._guess(capacity, share, self._least)
            if abs(first - before) <= 1:
                break
        return first

    def _unrounded(self, value: int) -> int:
        """A value near, that kernels don't round."""
        if self.field == "micro_batch":
            return max(value, 2)  # one row alone runs other operators than several
        return (
            max(ROUNDED, value // ROUNDED * ROUNDED)
            if self.values[-1] >= ROUNDED
            else self.values[-1]
        )

    def _peak(self, value: int) -> int | None:
        """The analytic estimate's peak in bytes; None for a step that it does not describe."""
        if value not in self._peaks:
            try:
                form = analytic_estimate(
                    self.scenario_at(value), capability=self.capability, blocks=False
                )
                self._peaks[value] = form["peak_allocated_bytes"]
            except NotDescribed:
                self._peaks[value] = 0
        return self._peaks[value] or None

    @property
    def _described(self) -> bool:
        return self._peak(self.values[0]) is not None

    def _about(self, value: int) -> int:
        """The estimate's peak; without one what lies on the line through the nearest two traces."""
        if peak := self._peak(value):
            return peak
        known = sorted(sorted(self.scaled.recordings, key=lambda traced: abs(traced - value))[:2])
        least = [self.scaled.least_bytes(traced) for traced in known]
        if value in known or len(known) < 2:
            return least[known.index(value) if value in known else 0]
        return round(least[0] + (least[1] - least[0]) * (value - known[0]) / (known[1] - known[0]))

    def _least(self, value: int) -> int:
        """The peak by the events; estimated where those would have to be traced."""
        traced = self.scaled.recordings
        known = self.scaled.alike and min(traced) <= value <= max(traced)
        least_bytes = self.scaled.least_bytes(value, trace=False) if known else None
        return least_bytes or self._about(value)

    def _surely_too_large(self, value: int, capacity: int) -> bool:
        peak = self._peak(value)
        return peak is not None and peak * (1 - PEAK) > capacity


def workspace_bytes(capability: tuple[int, int] | None) -> int:
    """What cuBLAS takes on a GPU: all that may differ within a group of :func:`by_kernels`."""
    return cublas_workspace_bytes(capability or DEFAULT_CAPABILITY)


def by_kernels(scenario: Scenario, gpus: Sequence[Gpu]) -> list[list[Gpu]]:
    """GPUs in groups that run the same kernels in a step and share traces, the least for cuBLAS first."""
    groups: dict[Any, list[Gpu]] = {}
    for gpu in gpus:
        try:
            same = kernels_of(replace(scenario, gpu=None), gpu.capability)[1:]
        except NotDescribed:
            same = gpu.capability
        groups.setdefault(same, []).append(gpu)
    return [
        sorted(group, key=lambda gpu: workspace_bytes(gpu.capability)) for group in groups.values()
    ]
