"""PyTorch's CUDA caching allocator as a model: what a sequence of allocations and frees costs on a card.

A tracker of tensors knows what was *requested*. A card gives more, for two reasons that this module replays:

* blocks: a request is rounded up, and the rest of a reused block stays with it where it is too small to be
  split off. ``torch.cuda.max_memory_allocated`` counts blocks, not requests;
* segments: blocks are cut from segments that ``cudaMalloc`` returned and that are kept when they are free.
  ``torch.cuda.max_memory_reserved`` counts segments.

So one sequence has three answers: the blocks in use at its peak, the segments held when memory is plentiful, and
the least a card must have when free segments are given back under pressure (:mod:`dryfit.engine.capacities`).

Source of every rule: ``c10/cuda/CUDACachingAllocator.cpp``, class ``DeviceCachingAllocator``, with its constants in
that file up to PyTorch 2.8 and in ``c10/core/AllocatorConfig.h`` (``kMinBlockSize``, ``kSmallSize``,
``kSmallBuffer``, ``kMinLargeAlloc``, ``kRoundLarge``, ``large_segment_size_`` = 20 MiB) in 2.10 to 2.14. The values
are the same in all of them; what later versions add (expandable segments, a configurable large segment, memory
fractions, garbage collection) is off unless ``PYTORCH_ALLOC_CONF`` asks for it.

Each stream has pools of its own, and all share the capacity (``get_pool`` and ``BlockComparatorSize``: the stream comes
first). Blocks are reused at once when they are freed: where another stream uses them as well, the events have to say
when the GPU has got there.

A private pool of CUDA graphs is written as a stream below 0. Its blocks never mix with others. While a graph may be
captured nothing is given back (``captures_underway``), and its segments are kept as long as the graph lives: here, to
the end (``release_cached_blocks`` goes through the general pools, and those of graphs that are gone).

Among free blocks of one size the allocator takes the lowest address. Which address ``cudaMalloc`` returns is not
documented; the model takes segments of more than 20 MiB to lie below the ones before them, as mappings do that Linux
places from the top down, and smaller ones, which a driver cuts from stretches of its own, above one another. With that
order ``max_memory_reserved`` of 29 among 30 published runs that leave nothing else to chance is exact to the MiB
(docs/memory-validation.md); with all segments upward the largest misses are 9 %, with all downward 0.3 %.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence

MIB = 2**20
MIN_BLOCK = 512  # kMinBlockSize: every size is a multiple of it (round_size)
SMALL = MIB  # kSmallSize: the largest request of the small pool; also the largest rest that stays unsplit
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer: what cudaMalloc is asked for by the small pool
LARGE_SEGMENT = (
    20 * MIB
)  # kLargeBuffer, large_segment_size(): ... by requests over 1 and below 10 MiB
MIN_LARGE = 10 * MIB  # kMinLargeAlloc: from here on a segment is the request itself,
ROUND_LARGE = 2 * MIB  # kRoundLarge: rounded up to this

Event = tuple[int, int]  # (id, bytes): id > 0 allocates bytes under that id; (-id, 0) frees them
EMPTY_CACHE: Event = (0, 0)  # torch.cuda.empty_cache(): gives free segments back

# A free block's key orders as BlockComparatorSize does: by size, then by address. One integer holds both, so that
# the free lists are plain sorted lists; addresses stay below 2**48 as CUDA's do.
_ADDRESS_BITS = 48
_ADDRESS_MASK = (1 << _ADDRESS_BITS) - 1
PLENTY = 1 << 62  # a capacity that nothing exceeds


class OutOfMemory(Exception):
    """The capacity does not suffice even after every free segment has been given back.

    Attributes
    ----------
    event_index
        Index of the event that could not be served.
    needed_bytes
        What would have sufficed at that point: segments that can't be released, and the one asked for.
    """

    def __init__(self, event_index: int, needed_bytes: int, capacity_bytes: int) -> None:
        self.event_index, self.needed_bytes, self.capacity_bytes = (
            event_index,
            needed_bytes,
            capacity_bytes,
        )
        super().__init__(
            f"event {event_index} needs {needed_bytes} bytes, the capacity is {capacity_bytes}"
        )


class _Block:
    """A stretch of a segment, in use or free; neighbours in the segment are linked."""

    __slots__ = ("address", "free", "next", "pool", "previous", "requested", "size")

    def __init__(self, address: int, size: int, pool: list[int]) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.previous: _Block | None = None
        self.next: _Block | None = None
        self.free = False
        self.requested = 0


def round_size(requested: int) -> int:
    """Size of a block for a request, in bytes (``round_size``; ``roundup_power2_divisions`` is off by default)."""
    return MIN_BLOCK if requested < MIN_BLOCK else -(-requested // MIN_BLOCK) * MIN_BLOCK


def segment_size(size: int) -> int:
    """Bytes that ``cudaMalloc`` is asked for when no free block fits (``get_allocation_size``)."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


