"""What a step did to memory, written down: allocations and frees in order, what each was for, where phases begin."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .allocator import Event
from .costs import CostRecorder
from .origins import Origins
from .stashes import Stashes
from .workspaces import Workspaces


class Record:
    """A step's record, empty at first. :class:`~will_it_fit.engine.tracker.Tracker` writes one.

    Attributes
    ----------
    events
        ``(id, bytes)`` for an allocation, ``(-id, 0)`` for its end.
    marks
        ``(phase, step, index of its first event)`` in order.
    components
        What each id is for.
    warnings
        What a person should know about the answer, in the order in which it was seen.
    origins, costs
        Where each tensor comes from, and what each operator costs; None unless somebody sets them.
    streams
        The stream that an id was allocated on, where it is not the one that models compute on.
    reusable
        For an id that another stream uses as well, and that is freed: the index of the event before which the GPU has
        certainly got there.
    workspaces
        Where cuDNN and cuFFT take some of their own.
    stashes
        The collectives that it starts.
    kernels_run
        How often each of Triton's kernels was launched.
    compiled
        What the compiler took, where a compiled step is followed.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.marks: list[tuple[str, int, int]] = []
        self.components: dict[int, str] = {}
        self.warnings: dict[str, None] = {}
        self.origins: Origins | None = None
        self.costs: CostRecorder | None = None
        self.streams: dict[int, int] = {}
        self.reusable: dict[int, int] = {}
        self.workspaces = Workspaces()
        self.stashes = Stashes()
        self.kernels_run: Counter[str] = Counter()
        self.compiled: Any = None

    def warn(self, text: str) -> None:
        """Note what a person should know about the answer."""
        self.warnings.setdefault(text)

    def start(self, step: int) -> int:
        """Index of a step's first event."""
        return next(index for _, number, index in self.marks if number == step)

    def spans(self, step: int) -> list[tuple[str, int, int]]:
        """Return the phases of a step in order: name, index of its first event, index after its last."""
        ends = [index for _, _, index in self.marks[1:]]
        return [
            (phase, first, last)
            for (phase, number, first), last in zip(self.marks, ends, strict=False)
            if number == step
        ]
