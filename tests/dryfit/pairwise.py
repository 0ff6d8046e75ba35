"""Rows in which every value of each factor meets every value of each other one, instead of the full product."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def pairs_of(row: Row) -> set[tuple[tuple[str, Any], ...]]:
    return set(combinations(sorted(row.items()), 2))


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Rows that cover each pair of values that an allowed row has; the same ones each time.

    Greedy: of all rows the one that covers the most pairs that are not covered yet. A few rows more than the fewest.
    """
    rows = [
        row
        for values in product(*factors.values())
        if allowed(row := dict(zip(factors, values, strict=True)))
    ]
    left = set().union(*map(pairs_of, rows))
    chosen = []
    while left:
        chosen.append(max(rows, key=lambda row: len(pairs_of(row) & left)))
        left -= pairs_of(chosen[-1])
    return chosen
