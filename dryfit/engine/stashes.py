"""What NCCL holds on to for collectives that a program starts and doesn't wait for.

Since PyTorch 2.8 a collective that is started with ``async_op=True`` keeps its tensors until ``work.wait()``
(``ProcessGroupNCCL.cpp``, ``TensorShelf``; before, ``record_stream`` left that to the allocator, whose figures of
allocated memory didn't show it). A program that waits for the work's future alone never says that. Then a thread which
looks every 100 ms finds out that a collective is done, and the next call of a collective lets go of its tensors. So
what such a program has freed is alive for as many steps as the CPU is ahead of the GPU, and for those of 100 ms more.
How far ahead that is isn't known; CUDA takes about 1,024 launches before it makes the program wait, which is observed
and not documented. How long a step takes isn't known either: the upper end is that of steps of 50 ms, two of which
pass while the thread sleeps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .allocator import Event

LAUNCHES_AHEAD = 1024
STEPS_ASLEEP = 2  # of 50 ms, while NCCL's thread sleeps (`kWatchdogThreadSleepMillis`)
_TOLD = (
    "the program starts collectives with async_op=True and doesn't wait for their work: since PyTorch 2.8 their tensors"
    " stay until the GPU is done with them and NCCL's thread, which looks every 100 ms, has seen it. That is up to"
    " {:,.0f} MiB more than the figures where a step takes 50 ms, see `peak_allocated_range_bytes`, and more where it"
    " takes less. Call work.wait(), not the future's"
)


@dataclass
class Started:
    """A collective that was started."""

    # Index of the next event, and how many kernels had been launched.
    moment: int
    launches: int
    kept: tuple[int, ...]  # ids of what it keeps; none where the program waits in the call
    released: int | None = None  # index of the event before which the program has waited for it


class Stashes:
    """The collectives of a step, in order."""

    def __init__(self) -> None:
        self._started: list[Started] = []

    def start(self, moment: int, launches: int, kept: Sequence[int]) -> None:
        """Note a collective."""
        self._started.append(Started(moment, launches, tuple(kept)))

    @property
    def last(self) -> Started | None:
        """The one that was started last."""
        return self._started[-1] if self._started else None

    def waited(self, moment: int, started: Started | None = None) -> None:
        """The program waits for a work: the ``started`` one, else the last without ``async_op``, or the oldest."""
        if started is not None:
            started.released = moment if started.released is None else started.released
            return
        last = self._started[-1:]
        waits = last if last and not last[0].kept and last[0].released is None else self._started
        found = next(
            (each for each in waits if each.released is None and (each.kept or waits is last)), None
        )
        if found is not None:
            found.released = moment

    def delayed(self, events: Sequence[Event], lead: int = LAUNCHES_AHEAD) -> list[Event] | None:
        """The events of a program that is so many launches ahead of the GPU; None where nothing is held.

        A collective's tensors go when the program waits for it, or with the first later collective that is called when
        so many kernels have been launched since.
        """
        launches = [each.launches for each in self._started]
        release: dict[int, int] = {}
        for each in self._started:
            later = bisect_left(launches, each.launches + lead)
            ends = self._started[later].moment if later < len(launches) else len(events)
            ends = ends if each.released is None else min(ends, each.released)
            for identity in each.kept:
                release[identity] = max(release.get(identity, 0), ends)
        moved: list[Event] = []
        waiting: dict[int, list[int]] = {}
        for index, (identity, count) in enumerate(events):
            moved += [(-one, 0) for one in waiting.pop(index, ())]
            ends = release.get(-identity, 0) if identity < 0 else 0
            if ends > index:
                waiting.setdefault(ends, []).append(-identity)
            else:
                moved.append((identity, count))
        return moved if release else None

    def range_of(
        self,
        peak: int,
        events: Sequence[Event],
        peak_of: Callable[[list[Event]], int],
        warn: Callable[[str], None],
        steps: int = 1,
    ) -> dict[str, Any]:
        """``peak_allocated_range_bytes`` of a report, where anything is held that decides; ``steps``: of the events."""
        launches_of_step = self._started[-1].launches // max(steps, 1) if self._started else 0
        moved = self.delayed(events, LAUNCHES_AHEAD + STEPS_ASLEEP * launches_of_step)
        highest = peak if moved is None else peak_of(moved)
        if highest <= peak:
            return {}
        warn(_TOLD.format((highest - peak) / 2**20))
        return {"peak_allocated_range_bytes": (peak, highest)}
