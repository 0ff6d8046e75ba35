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


def test_wilson_reaches_the_ends_exactly_and_refuses_what_is_no_proportion():
    assert wilson_interval(0, 200)[0] == 0.0 and wilson_interval(200, 200)[1] == 1.0
    with pytest.raises(ValueError):
        wilson_interval(1, 0)
    with pytest.raises(ValueError):
        wilson_interval(3, 2)


def test_the_bootstrap_finds_a_shift_and_heeds_the_weights():
    generator = random.Random(1)
    differences = [generator.gauss(0.5, 1.0) for _ in range(200)]
    low, high = paired_bootstrap_interval(differences)
    # The normal interval of this sample is 0.5 -+ 0.14.
    assert 0.25 < low < 0.5 < high < 0.75
    assert (low, high) == paired_bootstrap_interval(differences)
    low, high = paired_bootstrap_interval([1.0, -1.0] * 50)
    assert low < 0 < high
    generator = random.Random(2)
    differences = [generator.gauss(0.0, 1.0) for _ in range(1000)]
    low, high = paired_bootstrap_interval(differences)
    deviation = (sum(value * value for value in differences) / 1000) ** 0.5
    # 1.96 standard errors to each side; with 5 % at each end it would be 1.645.
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / 1000**0.5, rel=0.06)
    differences, weights = [1.0, -1.0] * 50, [9.0, 1.0] * 50
    low, high = paired_bootstrap_interval(differences, weights)
    assert 0.5 < low < 0.8 < high < 1.0
