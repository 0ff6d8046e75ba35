"""Which capacities serve a sequence, against replays at each: more memory may hurt."""

import random

import pytest

from dryfit.engine.allocator import MIB, OutOfMemory
from dryfit.engine.capacities import APART, Capacities, capacities, served_at
from dryfit.engine.interpolate import Recording
from dryfit.engine.replay import peak_blocks, replay

pytestmark = pytest.mark.usefixtures("each_replay")

STEP = 2 * MIB


def step_events(seed: int, layers: int = 14, widen: int = 1) -> list[tuple[int, int]]:
    """Events like a training step's: weights, then twice activations by layer and their frees the other way round."""
    draw = random.Random(seed)
    events, identity = [], 0

    def allocate(low: float, high: float) -> int:
        nonlocal identity
        identity += 1
        events.append((identity, widen * int(2 ** draw.uniform(low, high))))
        return identity

    for _ in range(3 * layers):
        allocate(16, 23)
    sizes = [[draw.uniform(17, 25) for _ in range(4)] for _ in range(layers)]
    for _ in range(2):
        kept = []
        for layer in sizes:
            kept.append([allocate(size, size) for size in layer])
            events.append((-allocate(20, 26), 0))
        for layer in reversed(kept):
            events += [
                (-allocate(22, 25), 0),
                *((-one, 0) for one in draw.sample(layer, len(layer))),
            ]
            if draw.random() < 0.3:
                allocate(15, 21)  # a gradient, which stays
    return events


def is_served(events, capacity: int, *, expandable: bool, streams=None) -> bool:
    try:
        replay(events, capacity_bytes=capacity, streams=streams, expandable_segments=expandable)
    except OutOfMemory:
        return False
    return True


def top(events, *, expandable: bool) -> int:
    return replay(events, expandable_segments=expandable).peak_reserved_bytes


@pytest.mark.few(12)
@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_capacity_is_as_its_own_replay_says(seed, expandable):
    events = step_events(seed)
    sizes = range(
        peak_blocks(events) // STEP * STEP - 8 * STEP,
        top(events, expandable=expandable) + 4 * STEP,
        STEP,
    )
    found = capacities(events, expandable_segments=expandable, sizes=sizes)
    truth = {size: is_served(events, size, expandable=expandable) for size in sizes}
    assert {size: found.fits(size) for size in sizes} == truth
    assert is_served(events, found.required_bytes, expandable=expandable)
    refused = [size for size in sizes if not truth[size]]
    assert max(refused) < found.required_bytes <= max(refused) + STEP
    low, high, fits = served_at(sizes[9], events, expandable_segments=expandable)
    assert low <= sizes[9] < high and fits == truth[sizes[9]]
    assert all(truth[size] == fits for size in sizes if low <= size < high)


def few_events(seed: int) -> list[tuple[int, int]]:
    """A dozen segments' worth of allocations and frees."""
    draw = random.Random(seed)
    alive, events = [], []
    for identity in range(1, 30):
        while alive and draw.random() < 0.45:
            events.append((-alive.pop(draw.randrange(len(alive))), 0))
        alive.append(identity)
        events.append((identity, draw.choice((2, 6, 10, 14, 20, 24, 30, 40)) * MIB))
    return events


@pytest.mark.few(1)
@pytest.mark.parametrize("expandable", [False, True])
def test_many_short_sequences_of_which_some_are_served_by_less_and_not_by_more(expandable):
    odd = 0
    for seed in range(150):
        events = few_events(seed)
        sizes = range(
            peak_blocks(events) // STEP * STEP, top(events, expandable=expandable) + STEP, STEP
        )
        found = capacities(events, expandable_segments=expandable, sizes=sizes)
        assert [found.fits(size) for size in sizes] == [
            is_served(events, size, expandable=expandable) for size in sizes
        ]
        odd += bool(found.also_fits)
    assert (
        expandable or odd >= 3
    )  # where more never hurts, this proves nothing that bisection would not pass


@pytest.mark.parametrize("seed", range(6))
def test_of_large_steps_the_border_and_the_sizes_asked_about_are_exact(seed):
    events = step_events(seed, widen=40)
    draw = random.Random(seed)
    reserved, least = top(events, expandable=False), peak_blocks(events)
    sizes = [draw.randrange(least, reserved) for _ in range(12)]
    found = capacities(events, sizes=sizes)
    for size in sizes:
        assert found.fits(size) == is_served(events, size, expandable=False)
    assert not is_served(events, found.required_bytes - 512, expandable=False)
    coarse = least // 512
    for size in range(
        found.required_bytes, reserved, coarse
    ):  # each interval that was seen serves as a whole
        low, high, fits = served_at(size, events)
        assert fits or high - low <= coarse


