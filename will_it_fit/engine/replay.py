"""What a sequence of allocations and frees costs, run through the allocator's model: compiled where it can be."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from . import native_replay
from .allocator import Allocator, AllocatorState, Event, round_size
from .expandable import ExpandableAllocator

State = AllocatorState | native_replay.NativeAllocator


class Events(Sequence[Event]):
    """Events in one array of 64-bit numbers, id and bytes by turns: what compiled code reads.

    Parameters
    ----------
    numbers
        An array of the type ``q``.
    """

    def __init__(self, numbers: array[int]) -> None:
        self.numbers = numbers

    @classmethod
    def of(cls, events: Iterable[Event]) -> Events:
        """The same events in an array.

        Raises
        ------
        OverflowError
            If a number is beyond 64 bits.
        """
        return events if isinstance(events, cls) else cls(array("q", chain.from_iterable(events)))

    @property
    def ids(self) -> array[int]:
        """The ids in order."""
        return self.numbers[::2]

    def __len__(self) -> int:
        return len(self.numbers) // 2

    def __iter__(self) -> Iterator[Event]:
        return zip(self.numbers[::2], self.numbers[1::2], strict=True)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(zip(self.numbers[::2][index], self.numbers[1::2][index], strict=True))
        place = range(len(self))[index]
        return self.numbers[2 * place], self.numbers[2 * place + 1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def largest_id(self) -> int | None:
        """The largest id; None: compiled code can't take these events."""
        return native_replay.largest_id(self.numbers)


def allocator_for(
    events: Sequence[Event], streams: Mapping[int, int] | None = None, *, expandable_segments: bool = False
) -> tuple[State, Sequence[Event]]:
    """An allocator's first state, and the events as it takes them: compiled, or else in Python.

    The parameters are those of :func:`replay`.
    """
    packed = _packed(events)
    if packed is not None:
        return native_replay.NativeAllocator(streams, expandable_segments=expandable_segments), packed
    return (ExpandableAllocator if expandable_segments else Allocator)(streams), list(events)


def _packed(events: Sequence[Event]) -> Events | None:
    """Events as compiled code takes them; None: it can't."""
    if native_replay.compiled() is None:
        return None
    try:
        packed = Events.of(events)
    except OverflowError:
        return None
    return packed if packed.largest_id is not None else None


@dataclass(frozen=True)
class Span:
    """Peaks between one mark and the next, as ``reset_peak_memory_stats`` at the mark would give them (bytes)."""

    phase: str
    start_index: int
    start_allocated_bytes: int
    peak_allocated_bytes: int
    peak_requested_bytes: int
    peak_reserved_bytes: int


@dataclass(frozen=True)
class Replay:
    """What a sequence of events costs.

    Attributes
    ----------
    peak_allocated_bytes
        Largest sum of blocks in use: ``torch.cuda.max_memory_allocated``.
    peak_requested_bytes
        Largest sum of the requests themselves: ``requested_bytes.all.peak`` of ``torch.cuda.memory_stats``.
    peak_reserved_bytes
        Largest sum of segments: ``torch.cuda.max_memory_reserved``.
    allocated_bytes, requested_bytes, reserved_bytes
        The same three at the end.
    spans
        The peaks of each marked stretch, in order.
    capacity_bytes
        The capacity that the replay ended with; larger than the given one only where it was allowed to grow.
    retries
        How often free segments were given back because ``cudaMalloc`` failed: ``num_alloc_retries``.
    """

    peak_allocated_bytes: int
    peak_requested_bytes: int
    peak_reserved_bytes: int
    allocated_bytes: int
    requested_bytes: int
    reserved_bytes: int
    spans: tuple[Span, ...] = ()
    capacity_bytes: int | None = None
    retries: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """Largest ``peak_allocated_bytes`` of each phase's spans."""
        largest: dict[str, int] = {}
        for span in self.spans:
            largest[span.phase] = max(largest.get(span.phase, 0), span.peak_allocated_bytes)
        return largest


def replay(
    events: Sequence[Event],
    marks: Sequence[tuple[str, int]] = (),
    capacity_bytes: int | None = None,
    *,
    streams: Mapping[int, int] | None = None,
    expandable_segments: bool = False,
    grow: bool = False,
    trail: list[int] | None = None,
) -> Replay:
    """Run events through the allocator.

    Parameters
    ----------
    events
        ``(id, bytes)`` with ``id > 0`` allocates, ``(-id, 0)`` frees. Ids are used once; freeing an id that was
        never allocated, or was of 0 bytes (PyTorch allocates nothing for those), does nothing.
        :data:`~will_it_fit.engine.allocator.EMPTY_CACHE` gives free segments back.
    marks
        ``(phase, index of the phase's first event)`` in order.
    capacity_bytes
        What segments may take together: the GPU's memory without the CUDA context. None: plenty.
    streams
        The stream of each id whose block is not allocated on the first one, 0.
    expandable_segments
        Whether the allocator runs with ``expandable_segments:True``.
    grow
        Raise the capacity instead of failing, to what would have sufficed there.
    trail
        Gets the bytes of the blocks in use before each event.

    Returns
    -------
    Replay

    Raises
    ------
    OutOfMemory
        The capacity is too small even after all free segments are given back. The order of attempts is that of
        ``malloc``: ``get_free_block``, ``alloc_block``, ``release_cached_blocks``, ``alloc_block``
        (``release_available_cached_blocks`` does nothing unless ``max_split_size_mb`` is set).
    """
    state, taken = allocator_for(events, streams, expandable_segments=expandable_segments)
    return run_through(state, taken, marks, capacity_bytes, grow=grow, trail=trail)


def run_through(
    state: State,
    events: Sequence[Event],
    marks: Sequence[tuple[str, int]] = (),
    capacity_bytes: int | None = None,
    *,
    grow: bool = False,
    trail: list[int] | None = None,
) -> Replay:
    """Run events through an allocator in its first state; the rest is as :func:`replay` has it."""
    if capacity_bytes is not None:
        state.capacity = capacity_bytes
    ends = [*(index for _, index in marks), len(events)]
    state.run(events, 0, ends[0], grow=grow, trail=trail)
    peaks, spans = [state.peaks], []
    for (phase, start), end in zip(marks, ends[1:], strict=True):
        begun = state.allocated
        state.peaks = (state.allocated, state.requested, state.reserved)
        state.run(events, start, end, grow=grow, trail=trail)
        peaks.append(state.peaks)
        spans.append(Span(phase, start, begun, *state.peaks))
    allocated, requested, reserved = (max(kind) for kind in zip(*peaks, strict=True))
    return Replay(
        peak_allocated_bytes=allocated,
        peak_requested_bytes=requested,
        peak_reserved_bytes=reserved,
        allocated_bytes=state.allocated,
        requested_bytes=state.requested,
        reserved_bytes=state.reserved,
        spans=tuple(spans),
        capacity_bytes=None if capacity_bytes is None else state.capacity,
        retries=state.retries,
    )


def peak_blocks(events: Sequence[Event]) -> int:
    """The largest sum of what is requested at a time, each rounded up to a block: less than that never suffices."""
    packed = _packed(events)
    if packed is not None:
        return native_replay.peak_blocks(packed.numbers, packed.largest_id or 0)
    sizes: dict[int, int] = {}
    total = most = 0
    for identity, count in events:
        if identity > 0 and count:
            sizes[identity] = size = round_size(count)
            total += size
            most = max(most, total)
        elif identity < 0:
            total -= sizes.pop(-identity, 0)
    return most
