"""Expressions of sizes are found exactly, or not at all."""

import random

import pytest

from dryfit.derived.sizes import EXACT, value, with_rounded
from dryfit.recorder.fitting import NotFitted, fitted

BASE = {"b": 7, "s": 640, "h": 1280, "i": 2432, "V": 1408}
VARIED = [
    {**BASE, name: new}
    for name, new in {"b": 11, "s": 645, "h": 1664, "i": 3712, "V": 1664}.items()
]
OTHERS = [
    {"b": 5, "s": 901, "h": 1000, "i": 2730, "V": 50257},
    {"b": 8, "s": 709, "h": 1496, "i": 1234, "V": 1003},
    {"b": 9, "s": 333, "h": 968, "i": 3005, "V": 2176},
    {"b": 3, "s": 1152, "h": 2176, "i": 1792, "V": 3968},
]
POINTS = [with_rounded(point, (8, 0)) for point in (BASE, *VARIED, *OTHERS)]
UNSEEN = with_rounded({"b": 3, "s": 333, "h": 896, "i": 4864, "V": 151936}, (8, 0))

SIZES = {
    "a product": lambda x: 2 * x["b"] * x["s"] * x["h"],
    "a length rounded up": lambda x: 4 * x["b"] * x["s^128"],
    "a sum": lambda x: 2 * x["h"] * x["i"] + 4 * x["h"],
    "all tokens but the last of each row": lambda x: 4 * x["b"] * (x["s"] - 1),
    "scales of scales, rounded up": lambda x: -(-x["h"] * x["i"] // 16384) * 4,
    "scales of scales of two weights in one": lambda x: -(-x["h"] * (x["i"] + x["V"]) // 16384) * 4,
    "scores with a sink of each row": lambda x: 4 * x["b"] * x["s"] * (x["s"] + 1),
    "a number": lambda x: 1024,
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_an_expression_holds_at_numbers_that_were_not_given(size) -> None:
    assert value(fitted(tuple(map(size, POINTS)), POINTS, list(BASE)), UNSEEN) == size(UNSEEN)


def test_what_is_whole_everywhere_stays_exact_and_sizes_without_an_expression_are_refused() -> None:
    assert fitted(tuple(map(SIZES["a product"], POINTS)), POINTS, list(BASE))[1] == EXACT
    with pytest.raises(NotFitted):
        fitted(tuple(random.Random(1).sample(range(10**6, 10**7), len(POINTS))), POINTS, list(BASE))
