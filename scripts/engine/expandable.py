"""The caching allocator with ``expandable_segments:True``: address ranges that grow and shrink, instead of segments.

Each pool of a stream has one range of addresses. Memory is mapped into it in pieces of 2 MiB (small pool) or 20 MiB
(large one), so that neighbours merge whatever they were allocated for, and nothing is left over behind a request. That
changes both what is reserved and, since every block is split to 512 bytes, what is allocated.

Source: ``c10/cuda/CUDACachingAllocator.cpp``: ``get_free_block`` (the block at the end of what is mapped counts as
large as its range), ``should_split``, ``find_expandable_block``, ``try_allocate_expandable_block``, ``map_block``,
``release_blocks`` with ``unmap_block``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence

from .allocator import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL,
    SMALL_SEGMENT,
    Event,
    OutOfMemory,
    Replay,
    Span,
    round_size,
)

_ENDLESS = 1 << 60


class _Range:
    """The addresses of one pool: blocks that are used, free or not mapped, in order; the last is endless, unmapped."""

    def __init__(self, piece: int) -> None:
        self.piece = piece
        self.size: dict[int, int] = {0: _ENDLESS}  # of each block, by its address
        self.before: dict[int, int] = {}  # address of the block before
        self.free: list[tuple[int, int]] = []  # (size, address) of what is mapped and free, sorted
        self.unmapped: list[int] = [0]  # addresses, sorted
        self._free: set[int] = set()

    def take(self, size: int) -> int | None:
        """Cut a block out of what is mapped; its address, or None."""
        free = self.free
        place = bisect_left(free, (size, -1))
        if place == len(free):
            return None
        # A block before unmapped addresses counts as large as both: only such a one is passed over.
        while sum(free[place]) in self.unmapped and place + 1 < len(free):
            if self._reach(place + 1) >= self._reach(place):
                break
            place += 1
        extent, address = free.pop(place)
        self._free.discard(address)
        if extent - size >= MIN_BLOCK:
            self._split_at(address, address + size)
            self._add(address + size)
        return address

    def grow(self, size: int, room: int) -> tuple[int, int] | None:
        """Map what a block of ``size`` lacks, if it is ``room`` bytes at most: its address and the bytes mapped."""
        for start in self.unmapped:
            first = self.before.get(start, -1)
            first = first if first in self._free else start
            length, address = 0, first
            while address is not None and length < size and (address in self._free or address in self.unmapped):
                length += self.size[address]
                address = self._after(address)
            if length >= size:
                break
        needed, address, have = 0, first, 0
        while have < size:  # pieces that would be mapped
            extent = self.size[address]
            if address not in self._free:
                extent = min(extent, -(-min(extent, size - have) // self.piece) * self.piece)
                needed += extent
            have += extent
            address += self.size[address]
        if needed > room:
            return None
        address = first
        have = 0
        while have < size:
            extent = self.size[address]
            if address not in self._free:
                extent = min(extent, -(-min(extent, size - have) // self.piece) * self.piece)
                self._map(address, extent)
                address = first if first in self._free else address
            have = self.size[first]
            address = first + self.size[first]
        return self._cut(first, size), needed

    def give(self, address: int) -> None:
        """Free a block; free neighbours merge."""
        free = self._free
        before = self.before.get(address, -1)
        if before in free:
            self._forget(before)
            self._join(before, address)
            address = before
        after = address + self.size[address]
        if after in free:
            self._forget(after)
            self._join(address, after)
        self._add(address)

    def release(self) -> int:
        """Unmap the whole pieces of what is free; their bytes."""
        released = 0
        for size, address in list(self.free):
            low, high = -(-address // self.piece) * self.piece, (address + size) // self.piece * self.piece
            if high <= low:
                continue
            self._forget(address)
            if high < address + size:
                self._split_at(address, high)
                self._add(high)
            if low > address:
                self._split_at(address, low)
                self._add(address)
            self._unmap(low)
            released += high - low
        return released

    def _reach(self, place: int) -> int:
        size, address = self.free[place]
        after = address + size
        return size + (self.size[after] if after in self.unmapped else 0)

    def _after(self, address: int) -> int | None:
        after = address + self.size[address]
        return after if after in self.size else None

    def _cut(self, address: int, size: int) -> int:
        rest = self.size[address] - size
        self._forget(address)
        if rest >= MIN_BLOCK:
            self._split_at(address, address + size)
            self._add(address + size)
        return address

    def _map(self, address: int, extent: int) -> None:
        self.unmapped.remove(address)
        if self.size[address] > extent:
            self._split_at(address, address + extent)
            insort(self.unmapped, address + extent)
        self.give(address)

    def _unmap(self, address: int) -> None:
        before, after = self.before.get(address, -1), self._after(address)
        if after is not None and after in self.unmapped:
            self.unmapped.remove(after)
            self._join(address, after)
        if before in self.unmapped:
            self._join(before, address)
        else:
            insort(self.unmapped, address)

    def _split_at(self, address: int, middle: int) -> None:
        end = address + self.size[address]
        self.size[address], self.size[middle] = middle - address, end - middle
        self.before[middle] = address
        if end in self.size:
            self.before[end] = middle

    def _join(self, address: int, after: int) -> None:
        self.size[address] += self.size.pop(after)
        del self.before[after]
        end = address + self.size[address]
        if end in self.size:
            self.before[end] = address

    def _add(self, address: int) -> None:
        """Put a free block on the list."""
        self._free.add(address)
        insort(self.free, (self.size[address], address))

    def _forget(self, address: int) -> None:
        """Take a free block off the list."""
        self._free.discard(address)
        key = (self.size[address], address)
        del self.free[bisect_left(self.free, key)]


def replay_expandable(
    events: Iterable[Event],
    marks: Sequence[tuple[str, int]] = (),
    capacity_bytes: int | None = None,
    *,
    grow: bool = False,
    trail: list[int] | None = None,
    streams: Mapping[int, int] | None = None,
) -> Replay:
    """Run events through the allocator; arguments, result and errors are those of ``allocator.replay``."""
    streams = streams or {}
    pools: dict[int, tuple[_Range, _Range]] = {}
    used: dict[int, tuple[_Range, int, int]] = {}
    allocated = requested = reserved = retries = 0
    peaks = [0, 0, 0]
    capacity = _ENDLESS if capacity_bytes is None else capacity_bytes
    starts: list[tuple[str, int, int]] = []
    closed: list[list[int]] = []
    upcoming = list(marks)[::-1]
    index = -1

    def enter() -> None:
        nonlocal peaks
        closed.append(peaks)
        phase, first = upcoming.pop()
        starts.append((phase, first, allocated))
        peaks = [allocated, requested, reserved]

    for index, (identity, count) in enumerate(events):
        while upcoming and upcoming[-1][1] == index:
            enter()
        if trail is not None:
            trail.append(allocated)
        if identity < 0:
            if -identity in used:
                pool, address, asked = used.pop(-identity)
                allocated -= pool.size[address]
                requested -= asked
                pool.give(address)
            continue
        if identity == 0:
            reserved -= sum(pool.release() for pair in pools.values() for pool in pair)
        if not count:
            continue
        size = round_size(count)
        stream = streams.get(identity, 0)
        if stream not in pools:
            pools[stream] = (_Range(SMALL_SEGMENT), _Range(LARGE_SEGMENT))
        pool = pools[stream][size > SMALL]
        address = pool.take(size)
        if address is None:
            found = pool.grow(size, capacity - reserved)
            if found is None:
                retries += 1
                reserved -= sum(other.release() for pair in pools.values() for other in pair)
                found = pool.grow(size, capacity - reserved)
            if found is None:
                found = pool.grow(size, _ENDLESS)
                if not grow:
                    raise OutOfMemory(index, reserved + found[1], capacity)
                capacity = reserved + found[1]
            address, mapped = found
            reserved += mapped
        used[identity] = (pool, address, count)
        allocated += pool.size[address]
        requested += count
        if allocated > peaks[0]:
            peaks[0] = allocated
        if requested > peaks[1]:
            peaks[1] = requested
        if reserved > peaks[2]:
            peaks[2] = reserved
    while upcoming:
        enter()
    closed.append(peaks)
    return Replay(
        *(max(each[kind] for each in closed) for kind in range(3)),
        allocated,
        requested,
        reserved,
        spans=tuple(Span(*start, *peak) for start, peak in zip(starts, closed[1:], strict=True)),
        capacity_bytes=None if capacity_bytes is None else capacity,
        retries=retries,
    )


def required_bytes_expandable(
    events: Sequence[Event], plenty: Replay | None = None, streams: Mapping[int, int] | None = None
) -> int:
    """Return the least a GPU must have for the events, in bytes, without its CUDA context, to 2 MiB.

    Blocks fit together nearly without rests here, so the search begins at the blocks in use at the peak and asks each
    time for what was missing; where the step before the answer would do as well, bisection goes on from there.
    """
    plenty = plenty or replay_expandable(events, streams=streams)

    def missing(steps: int) -> int:
        """The steps that would have sufficed where so many of 2 MiB don't; 0: they do."""
        try:
            replay_expandable(events, capacity_bytes=steps * SMALL_SEGMENT, streams=streams)
        except OutOfMemory as error:
            return -(-error.needed_bytes // SMALL_SEGMENT)
        return 0

    low, high = 0, -(-plenty.peak_allocated_bytes // SMALL_SEGMENT)
    while needed := missing(high):
        low, high = high, max(needed, high + 1)
    low = max(low, (plenty.peak_allocated_bytes - 1) // SMALL_SEGMENT)
    middle = high - 1
    while high - low > 1:
        low, high = (middle, high) if missing(middle) else (low, middle)
        middle = (low + high) // 2
    return high * SMALL_SEGMENT
