"""A memory snapshot of PyTorch beside the trace: the step's allocations and frees in order, and the first that differs.

``torch.cuda.memory._record_memory_history()``, some steps, then ``torch.cuda.memory._dump_snapshot("mem.pickle")`` in
the program make such a file (https://docs.pytorch.org/docs/stable/torch_cuda_memory.html). It is a pickle. A pickle can
run anything, so only plain values are read here. One that names a class or a function is refused, and nothing of it
runs.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.text import size_text
from dryfit.engine.record import Record

MOST_BYTES = 2**31  # of a file
_GRAM = 6  # sizes in a row by which a step is found in a snapshot
_RARE = 32  # places at most that a run of sizes has in a snapshot: one a step
_LIKELY = 16  # beginnings that are tried
_SHIFTS = 8  # allocations by which a step may begin earlier or later than most of them say
_ALLOCATED, _FREED = "alloc", ("free_completed", "free_requested")


class MemoryEvent(NamedTuple):
    """An allocation or the end of one.

    ``key``: what both sides have alike, the size and, of an end, which of the step's allocations ends; -1: an earlier
    one.
    """

    freed: bool
    size: int
    number: int
    what: str

    @property
    def key(self) -> tuple[bool, int, int]:
        return self.freed, self.size, self.number

    def __str__(self) -> str:
        if not self.freed:
            return f"allocates {size_text(self.size)} ({self.what})"
        which = "of an earlier step" if self.number < 0 else f"number {self.number + 1} of the step"
        return f"frees {size_text(self.size)}, {which} ({self.what})"


class FirstDifference(NamedTuple):
    """Where the two part: how many events agree before, and what each does then; None: it does nothing more."""

    agreeing: int
    events: int
    trace: MemoryEvent | None
    snapshot: MemoryEvent | None

    def __str__(self) -> str:
        if self.trace is None and self.snapshot is None:
            return f"All {self.events:,} events of the step are the same in the trace and in the snapshot."
        sides = [
            f"{name} {event or 'does nothing more'}"
            for name, event in (("the trace", self.trace), ("the snapshot", self.snapshot))
        ]
        return f"The first {self.agreeing:,} of {self.events:,} events are the same. Then {sides[0]}; {sides[1]}."


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside itself")


def read_snapshot(path: Path) -> list[Mapping[str, Any]]:
    """The events of the device that has most of them, as PyTorch writes them.

    Raises :class:`UserError` if the file is no such snapshot, holds anything but plain values, or has no history.
    """
    how = "torch.cuda.memory._record_memory_history(); ...; torch.cuda.memory._dump_snapshot('mem.pickle')"
    wrong = {
        "where": str(path),
        "allowed": "a file of torch.cuda.memory._dump_snapshot",
        "write": how,
    }
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(
                "The snapshot is too large.", **wrong | {"allowed": size_text(MOST_BYTES)}
            )
        with path.open("rb") as file:
            content = _Plain(file).load()
    except FileNotFoundError:
        raise UserError("The file isn't there.", **wrong) from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The file holds more than plain values, and is not read: {error}.", **wrong
        ) from None
    except (
        EOFError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        OverflowError,
        ImportError,
        MemoryError,
        RecursionError,
    ) as error:
        raise UserError(f"The file is no snapshot: {type(error).__name__}.", **wrong) from None
    traces = content.get("device_traces") if isinstance(content, Mapping) else None
    if not isinstance(traces, (list, tuple)):
        raise UserError("The file is no memory snapshot: it has no `device_traces`.", **wrong)
    events = max(
        (trace for trace in traces if isinstance(trace, (list, tuple))), key=len, default=[]
    )
    if not events:
        raise UserError(
            "The snapshot has no history of events.", **wrong | {"allowed": "one that was recorded"}
        )
    for number, event in enumerate(events):
        if not (
            isinstance(event, Mapping)
            and isinstance(event.get("action"), str)
            and all(isinstance(event.get(key, 0), int) for key in ("addr", "size"))
        ):
            raise UserError(
                "An event of the snapshot is none that PyTorch writes.",
                **wrong | {"found": f"event {number}"},
            )
    return list(events)


def of_snapshot(events: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """``(id, bytes, where)`` of each allocation, ``(-id, bytes, where)`` of its end; ids are the snapshot's own."""
    actions = {event["action"] for event in events}
    freed = next((action for action in _FREED if action in actions), _FREED[0])
    alive: dict[int, int] = {}
    plain, count = [], 0
    for event in events:
        if event["action"] == _ALLOCATED:
            count += 1
            alive[event["addr"]] = count
            plain.append((count, event["size"], _frame(event)))
        elif event["action"] == freed:
            identity = alive.pop(event["addr"], None)
            if identity is None:  # allocated before the history began
                count += 1
                identity = count
            plain.append((-identity, event["size"], _frame(event)))
    return plain


