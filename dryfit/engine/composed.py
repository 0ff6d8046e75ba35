"""The record of a step of a deep model, from those of two shallow ones that differ in one period of layers.

Two layers of a model do the same to memory, but for those at the ends. So the records of shallow models say what a deep
one's would: allocations and frees, what each is for, phases, streams, costs (:mod:`dryfit.engine.periods`).
A third record is the proof, see :meth:`Composer.proven_by`. What does not grow evenly raises :class:`Unlike`.

Of two steps the second is told by the first, so that a step at many sizes is traced once, and not twice. The first step
makes what stays: workspaces and the optimizer's states. Everything else that the second step allocates is like an
allocation of the first one (:class:`SecondStep`).

Sums over several layers are beyond it: what fills up to a limit, such as the buckets in which DDP sends gradients, may
go over it behind the third record. Who calls this has to know that a step has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from .components import WORKSPACES
from .costs import CostRecorder, Operator
from .periods import Periods, Unlike
from .record import ALLOCATED, Columns, Record, WrittenRecord

_SMALL = 4096  # bytes: what a few layers' numbers take together is less


class Composer:
    """Records of deeper models, from two of shallow ones.

    Parameters
    ----------
    shorter, longer
        Of models that differ in one period of layers.
    like
        A composer that was proven by other sizes of the same step: the events correspond as its do.
    in_order
        Whether frees in a row are taken in the order of their allocations: layers of several kinds may end theirs in
        another order at another depth. Where tensors of two kinds look alike, their own order tells them apart.

    Raises
    ------
    Unlike
        If the longer record does not repeat the shorter one's layers.
    """

    def __init__(
        self,
        shorter: Record,
        longer: Record,
        like: Composer | None = None,
        *,
        in_order: bool = False,
    ) -> None:
        _refuse(shorter, longer)
        self._records = shorter, longer
        self._in_order = like._in_order if like is not None else in_order
        self.shorter, self.longer = self._listed(shorter), self._listed(longer)
        # What is the same in steps whose events differ in size alone.
        self.structure = self.shorter.structure, self.longer.structure
        if like is not None and like.structure != self.structure:
            raise Unlike("the events are others")
        self._periods = like._periods if like is not None else _aligned(self.shorter, self.longer)
        # By the number of periods more, what does not depend on the size of the step: kinds, targets and subjects.
        self._alike: dict[int, tuple[torch.Tensor, ...]] = like._alike if like is not None else {}
        self._phases = _Places(
            [mark[:2] for mark in shorter.marks], [mark[:2] for mark in longer.marks]
        )
        self._costs = (
            _Costs(shorter.costs, longer.costs) if shorter.costs and longer.costs else None
        )

    def proven_by(self, record: Record) -> bool:
        """Whether the model with one period of layers more has the record that is composed for it."""
        found = self.at(1)
        alike = self._listed(found).same_as(self._listed(record))
        told = found.marks, found.warnings, found.kernels_run, _told(found.costs)
        return alike and told == (
            record.marks,
            record.warnings,
            record.kernels_run,
            _told(record.costs),
        )

    def grows_like(self, other: Composer) -> bool:
        """Whether the longer record has the same beside the shorter one's, byte for byte, at another size of the step.

        Then the layers that were added are like those beside them, and what grows with the layers does not with the
        size. So :meth:`longer_than` gives the longer record at the sizes between.
        """
        own, others = self._added, other._added
        return self.structure == other.structure and all(map(torch.equal, own, others))

    def longer_than(self, shorter: Record) -> Record:
        """The longer record at a size at which the shorter model alone was traced.

        Raises :class:`Unlike` if its events are others.
        """
        before, after = self._records
        own, longer = self._listed(shorter), self.longer
        told = shorter.warnings, shorter.workspaces.cudnn_bytes, shorter.kernels_run, shorter.costs
        known = before.warnings, before.workspaces.cudnn_bytes, before.kernels_run, None
        if (
            own.structure != self.structure[0]
            or told != known
            or len(before.marks) != len(after.marks)
        ):
            raise Unlike("the events are others")
        if not torch.equal(own.reused < 0, self.shorter.reused < 0):
            raise Unlike("other blocks wait for another stream")
        places, (of_bytes, of_moments) = self._periods.in_shorter(), self._added
        sizes, reused = own.sizes[places] + of_bytes, own.reused[places] + of_moments
        columns = Columns(longer.kinds, sizes, longer.targets, reused, longer.about, longer.told)
        marks = zip(shorter.marks, after.marks, before.marks, strict=True)
        return _written(
            columns,
            [(*mark, here + end - first) for (*mark, here), (_, _, end), (_, _, first) in marks],
            after,
        )

    @cached_property
    def _added(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the longer record's bytes, and moments of reuse, have more than those of the events that they repeat."""
        places, few, many = self._periods.in_shorter(), self.shorter, self.longer
        return many.sizes - few.sizes[places], many.reused - few.reused[places]

    def at(self, more: int) -> Record:
        """The record of the model with so many periods of layers more than the longer one.

        Raises :class:`Unlike` if something does not grow evenly.
        """
        before, after = self._records
        ends = ([mark[2] for mark in marks] for marks in (before.marks, after.marks))
        marks = [(*mark, end) for mark, end in self._phases.at(*ends, more)]
        record = _written(self._columns(more), marks, after)
        few, many = before.kernels_run, after.kernels_run
        record.kernels_run = Counter(
            {name: count + (count - few[name]) * more for name, count in many.items()}
        )
        record.costs = self._costs and self._costs.at(more)
        return record

    def _listed(self, record: Record) -> Columns:
        columns = Columns.of(record)
        return (
            columns.in_order(place for _, _, place in record.marks) if self._in_order else columns
        )

    def _columns(self, more: int) -> Columns:
        few, many, extended = self.shorter, self.longer, self._periods.extended
        if more not in self._alike:
            source = self._periods.source(more)
            self._alike[more] = (
                many.kinds[source],
                extended(few.targets, many.targets, more),
                many.about[source],
            )
        kinds, targets, about = self._alike[more]
        sizes, reused = (
            extended(few.sizes, many.sizes, more),
            extended(few.reused, many.reused, more),
        )
        return Columns(kinds, sizes, targets, reused, about, many.told)


