"""Intervals, against published and simulated values."""

import random

import pytest

from scripts.common.statistics import paired_bootstrap_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),  # the same
        (0, 20, 0.0, 0.1611),  # the same
        (1, 29, 0.0061, 0.1718),  # the same
    ],
)
def test_wilson_against_newcombe(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_reaches_the_ends_exactly():
    assert wilson_interval(0, 200)[0] == 0.0 and wilson_interval(200, 200)[1] == 1.0


def test_wilson_refuses_what_is_no_proportion():
    with pytest.raises(ValueError):
        wilson_interval(1, 0)
    with pytest.raises(ValueError):
        wilson_interval(3, 2)


def test_bootstrap_finds_a_shift_and_is_deterministic():
    generator = random.Random(1)
    differences = [generator.gauss(0.5, 1.0) for _ in range(200)]
    low, high = paired_bootstrap_interval(differences)
    # The normal interval of this sample is 0.5 -+ 0.14.
    assert 0.25 < low < 0.5 < high < 0.75
    assert (low, high) == paired_bootstrap_interval(differences)


def test_bootstrap_admits_that_there_is_nothing():
    low, high = paired_bootstrap_interval([1.0, -1.0] * 50)
    assert low < 0 < high
