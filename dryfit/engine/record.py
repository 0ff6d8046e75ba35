"""What a step did to memory, written down: allocations and frees in order, what each was for, where phases begin.

A tracker writes lists. Whoever composes a record of a deep model works on columns of numbers, where some ten thousand
events take a millisecond. Lists are made of them only when somebody asks: a search for a border never does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch

from .allocator import Event
from .components import WORKSPACES
from .costs import CostRecorder
from .cuda_rules import CUBLASLT_WORKSPACE_BYTES, cufft_worst_bytes
from .interpolate import events_of
from .origins import Origins
from .periods import Unlike
from .replay import Events
from .stashes import Stashes

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
_TRANSFORMS = (
    torch.ops.aten._fft_c2c.default,
    torch.ops.aten._fft_r2c.default,
    torch.ops.aten._fft_c2r.default,
)
NOTED = (*_CONVOLUTIONS, *_TRANSFORMS)  # what :meth:`Workspaces.note` has to hear of
# aten/src/ATen/native/cudnn/Conv_v8.cpp: `run_conv_plan` takes the plan's workspace from the allocator for the call;
# `try_configs` goes on to the next plan where it is out of memory, and `generate_and_filter_plans` (benchmark mode)
# leaves out what the largest free block can't hold.
_CUDNN = (
    "the step runs convolutions, and cuDNN's workspaces for them are not counted: the peak is the least it can be, see"
    " `peak_allocated_range_bytes`. PyTorch takes a smaller plan where a workspace doesn't fit, so the least that a GPU"
    " must have stays. CUDNN_CONV_WSCAP_DBG, in MiB, bounds a workspace; `cudnn_workspace_bytes` says it to the trace"
)
_CUFFT = (
    "the step runs Fourier transforms, and cuFFT's work areas for them are not counted: the peak is the least it can"
    " be, see `peak_allocated_range_bytes`. A transform whose work area doesn't fit fails: a GPU must have as much more"
)
_RECURRENT = (
    "the step runs recurrent layers, which are cuDNN's. What cuDNN keeps of them for the backward pass is counted as"
    " gates and states, which is the least, and its workspaces are not counted: the peak is the least it can be, see"
    " `peak_allocated_range_bytes`"
)
ALLOCATED, FREED, EMPTIED = 1, 2, 0

# Of an allocation or what frees it: component and stream; and the workspaces of cuDNN and cuFFT behind it.
About = tuple[Hashable, ...]


class Record:
    """A step's record, empty at first. :class:`~dryfit.engine.tracker.Tracker` writes one."""

    def __init__(self) -> None:
        self.events: list[Event] = []  # `(id, bytes)` for an allocation, `(-id, 0)` for its end
        self.marks: list[
            tuple[str, int, int]
        ] = []  # `(phase, step, index of its first event)` in order
        self.components: dict[int, str] = {}  # what each id is for
        # What a person should know about the answer, in the order in which it was seen.
        self.warnings: dict[str, None] = {}
        # Where each tensor comes from, and what each operator costs; None unless somebody sets them.
        self.origins: Origins | None = None
        self.costs: CostRecorder | None = None
        # The stream that an id was allocated on, where it is not the one that models compute on.
        self.streams: dict[int, int] = {}
        # For an id that another stream uses as well, and that is freed: the index of the event before which the GPU has
        # certainly got there.
        self.reusable: dict[int, int] = {}
        self.workspaces = Workspaces()  # where cuDNN and cuFFT take some of their own
        self.stashes: Stashes | None = None  # the collectives that it starts; None without any
        self.kernels_run: Counter[str] = (
            Counter()
        )  # how often each of Triton's kernels was launched
        self.compiled: Any = None  # what the compiler took, where a compiled step is followed
        self.replayed: set[int] = (
            set()
        )  # steps in which CUDA graphs were replayed, which allocates nothing
        self.columns_so_far: tuple[int, Columns] | None = (
            None  # what `Columns` made of so many events
        )

    def warn(self, text: str) -> None:
        """Note what a person should know about the answer."""
        self.warnings.setdefault(text)

    def sequence(self) -> Events:
        """The events in one array."""
        return Events.of(self.events)

    def cublas_workspaces(self) -> frozenset[int]:
        """Ids of cuBLAS's workspaces, whose bytes the GPU decides."""
        ids = (one for one, component in self.components.items() if component == WORKSPACES)
        sizes = dict(self.events)
        return frozenset(one for one in ids if sizes[one] != CUBLASLT_WORKSPACE_BYTES)

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