def _written(
    columns: Columns, marks: Iterable[tuple[str, int, int]], like: Record
) -> WrittenRecord:
    """A record of events and marks, whose warnings, launches and workspaces are another's."""
    record = WrittenRecord(columns)
    record.marks, record.warnings, record.kernels_run = (
        [*marks],
        dict(like.warnings),
        Counter(like.kernels_run),
    )
    record.workspaces.cudnn_bytes = like.workspaces.cudnn_bytes
    return record


class _Places:
    """Where phases begin in longer records: phases may repeat too."""

    def __init__(self, shorter: list[Any], longer: list[Any]) -> None:
        self._names, self._periods = longer, Periods(shorter, longer)

    def at(self, shorter: list[int], longer: list[int], more: int) -> list[tuple[Any, int]]:
        """Each phase with its place, from its places in the two records."""
        places = self._periods.extended(torch.tensor(shorter), torch.tensor(longer), more).tolist()
        sources = self._periods.source(more).tolist()
        return [(self._names[source], place) for source, place in zip(sources, places, strict=True)]


def _refuse(shorter: Record, longer: Record) -> None:
    for record in (shorter, longer):
        refuse_beyond(record)
    if shorter.warnings != longer.warnings:
        raise Unlike("the warnings differ")


def _aligned(shorter: Columns, longer: Columns) -> Periods:
    """Which events correspond.

    Sizes tell that are in both records. But where a small one grows with the layers, such as that of all norms
    together, it may be another tensor's in the other record: then small ones tell nothing.
    """
    fixed = {*shorter.sizes.tolist()} & {*longer.sizes.tolist()}
    try:
        return Periods(shorter.tokens(fixed), longer.tokens(fixed))
    except Unlike:
        large = {size for size in fixed if size >= _SMALL}
        return Periods(shorter.tokens(large), longer.tokens(large))


def _told(costs: CostRecorder | None) -> Any:
    if costs is None:
        return None
    calls = [costs.operators[index] for index in costs.calls]
    return calls, costs.streams, costs.phases, costs.waits, costs.without_kernel


class _Costs:
    def __init__(self, shorter: CostRecorder, longer: CostRecorder) -> None:
        self.shorter, self.longer = shorter, longer
        self._phases = _Places(
            [phase for phase, _ in shorter.phases], [phase for phase, _ in longer.phases]
        )
        fixed = {*shorter.operators} & {*longer.operators}
        self._calls = Periods(_calls(shorter, fixed), _calls(longer, fixed))
        self._waits = Periods(
            [wait[1:3] for wait in shorter.waits], [wait[1:3] for wait in longer.waits]
        )

    def at(self, more: int) -> CostRecorder:
        """Of the model with so many periods of layers more than the longer one."""
        found, known = CostRecorder(0), {}
        numbers = self._calls.extended(_numbers(self.shorter), _numbers(self.longer), more).tolist()
        for source, row in zip(self._calls.source(more).tolist(), numbers, strict=True):
            like = self.longer.operators[self.longer.calls[source]]
            flops, size, made, *shape = row
            operator = like._replace(
                flops=flops, bytes=size, made_bytes=made, shape=tuple(shape[: len(like.shape)])
            )
            if operator not in known:
                known[operator] = len(found.operators)
                found.operators.append(operator)
            found.calls.append(known[operator])
            found.streams.append(self.longer.streams[source])
        ends = ([end for _, end in costs.phases] for costs in (self.shorter, self.longer))
        found.phases = self._phases.at(*ends, more)
        places = self._waits.extended(_places(self.shorter), _places(self.longer), more).tolist()
        for source, (now, launches) in zip(self._waits.source(more).tolist(), places, strict=True):
            found.waits.append((now, *self.longer.waits[source][1:3], launches))
        few, many = self.shorter.without_kernel, self.longer.without_kernel
        found.without_kernel = many + (many - few) * more
        return found


_SHAPE = 4  # numbers of an operator's shape


