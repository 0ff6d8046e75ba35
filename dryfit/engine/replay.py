"""What a sequence of allocations and frees costs, run through the allocator's model: compiled where it can be."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any

from .allocator import Allocator, AllocatorState, Event, OutOfMemory, no_addresses, round_size
from .expandable import ExpandableAllocator
from .native_library import library

_DONE, _PAUSED, _OUT_OF_MEMORY, _NO_ADDRESSES, _NO_HOST_MEMORY = range(5)
_MOST_IDS = 2**20  # the compiled code has a place for each id up to the largest


class _Totals(ctypes.Structure):
    """What ``State`` of ``native/blocks.h`` begins with."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("capacity", "allocated", "requested", "reserved")),
        *(
            (name, ctypes.c_int64)
            for name in ("peak_allocated", "peak_requested", "peak_reserved", "retries")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("at", "needed", "listening", "pausing", "risen_count", "sums_count")
        ),
        ("risen", ctypes.POINTER(ctypes.c_int64)),
        ("sums", ctypes.POINTER(ctypes.c_int64)),
    ]


_State = ctypes.POINTER(_Totals)


@cache
def compiled() -> Any:
    """The library with its functions' types; None: replays run in Python."""
    native = library()
    if native is not None:
        number, pointer, whole = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        types = {
            "replay_new": (_State, whole, whole, whole, pointer, number),
            "replay_copy": (_State, _State),
            "replay_free": (None, _State),
            "replay_run": (whole, _State, pointer, number, number, whole, pointer),
            "replay_signature": (whole, _State, ctypes.POINTER(number)),
            "events_largest_id": (number, pointer, number),
            "events_peak_blocks": (number, pointer, number, number),
        }
        for name, (result, *arguments) in types.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, arguments
    return native


class Events(Sequence[Event]):
    """Events in one array of 64-bit numbers, id and bytes by turns: what compiled code reads.

    ``numbers``: an array of the type ``q``.
    """

    def __init__(self, numbers: array[int]) -> None:
        self.numbers = numbers

    @classmethod
    def of(cls, events: Iterable[Event]) -> Events:
        """The same events in an array.

        Raises :class:`OverflowError` if a number is beyond 64 bits.
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
        native, count = compiled(), len(self)
        if native is None:
            return None
        largest = native.events_largest_id(self.numbers.buffer_info()[0], count)
        return largest if 0 <= largest <= 16 * count + _MOST_IDS else None


def _total(name: str) -> Any:
    """An attribute that is one of the compiled state's numbers."""
    return property(
        lambda self: getattr(self._totals, name),
        lambda self, value: setattr(self._totals, name, value),
    )