def test_capacities_at_their_borders():
    """With 40 MiB the first segment of 20 is given back, and 10 MiB get one of their own. With 44 they lie in it."""
    events = [(1, 6 * MIB), (-1, 0), (2, 24 * MIB), (3, 10 * MIB), (-2, 0), (4, 30 * MIB)]
    served = [size for size in range(30, 60, 2) if is_served(events, size * MIB, expandable=False)]
    assert served == [40, 42, 50, 52, 54, 56, 58]
    assert capacities(events) == Capacities(50 * MIB)
    assert capacities(events, sizes=[41 * MIB, 46 * MIB]) == Capacities(
        50 * MIB, ((40 * MIB, 44 * MIB),)
    )
    assert capacities([]) == Capacities(0)
    assert capacities([(1, 0), (-1, 0)]).fits(0)
    # Of 2 GiB a step is 4 MiB: 2,080 MiB is one, and 2,078 suffice, where the small segment is given back.
    events = [(1, 2048 * MIB), (2, 512), (-2, 0), (3, 30 * MIB)]
    assert capacities(events) == Capacities(2078 * MIB)


@pytest.mark.parametrize("expandable", [False, True])
def test_streams_have_pools_of_their_own(expandable):
    events, streams = [(1, 30 * MIB), (-1, 0), (2, 30 * MIB)], {2: 7}
    assert (
        capacities(events).required_bytes == capacities(events, streams).required_bytes == 30 * MIB
    )
    for seed in range(20):
        events, streams = few_events(seed), {5: 1, 9: 1, 12: 2}
        sizes = range(
            peak_blocks(events) // STEP * STEP, top(events, expandable=expandable) + 20 * STEP, STEP
        )
        found = capacities(events, streams, expandable_segments=expandable, sizes=sizes)
        for size in sizes:
            assert found.fits(size) == is_served(
                events, size, expandable=expandable, streams=streams
            )


def test_of_several_orders_all_have_to_be_served():
    first, second = Capacities(100, ((60, 70), (30, 40))), Capacities(90, ((35, 65),))
    found = Capacities.of_all([first, second])
    assert found == Capacities(100, ((60, 65), (35, 40)))
    assert [size for size in (34, 35, 39, 40, 60, 64, 65, 90, 99, 100) if found.fits(size)] == [
        35,
        39,
        60,
        64,
        100,
    ]
    assert Capacities.of_all([first]) == first
    both = Recording([few_events(1), few_events(2)])
    size = both.required_bytes()
    assert size == max(one.required_bytes for one in both.capacities())
    assert both.fits(size) and not both.fits(size - 512)
    low, high, fits = both.served_at(size)
    assert fits and low == size < high


def test_a_size_that_is_asked_about_counts_between_two_steps_of_the_search():
    """Of 8 GiB a step is 16 MiB, and passes over the 6 MiB in which this fails."""
    odd = [(2, 6), (-2, 0), (3, 24), (4, 10), (-3, 0), (5, 30)]
    events = [(1, 8198 * MIB), *((identity, size * MIB) for identity, size in odd)]
    assert capacities(events) == Capacities(8238 * MIB)
    assert capacities(events, sizes=[8244 * MIB]) == Capacities(8248 * MIB)
    found = capacities(events, sizes=[8244 * MIB, 8240 * MIB])
    assert found == Capacities(8248 * MIB, ((8238 * MIB, 8242 * MIB),))
    assert [found.fits(size * MIB) for size in (8237, 8238, 8241, 8242, 8244, 8248)] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.few(1)
def test_long_histories_go_on_from_copies():
    draw, events, alive = random.Random(5), [], []
    for identity in range(1, 9000):
        while alive and draw.random() < 0.5 and len(alive) > 12:
            events.append((-alive.pop(draw.randrange(len(alive))), 0))
        alive.append(identity)
        events.append(
            (identity, draw.choice((1, 2, 6, 10, 14, 24)) * MIB - draw.randrange(2) * 700 * 1024)
        )
        if len(alive) > 30:
            events += [(-one, 0) for one in alive]
            alive.clear()
    assert len(events) > 3 * APART
    for expandable in (False, True):
        sizes = range(
            peak_blocks(events) // STEP * STEP, top(events, expandable=expandable) + STEP, 3 * STEP
        )
        found = capacities(events, expandable_segments=expandable, sizes=sizes)
        assert [found.fits(size) for size in sizes] == [
            is_served(events, size, expandable=expandable) for size in sizes
        ]
        assert not is_served(events, found.required_bytes - 512, expandable=expandable)
        low, _, fits = served_at(sizes[2], events, expandable_segments=expandable)
        assert is_served(events, low, expandable=expandable) is fits
