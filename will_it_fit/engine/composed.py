"""The record of a step of a deep model, from those of two shallow ones that differ in one period of layers.

Two layers of a model do the same to memory, but for those at the ends. So the records of shallow models say what a deep
one's would: allocations and frees, what each is for, phases, streams, costs (:mod:`will_it_fit.engine.periods`).
A third record is the proof, see :meth:`Composer.proven_by`. What does not grow evenly raises :class:`Unlike`.

Sums over several layers are beyond it: what fills up to a limit, such as the buckets in which DDP sends gradients, may
go over it behind the third record. Who calls this has to know that a step has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from .costs import CostRecorder, Operator
from .periods import Periods, Unlike
from .record import Record

_ALLOCATED, _FREED, _EMPTIED = 1, 2, 0
_SMALL = 4096  # bytes: what a few layers' numbers take together is less


_About = tuple[Hashable, ...]
_Columns = tuple[list[int], list[int], list[int], list[_About], list[int]]


class _Events:
    """A record's events as columns."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.kinds: list[int] = []
        self.sizes: list[int] = []
        self.targets: list[int] = []  # of a free: the place of the allocation; else -1
        # Of an allocation or what frees it: component and stream; and the workspaces of cuDNN and cuFFT behind it.
        self.about: list[_About] = []
        self.reused: list[int] = []  # `Record.reusable`, or -1
        places: dict[int, int] = {}
        workspaces = _by_event(record)
        for place, (identity, size) in enumerate(record.events):
            target, about, reused = -1, ("", 0), -1
            if identity > 0:
                places[identity] = place
                about = record.components[identity], record.streams.get(identity, 0)
                reused = record.reusable.get(identity, -1)
            elif identity < 0:
                target = places.pop(-identity, -1)
                if target < 0:
                    raise Unlike("something is freed that nobody allocated")
                about = self.about[target][:2]
            self.kinds.append(_ALLOCATED if identity > 0 else _FREED if identity < 0 else _EMPTIED)
            self.sizes.append(size)
            self.targets.append(target)
            self.about.append((*about, *workspaces.get(place, ())))
            self.reused.append(reused)

    @cached_property
    def structure(self) -> int:
        """What is the same in steps whose events differ in size alone."""
        return hash((tuple(self.kinds), tuple(self.targets), tuple(self.about)))

    def tokens(self, fixed: set[int]) -> list[Hashable]:
        """What each event is: what it is about, and the size if that is one of the ``fixed`` ones."""
        found: list[Hashable] = []
        for kind, size, target, about in zip(self.kinds, self.sizes, self.targets, self.about, strict=True):
            freed = target >= 0
            found.append((_FREED, found[target], about) if freed else (kind, about, size if size in fixed else None))
        return found


def _by_event(record: Record) -> dict[int, list[int | None]]:
    """The workspaces of cuDNN and cuFFT (``Workspaces.taken``), by the event behind which they are taken."""
    found: dict[int, list[int | None]] = {}
    for at, most in record.workspaces.taken:
        if not at:
            raise Unlike("a workspace is taken before anything is allocated")
        found.setdefault(at - 1, []).append(most)
    return found