class NativeAllocator:
    """Pools of each stream with what is used and free in them; attributes are those of ``allocator.AllocatorState``.

    It does what ``Allocator`` and ``ExpandableAllocator`` do, a dozen times as fast.

    ``streams``: the stream of each id that is not on the first one.
    """

    def __init__(
        self, streams: Mapping[int, int] | None = None, *, expandable_segments: bool = False
    ) -> None:
        self._compiled = compiled()
        numbers = {0: 0}
        self._stream_of = (
            array("i", [0]) * (max(streams, default=-1) + 1) if streams else array("i")
        )
        for stream in (
            sorted(set(streams.values()), reverse=True) if streams else ()
        ):  # private pools come last
            numbers.setdefault(stream, len(numbers))
        for identity, stream in (streams or {}).items():
            self._stream_of[identity] = numbers[stream]
        general = sum(stream >= 0 for stream in numbers)
        place, count = self._stream_of.buffer_info()
        self._begin(
            self._compiled.replay_new(expandable_segments, len(numbers), general, place, count)
        )

    def _begin(self, state: Any) -> None:
        self._state: Any = state
        if not state:
            raise MemoryError
        self._totals = state.contents
        self.released: Callable[[int], None] | None = None

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._compiled.replay_free(self._state)

    def copy(self) -> NativeAllocator:
        """The same state once more, for another future."""
        other = NativeAllocator.__new__(NativeAllocator)
        other._compiled, other._stream_of = self._compiled, self._stream_of
        other._begin(self._compiled.replay_copy(self._state))
        return other

    def signature(self) -> int:
        """What is held, by pool in the order of addresses: two states with the same one serve events alike."""
        signature = ctypes.c_int64()
        if not self._compiled.replay_signature(self._state, ctypes.byref(signature)):
            raise MemoryError
        return signature.value

    def run(
        self,
        events: Events,
        first: int,
        last: int,
        *,
        grow: bool = False,
        trail: list[int] | None = None,
    ) -> None:
        """Serve ``Events`` from index ``first`` to before ``last``."""
        totals, place = self._totals, events.numbers.buffer_info()[0]
        totals.pausing = self.released is not None
        noted = array("q", [0]) * (last - first) if trail is not None else None
        at, outcome = first, _PAUSED
        while outcome == _PAUSED:
            trailing = None if noted is None else noted.buffer_info()[0] + 8 * (at - first)
            outcome = self._compiled.replay_run(self._state, place, at, last, grow, trailing)
            at = totals.at
            if outcome == _PAUSED and self.released is not None:
                self.released(at)
        if outcome == _OUT_OF_MEMORY:
            raise OutOfMemory(at, totals.needed, totals.capacity)
        if outcome == _NO_ADDRESSES:
            raise no_addresses(totals.reserved)
        if outcome == _NO_HOST_MEMORY:
            raise MemoryError
        if trail is not None:
            trail.extend(noted)

    capacity, allocated, requested, reserved, retries = map(
        _total, ("capacity", "allocated", "requested", "reserved", "retries")
    )

    @property
    def peaks(self) -> tuple[int, int, int]:
        totals = self._totals
        return totals.peak_allocated, totals.peak_requested, totals.peak_reserved

    @peaks.setter
    def peaks(self, sizes: tuple[int, int, int]) -> None:
        totals = self._totals
        totals.peak_allocated, totals.peak_requested, totals.peak_reserved = sizes

    @property
    def risen(self) -> list[tuple[int, int]]:
        numbers = self._totals.risen[: 2 * self._totals.risen_count]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    @property
    def sums(self) -> list[int] | None:
        return self._totals.sums[: self._totals.sums_count] if self._totals.listening else None

    @sums.setter
    def sums(self, begun: list[int] | None) -> None:
        """A list begins to be kept: an empty one."""
        self._totals.listening, self._totals.sums_count = begun is not None, 0


State = AllocatorState | NativeAllocator


def allocator_for(
    events: Sequence[Event],
    streams: Mapping[int, int] | None = None,
    *,
    expandable_segments: bool = False,
) -> tuple[State, Sequence[Event]]:
    """An allocator's first state, and the events as it takes them: compiled, or else in Python.

    The parameters are those of :func:`replay`.
    """
    packed = _packed(events)
    if packed is not None:
        return NativeAllocator(streams, expandable_segments=expandable_segments), packed
    return (ExpandableAllocator if expandable_segments else Allocator)(streams), list(events)


def _packed(events: Sequence[Event]) -> Events | None:
    """Events as compiled code takes them; None: it can't."""
    if compiled() is None:
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
    """What a sequence of events costs."""

    peak_allocated_bytes: int  # largest sum of blocks in use: `torch.cuda.max_memory_allocated`
    # Largest sum of the requests themselves: `requested_bytes.all.peak` of `torch.cuda.memory_stats`.
    peak_requested_bytes: int
    peak_reserved_bytes: int  # largest sum of segments: `torch.cuda.max_memory_reserved`
    # The same three at the end.
    allocated_bytes: int
    requested_bytes: int
    reserved_bytes: int
    spans: tuple[Span, ...] = ()  # the peaks of each marked stretch, in order
    # The capacity that the replay ended with; larger than the given one only where it was allowed to grow.
    capacity_bytes: int | None = None
    retries: int = 0  # how often free segments were given back because `cudaMalloc` failed: `num_alloc_retries`

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
        :data:`~dryfit.engine.allocator.EMPTY_CACHE` gives free segments back.
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


def running_sum(events: Iterable[Event]) -> Iterator[int]:
    """The bytes that are alive before each event and after the last, without what the allocator adds."""
    sizes: dict[int, int] = {}
    total = 0
    for identity, count in events:
        yield total
        if identity > 0:
            sizes[identity] = count
            total += count
        else:
            total -= sizes.pop(-identity, 0)
    yield total


def peak_blocks(events: Sequence[Event]) -> int:
    """The largest sum of what is requested at a time, each rounded up to a block: less than that never suffices."""
    packed = _packed(events)
    if packed is not None:
        address = packed.numbers.buffer_info()[0]
        largest_sum = compiled().events_peak_blocks(address, len(packed), packed.largest_id or 0)
        if largest_sum < 0:
            raise MemoryError
        return largest_sum
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
