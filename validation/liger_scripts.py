"""One of Liger's benchmark scripts as a process: all that it allocates, from the first tensor to the last.

``benchmark/scripts/benchmark_*.py`` measures several sizes of two implementations in one process, their speed before
their memory. PyTorch's allocator keeps what was freed. A block that is taken from a larger free one is up to 1 MiB
larger than its request, and ``max_memory_allocated`` counts it whole. So the figure of a size depends on the sizes
before it. Each size is traced once; here the traces follow each other as the script has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dryfit.engine.components import WORKSPACES
from dryfit.engine.replay import replay
from dryfit.engine.trace import Options, trace_step

STEPS = 3  # the last is like all that follow
# triton/testing.py, do_bench: a tensor as large as a cache of the second level, from the second call on.
FLUSHED_BYTES = 256 * 10**6
_NOT_MEASURED = "between"


@dataclass(frozen=True)
class ScriptRun:
    """The first three steps of an implementation at a size.

    Attributes
    ----------
    events
        ``(id, bytes)`` for an allocation, ``(-id, 0)`` for its end; first the tensors that the script makes.
    steps
        For each step, the indices of the first events of its forward and of its backward pass.
    workspaces
        Ids of what cuBLAS keeps for a thread, in order.
    """

    events: Sequence[tuple[int, int]]
    steps: Sequence[tuple[int, int]]
    workspaces: Sequence[int]


def run_of(bench: nn.Module, step: Any) -> ScriptRun:
    """Three steps, traced; inside a simulated card."""
    options = Options(compiled="follow", scalars=1.0, steps=STEPS, report=_run)
    return trace_step(bench, None, step, options=options)


def _run(record: Any, *_: Any, **__: Any) -> ScriptRun:
    steps = []
    for number in range(STEPS):
        marks = [(phase, index) for phase, step, index in record.marks if step == number]
        steps.append((marks[0][1], next(index for phase, index in marks if phase == "backward")))
    workspaces = [
        identity for identity, component in record.components.items() if component == WORKSPACES
    ]
    return ScriptRun(list(record.events), steps, workspaces)


class ScriptProcess:
    """What a script has allocated so far."""

    def __init__(self) -> None:
        self._events: list[tuple[int, int]] = []
        self._marks: list[tuple[str, int]] = []
        self._last = self._workspaces = 0

    def holds(self, sizes: Iterable[int]) -> None:
        """Tensors that stay until the process ends."""
        for size in sizes:
            self._allocate(size)

    def speed(self, run: ScriptRun, *, forward_only: bool, before: Sequence[int] = ()) -> None:
        """A size's speed is measured, of both passes or of the forward pass alone."""
        self._play(run, flushes=True, forward_only=forward_only, before=before)

    def memory(self, run: ScriptRun, name: str, before: Sequence[int] = ()) -> None:
        """A size's memory is measured, under a name.

        Parameters
        ----------
        before
            Sizes of weights that the script makes and replaces by others before the first step.
        """
        self._play(run, name=name, before=before)

    def peaks(self) -> dict[str, int]:
        """By name, the bytes of blocks in use at the largest, as ``max_memory_allocated`` gives them."""
        spans = replay(self._events, self._marks).spans
        return {
            span.phase: span.peak_allocated_bytes for span in spans if span.phase != _NOT_MEASURED
        }

    def _allocate(self, size: int) -> int:
        self._last += 1
        self._events.append((self._last, size))
        return self._last

    def _free(self, identity: int) -> None:
        self._events.append((-identity, 0))

    def _play(
        self,
        run: ScriptRun,
        *,
        name: str | None = None,
        flushes: bool = False,
        forward_only: bool = False,
        before: Sequence[int] = (),
    ) -> None:
        alive = self._replaced(run, before)
        cache = None
        first, *_ = run.steps[0]
        for event in run.events[:first]:
            self._follow(run, event, alive)
        ends = [*(start for start, _ in run.steps[1:]), len(run.events)]
        for number, ((start, backward), end) in enumerate(zip(run.steps, ends, strict=True)):
            if number == 1 and flushes:
                cache = self._allocate(FLUSHED_BYTES)
            if number == STEPS - 1 and name:
                self._marks.append((name, len(self._events)))
            stays = set(alive)
            for event in run.events[start : backward if forward_only else end]:
                self._follow(run, event, alive)
            for identity in (set(alive) - stays) if forward_only else ():
                self._free(alive.pop(identity))
        if name:
            self._marks.append((_NOT_MEASURED, len(self._events)))
        for identity in [*([cache] if cache else []), *alive.values()]:
            self._free(identity)

    def _replaced(self, run: ScriptRun, sizes: Sequence[int]) -> dict[int, int]:
        """Both models make weights of their own first; then each pair is replaced by one tensor that they share."""
        made = [self._allocate(size) for size in (*sizes, *sizes)]
        alive: dict[int, int] = {}
        for number, size in enumerate(sizes):
            identity = next(one for one, count in run.events if count == size and one not in alive)
            alive[identity] = self._allocate(size)
            self._free(made[number])
            self._free(made[len(sizes) + number])
        return alive

    def _follow(self, run: ScriptRun, event: tuple[int, int], alive: dict[int, int]) -> None:
        identity, size = event
        if identity < 0:
            if -identity in alive:
                self._free(alive.pop(-identity))
        elif identity in run.workspaces:
            if run.workspaces.index(identity) == self._workspaces:  # a thread's is made once
                self._workspaces += 1
                self._allocate(size)
        elif identity and identity not in alive:
            alive[identity] = self._allocate(size)


def measured(
    sizes: Sequence[tuple[str, ScriptRun, ScriptRun]],
    *,
    speed_first: bool = True,
    baseline_first: bool = False,
    before: Sequence[int] = (),
    left: Sequence[int] = (),
    left_again: Sequence[int] = (),
) -> Iterator[tuple[str, int, int]]:
    """The peaks that a script prints.

    Parameters
    ----------
    sizes
        A name, and the runs with Liger's kernels and without, in the script's order.
    speed_first
        Whether it measures speed before memory.
    baseline_first
        Whether the run without Liger's kernels comes before the other.
    before
        See :meth:`Process.memory`.
    left
        Sizes of what PyTorch's compiler leaves behind while the speed is measured.
    left_again
        The same, from the first size on whose memory is measured.

    Yields
    ------
    tuple
        The name, and the bytes with Liger's kernels and without.
    """
    process, columns = ScriptProcess(), (2, 1) if baseline_first else (1, 2)
    for forward_only in (True, False) if speed_first else ():
        for column in columns:
            for size in sizes:
                process.speed(size[column], forward_only=forward_only, before=before)
            if forward_only and column == 1:
                process.holds(left)
    if not speed_first:
        process.holds(left)
    for column in columns:
        for number, size in enumerate(sizes):
            process.memory(size[column], f"{column} {size[0]}", before)
            if (column, number) == (1, 0):
                process.holds(left_again)
    peaks: Mapping[str, int] = process.peaks()
    for name, *_ in sizes:
        yield name, peaks[f"1 {name}"], peaks[f"2 {name}"]