class Workspaces:
    """Where a step takes workspaces whose size cuDNN and cuFFT alone know, and the range that its peak then has."""

    def __init__(self) -> None:
        self.cudnn_bytes: int | None = None  # what cuDNN may take; None: what the GPU has left
        self._convolutions: list[int] = []  # indices of the events after which cuDNN runs
        self._transforms: list[
            tuple[int, int]
        ] = []  # likewise cuFFT, with the most that its work area may take
        self._recurrent: list[int] = []  # likewise cuDNN for recurrent layers, which nothing bounds

    def note_recurrent(self, at: int) -> None:
        """Hear of a recurrent layer that cuDNN runs; ``at``: the number of events before it."""
        self._recurrent.append(at)

    @property
    def taken(self) -> list[tuple[int, int | None]]:
        """In order: the event after which one is taken, and the most that cuFFT's may be; None: it is cuDNN's."""
        return sorted(
            [*((at, None) for at in self._convolutions), *self._transforms], key=lambda one: one[0]
        )

    @taken.setter
    def taken(self, taken: Iterable[tuple[int, int | None]]) -> None:
        taken = list(taken)
        self._convolutions = [at for at, most in taken if most is None]
        self._transforms = [(at, most) for at, most in taken if most is not None]

    def note(self, func: Any, args: Sequence[Any], output: Any, at: int) -> None:
        """Hear of an operator that has run; ``at``: the number of events before it."""
        if func in _CONVOLUTIONS:
            self._convolutions.append(at)
        elif func in _TRANSFORMS:
            number = args[0] if args[0].is_complex() else output
            elements = max(args[0].numel(), output.numel())
            self._transforms.append((at, cufft_worst_bytes(elements, number.element_size())))

    def range_of(
        self,
        lowest: int,
        allocated: Callable[[int], int],
        since: int,
        capacity: int | None,
        warn: Callable[[str], None],
    ) -> dict[str, tuple[int, int | None]]:
        """The range of a peak that is ``lowest`` without them; nothing where none is taken from the event ``since`` on.

        cuDNN's end at what it may take, or at the GPU's ``capacity``; cuFFT's at the most that its reference names.
        ``allocated``: bytes before an event.
        """
        convolving = [allocated(at) for at in self._convolutions if at >= since]
        transforming = [allocated(at) + most for at, most in self._transforms if at >= since]
        recurrent = any(at >= since for at in self._recurrent)
        if not convolving and not transforming and not recurrent:
            return {}
        most: list[int | None] = [lowest, *transforming]
        if recurrent:
            warn(_RECURRENT)
            most.append(capacity)
        if transforming:
            warn(_CUFFT)
        if convolving:
            warn(_CUDNN)
            most.append(
                capacity if self.cudnn_bytes is None else max(convolving) + self.cudnn_bytes
            )
        return {"peak_allocated_range_bytes": (lowest, None if None in most else max(most))}


