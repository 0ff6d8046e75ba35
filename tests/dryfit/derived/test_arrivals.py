"""Experts arrive one by one, are stacked by source and put side by side; the step behind them stays as it was."""

import pytest

from dryfit.derived.arrivals import arrived
from dryfit.derived.layers import Composition, UnknownOrder

# A block that is given back, a plain weight, gate and up of two experts in one tensor, a buffer; then a step.
WHOLE = Composition(
    [(1, 90), (-1, 0), (2, 10), (3, 80), (4, 6), (5, 7), (-5, 0), (-3, 0)],
    [("forward", 0, 5)],
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)],
)
GATE_AND_UP = {1: 0, 2: 2}
MERGED = [
    (3, 20),
    (4, 20),
    (5, 20),
    (6, 20),  # two experts of gate, two of up
    (7, 40),
    (-3, 0),
    (-4, 0),
    (8, 40),
    (-5, 0),
    (-6, 0),  # each source stacked
    (9, 80),
    (-7, 0),
    (-8, 0),
]
REST = [(10, 6), (11, 7), (-11, 0), (-9, 0)]


def test_the_order_of_arrivals_is_that_of_one_thread() -> None:
    composed = arrived(WHOLE, {2: 2}, experts=2, workers=1, seed=0)
    assert composed.events == [(1, 90), (-1, 0), (2, 10), *MERGED, *REST]
    assert composed.marks == [("forward", 0, 17)]
    assert [composed.about[identity - 1] for identity in (2, 9, 10, 11)] == WHOLE.about[1:]
    with pytest.raises(UnknownOrder):
        arrived(WHOLE, {0: 0, **GATE_AND_UP}, experts=2, workers=4, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_several_threads_leave_the_same_tensors(seed) -> None:
    composed = arrived(WHOLE, GATE_AND_UP, experts=2, workers=4, seed=seed)
    begin = composed.marks[0][2]
    held: dict[int, int] = {}
    for identity, size in composed.events[:begin]:
        held |= {identity: size} if identity > 0 else {}
        held.pop(-identity, None)
    assert sorted(held.values()) == [6, 10, 80]
    assert len(composed.events) - begin == 3
