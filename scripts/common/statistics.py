"""Intervals: a difference is claimed only where the sample is large enough for it."""

import math
import random
from collections.abc import Iterable, Sequence

RESAMPLES = 2000
VERDICTS = {1: "better", -1: "worse", 0: "difference too small for this sample"}
Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); honest near 0 and 1, where the usual one is not.

    ValueError: when ``n`` is not positive or ``successes`` is not between 0 and ``n``.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a proportion")
    share, z2 = successes / n, Z_95 * Z_95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the exact bound is 0 or 1; the formula misses it by a rounding error.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def share(flags: Iterable[bool]) -> dict[str, float]:
    """How many of ``n`` rows hold, as a ``count`` and a ``share`` with its 95 % Wilson interval."""
    rows = list(flags)
    count, n = sum(rows), len(rows)
    low, high = wilson_interval(count, n)
    return {"count": count, "high_95": high, "low_95": low, "n": n, "share": count / n}


def by_unit(
    differences: Sequence[float], units: Sequence[object], weights: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """The (weighted) mean difference of each unit's rows, and its weight; None as a unit is a unit of its own.

    Rows that ask for one thing are right or wrong together. So intervals and tests count what was asked for, not rows.
    """
    sums: dict[object, list[float]] = {}
    for number, (unit, difference) in enumerate(zip(units, differences, strict=True)):
        weight = 1.0 if weights is None else weights[number]
        one = sums.setdefault(("row", number) if unit is None else unit, [0.0, 0.0])
        one[0] += difference * weight
        one[1] += weight
    return [total / weight for total, weight in sums.values()], [
        weight for _, weight in sums.values()
    ]


def sign_flip_p(differences: Sequence[float], weights: Sequence[float]) -> float:
    """Two-sided p of paired differences, were their signs drawn by chance (Fisher's randomization test).

    Exact for few differences, else of 9,999 draws with a fixed seed, so never below 1 in 10,000.
    """
    import numpy as np
    from scipy.stats import permutation_test

    sums = np.array([one * weight for one, weight in zip(differences, weights, strict=True) if one])
    if not len(sums):
        return 1.0
    if len(sums) == 1:
        return 1.0  # one unit says nothing: either sign is as far from zero
    found = permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=9_999, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)


def paired_bootstrap_interval(
    differences: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """95 % percentile interval of the (weighted) mean of paired differences, resampling rows (Efron 1979)."""
    n = len(differences)
    weights = [1.0] * n if weights is None else weights
    generator = random.Random(0)
    means = []
    for _ in range(RESAMPLES):
        rows = generator.choices(range(n), k=n)
        means.append(sum(differences[i] * weights[i] for i in rows) / sum(weights[i] for i in rows))
    means.sort()
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def sign(low: float, high: float) -> int:
    """1 when the whole interval is above zero, -1 when it is below, else 0."""
    return int(low > 0) - int(high < 0)


def paired(
    base: Sequence[float], tuned: Sequence[float], intents: Sequence[str | None] | None = None
) -> dict:
    """Tuned minus base on a metric of which more is better, over the same rows: 95 % bootstrap interval and p."""
    differences = [float(after) - float(before) for before, after in zip(base, tuned, strict=True)]
    units = by_unit(differences, intents or [None] * len(differences))
    low, high = paired_bootstrap_interval(*units)
    return {
        "difference": sum(differences) / len(differences),
        "gained": sum(one > 0 for one in differences),
        "high_95": high,
        "lost": sum(one < 0 for one in differences),
        "low_95": low,
        "p": sign_flip_p(*units),
        "units": len(units[0]),
        "verdict": VERDICTS[sign(low, high)],
    }