def _frame(event: Mapping[str, Any]) -> str:
    """The innermost line of Python outside PyTorch."""
    frames = [frame for frame in event.get("frames") or () if isinstance(frame, Mapping)]
    lines = [
        f"{frame.get('filename')}:{frame.get('line')} {frame.get('name')}"
        for frame in frames
        if str(frame.get("filename", "")).endswith(".py")
    ]
    own = next((line for line in lines if "/torch/" not in line), None)
    return own or next(iter(lines), "no line of Python")


def of_record(record: Record) -> tuple[list[tuple[int, int, str]], int]:
    """The same of a traced step and what precedes it, and the index at which the last step begins."""
    sizes: dict[int, int] = {}
    plain = []
    for identity, count in record.events:
        if identity > 0:
            sizes[identity] = count
        if identity:
            plain.append(
                (identity, sizes.get(abs(identity), 0), record.components.get(abs(identity), ""))
            )
    begin = next(
        spans[0][1]
        for step in sorted({step for _, step, _ in record.marks}, reverse=True)
        if (spans := record.spans(step))
    )
    return plain, begin - sum(identity == 0 for identity, _ in record.events[:begin])


def numbered(plain: Iterable[tuple[int, int, str]]) -> Iterator[MemoryEvent]:
    """Events with the allocations of a step counted from 0."""
    own: dict[int, int] = {}
    for identity, size, what in plain:
        if identity > 0:
            own[identity] = len(own)
            yield MemoryEvent(False, size, own[identity], what)
        else:
            yield MemoryEvent(True, size, own.get(-identity, -1), what)


def first_difference(
    traced: Sequence[MemoryEvent], snapshot: Sequence[tuple[int, int, str]]
) -> FirstDifference:
    """Find the step in a snapshot, and its first event that differs from the trace's.

    A step is found by its allocations' sizes: most runs of :data:`_GRAM` of them say where it would have to begin. Of
    the places around that, the one counts at which most events agree; of equal ones the last, which is a later step.

    Raises :class:`UserError` if nothing in the snapshot is like the step.
    """
    places = [index for index, (identity, _, _) in enumerate(snapshot) if identity > 0]
    sizes = [snapshot[index][1] for index in places]
    own = [event.size for event in traced if not event.freed]
    grams: dict[tuple[int, ...], list[int]] = {}
    for at in range(len(sizes) - _GRAM + 1):
        grams.setdefault(tuple(sizes[at : at + _GRAM]), []).append(at)
    votes: Counter[int] = Counter()
    for at in range(len(own) - _GRAM + 1):
        found_at = grams.get(tuple(own[at : at + _GRAM]), ())
        if len(found_at) <= _RARE:  # what all layers have says little about where the step begins
            votes.update(place - at for place in found_at if place - at > -_SHIFTS)
    if not votes:
        raise UserError(
            "Nothing in the snapshot is like the traced step.",
            allowed="a snapshot of the step that is asked about",
            write="name the step's sizes: -s, -b, --set gradient_checkpointing=...",
        )
    most = max(votes.values())
    likely = [place for place, count in votes.most_common(_LIKELY) if 2 * count > most]
    starts = {max(0, place + shift) for place in likely for shift in range(-_SHIFTS, _SHIFTS + 1)}
    best: FirstDifference | None = None
    before = next(
        (index for index, event in enumerate(traced) if not event.freed), 0
    )  # frees before the first
    for start in sorted(start for start in starts if start < len(places)):
        for begin in {places[start], max(0, places[start] - before)}:
            found = _from(traced, snapshot[begin : begin + len(traced) + 1])
            if best is None or found.agreeing >= best.agreeing:
                best = found
    return best


def _from(traced: Sequence[MemoryEvent], plain: Sequence[tuple[int, int, str]]) -> FirstDifference:
    for index, (one, other) in enumerate(zip(traced, numbered(plain[: len(traced)]), strict=False)):
        if one.key != other.key:
            return FirstDifference(index, len(traced), one, other)
    if len(plain) < len(traced):
        return FirstDifference(len(plain), len(traced), traced[len(plain)], None)
    return FirstDifference(len(traced), len(traced), None, None)


def compare_snapshot(record: Record, path: Path) -> FirstDifference:
    """The traced step beside a snapshot's file."""
    plain, begin = of_record(record)
    return first_difference(list(numbered(plain[begin:])), of_snapshot(read_snapshot(path)))
