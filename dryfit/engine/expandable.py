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
from collections.abc import Callable, Mapping

from .allocator import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL,
    SMALL_SEGMENT,
    AllocatorState,
    OutOfMemory,
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

    def copy(self) -> _Range:
        """The same addresses once more."""
        other = _Range(self.piece)
        other.size, other.before = dict(self.size), dict(self.before)
        other.free, other.unmapped, other._free = (
            list(self.free),
            list(self.unmapped),
            set(self._free),
        )
        return other

    def held(self, owners: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
        """Address, size and owner (by address; 0: free, -1: not mapped) of each block."""
        unmapped = set(self.unmapped)
        return tuple(
            (address, size, owners.get(address, -1 if address in unmapped else 0))
            for address, size in sorted(self.size.items())
        )

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

    def grow(self, size: int, within: Callable[[int], bool]) -> tuple[int, int] | None:
        """Map what a block of ``size`` lacks, if there is room for so many bytes: its address and the bytes mapped."""
        for start in self.unmapped:
            first = self.before.get(start, -1)
            first = first if first in self._free else start
            length, address = 0, first
            while (
                address is not None
                and length < size
                and (address in self._free or address in self.unmapped)
            ):
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
        if not within(needed):
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
            low, high = (
                -(-address // self.piece) * self.piece,
                (address + size) // self.piece * self.piece,
            )
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
        self._free.add(address)
        insort(self.free, (self.size[address], address))

    def _forget(self, address: int) -> None:
        self._free.discard(address)
        key = (self.size[address], address)
        del self.free[bisect_left(self.free, key)]


class ExpandableAllocator(AllocatorState):
    """Ranges of each stream's pools, and the largest sums of what is used and mapped since the last mark."""

    def __init__(self, streams: Mapping[int, int] | None = None) -> None:
        super().__init__(streams)
        self.pools: dict[int, tuple[_Range, _Range]] = {}
        self.used: dict[int, tuple[_Range, int, int]] = {}

    def copy(self) -> ExpandableAllocator:
        """The same state once more, for another future."""
        other = ExpandableAllocator()
        other.__dict__.update(self.__dict__)
        other.risen = list(self.risen)
        other.pools = {
            stream: (small.copy(), large.copy()) for stream, (small, large) in self.pools.items()
        }
        twins = {
            id(one): twin
            for stream, pair in self.pools.items()
            for one, twin in zip(pair, other.pools[stream], strict=True)
        }
        other.used = {
            identity: (twins[id(pool)], *rest) for identity, (pool, *rest) in self.used.items()
        }
        return other

    def signature(self) -> int:
        """What is held, by pool in the order of addresses: two states with the same one serve events alike."""
        owners: dict[int, dict[int, int]] = {
            id(pool): {} for pair in self.pools.values() for pool in pair
        }
        for identity, (pool, address, _) in self.used.items():
            owners[id(pool)][address] = identity
        return hash(
            tuple(pool.held(owners[id(pool)]) for pair in self.pools.values() for pool in pair)
        )

    def release(self) -> None:
        """Unmap what is free."""
        pools = (pool for stream, pair in self.pools.items() if stream >= 0 for pool in pair)
        self.reserved -= sum(pool.release() for pool in pools)

    def allocate(self, identity: int, count: int, index: int, grow: bool) -> None:
        """Take a block of the range of the id's pool, which grows where it has to."""
        size = round_size(count)
        stream = self.streams.get(identity, 0)
        if stream not in self.pools:
            self.pools[stream] = (_Range(SMALL_SEGMENT), _Range(LARGE_SEGMENT))
        pool = self.pools[stream][size > SMALL]
        address = pool.take(size)
        if address is None:
            address = self._map(pool, size, index, grow, stream < 0)
        self.used[identity] = (pool, address, count)
        self.allocated += pool.size[address]
        self.requested += count

    def free_block(self, identity: int) -> None:
        """Free a block, together with free neighbours."""
        if identity in self.used:
            pool, address, count = self.used.pop(identity)
            self.allocated -= pool.size[address]
            self.requested -= count
            pool.give(address)

    def _map(self, pool: _Range, size: int, index: int, grow: bool, private: bool) -> int:
        """A block on memory that is mapped now; under pressure what is free is unmapped first."""
        within = lambda more: self.within(self.reserved + more, index)  # noqa: E731
        grown = pool.grow(size, within)
        if grown is None and not private:
            self.retries += 1
            self.release()
            if self.released is not None:
                self.released(index)
            grown = pool.grow(size, within)
        if grown is None:
            grown = pool.grow(size, lambda _: True)
            if not grow:
                raise OutOfMemory(index, self.reserved + grown[1], self.capacity)
            self.capacity = self.reserved + grown[1]
        self.reserved += grown[1]
        return grown[0]