def _calls(costs: CostRecorder, fixed: set[Operator]) -> list[Hashable]:
    """What is launched; of operators whose numbers grow with the layers only the name and kind."""
    tokens: list[Hashable] = [
        operator if operator in fixed else (*operator[:3], len(operator.shape), operator.group)
        for operator in costs.operators
    ]
    return [
        (tokens[index], stream) for index, stream in zip(costs.calls, costs.streams, strict=True)
    ]


def _numbers(costs: CostRecorder) -> torch.Tensor:
    rows = [
        (
            operator.flops,
            operator.bytes,
            operator.made_bytes,
            *operator.shape,
            *(0,) * (_SHAPE - len(operator.shape)),
        )
        for operator in costs.operators
    ]
    if not rows:
        return torch.empty(0, 3 + _SHAPE, dtype=torch.int64)
    return torch.tensor(rows, dtype=torch.int64)[torch.tensor(costs.calls, dtype=torch.int64)]


def _places(costs: CostRecorder) -> torch.Tensor:
    """By wait: the next launch, and the launches that are waited for."""
    return torch.tensor(
        [(now, launches) for now, _, _, launches in costs.waits], dtype=torch.int64
    ).view(-1, 2)


class SecondStep:
    """The second step of a record, which the first one tells: it allocates the same, but for the optimizer's states.

    ``record``: of two steps.

    Raises :class:`Unlike` if the second step allocates something that the first does not, or in another order.
    """

    def __init__(self, record: Record) -> None:
        refuse_beyond(record)
        self.record, self.both = record, Columns.of(record)
        self._kinds, self._about, self._sizes = (
            column.tolist() for column in (self.both.kinds, self.both.about, self.both.sizes)
        )
        self._first = record.start(1)  # event of the second step
        self._sources = [
            *range(self._first)
        ]  # by event of both steps, that of the first step with its bytes; or -1
        self.one_by_one = True  # whether each phase but the optimizer's allocates the same in both steps, one by one
        phases = {phase for phase, _, _ in record.spans(1)}
        places = {phase: (self._allocated(phase, 0), self._allocated(phase, 1)) for phase in phases}
        source_of: dict[int, int] = {}
        self._of_weights: list[int] = []  # places whose bytes don't depend on the size of the step
        for phase, (before, after) in places.items():
            if phase == "optimizer":
                self._of_weights += after
            else:
                passing = [
                    one for one in before if self.both.told[self._about[one]][0] != WORKSPACES
                ]
                self.one_by_one &= len(passing) == len(after)
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
        spans = (
            range(first, last) for name, first, last in self.record.spans(step) if name == phase
        )
        return [place for span in spans for place in span if self._kinds[place] == ALLOCATED]

    def same_as(self, other: SecondStep) -> bool:
        """Whether at another size of the step the same event of the first one tells each event of the second."""
        same = (
            torch.equal(self.both.reused, other.both.reused)
            and self.record.marks == other.record.marks
        )
        return (
            same and self.both.structure == other.both.structure and self._sources == other._sources
        )

    def behind(self, first: Record) -> Record:
        """Both steps at a size at which the first alone was traced.

        Raises :class:`Unlike` if its events are others.
        """
        refuse_beyond(first)
        known, own = self.record, Columns.of(first)
        told = first.marks, first.warnings, first.workspaces.cudnn_bytes, first.costs
        same = (
            [mark for mark in known.marks if mark[1] < 1],
            known.warnings,
            known.workspaces.cudnn_bytes,
            None,
        )
        launches = {name: 2 * count for name, count in first.kernels_run.items()}
        if (
            launches != known.kernels_run
            or told != same
            or own.structure != self._structure_of_first
        ):
            raise Unlike("the events are others")
        sources = torch.tensor(self._sources)
        sizes = torch.where(sources >= 0, own.sizes[sources], 0)
        if any(int(sizes[place]) != self._sizes[place] for place in self._of_weights):
            raise Unlike("the optimizer's step depends on the size of the batch")
        both = self.both
        columns = Columns(both.kinds, sizes, both.targets, both.reused, both.about, both.told)
        return _written(columns, known.marks, known)

    @property
    def _structure_of_first(self) -> int:
        return hash(self.both.first(self._first))


class SecondSteps:
    """Traces of one scenario's shallow models, without the second step where the first one tells it.

    Bytes may be equal by chance, so two sizes have to agree (:meth:`SecondStep.same_as`). Once two sizes of one model
    agree, the other models are known too, as far as they allocate one by one: they have more or fewer layers, no more.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Hashable, SecondStep]] = []  # with the size of the step
        self._proven: list[SecondStep] = []

    def traced(
        self, stepped: Callable[..., tuple[Record, Any]], shallow: Any, size: Hashable
    ) -> tuple[Record, Any]:
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

    Raises :class:`Unlike` if it does.
    """
    if record.origins is not None or record.compiled is not None:
        raise Unlike("the record holds what is not composed")
    if record.stashes is not None and record.stashes.delayed(record.events) not in (
        None,
        record.events,
    ):
        raise Unlike("collectives hold what the program has let go of")
