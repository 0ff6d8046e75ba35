"""The allocator's rules, one by one on sequences small enough to check by hand, and all of them against a slow twin."""

import random

import pytest

from dryfit.engine.allocator import (
    EMPTY_CACHE,
    MIB,
    OutOfMemory,
    round_size,
    segment_size,
    typical_block,
)
from dryfit.engine.capacities import capacities
from dryfit.engine.replay import replay

pytestmark = pytest.mark.usefixtures("each_replay")


def required_bytes(events):
    return capacities(events).required_bytes


def random_events(count: int, seed: int) -> list[tuple[int, int]]:
    """Allocations of 256 bytes to 64 MiB and frees in random order, about 40 alive at a time."""
    draw = random.Random(seed)
    alive, events, identity = [], [], 0
    for _ in range(count):
        if alive and draw.random() < 0.5 + 0.01 * (len(alive) - 40):
            events.append((-alive.pop(draw.randrange(len(alive))), 0))
        else:
            identity += 1
            alive.append(identity)
            events.append((identity, int(2 ** draw.uniform(8, 26))))
    return events


def slow_twin(events: list[tuple[int, int]]) -> tuple[int, int]:
    """The same rules written down without any index: segments are lists of [size, identity or None]."""
    segments: list[tuple[bool, list[list]]] = []
    allocated_peak = reserved_peak = 0
    for identity, count in events:
        if identity < 0:
            for _, blocks in segments:
                for block in blocks:
                    if block[1] == -identity:
                        block[1] = None
                k = 0
                while k + 1 < len(blocks):
                    if blocks[k][1] is None and blocks[k + 1][1] is None:
                        blocks[k][0] += blocks.pop(k + 1)[0]
                    else:
                        k += 1
        else:
            size = max(512, -(-count // 512) * 512)
            is_small = size <= MIB
            fitting = [
                # Segments up to 20 MiB lie below the larger ones, each above the ones before it; larger ones downward.
                (block[0], *((0, s) if sum(size for size, _ in blocks) <= 20 * MIB else (1, -s)), b)
                for s, (small, blocks) in enumerate(segments)
                for b, block in enumerate(blocks)
                if small == is_small and block[1] is None and block[0] >= size
            ]
            if not fitting:
                total = (
                    2 * MIB
                    if is_small
                    else 20 * MIB
                    if size < 10 * MIB
                    else -(-size // (2 * MIB)) * 2 * MIB
                )
                segments.append((is_small, [[total, None]]))
                fitting = [(total, 0, len(segments) - 1, 0)]
            total, _, s, b = min(fitting)
            s = abs(s)
            rest = total - size
            if (rest >= 512) if is_small else (rest > MIB):
                segments[s][1][b] = [size, identity]
                segments[s][1].insert(b + 1, [rest, None])
            else:
                segments[s][1][b][1] = identity
        blocks = [block for _, blocks in segments for block in blocks]
        allocated_peak = max(
            allocated_peak, sum(size for size, owner in blocks if owner is not None)
        )
        reserved_peak = max(reserved_peak, sum(size for size, _ in blocks))
    return allocated_peak, reserved_peak


@pytest.mark.parametrize(
    "requested, block", [(1, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)]
)
def test_a_request_is_rounded_up_to_512_bytes(requested, block):
    assert round_size(requested) == block
    run = replay([(1, requested)])
    assert (run.peak_allocated_bytes, run.peak_requested_bytes) == (block, requested)


@pytest.mark.parametrize(
    "size, segment",
    [
        (512, 2),
        (MIB, 2),
        (MIB + 512, 20),
        (10 * MIB - 512, 20),
        (10 * MIB, 10),
        (10 * MIB + 512, 12),
        (21 * MIB, 22),
    ],
)
def test_segments(size, segment):
    assert segment_size(size) == segment * MIB
    assert replay([(1, size)]).peak_reserved_bytes == segment * MIB


def test_blocks_are_split_chosen_and_merged():
    kept = replay(
        [(1, 21 * MIB)]
    )  # a segment of 22 MiB: the rest of exactly 1 MiB is not split off
    split = replay([(1, 21 * MIB - 512)])
    assert kept.peak_allocated_bytes == 22 * MIB
    assert split.peak_allocated_bytes == 21 * MIB - 512
    assert replay([(1, 512), (2, 2 * MIB // 2 - 512), (3, MIB)]).peak_reserved_bytes == 2 * MIB
    # Two free blocks of 12 MiB and one of 14; a request of 12 takes one of the two, one of 13 the third.
    events = [
        (1, 14 * MIB),
        (2, 12 * MIB),
        (3, 12 * MIB),
        (-1, 0),
        (-2, 0),
        (-3, 0),
        (4, 12 * MIB),
        (5, 13 * MIB),
    ]
    run = replay(events)
    assert run.reserved_bytes == 38 * MIB
    assert run.allocated_bytes == 26 * MIB  # 13 MiB in the block of 14: rest of 1 MiB unsplit
    events = [(1, 5 * MIB), (2, 5 * MIB), (3, 5 * MIB), (-1, 0), (-3, 0), (-2, 0), (4, 20 * MIB)]
    assert replay(events).peak_reserved_bytes == 20 * MIB
    run = replay([(1, 0), (-1, 0), (-7, 0)])
    assert (run.peak_allocated_bytes, run.peak_reserved_bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(6))
def test_against_the_slow_twin(seed):
    events = random_events(400, seed)
    run = replay(events)
    assert (run.peak_allocated_bytes, run.peak_reserved_bytes) == slow_twin(events)
    assert run.peak_requested_bytes <= run.peak_allocated_bytes <= run.peak_reserved_bytes


def test_spans_start_from_what_is_alive():
    events = [(1, 4 * MIB), (2, 8 * MIB), (-2, 0), (3, 2 * MIB), (-3, 0)]
    run = replay(events, marks=[("load", 0), ("forward", 3), ("backward", 5)])
    assert [(s.phase, s.start_allocated_bytes, s.peak_allocated_bytes) for s in run.spans] == [
        ("load", 0, 12 * MIB),
        ("forward", 4 * MIB, 6 * MIB),
        ("backward", 4 * MIB, 4 * MIB),
    ]
    assert run.phases == {"load": 12 * MIB, "forward": 6 * MIB, "backward": 4 * MIB}
    assert run.peak_allocated_bytes == 12 * MIB


def test_free_segments_are_given_back_under_pressure():
    events = [(1, 30 * MIB), (-1, 0), (2, 40 * MIB)]
    assert replay(events).peak_reserved_bytes == 70 * MIB
    tight = replay(events, capacity_bytes=40 * MIB)
    assert (tight.peak_reserved_bytes, tight.retries) == (40 * MIB, 1)
    with pytest.raises(OutOfMemory) as failure:
        replay(events, capacity_bytes=38 * MIB)
    assert (failure.value.event_index, failure.value.needed_bytes) == (2, 40 * MIB)
    events = [(1, 512), (-1, 0), (2, 40 * MIB)]
    assert (
        replay(events, capacity_bytes=40 * MIB).reserved_bytes == required_bytes(events) == 40 * MIB
    )
    assert replay([(1, 512), (-1, 0), EMPTY_CACHE]).reserved_bytes == 0
    held = [(1, 512), (2, 40 * MIB)]
    assert required_bytes(held) == 42 * MIB
    events = [(1, 5 * MIB), (2, 5 * MIB), (-1, 0), (3, 40 * MIB)]
    assert required_bytes(events) == 60 * MIB
    run = replay([(1, 30 * MIB), (2, 5 * MIB), (3, 5 * MIB), (-1, 0), (-2, 0), EMPTY_CACHE])
    assert run.reserved_bytes == 20 * MIB  # the segment that event 3 still uses stays
    assert run.peak_reserved_bytes == 50 * MIB


@pytest.mark.parametrize(
    "size, required", [(30 * MIB, 30), (30 * MIB - 512, 30), (30 * MIB + 512, 32), (512, 2)]
)
def test_required_at_its_edge(size, required):
    """The blocks in use at the peak may be all that is required, to the byte."""
    assert required_bytes([(1, size), (-1, 0), (2, size)]) == required * MIB
    with pytest.raises(OutOfMemory):
        replay([(1, size)], capacity_bytes=(required - 2) * MIB)


def test_a_trail_and_what_is_known_of_a_run_with_plenty():
    events = random_events(300, 11)
    assert required_bytes(events) == capacities(list(events)).required_bytes
    trail: list[int] = []
    replay([(1, 512), (2, 1024), (-1, 0), (3, 1)], [("second", 1)], trail=trail)
    assert trail == [0, 512, 1536, 1024]


@pytest.mark.parametrize("seed", range(8))
def test_required_is_the_least_capacity_that_gets_through(seed):
    events = random_events(300, seed)
    required = required_bytes(events)
    assert replay(events, capacity_bytes=required).peak_reserved_bytes <= required
    plenty = replay(events)
    assert plenty.peak_allocated_bytes <= required <= plenty.peak_reserved_bytes
    for capacity in range(plenty.peak_allocated_bytes // (2 * MIB) * 2 * MIB, required, 2 * MIB):
        with pytest.raises(OutOfMemory):
            replay(events, capacity_bytes=capacity)


@pytest.mark.parametrize(
    "hole, taken", [(30 * MIB, "younger"), (18 * MIB, "younger"), (16 * MIB, "older")]
)
def test_of_two_equal_holes_the_one_at_the_lower_address_is_taken(hole, taken):
    # The older segment is 4 MiB larger than its hole. Both over 20 MiB: the younger lies below; both up to 20: above.
    # One of each: the smaller one, here the younger, lies in the lower region.
    older = hole + 4 * MIB
    both = [(1, older), (-1, 0), (2, 4 * MIB), (3, hole), (4, hole), (-3, 0), (-4, 0)]
    events = [*both, (5, hole), (-2, 0), EMPTY_CACHE]
    assert replay(events).reserved_bytes == (hole if taken == "younger" else older)


@pytest.mark.parametrize(
    ("requested", "block"),
    [
        (700 * 1024, 700 * 1024),  # what a small segment has left over serves other small requests
        (MIB, MIB),
        (3 * MIB, 3 * MIB),  # 2 MiB of 20 are left over, which serve a request of their own
        (9 * MIB + MIB // 2, 10 * MIB),  # 1 MiB is left over, too little: two blocks share it
        (9 * MIB, 9 * MIB),
        (11 * MIB - 100, 12 * MIB),  # a segment of its own, in steps of 2 MiB
    ],
)
def test_on_average_a_block_has_its_share_of_what_serves_nobody(requested, block) -> None:
    assert typical_block(requested) == block
