"""On which GPUs a sequence of allocations and frees is served, where more memory may hurt.

Where a GPU is full, the allocator gives back what lies free and goes on from there. On a larger one it does so later,
and the segments that it makes then may fit together worse. So what one capacity serves a larger one may not.

A replay asks for the capacity only where it needs a segment: does it fit beside the others or not? All capacities with
the same answers have the same history, so each replay holds for an interval of them. The search walks down from plenty,
in steps of about a thousandth and through the sizes that are asked about, to the first that fails. Below it some sizes
may be served as well, by luck.

Two things make that cheap. A history goes on from a copy of the one before it, taken before the two part. And where
free segments have just been given back, two histories that hold the same blocks in the same order have one future.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .allocator import PLENTY, ROUND_LARGE, Event, OutOfMemory
from .replay import State, allocator_for, peak_blocks

APART = 4096  # events from one kept state to the next: a copy takes about as long
STEPS = 512  # to the blocks in use at the peak, at least
Interval = tuple[int, int]  # capacities from the first number to before the second


@dataclass(frozen=True)
class Capacities:
    """The capacities in bytes, without a CUDA context, that serve a sequence."""

    # From here on every capacity suffices that was replayed: in steps of at most 1/512 of the blocks in use at the
    # peak, and every one that was asked about.
    required_bytes: int
    # Intervals below it, from the first number to before the second, around sizes that were asked about: they suffice
    # as well, by luck.
    also_fits: tuple[Interval, ...] = ()

    def fits(self, capacity_bytes: int) -> bool:
        """Whether so many bytes suffice."""
        return capacity_bytes >= self.required_bytes or any(
            low <= capacity_bytes < high for low, high in self.also_fits
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON: ``required_bytes`` and ``also_fits_bytes``."""
        return {
            "required_bytes": self.required_bytes,
            "also_fits_bytes": [list(one) for one in self.also_fits],
        }

    @classmethod
    def of_all(cls, of_sequences: Iterable[Capacities]) -> Capacities:
        """Where each of several sequences is served."""
        of_sequences = list(of_sequences)
        required = max(each.required_bytes for each in of_sequences)
        windows: list[Interval] = [(0, required)]
        for each in of_sequences:
            own = [(each.required_bytes, required), *each.also_fits]
            windows = [
                (max(low, first), min(high, last))
                for low, high in windows
                for first, last in own
                if max(low, first) < min(high, last)
            ]
        return cls(required, tuple(sorted(windows, reverse=True)))


def capacities(
    events: Sequence[Event],
    streams: Mapping[int, int] | None = None,
    *,
    expandable_segments: bool = False,
    sizes: Iterable[int] = (),
) -> Capacities:
    """Find the capacity from which on events are served at every one, and whether they are at some below it.

    Parameters
    ----------
    events, streams
        As :func:`~dryfit.engine.replay.replay` has them.
    expandable_segments
        Whether the allocator runs with ``expandable_segments:True``.
    sizes
        Capacities that are asked about.
    """
    least = peak_blocks(events)  # less never suffices
    search = _CapacitySearch(
        *allocator_for(events, streams, expandable_segments=expandable_segments)
    )
    required, ahead = _walked(search, least, set(sizes))
    also = set()
    for size in ahead:
        search.restart()
        low, high, fits = search.below(size + 1)
        if fits:
            also.add((max(low, least), min(high, required)))
    return Capacities(required, tuple(sorted(also, reverse=True)))


def served_at(
    capacity_bytes: int,
    events: Sequence[Event],
    streams: Mapping[int, int] | None = None,
    *,
    expandable_segments: bool = False,
) -> tuple[int, int, bool]:
    """Whether a capacity suffices, and for which others the same history says so: from the first, to before the second.

    The other arguments are those of :func:`capacities`.
    """
    search = _CapacitySearch(
        *allocator_for(events, streams, expandable_segments=expandable_segments)
    )
    return search.below(capacity_bytes + 1)


def _walked(search: _CapacitySearch, least: int, sizes: Collection[int]) -> tuple[int, list[int]]:
    """The least capacity from which on all served, and the sizes below it that may suffice."""
    step = max(ROUND_LARGE, 1 << max(least // STEPS, 1).bit_length() - 1)
    required, high = search.below(PLENTY)[0], least
    while required > least:
        next_one = max(
            [(required - 1) // step * step, *(size for size in sizes if size < required)]
        )
        low, high, fits = search.below(next_one + 1) if next_one >= least else (0, least, False)
        if not fits:  # the border lies between the two
            break
        required = low
    search.restart()
    while required > max(high, least):
        low, _, fits = search.below(required)
        if not fits:
            break
        required = low
    required = max(required, least)
    return required, [size for size in sizes if least <= size < required]


class _Known(Exception):
    """What is held was held before, and what came of it is known."""

    def __init__(self, low: int, high: int, fits: bool) -> None:
        super().__init__()
        self.low, self.high, self.fits = low, high, fits


class _CapacitySearch:
    """Replays at falling capacities."""

    def __init__(self, state: State, events: Sequence[Event]) -> None:
        self.events, self._first = events, state
        self.restart()
        # By what is held where segments were given back: intervals of capacities, and whether they suffice from there.
        self._futures: dict[tuple[int, int], list[tuple[int, int, bool]]] = {}

    def restart(self) -> None:
        """Begin at the top again: capacities have to fall from one question to the next."""
        self._path = [
            (0, self._first)
        ]  # states of the last history, and how many events came before each
        self._risen: list[tuple[int, int]] = []  # of the last history

    def below(self, high: int) -> tuple[int, int, bool]:
        """The capacities with the same history as the largest one below ``high``, and whether they suffice."""
        capacity = high - 1
        parts = next(
            (at for total, at in self._risen if total > capacity), 0
        )  # from the last history
        while self._path[-1][0] > parts:
            self._path.pop()
        index, state = self._path[-1]
        state = state.copy()
        state.capacity = capacity
        while parts - index > APART:
            state.run(self.events, index, index + APART)
            index += APART
            self._path.append((index, state.copy()))
        low, fits = state.risen[-1][0], True
        state.sums = []
        passed: list[
            tuple[tuple[int, int], int]
        ] = []  # what was held, and how many sums were asked for before

        def released(at: int) -> None:
            key = at, state.signature()
            for known in self._futures.get(key, ()):
                if known[0] <= capacity < known[1]:
                    raise _Known(*known)
            passed.append((key, len(state.sums)))

        state.released, ends = released, []
        try:
            state.run(self.events, index, len(self.events))
        except OutOfMemory:
            fits = False
        except _Known as known:
            fits = known.fits
            ends = [known.low, known.high]
        sums = [*state.sums, *ends]
        for key, count in passed:
            self._futures.setdefault(key, []).append((*_around(capacity, sums[count:]), fits))
        self._risen = state.risen
        within, beyond = _around(capacity, sums)
        return max(low, within), beyond, fits


def _around(capacity: int, sums: Sequence[int]) -> Interval:
    """The capacities that are not told apart from one by sums that were asked for."""
    within = max((total for total in sums if total <= capacity), default=0)
    return within, min((total for total in sums if total > capacity), default=PLENTY)