class Composer:
    """Records of deeper models, from two of shallow ones.

    Parameters
    ----------
    shorter, longer
        Of models that differ in one period of layers.
    like
        A composer that was proven by other sizes of the same step: the events correspond as its do.

    Attributes
    ----------
    structure
        What is the same in steps whose events differ in size alone.

    Raises
    ------
    Unlike
        If the longer record does not repeat the shorter one's layers.
    """

    def __init__(self, shorter: Record, longer: Record, like: Composer | None = None) -> None:
        _refuse(shorter, longer)
        self.shorter, self.longer = _Events(shorter), _Events(longer)
        self.structure = self.shorter.structure, self.longer.structure
        if like is not None and like.structure != self.structure:
            raise Unlike("the events are others")
        self._periods = like._periods if like is not None else _aligned(self.shorter, self.longer)
        self._phases = _Places([mark[:2] for mark in shorter.marks], [mark[:2] for mark in longer.marks])
        self._costs = _Costs(shorter.costs, longer.costs) if shorter.costs and longer.costs else None

    def proven_by(self, record: Record) -> bool:
        """Whether the model with one period of layers more has the record that is composed for it."""
        found, own = self.at(1), _Events(record)
        alike = self._columns(1) == (own.kinds, own.sizes, own.targets, own.about, own.reused)
        told = found.marks, found.warnings, found.kernels_run, _told(found.costs)
        return alike and told == (record.marks, record.warnings, record.kernels_run, _told(record.costs))

    def grows_like(self, other: Composer) -> bool:
        """Whether the longer record has the same beside the shorter one's, byte for byte, at another size of the step.

        Then the layers that were added are like those beside them, and what grows with the layers does not with the
        size. So :meth:`longer_than` gives the longer record at the sizes between.
        """
        own, others = self._added(), other._added()
        return self.structure == other.structure and all(map(torch.equal, own, others))

    def longer_than(self, shorter: Record) -> Record:
        """The longer record at a size at which the shorter model alone was traced.

        Raises
        ------
        Unlike
            If its events are others.
        """
        before, after = self.shorter.record, self.longer.record
        own = _Events(shorter)
        told = shorter.warnings, shorter.workspaces.cudnn_bytes, shorter.kernels_run, shorter.costs
        known = before.warnings, before.workspaces.cudnn_bytes, before.kernels_run, None
        if own.structure != self.structure[0] or told != known or len(before.marks) != len(after.marks):
            raise Unlike("the events are others")
        places = self._periods.in_shorter()
        sizes, reused = (
            (torch.tensor(numbers)[places] + added).tolist()
            for numbers, added in zip((own.sizes, own.reused), self._added(), strict=True)
        )
        record = _written(self.longer.kinds, sizes, self.longer.targets, self.longer.about, reused)
        record.marks = [
            (phase, step, here + end - first)
            for (phase, step, here), (_, _, end), (_, _, first) in zip(
                shorter.marks, after.marks, before.marks, strict=True
            )
        ]
        record.warnings, record.kernels_run = dict(after.warnings), Counter(after.kernels_run)
        record.workspaces.cudnn_bytes = after.workspaces.cudnn_bytes
        return record

    def _added(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the longer record's bytes, and moments of reuse, have more than those of the events that they repeat."""
        places = self._periods.in_shorter()
        pairs = (self.shorter.sizes, self.longer.sizes), (self.shorter.reused, self.longer.reused)
        of_bytes, of_moments = (torch.tensor(many) - torch.tensor(few)[places] for few, many in pairs)
        return of_bytes, of_moments

    def at(self, more: int) -> Record:
        """The record of the model with so many periods of layers more than the longer one.

        Raises
        ------
        Unlike
            If something does not grow evenly.
        """
        before, after = self.shorter.record, self.longer.record
        record = _written(*self._columns(more))
        ends = ([mark[2] for mark in marks] for marks in (before.marks, after.marks))
        record.marks = [(*mark, end) for mark, end in self._phases.at(*ends, more)]
        record.warnings = dict(after.warnings)
        record.workspaces.cudnn_bytes = after.workspaces.cudnn_bytes
        few, many = before.kernels_run, after.kernels_run
        record.kernels_run = Counter({name: count + (count - few[name]) * more for name, count in many.items()})
        record.costs = self._costs and self._costs.at(more)
        return record

    def _columns(self, more: int) -> _Columns:
        """Kinds, sizes, targets, what they are about, and when they may be reused."""
        places = self._periods.source(more).tolist()
        numbers = (
            self._periods.extended(torch.tensor(few), torch.tensor(many), more).tolist()
            for few, many in (
                (self.shorter.sizes, self.longer.sizes),
                (self.shorter.targets, self.longer.targets),
                (self.shorter.reused, self.longer.reused),
            )
        )
        sizes, targets, reused = numbers
        kinds, about = self.longer.kinds, self.longer.about
        return [kinds[place] for place in places], sizes, targets, [about[place] for place in places], reused


class _Places:
    """Where phases begin in longer records: phases may repeat too."""

    def __init__(self, shorter: list[Any], longer: list[Any]) -> None:
        self._names, self._periods = longer, Periods(shorter, longer)

    def at(self, shorter: list[int], longer: list[int], more: int) -> list[tuple[Any, int]]:
        """Each phase with its place, from its places in the two records."""
        places = self._periods.extended(torch.tensor(shorter), torch.tensor(longer), more).tolist()
        sources = self._periods.source(more).tolist()
        return [(self._names[source], place) for source, place in zip(sources, places, strict=True)]


class SecondStep:
    """The second step of a record, which the first one tells: it allocates the same, but for the optimizer's states.

    Parameters
    ----------
    record
        Of two steps.

    Raises
    ------
    Unlike
        If the second step allocates something that the first does not, or in another order.
    """

    def __init__(self, record: Record) -> None:
        _refuse_beyond(record)
        self.both = _Events(record)
        self._first = record.start(1)  # event of the second step
        self._sources = [*range(self._first)]  # by event of both steps, that of the first step with its bytes; or -1
        phases = {phase for phase, _, _ in record.spans(1)}
        allocated = {phase: iter(self._allocated(phase, 0)) for phase in phases}
        phase_of = {place: phase for phase in phases for place in self._allocated(phase, 1)}
        for place in range(self._first, len(self.both.kinds)):
            source = -1
            if place in phase_of:
                like = self._told(place)
                source = next((one for one in allocated[phase_of[place]] if self._told(one) == like), -1)
                if source < 0:
                    raise Unlike("the second step allocates what the first does not")
            self._sources.append(source)

    def _allocated(self, phase: str, step: int) -> list[int]:
        """Places of the allocations of a step's phase, which may come more than once."""
        spans = (range(first, last) for name, first, last in self.both.record.spans(step) if name == phase)
        return [place for span in spans for place in span if self.both.kinds[place] == _ALLOCATED]

    def _told(self, place: int) -> Hashable:
        return self.both.about[place][:2], self.both.sizes[place]

    def same_as(self, other: SecondStep) -> bool:
        """Whether at another size of the step the same event of the first one tells each event of the second."""
        mine, others = ((one._sources, one.both.reused, one.both.record.marks) for one in (self, other))
        return self.both.structure == other.both.structure and mine == others

    def behind(self, first: Record) -> Record:
        """Both steps at a size at which the first alone was traced.

        Raises
        ------
        Unlike
            If its events are others.
        """
        _refuse_beyond(first)
        own, both, end = _Events(first), self.both, self._first
        columns = (own.kinds, both.kinds), (own.targets, both.targets), (own.about, both.about)
        known = both.record
        told = first.marks, first.warnings, first.workspaces.cudnn_bytes, first.costs
        same = [mark for mark in known.marks if mark[1] < 1], known.warnings, known.workspaces.cudnn_bytes, None
        launches = {name: 2 * count for name, count in first.kernels_run.items()}
        if launches != known.kernels_run or told != same or any(mine != others[:end] for mine, others in columns):
            raise Unlike("the events are others")
        sizes = [own.sizes[source] if source >= 0 else 0 for source in self._sources]
        record = _written(both.kinds, sizes, both.targets, both.about, both.reused)
        record.marks, record.warnings = list(known.marks), dict(known.warnings)
        record.kernels_run = Counter(known.kernels_run)
        record.workspaces.cudnn_bytes = known.workspaces.cudnn_bytes
        return record


class SecondSteps:
    """Traces of one scenario's shallow models, without the second step where the first one tells it."""

    def __init__(self) -> None:
        self._seen: list[SecondStep] = []
        self._proven: list[SecondStep] = []  # told in the same way at two sizes

    def traced(self, stepped: Callable[..., tuple[Record, Any]], shallow: Any) -> tuple[Record, Any]:
        """The record of both steps, and what is known of the model."""
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
            second = SecondStep(record)
            if any(second.same_as(other) for other in self._seen):
                self._proven.append(second)
            self._seen.append(second)
        return record, about


def _written(kinds: list[int], sizes: list[int], targets: list[int], about: list[_About], reused: list[int]) -> Record:
    """A record of columns."""
    record, ids, identity = Record(), [0] * len(kinds), 0
    for place, kind in enumerate(kinds):
        if kind == _ALLOCATED:
            identity += 1
            ids[place] = identity
            component, stream = about[place][:2]
            record.events.append((identity, sizes[place]))
            record.components[identity] = component
            if stream:
                record.streams[identity] = stream
            if reused[place] >= 0:
                record.reusable[identity] = reused[place]
        elif kind == _FREED:
            target = targets[place]
            if not 0 <= target < place or not ids[target]:
                raise Unlike("something is freed that is not there")
            record.events.append((-ids[target], 0))
            ids[target] = 0
        else:
            record.events.append((0, 0))
    record.workspaces.taken = ((place + 1, most) for place, (_, _, *behind) in enumerate(about) for most in behind)
    return record


def _refuse_beyond(record: Record) -> None:
    if record.origins is not None or record.compiled is not None:
        raise Unlike("the record holds what is not composed")
    if record.stashes is not None and record.stashes.delayed(record.events) not in (None, record.events):
        raise Unlike("collectives hold what the program has let go of")


def _refuse(shorter: Record, longer: Record) -> None:
    for record in (shorter, longer):
        _refuse_beyond(record)
    if shorter.warnings != longer.warnings:
        raise Unlike("the warnings differ")


def _aligned(shorter: _Events, longer: _Events) -> Periods:
    """Which events correspond.

    Sizes tell that are in both records. But where a small one grows with the layers, such as that of all norms
    together, it may be another tensor's in the other record: then small ones tell nothing.
    """
    fixed = {*shorter.sizes} & {*longer.sizes}
    try:
        return Periods(shorter.tokens(fixed), longer.tokens(fixed))
    except Unlike:
        large = {size for size in fixed if size >= _SMALL}
        return Periods(shorter.tokens(large), longer.tokens(large))


def _told(costs: CostRecorder | None) -> Any:
    """Everything that makes two steps cost the same."""
    if costs is None:
        return None
    calls = [costs.operators[index] for index in costs.calls]
    return calls, costs.streams, costs.phases, costs.waits, costs.without_kernel


class _Costs:
    """What the operators of a deeper model's step cost."""

    def __init__(self, shorter: CostRecorder, longer: CostRecorder) -> None:
        self.shorter, self.longer = shorter, longer
        self._phases = _Places([phase for phase, _ in shorter.phases], [phase for phase, _ in longer.phases])
        fixed = {*shorter.operators} & {*longer.operators}
        self._calls = Periods(_calls(shorter, fixed), _calls(longer, fixed))
        self._waits = Periods([wait[1:3] for wait in shorter.waits], [wait[1:3] for wait in longer.waits])

    def at(self, more: int) -> CostRecorder:
        """Of the model with so many periods of layers more than the longer one."""
        found, known = CostRecorder(0), {}
        numbers = self._calls.extended(_numbers(self.shorter), _numbers(self.longer), more).tolist()
        for source, row in zip(self._calls.source(more).tolist(), numbers, strict=True):
            like = self.longer.operators[self.longer.calls[source]]
            flops, size, made, *shape = row
            operator = like._replace(flops=flops, bytes=size, made_bytes=made, shape=tuple(shape[: len(like.shape)]))
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
    return [(tokens[index], stream) for index, stream in zip(costs.calls, costs.streams, strict=True)]


def _numbers(costs: CostRecorder) -> torch.Tensor:
    """By call: operations, bytes, bytes made, and the shape."""
    rows = [
        (operator.flops, operator.bytes, operator.made_bytes, *operator.shape, *(0,) * (_SHAPE - len(operator.shape)))
        for operator in costs.operators
    ]
    if not rows:
        return torch.empty(0, 3 + _SHAPE, dtype=torch.int64)
    return torch.tensor(rows, dtype=torch.int64)[torch.tensor(costs.calls, dtype=torch.int64)]


def _places(costs: CostRecorder) -> torch.Tensor:
    """By wait: the next launch, and the launches that are waited for."""
    return torch.tensor([(now, launches) for now, _, _, launches in costs.waits], dtype=torch.int64).view(-1, 2)