class Columns:
    """Events by place.

    Parameters
    ----------
    kinds, sizes
        What each event is, and the bytes of an allocation.
    targets
        Of a free the place of the allocation; else -1.
    reused
        The moment in ``Record.reusable``, or -1.
    about
        What each is about, as a place in ``told``.
    told
        All that events are about, each once.
    """

    def __init__(
        self,
        kinds: torch.Tensor,
        sizes: torch.Tensor,
        targets: torch.Tensor,
        reused: torch.Tensor,
        about: torch.Tensor,
        told: Sequence[About],
    ) -> None:
        self.kinds, self.sizes, self.targets, self.reused = kinds, sizes, targets, reused
        self.about, self.told = about, told

    @classmethod
    def of(cls, record: Record) -> Columns:
        """A record's events so far.

        Raises :class:`Unlike` if something is freed that nobody allocated.
        """
        if isinstance(record, WrittenRecord):
            return record.columns
        kept = record.columns_so_far
        if kept is None or kept[0] != len(record.events):
            kept = record.columns_so_far = len(record.events), cls._listed(record)
        return kept[1]

    @classmethod
    def _listed(cls, record: Record) -> Columns:
        kinds, sizes, targets, reused, codes = [], [], [], [], []
        told: dict[About, int] = {}
        places: dict[int, int] = {}
        workspaces, about_of = _by_event(record), []
        components, streams, reusable = record.components, record.streams, record.reusable
        for place, (identity, size) in enumerate(record.events):
            kind, target, moment, about = EMPTIED, -1, -1, ("", 0)
            if identity > 0:
                kind, places[identity] = ALLOCATED, place
                about = components[identity], streams.get(identity, 0)
                moment = reusable.get(identity, -1)
            elif identity < 0:
                kind, target = FREED, places.pop(-identity, -1)
                if target < 0:
                    raise Unlike("something is freed that nobody allocated")
                about = about_of[target]
            about_of.append(about)
            if place in workspaces:
                about = (*about, *workspaces[place])
            kinds.append(kind)
            sizes.append(size)
            targets.append(target)
            reused.append(moment)
            codes.append(told.setdefault(about, len(told)))
        return cls(
            *(
                torch.tensor(column, dtype=torch.int64)
                for column in (kinds, sizes, targets, reused, codes)
            ),
            [*told],
        )

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def structure(self) -> int:
        """What is the same in steps whose events differ in size alone."""
        return hash(self.first(len(self)))

    def first(self, count: int) -> tuple[Hashable, ...]:
        """The same of so many events."""
        columns = (
            tuple(column[:count].tolist()) for column in (self.kinds, self.targets, self.about)
        )
        return (*columns, tuple(self.told[: int(self.about[:count].max()) + 1] if count else ()))

    def same_as(self, other: Columns) -> bool:
        """Whether all numbers are equal, and what they are about."""
        names = "kinds", "sizes", "targets", "reused"
        alike = all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)
        return alike and self._about() == other._about()

    def _about(self) -> list[About]:
        return [self.told[code] for code in self.about.tolist()]

    def tokens(self, fixed: set[int]) -> list[Hashable]:
        """What each event is: what it is about, and the size if that is one of the ``fixed`` ones."""
        found: list[Hashable] = []
        columns = (column.tolist() for column in (self.kinds, self.sizes, self.targets, self.about))
        for kind, size, target, about in zip(*columns, strict=True):
            freed = target >= 0
            found.append(
                (FREED, found[target], about)
                if freed
                else (kind, about, size if size in fixed else None)
            )
        return found

    def in_order(self, marks: Iterable[int]) -> Columns:
        """The same events, with frees that follow each other in the order of their allocations.

        Python ends tensors together in an order of chance, and whatever it is, an allocator has the same free blocks
        behind them. ``marks``, moments of reuse and workspaces lie between two events: no free passes them.
        """
        freed = self.kinds == FREED
        first = ~freed | ~freed.roll(1)  # of its run
        workspaces = torch.tensor([len(about) > 2 for about in self.told], dtype=torch.bool)[
            self.about
        ]
        places = torch.cat(
            (
                torch.tensor([*marks], dtype=torch.int64),
                self.reused,
                workspaces.nonzero().flatten() + 1,
            )
        )
        first[places[(places > 0) & (places < len(self))]] = True
        order = torch.argsort(first.cumsum(0) * len(self) + torch.where(freed, self.targets, 0))
        columns = (
            column[order]
            for column in (self.kinds, self.sizes, self.targets, self.reused, self.about)
        )
        return Columns(*columns, self.told)

    def freed_once(self) -> bool:
        """Whether each free is of an allocation before it that nothing else frees."""
        places = torch.nonzero(self.kinds == FREED).flatten()
        targets = self.targets[places]
        within = bool(((targets >= 0) & (targets < places)).all())
        if not within or bool((self.kinds[targets] != ALLOCATED).any()):
            return False
        return not len(targets) or int(torch.bincount(targets).max()) == 1


