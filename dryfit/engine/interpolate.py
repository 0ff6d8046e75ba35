"""A step at sizes that were not traced: the events of traces at other sizes, each with the bytes that lie between.

Two steps that differ in the length of their rows, or in their number, run the same operators in the same order. So
their records have the same events, and the bytes of each event are a polynomial of that number: constant for weights,
linear for activations, of second degree where attention keeps its scores. Where kernels round a length up, all lengths
with the same rest share the polynomial. Two or three traces therefore give the events at any size between them, and
the allocator's replay of those is what a trace of that size would say (tests/dryfit/planner/test_feasibility.py
compares). That is 30 milliseconds instead of a second and a half, and knows fragments, which no formula does.

Where two records do not have the same events (a kernel changes, a loss runs in another number of chunks), nothing is
taken from between them: the step is traced there.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch

from .allocator import MIN_BLOCK, PLENTY, Event
from .capacities import Capacities, capacities, served_at
from .replay import Events, running_sum

PIECES = 3  # with more kinds of records than this there is no place where the events change: they always do


class Asked(NamedTuple):
    """What is asked about GPUs: usable bytes of some, and whether with and without expandable segments."""

    sizes: Collection[int] = ()
    both_allocators: bool = False


NOTHING_ASKED = Asked()


@dataclass(frozen=True)
class Recording:
    """All events of a step on one GPU, loading included."""

    sequences: Sequence[Sequence[Event]]  # one for each order of loading that is possible
    streams: Mapping[int, int] = field(
        default_factory=dict
    )  # the stream of each id that is not on the first
    traced: bool = True  # whether a trace recorded them; else they lie between traces
    workspaces: frozenset[int] = (
        frozenset()
    )  # ids of cuBLAS's workspaces, whose bytes the GPU decides

    def with_workspaces(self, count: int) -> Recording:
        """The same on a GPU that runs the same kernels and has workspaces of so many bytes."""
        ids = self.workspaces
        sequences = [
            [(one, count if one in ids else size) for one, size in events]
            for events in self.sequences
        ]
        return replace(self, sequences=[Events.of(events) for events in sequences])

    def peak_bytes(self) -> int:
        """Most bytes that are alive at once, without what the allocator adds."""
        return max(max(running_sum(events)) for events in self.sequences)

    def served_at(
        self, capacity_bytes: int, *, expandable_segments: bool = False
    ) -> tuple[int, int, bool]:
        """Whether the allocator gets through with so many bytes, whatever the order of loading.

        Before that, between which numbers of bytes the answer is the same: from the first, to before the second.
        """
        lowest, highest = 0, PLENTY
        for events in self.sequences:
            low, high, fits = served_at(
                capacity_bytes, events, self.streams, expandable_segments=expandable_segments
            )
            if not fits:
                return low, high, False
            lowest, highest = max(lowest, low), min(highest, high)
        return lowest, highest, True

    def fits(self, capacity_bytes: int, *, expandable_segments: bool = False) -> bool:
        """Whether the allocator gets through with so many bytes, whatever the order of loading."""
        return self.served_at(capacity_bytes, expandable_segments=expandable_segments)[2]

    def capacities(
        self, *, expandable_segments: bool = False, sizes: Collection[int] = ()
    ) -> list[Capacities]:
        """What GPUs must have, without their CUDA context, by the order of loading; ``sizes`` are asked about."""
        return [
            capacities(events, self.streams, expandable_segments=expandable_segments, sizes=sizes)
            for events in self.sequences
        ]

    def required_bytes(
        self, *, expandable_segments: bool = False, sizes: Collection[int] = ()
    ) -> int:
        """The size from which on every GPU suffices, whatever the order of loading."""
        of_orders = self.capacities(expandable_segments=expandable_segments, sizes=sizes)
        return max(each.required_bytes for each in of_orders)

    def needs(self, asked: Asked, *, expandable_segments: bool = False) -> dict[str, Any]:
        """What GPUs must have, as :class:`~dryfit.engine.report.Report` has it."""
        of_orders = self.capacities(expandable_segments=expandable_segments, sizes=asked.sizes)
        needed = [each.required_bytes for each in of_orders]
        own = Capacities.of_all(of_orders)
        answer: dict[str, Any] = {
            "required_bytes": own.required_bytes,
            "required_range_bytes": (min(needed), max(needed)),
            "also_fits_bytes": own.also_fits,
            "asked_bytes": tuple(sorted(set(asked.sizes))),
        }
        if asked.both_allocators:
            other = self.capacities(expandable_segments=not expandable_segments, sizes=asked.sizes)
            names = ("default", "expandable_segments")[:: -1 if expandable_segments else 1]
            both = dict(zip(names, (own, Capacities.of_all(other)), strict=True))
            answer["required_bytes_by_allocator"] = {
                name: each.required_bytes for name, each in both.items()
            }
            answer["also_fits_bytes_by_allocator"] = {
                name: each.also_fits for name, each in both.items()
            }
        return answer


class Scaled:
    """The recordings of a step by one number that varies, its length or its rows.

    ``record``: traces the step at a value. ``period``: what kernels round the number up to: values with the same rest
    share a polynomial.
    """

    def __init__(self, record: Callable[[int], Recording], period: int = 1) -> None:
        self._record, self.period = record, period
        self.recordings: dict[int, Recording] = {}
        self._structures: dict[int, tuple[int, ...]] = {}
        self._ids: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._pairs: dict[
            tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]
        ] = {}  # frees, and what they free
        self._sizes: dict[int, list[torch.Tensor]] = {}
        self._least: dict[int, int] = {}

    @property
    def alike(self) -> bool:
        """Whether any two traces so far have the same events: without that nothing lies between them."""
        return len(set(self._structures.values())) < len(self._structures)

    def record(self, value: int) -> Recording:
        """The step's own trace at a value."""
        if value not in self.recordings:
            recording = self._record(value)
            self.recordings[value] = recording
            self._least.clear()  # another trace may correct what lies between
            sequences = [Events.of(events) for events in recording.sequences]
            ids = [events.ids for events in sequences]
            self._structures[value] = structure = tuple(hash(each.tobytes()) for each in ids)
            if structure not in self._ids:
                self._ids[structure] = [_columns(events)[0] for events in sequences]
                self._pairs[structure] = [_pairs(each) for each in ids]
            self._sizes[value] = [_columns(events)[1].to(torch.float64) for events in sequences]
        return self.recordings[value]

    def with_workspaces(self, count: int) -> Scaled:
        """The same traces for GPUs whose cuBLAS takes so many bytes; what this one lacks is traced for both."""
        other = Scaled(lambda value: self.record(value).with_workspaces(count), self.period)
        for value in self.recordings:
            other.record(value)
        return other

    def at(self, value: int) -> Recording:
        """The step at a value: between traces that have the same events, else its own trace."""
        peers, sizes = self._known(value)
        if sizes is None:
            return self.record(value)
        structure = self._structures[peers[0]]
        sequences = [
            events_of(ids, counts) for ids, counts in zip(self._ids[structure], sizes, strict=True)
        ]
        near = self.recordings[peers[0]]
        return Recording(sequences, near.streams, traced=False, workspaces=near.workspaces)

    def least_bytes(self, value: int, *, trace: bool = True) -> int | None:
        """The largest sum of what is asked for at a value, in blocks: less than that never suffices.

        None: the step would have to be traced for that, which ``trace`` forbids.
        """
        if value in self._least:
            return self._least[value]
        peers, sizes = self._known(value, trace=trace)
        if sizes is None and not trace and value not in self.recordings:
            return None
        if sizes is None:
            self.record(value)
            peers, sizes = [value], [size.to(torch.int64) for size in self._sizes[value]]
        most = 0
        for counts, (frees, freed) in zip(
            sizes, self._pairs[self._structures[peers[0]]], strict=True
        ):
            blocks = counts + (MIN_BLOCK - 1) & -MIN_BLOCK
            blocks[frees] = -blocks[freed]
            most = max(most, int(blocks.cumsum(0).max()))
        self._least[value] = most
        return most

    def bends(self, low: int, high: int) -> bool:
        """Whether a value that was traced between two others lies beside the line through them.

        Rounding up puts it above the line, by less than a period's growth.
        """
        (middle,) = [value for value in self.recordings if low < value < high][:1]
        if not self._structures[low] == self._structures[middle] == self._structures[high]:
            return False
        for first, between, last in zip(
            *(self._sizes[value] for value in (low, middle, high)), strict=True
        ):
            growth = (last - first) / (high - low)
            beside = between - (first + growth * (middle - low))
            if bool((beside.abs() > growth.abs() * self.period + MIN_BLOCK).any()):
                return True
        return False

    def _known(
        self, value: int, *, trace: bool = True
    ) -> tuple[list[int], list[torch.Tensor] | None]:
        """Traces with the same events as the step at a value, and its bytes by them; None: it has to be traced.

        Where the events change between two traces, the place is looked for by halves: a trace at every value that is
        asked about would take as many as there are questions.
        """
        while value not in self.recordings:
            below = max((known for known in self.recordings if known < value), default=None)
            above = min((known for known in self.recordings if known > value), default=None)
            if below is None or above is None:
                break
            structure = self._structures[below]
            if structure == self._structures[above]:
                peers = [known for known in self.recordings if self._structures[known] == structure]
                return peers, self._between(peers, value)
            middle = (below + above) // 2 // self.period * self.period
            if not trace or not below < middle < above or len(self._ids) > PIECES:
                break
            self.record(middle)
        return [], None

    def _between(self, peers: Sequence[int], value: int) -> list[torch.Tensor] | None:
        near = sorted(peers, key=lambda known: abs(known - value))
        by_rest: dict[int, list[int]] = {}
        for known in near:
            by_rest.setdefault(known % self.period, []).append(known)
        own = by_rest.get(value % self.period, [])
        main = own if len(own) > 1 else max(by_rest.values(), key=len)
        if len(main) < 2 or not own:
            return None
        sizes = self._through(main[:3], value)
        if main is not own:  # of this rest one trace is known: what rounding adds there
            corrections = self._through(main[:3], own[0])
            sizes = [
                size + known - line
                for size, known, line in zip(sizes, self._sizes[own[0]], corrections, strict=True)
            ]
        return [size.round_().clamp_(min=0).to(torch.int64) for size in sizes]

    def _through(self, values: Sequence[int], at: int) -> list[torch.Tensor]:
        """Lagrange's polynomial through two or three traces."""
        weights = [
            prod((at - other) / (value - other) for other in values if other != value)
            for value in values
        ]
        sums = [weights[0] * size for size in self._sizes[values[0]]]
        for value, weight in zip(values[1:], weights[1:], strict=True):
            sums = [
                total.add_(size, alpha=weight)
                for total, size in zip(sums, self._sizes[value], strict=True)
            ]
        return sums


def _columns(events: Events) -> tuple[torch.Tensor, torch.Tensor]:
    if not events:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    ids, sizes = torch.frombuffer(events.numbers, dtype=torch.int64).view(-1, 2).unbind(1)
    return ids.clone(), sizes.clone()


def events_of(ids: torch.Tensor, sizes: torch.Tensor) -> Events:
    """Events of two columns."""
    numbers = array("q", [0]) * (
        2 * len(ids)
    )  # `array("q", bytes(...))` would take each number by itself
    if numbers:
        columns = torch.frombuffer(numbers, dtype=torch.int64).view(-1, 2)
        columns[:, 0], columns[:, 1] = ids, sizes
    return Events(numbers)


def _pairs(ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the events that free something, and of those that allocated it."""
    known: dict[int, int] = {}
    frees, freed = [], []
    for index, identity in enumerate(ids):
        if identity > 0:
            known[identity] = index
        elif -identity in known:
            frees.append(index)
            freed.append(known.pop(-identity))
    return torch.tensor(frees, dtype=torch.int64), torch.tensor(freed, dtype=torch.int64)
