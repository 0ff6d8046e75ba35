"""Stretches put together for any depth: what one layer frees of another, and orders that nobody recorded."""

import pytest

from dryfit.derived.layers import (
    CHUNK,
    CHUNK_RADIUS,
    Layers,
    UnknownOrder,
    absolute,
    relation,
    window,
)

ALIKE = "aaaaaaa"
MIXED = "ssfssf"


@pytest.mark.parametrize("kinds", [ALIKE, MIXED])
def test_where_another_stretch_lies_is_found_again(kinds) -> None:
    places = [("g", 3), *((2, layer) for layer in range(len(kinds)))]
    for own in places:
        for other in places:
            assert absolute(own, relation(own, other, kinds), kinds) == other


def test_places_are_counted_from_the_first_or_the_last() -> None:
    assert absolute(("g", 0), relation(("g", 0), (1, 4), "aaaaa"), "a" * 30) == (1, 29)
    assert absolute(("g", 0), relation(("g", 0), (1, 0), "aaaaa"), "a" * 30) == (1, 0)
    loops = {3: CHUNK * 9}
    assert relation((3, 0), (3, 7), "aaaaa", loops) == ("E", 3, 1)
    assert absolute((3, 0), ("E", 3, 1), "aaaaa", {3: CHUNK * 20}) == (3, 18)
    assert relation((3, 4), (3, 5), "aaaaa", loops) == ("L", 3, 1)


# Forward each layer keeps a tensor for its backward pass, which frees it; the step frees what it made itself.
FORWARD, BACKWARD, APART, ENDS = 0, 1, 2, 3
STEP = {
    "program": [["g", 0, APART], ["pass", 0, 1], ["pass", 1, -1], ["g", 1, ENDS]],
    "templates": [
        [[1, 0, ["L", 1, 0]], [2, 0], 1],
        [[["L", 0, 0], 0]],
        [[0, 0, ["g", 1]]],
        [[["g", 0], 0], None],
    ],
    "choices": {
        str(at): [[list(window("aaaaa", layer, 2)), template] for layer in range(5)]
        for at, template in ((0, FORWARD), (1, BACKWARD))
    },
}


def test_events_are_put_together_for_other_depths() -> None:
    composed = Layers(**STEP).compose("a" * 6, lambda number: 10 + number)
    assert composed.events[0] == (1, 10)
    assert composed.events[1:4] == [(2, 11), (3, 12), (-3, 0)]
    assert composed.events[-8:] == [
        (-12, 0),
        (-10, 0),
        (-8, 0),
        (-6, 0),
        (-4, 0),
        (-2, 0),
        (-1, 0),
        (0, 0),
    ]
    step = {**STEP, "templates": [[[1, 0, ["L", 1, 0]], [-1, 0], 1], *STEP["templates"][1:]]}
    composed = Layers(**step).compose("a" * 5, lambda number: 0 if number < 0 else 10 + number)
    assert len([event for event in composed.events if event[0] > 0]) == 6
    assert [about for _, about in composed.about] == [0, 1, 1, 1, 1, 1]
    for kinds in ("aaa", "aabaa"):
        with pytest.raises(UnknownOrder):
            Layers(**STEP).compose(kinds, lambda number: 1)


# A loss in chunks: each keeps its sum until the next one, the last one until the step's end.
CHUNKED = {
    "program": [["g", 0, 0], ["loop", 0, 1], ["g", 1, 3]],
    "templates": [
        [[0, 0]],
        [[1, 0, ["L", 0, 1]], [2, 0], 1],
        [[1, 0, ["L", 0, 1]], [["L", 0, -1], 0]],
        [[["E", 0, 0], 0]],
        [[1, 0, ["g", 1]], [["L", 0, -1], 0]],
    ],
    "choices": {
        "0": [
            [list(window(CHUNK * count, chunk, CHUNK_RADIUS)), template]
            for count, templates in ((2, (1, 4)), (3, (1, 2, 4)), (5, (1, 2, 2, 2, 4)))
            for chunk, template in enumerate(templates)
        ]
    },
}


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_chunks_are_put_together_in_any_number(count) -> None:
    composed = Layers(**CHUNKED).compose("aaaaa", lambda number: 10 + number, CHUNK * count)
    made = [identity for identity, _ in composed.events if identity > 0]
    assert len(made) == count + 2
    assert {-identity for identity, _ in composed.events if identity < 0} == {*made[1:]}
    assert composed.events[-1] == (-made[-1], 0)