def _by_event(record: Record) -> dict[int, list[int | None]]:
    """The workspaces of cuDNN and cuFFT (``Workspaces.taken``), by the event behind which they are taken."""
    found: dict[int, list[int | None]] = {}
    for at, most in record.workspaces.taken:
        if not at:
            raise Unlike("a workspace is taken before anything is allocated")
        found.setdefault(at - 1, []).append(most)
    return found


class WrittenRecord(Record):
    """A record of columns. Its lists are made when somebody asks for them.

    Raises :class:`Unlike` if something is freed that is not there.
    """

    _LISTS = ("events", "components", "streams", "reusable")

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        if not columns.freed_once():
            raise Unlike("something is freed that is not there")
        for name in self._LISTS:
            delattr(self, name)
        self.columns = columns
        behind = [(place, more) for place, more in enumerate(self._behind()) if more]
        self.workspaces.taken = ((place + 1, most) for place, more in behind for most in more)

    def _behind(self) -> list[About]:
        if all(len(about) == 2 for about in self.columns.told):
            return []
        return [about[2:] for about in self.columns._about()]

    def __getattr__(self, name: str) -> Any:
        if name not in self._LISTS:
            raise AttributeError(name)
        value = getattr(self, f"_{name}")()
        setattr(self, name, value)
        return value

    @cached_property
    def _ids(self) -> torch.Tensor:
        """The id of each event: allocations count up from 1."""
        kinds, targets = self.columns.kinds, self.columns.targets
        ids = torch.where(kinds == ALLOCATED, (kinds == ALLOCATED).cumsum(0), 0)
        return torch.where(kinds == FREED, -ids[targets], ids)

    def _allocated(self, codes: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """Ids and codes of allocations; with ``codes`` those that are about one of them."""
        chosen = self.columns.kinds == ALLOCATED
        if codes is not None:
            chosen &= torch.isin(self.columns.about, torch.tensor(codes, dtype=torch.int64))
        return self._ids[chosen].tolist(), self.columns.about[chosen].tolist()

    def _events(self) -> list[tuple[int, int]]:
        return list(zip(self._ids.tolist(), self.columns.sizes.tolist(), strict=True))

    def _components(self) -> dict[int, Any]:
        told = self.columns.told
        return {identity: told[code][0] for identity, code in zip(*self._allocated(), strict=True)}

    def _streams(self) -> dict[int, Any]:
        told = self.columns.told
        elsewhere = [code for code, about in enumerate(told) if about[1]]
        return {
            identity: told[code][1]
            for identity, code in zip(*self._allocated(elsewhere), strict=True)
        }

    def _reusable(self) -> dict[int, int]:
        chosen = self.columns.reused >= 0
        return dict(
            zip(self._ids[chosen].tolist(), self.columns.reused[chosen].tolist(), strict=True)
        )

    def sequence(self) -> Events:
        return events_of(self._ids, self.columns.sizes)

    def cublas_workspaces(self) -> frozenset[int]:
        codes = [code for code, about in enumerate(self.columns.told) if about[0] == WORKSPACES]
        about, sizes, kinds = self.columns.about, self.columns.sizes, self.columns.kinds
        own = (kinds == ALLOCATED) & torch.isin(about, torch.tensor(codes, dtype=torch.int64))
        return frozenset(self._ids[own & (sizes != CUBLASLT_WORKSPACE_BYTES)].tolist())
