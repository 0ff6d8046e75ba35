"""A record's events as columns of numbers, and a record that is written from such columns.

Whoever composes a record of a deep model works on columns: some ten thousand events take a millisecond. The lists that
a tracker writes are made of them when somebody asks, since a search for a border never does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import torch

from .components import WORKSPACES
from .cuda_rules import CUBLASLT_WORKSPACE_BYTES
from .interpolate import events_of
from .periods import Unlike
from .record import Record
from .replay import Events

ALLOCATED, FREED, EMPTIED = 1, 2, 0

# Of an allocation or what frees it: component and stream; and the workspaces of cuDNN and cuFFT behind it.
About = tuple[Hashable, ...]


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

        Raises
        ------
        Unlike
            If something is freed that nobody allocated.
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
            *(torch.tensor(column, dtype=torch.int64) for column in (kinds, sizes, targets, reused, codes)), [*told]
        )

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def structure(self) -> int:
        """What is the same in steps whose events differ in size alone."""
        return hash(self.first(len(self)))

    def first(self, count: int) -> tuple[Hashable, ...]:
        """The same of so many events."""
        columns = (tuple(column[:count].tolist()) for column in (self.kinds, self.targets, self.about))
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
            found.append((FREED, found[target], about) if freed else (kind, about, size if size in fixed else None))
        return found

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

    Raises
    ------
    Unlike
        If something is freed that is not there.
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
        return {identity: told[code][1] for identity, code in zip(*self._allocated(elsewhere), strict=True)}

    def _reusable(self) -> dict[int, int]:
        chosen = self.columns.reused >= 0
        return dict(zip(self._ids[chosen].tolist(), self.columns.reused[chosen].tolist(), strict=True))

    def sequence(self) -> Events:
        return events_of(self._ids, self.columns.sizes)

    def cublas_workspaces(self) -> frozenset[int]:
        codes = [code for code, about in enumerate(self.columns.told) if about[0] == WORKSPACES]
        about, sizes, kinds = self.columns.about, self.columns.sizes, self.columns.kinds
        own = (kinds == ALLOCATED) & torch.isin(about, torch.tensor(codes, dtype=torch.int64))
        return frozenset(self._ids[own & (sizes != CUBLASLT_WORKSPACE_BYTES)].tolist())
