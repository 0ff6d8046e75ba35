"""The second step of a record, told by the first: so that a step at many sizes is traced once, and not twice.

The first step makes what stays: workspaces and the optimizer's states. All else that the second step allocates has an
allocation of the first one that it is like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import torch

from .columns import ALLOCATED, Columns, WrittenRecord
from .components import WORKSPACES
from .periods import Unlike
from .record import Record


class SecondStep:
    """The second step of a record, which the first one tells: it allocates the same, but for the optimizer's states.

    Parameters
    ----------
    record
        Of two steps.

    Attributes
    ----------
    one_by_one
        Whether each phase but the optimizer's allocates the same in both steps, one by one.

    Raises
    ------
    Unlike
        If the second step allocates something that the first does not, or in another order.
    """

    def __init__(self, record: Record) -> None:
        refuse_beyond(record)
        self.record, self.both = record, Columns.of(record)
        self._kinds, self._about, self._sizes = (
            column.tolist() for column in (self.both.kinds, self.both.about, self.both.sizes)
        )
        self._first = record.start(1)  # event of the second step
        self._sources = [*range(self._first)]  # by event of both steps, that of the first step with its bytes; or -1
        self.one_by_one = True
        phases = {phase for phase, _, _ in record.spans(1)}
        places = {phase: (self._allocated(phase, 0), self._allocated(phase, 1)) for phase in phases}
        source_of: dict[int, int] = {}
        self._of_weights: list[int] = []  # places whose bytes don't depend on the size of the step
        for phase, (before, after) in places.items():
            if phase == "optimizer":
                self._of_weights += after
            else:
                self.one_by_one &= len([one for one in before if not self._stays(one)]) == len(after)
            source_of |= self._matched(before, after)
        self._sources += [source_of.get(place, -1) for place in range(self._first, len(self.both))]

    def _matched(self, before: list[int], after: list[int]) -> dict[int, int]:
        """By place of the second step the allocation of the first that it is like, in order."""
        rest, found = iter(before), {}
        for place in after:
            like = self._about[place], self._sizes[place]
            source = next((one for one in rest if (self._about[one], self._sizes[one]) == like), -1)
            if source < 0:
                raise Unlike("the second step allocates what the first does not")
            found[place] = source
        return found

    def _allocated(self, phase: str, step: int) -> list[int]:
        """Places of the allocations of a step's phase, which may come more than once."""
        spans = (range(first, last) for name, first, last in self.record.spans(step) if name == phase)
        return [place for span in spans for place in span if self._kinds[place] == ALLOCATED]

    def _stays(self, place: int) -> bool:
        return self.both.told[self._about[place]][0] == WORKSPACES

    def same_as(self, other: SecondStep) -> bool:
        """Whether at another size of the step the same event of the first one tells each event of the second."""
        same = torch.equal(self.both.reused, other.both.reused) and self.record.marks == other.record.marks
        return same and self.both.structure == other.both.structure and self._sources == other._sources

    def behind(self, first: Record) -> Record:
        """Both steps at a size at which the first alone was traced.

        Raises
        ------
        Unlike
            If its events are others.
        """
        refuse_beyond(first)
        known, own = self.record, Columns.of(first)
        told = first.marks, first.warnings, first.workspaces.cudnn_bytes, first.costs
        same = [mark for mark in known.marks if mark[1] < 1], known.warnings, known.workspaces.cudnn_bytes, None
        launches = {name: 2 * count for name, count in first.kernels_run.items()}
        if launches != known.kernels_run or told != same or own.structure != self._structure_of_first:
            raise Unlike("the events are others")
        sources = torch.tensor(self._sources)
        sizes = torch.where(sources >= 0, own.sizes[sources], 0)
        if any(int(sizes[place]) != self._sizes[place] for place in self._of_weights):
            raise Unlike("the optimizer's step depends on the size of the batch")
        both = self.both
        record = WrittenRecord(Columns(both.kinds, sizes, both.targets, both.reused, both.about, both.told))
        record.marks, record.warnings = list(known.marks), dict(known.warnings)
        record.kernels_run = Counter(known.kernels_run)
        record.workspaces.cudnn_bytes = known.workspaces.cudnn_bytes
        return record

    @property
    def _structure_of_first(self) -> int:
        return hash(self.both.first(self._first))


class SecondSteps:
    """Traces of one scenario's shallow models, without the second step where the first one tells it.

    Bytes may be equal by chance, so two sizes have to agree (:meth:`SecondStep.same_as`). Where a model's do, the first
    of them is enough for the others that allocate one by one: they differ from it in layers alone.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Hashable, SecondStep]] = []  # with the size of the step
        self._proven: list[SecondStep] = []

    def traced(self, stepped: Callable[..., tuple[Record, Any]], shallow: Any, size: Hashable) -> tuple[Record, Any]:
        """The record of both steps at a size of the step, and what is known of the model."""
        told: list[Record] = []

        def enough(first: Record) -> bool:
            for second in self._proven:
                with suppress(Unlike):
                    told.append(second.behind(first))
                    return True
            return False

        record, about = stepped(shallow, enough)
        if told:
            return told[0], about
        with suppress(Unlike):
            self._learn(size, SecondStep(record))
        return record, about

    def _learn(self, size: Hashable, second: SecondStep) -> None:
        agreed = {known for known, other in self._seen if known != size and second.same_as(other)}
        if agreed:
            beside = (other for known, other in self._seen if known in agreed and other.one_by_one)
            self._proven += [second, *beside]
        self._seen.append((size, second))


def refuse_beyond(record: Record) -> None:
    """Refuse a record that holds what is not composed.

    Raises
    ------
    Unlike
        If it does.
    """
    if record.origins is not None or record.compiled is not None:
        raise Unlike("the record holds what is not composed")
    if record.stashes is not None and record.stashes.delayed(record.events) not in (None, record.events):
        raise Unlike("collectives hold what the program has let go of")