def typical_block(requested: int) -> int:
    """Size of a request's block on average, in bytes: where a segment's rest is too small, its last block has it."""
    size = round_size(requested)
    count, rest = divmod(segment_size(size), size)
    return size + (rest // count if rest <= SMALL < size else 0)


def no_addresses(reserved: int) -> OverflowError:
    """What a step is told that needs more segments than there are addresses."""
    return OverflowError(
        f"more than {reserved:,} bytes in segments: beyond the addresses of any GPU"
    )


class AllocatorState:
    """What both allocators have in common: sums, peaks, and how the capacity decided.

    A subclass says what a block is (``allocate``, ``free_block``, ``release``, ``copy``, ``signature``). These classes
    are the ones to read. :class:`~dryfit.engine.replay.NativeAllocator` does the same, much faster.
    """

    def __init__(self, streams: Mapping[int, int] | None = None) -> None:
        self.streams = (
            streams or {}
        )  # by id; 0 where it isn't there; below 0: a private pool of CUDA graphs
        # Bytes of the blocks in use, of the requests in them, and of what the driver was asked for.
        self.allocated = self.requested = self.reserved = 0
        self.retries = (
            0  # how often free memory was given back because the capacity did not suffice
        )
        self.peaks = (0, 0, 0)  # the largest of these three since the last mark, in bytes
        self.capacity = PLENTY  # what segments may take together, in bytes
        # The largest sums of segments that were asked for and are not beyond the capacity, as they rose, and the event
        # that asked for each: with less than the last one another history begins (`capacities`).
        self.risen: list[tuple[int, int]] = [(0, 0)]
        # All that were asked for, within the capacity or beyond it, since somebody began to listen; None: nobody does.
        self.sums: list[int] | None = None
        # Called with the index of the event, where free segments were given back because one was beyond the capacity.
        self.released: Callable[[int], None] | None = None

    def run(
        self,
        events: Sequence[Event],
        first: int,
        last: int,
        *,
        grow: bool = False,
        trail: list[int] | None = None,
    ) -> None:
        """Serve events from index ``first`` to before ``last``.

        ``grow``: whether the capacity rises where it does not suffice. ``trail``: gets the bytes of blocks in use
        before each event.

        Raises :class:`OutOfMemory` if the capacity does not suffice, and does not grow.
        """
        allocated, requested, reserved = self.peaks
        for index in range(first, last):
            identity, count = events[index]
            if trail is not None:
                trail.append(self.allocated)
            if identity < 0:
                self.free_block(-identity)
                continue
            if identity == 0:
                self.release()
            if count:
                self.allocate(identity, count, index, grow)
                if self.allocated > allocated:  # max() would be slower, and browsers run this
                    allocated = self.allocated
                if self.requested > requested:
                    requested = self.requested
                if self.reserved > reserved:
                    reserved = self.reserved
        self.peaks = (allocated, requested, reserved)

    def within(self, total: int, index: int) -> bool:
        """Whether segments of so many bytes, which an event asks for, are within the capacity."""
        if self.sums is not None:
            self.sums.append(total)
        if total > self.capacity:
            return False
        if total > self.risen[-1][0]:
            self.risen.append((total, index))
        return True

    def allocate(self, identity: int, count: int, index: int, grow: bool) -> None:
        """Give an id a block of at least ``count`` bytes; ``index`` is the event's."""
        raise NotImplementedError

    def free_block(self, identity: int) -> None:
        """Take an id's block back; an id that has none is left alone."""
        raise NotImplementedError

    def release(self) -> None:
        """Give the driver back what is free."""
        raise NotImplementedError


class Allocator(AllocatorState):
    """Segments cut into blocks, free or in use, and the largest sums of both since the last mark."""

    def __init__(self, streams: Mapping[int, int] | None = None) -> None:
        super().__init__(streams)
        self.pools: dict[int, tuple[list[int], list[int]]] = {
            0: ([], [])
        }  # by stream: the small and the large pool,
        # each the keys of its free blocks, ascending
        self.free: dict[int, _Block] = {}  # free blocks by address
        self.used: dict[int, _Block] = {}  # by id
        self.high = 1 << (
            _ADDRESS_BITS - 1
        )  # of the last large segment; the next one lies below it
        self.low = self.high >> 1  # where the next segment of at most 20 MiB lies

    def copy(self) -> Allocator:
        """The same state once more, for another future."""
        other = Allocator()
        other.__dict__.update(self.__dict__)
        other.risen = list(self.risen)
        other.pools = {
            stream: (list(small), list(large)) for stream, (small, large) in self.pools.items()
        }
        pools = {
            id(pool): twin
            for stream, pair in self.pools.items()
            for pool, twin in zip(pair, other.pools[stream], strict=True)
        }
        twins: dict[int, _Block] = {}
        for blocks in (self.free, self.used):
            for block in blocks.values():
                twin = twins[block.address] = _Block(
                    block.address, block.size, pools[id(block.pool)]
                )
                twin.free, twin.requested = block.free, block.requested
        for blocks in (self.free, self.used):
            for block in blocks.values():
                if block.next is not None:
                    twin, following = twins[block.address], twins[block.next.address]
                    twin.next, following.previous = following, twin
        other.free = {address: twins[address] for address in self.free}
        other.used = {identity: twins[block.address] for identity, block in self.used.items()}
        return other

    def signature(self) -> int:
        """What is held, by pool in the order of addresses: two states with the same one serve events alike.

        Right after segments were given back, when each has a block in use, which says what pool it is of.
        """
        held: dict[int, list[tuple[int, int, int, bool]]] = {
            id(pool): [] for pair in self.pools.values() for pool in pair
        }
        for identity, block in self.used.items():
            held[id(block.pool)].append(
                (block.address, identity, block.size, block.previous is None)
            )
        for block in self.free.values():
            held[id(block.pool)].append((block.address, 0, block.size, block.previous is None))
        return hash(tuple(tuple(block[1:] for block in sorted(blocks)) for blocks in held.values()))

    def release(self) -> None:
        """Give back the segments that are free as a whole (``release_blocks``)."""
        free = self.free
        for pool in (pool for stream, pair in self.pools.items() if stream >= 0 for pool in pair):
            kept = []
            for key in pool:
                block = free[key & _ADDRESS_MASK]
                if block.previous is None and block.next is None:
                    self.reserved -= free.pop(block.address).size
                else:
                    kept.append(key)
            pool[:] = kept

    def make_segment(
        self, size: int, pool: list[int], index: int, grow: bool, private: bool
    ) -> _Block:
        """A new segment as one block (``alloc_block``); under pressure free segments are given back first."""
        segment = segment_size(size)
        served = self.within(self.reserved + segment, index)
        if not served and not private:
            self.retries += 1
            self.release()
            if self.released is not None:
                self.released(index)
            served = self.within(self.reserved + segment, index)
        if not served:
            if not grow:
                raise OutOfMemory(index, self.reserved + segment, self.capacity)
            self.capacity = self.reserved + segment
        if segment > LARGE_SEGMENT:
            self.high -= segment
            block = _Block(self.high, segment, pool)
        else:
            block = _Block(self.low, segment, pool)
            self.low += segment
        if self.high < self.low:
            raise no_addresses(self.reserved)
        self.reserved += segment
        return block

    def allocate(self, identity: int, count: int, index: int, grow: bool) -> None:
        """Take the best free block, of those the one at the lowest address, else a new segment (``get_free_block``)."""
        size = round_size(count)
        stream = self.streams.get(identity, 0) if self.streams else 0
        small, large = self.pools.get(stream) or self.pools.setdefault(stream, ([], []))
        pool = small if size <= SMALL else large
        place = bisect_left(pool, size << _ADDRESS_BITS)
        if place < len(pool):
            block = self.free.pop(pool.pop(place) & _ADDRESS_MASK)
            block.free = False
        else:
            block = self.make_segment(size, pool, index, grow, stream < 0)
        rest = block.size - size
        if rest > SMALL or (rest >= MIN_BLOCK and pool is small):  # should_split
            self._split(block, size)
        block.requested = count
        self.used[identity] = block
        self.allocated += block.size
        self.requested += count

    def free_block(self, identity: int) -> None:
        """Free a block, together with free neighbours (``free_block``, ``try_merge_blocks``)."""
        block = self.used.pop(identity, None)
        if block is None:
            return
        self.allocated -= block.size
        self.requested -= block.requested
        if block.previous is not None and block.previous.free:
            block = self._merge(block.previous, block)
        if block.next is not None and block.next.free:
            block = self._merge(block, block.next)
        self._add(block)

    def _split(self, block: _Block, size: int) -> None:
        """Leave a block so many bytes; the rest is a free one behind it."""
        rest = _Block(block.address + size, block.size - size, block.pool)
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next, block.size = rest, size
        self._add(rest)

    def _merge(self, block: _Block, following: _Block) -> _Block:
        """One block of two neighbours, which is on no list."""
        for part in (block, following):
            if part.free:
                del (
                    part.pool[bisect_left(part.pool, part.size << _ADDRESS_BITS | part.address)],
                    self.free[part.address],
                )
        block.size += following.size
        block.next = following.next
        if following.next is not None:
            following.next.previous = block
        block.free = False
        return block

    def _add(self, block: _Block) -> None:
        block.free = True
        self.free[block.address] = block
        insort(block.pool, block.size << _ADDRESS_BITS | block.address)
