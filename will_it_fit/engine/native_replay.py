"""An allocator's state in compiled code: what ``Allocator`` and ``ExpandableAllocator`` are, a dozen times as fast."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from .allocator import OutOfMemory, no_addresses
from .native_library import library

_DONE, _PAUSED, _OUT_OF_MEMORY, _NO_ADDRESSES, _NO_HOST_MEMORY = range(5)
_MOST_IDS = 2**20  # the compiled code has a place for each id up to the largest


class _Totals(ctypes.Structure):
    """What ``State`` of ``native/blocks.h`` begins with."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("capacity", "allocated", "requested", "reserved")),
        *((name, ctypes.c_int64) for name in ("peak_allocated", "peak_requested", "peak_reserved", "retries")),
        *((name, ctypes.c_int64) for name in ("at", "needed", "listening", "pausing", "risen_count", "sums_count")),
        ("risen", ctypes.POINTER(ctypes.c_int64)),
        ("sums", ctypes.POINTER(ctypes.c_int64)),
    ]


_State = ctypes.POINTER(_Totals)


@cache
def compiled() -> Any:
    """The library with its functions' types; None: replays run in Python."""
    found = library()
    if found is not None:
        number, pointer, whole = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        types = {
            "replay_new": (_State, whole, whole, pointer, number),
            "replay_copy": (_State, _State),
            "replay_free": (None, _State),
            "replay_run": (whole, _State, pointer, number, number, whole, pointer),
            "replay_signature": (whole, _State, ctypes.POINTER(number)),
            "events_largest_id": (number, pointer, number),
            "events_peak_blocks": (number, pointer, number, number),
        }
        for name, (result, *arguments) in types.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    return found


def largest_id(numbers: array[int]) -> int | None:
    """The largest id in an array of events; None: compiled code can't take them."""
    found, count = compiled(), len(numbers) // 2
    if found is None:
        return None
    largest = found.events_largest_id(numbers.buffer_info()[0], count)
    return largest if 0 <= largest <= 16 * count + _MOST_IDS else None


def peak_blocks(numbers: array[int], largest: int) -> int:
    """The largest sum of what is requested at a time, each rounded up to a block, in bytes."""
    found = compiled().events_peak_blocks(numbers.buffer_info()[0], len(numbers) // 2, largest)
    if found < 0:
        raise MemoryError
    return found


class NativeAllocator:
    """Pools of each stream with what is used and free in them; attributes are those of ``allocator.AllocatorState``.

    Parameters
    ----------
    streams
        The stream of each id that is not on the first one.
    """

    def __init__(self, streams: Mapping[int, int] | None = None, *, expandable_segments: bool = False) -> None:
        self._compiled = compiled()
        numbers = {0: 0}
        self._stream_of = array("i", bytes(4 * (max(streams, default=-1) + 1))) if streams else array("i")
        for identity, stream in (streams or {}).items():
            self._stream_of[identity] = numbers.setdefault(stream, len(numbers))
        place, count = self._stream_of.buffer_info()
        self._begin(self._compiled.replay_new(expandable_segments, len(numbers), place, count))

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
        found = ctypes.c_int64()
        if not self._compiled.replay_signature(self._state, ctypes.byref(found)):
            raise MemoryError
        return found.value

    def run(self, events: Any, first: int, last: int, *, grow: bool = False, trail: list[int] | None = None) -> None:
        """Serve ``Events`` from index ``first`` to before ``last``."""
        totals, place = self._totals, events.numbers.buffer_info()[0]
        totals.pausing = self.released is not None
        noted = array("q", bytes(8 * (last - first))) if trail is not None else None
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

    @property
    def capacity(self) -> int:
        return self._totals.capacity

    @capacity.setter
    def capacity(self, count: int) -> None:
        self._totals.capacity = count

    @property
    def allocated(self) -> int:
        return self._totals.allocated

    @property
    def requested(self) -> int:
        return self._totals.requested

    @property
    def reserved(self) -> int:
        return self._totals.reserved

    @property
    def retries(self) -> int:
        return self._totals.retries

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
