"""Expandable segments: ranges grow in pieces, neighbours merge, nothing is left behind a request."""

import random

import pytest

from dryfit.engine.allocator import EMPTY_CACHE, MIB, OutOfMemory
from dryfit.engine.capacities import capacities
from dryfit.engine.replay import replay

pytestmark = pytest.mark.usefixtures("each_replay")


def replay_expandable(*arguments, **how):
    return replay(*arguments, expandable_segments=True, **how)


def test_a_range_is_mapped_in_pieces_grows_and_is_unmapped():
    small, large = replay_expandable([(1, 100)]), replay_expandable([(1, 2 * MIB)])
    assert (small.peak_allocated_bytes, small.peak_reserved_bytes) == (512, 2 * MIB)
    assert (large.peak_allocated_bytes, large.peak_reserved_bytes) == (2 * MIB, 20 * MIB)
    run = replay_expandable([(1, 19 * MIB + 512 * 1024), (2, 5 * MIB), (-1, 0), (3, 19 * MIB)])
    assert (
        run.allocated_bytes == 24 * MIB
    )  # a plain segment would have kept the half mebibyte with the block
    run = replay_expandable([(1, 30 * MIB), (2, 30 * MIB), (-1, 0), (-2, 0), (3, 70 * MIB)])
    assert run.peak_reserved_bytes == 80 * MIB
    run = replay_expandable([(1, 30 * MIB), (2, 10 * MIB), (-1, 0), (3, 40 * MIB)])
    assert (
        run.peak_reserved_bytes == 80 * MIB
    )  # the hole of 30 is too small; beside it the range grows
    events = [(1, 45 * MIB), (2, 20 * MIB), (-1, 0), EMPTY_CACHE]
    run = replay_expandable(events)
    assert run.reserved_bytes == 80 * MIB - 40 * MIB
    again = replay_expandable([*events, (3, 45 * MIB)])
    assert again.reserved_bytes == 80 * MIB


def test_a_full_gpu_gives_free_pieces_back_before_it_fails():
    events = [(1, 40 * MIB), (2, 20 * MIB), (-1, 0), (3, 60 * MIB)]
    with pytest.raises(OutOfMemory) as caught:
        replay_expandable(events, capacity_bytes=60 * MIB)
    assert caught.value.event_index == 3
    small = [(1, 40 * MIB), (2, 512), (-1, 0), *((number, 1000) for number in range(3, 5000))]
    run = replay_expandable(small, capacity_bytes=42 * MIB)
    assert run.retries == 1
    assert (
        replay_expandable(events, capacity_bytes=0, grow=True).capacity_bytes
        >= capacities(events, expandable_segments=True).required_bytes
    )


def test_random_sequences_lose_nothing():
    draw = random.Random(0)
    for _ in range(20):
        events, alive, biggest = [], {}, 0
        for identity in range(1, 300):
            size = draw.choice([100, 5000, MIB + 1, 3 * MIB, 25 * MIB])
            events.append((identity, size))
            alive[identity] = size
            biggest = max(biggest, sum(alive.values()))
            if draw.random() < 0.6:
                gone = draw.choice(list(alive))
                del alive[gone]
                events.append((-gone, 0))
            if draw.random() < 0.02:
                events.append(EMPTY_CACHE)
        run = replay_expandable(events, [("", 0), ("", len(events) // 2)])
        assert (
            run.peak_requested_bytes
            == biggest
            <= run.peak_allocated_bytes
            <= run.peak_reserved_bytes
        )
        assert run.requested_bytes == sum(alive.values())
        assert max(span.peak_allocated_bytes for span in run.spans) == run.peak_allocated_bytes
        needed = capacities(events, expandable_segments=True).required_bytes
        assert run.peak_allocated_bytes <= needed <= run.peak_reserved_bytes
        everything = [*events, *((-identity, 0) for identity in alive), EMPTY_CACHE]
        assert replay_expandable(everything).reserved_bytes == 0
