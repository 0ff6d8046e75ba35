"""An allocation's sizes at several sets of numbers as one expression in them, exactly or not at all.

The first set is the base, the next ones change one number each: the ratios say which powers of which symbols a product
has. What is left is a sum of a few products over the numbers that no power explains.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction

import numpy as np

from dryfit.derived.sizes import EXACT, WORKSPACES, Expression, Inexact, symbols_of, value

POWERS = (1, 2, 3, -1)
WIDTHS = (EXACT, 4, 2, 1, 8)  # bytes that a size is rounded up to: of elements
_MOST_COMBINATIONS = {2: 3e6, 3: 3e6, 4: 1e6}  # by how many terms
_AT_ONCE = 20_000
_NEAR = 1e-4
Sizes = tuple[int, ...]
Known = Sequence[Mapping[str, int]]  # by set of numbers the value of each symbol
Powers = list[tuple[str, int]]


class NotFitted(Exception):
    """No expression gives these sizes."""


def fitted(sizes: Sizes, known: Known, names: Sequence[str]) -> Expression:
    """The expression; ``names``: the numbers that sets 1, 2, ... vary alone.

    NotFitted: if there is none.
    """
    found = _fitted(sizes, known, names)
    if found is None:
        raise NotFitted(f"sizes {sizes[:8]}")
    return found


def _fitted(
    sizes: Sizes, known: Known, names: Sequence[str], workspace: bool = True
) -> Expression | None:
    if len(set(sizes)) == 1:
        return [[[sizes[0], 1, []]], EXACT]
    if not sizes[0]:
        return None
    for own in (own for own in WORKSPACES.values() if workspace and own in known[0]):
        if any(size % each[own] for size, each in zip(sizes, known, strict=True)):
            continue
        heads = tuple(size // each[own] for size, each in zip(sizes, known, strict=True))
        inner = _fitted(heads, known, names, workspace=False)
        if inner is not None and inner[1] == EXACT:
            return [
                [[factor, divisor, [*powers, [own, 1]]] for factor, divisor, powers in inner[0]],
                EXACT,
            ]
    choices, added = [], []
    for place, name in enumerate(names, 1):
        if sizes[place] == sizes[0]:
            continue
        ratio = Fraction(sizes[place], sizes[0])
        own = [
            (symbol, power)
            for symbol in symbols_of(name)
            for power in POWERS
            if known[0].get(symbol)
            and ratio == Fraction(known[place][symbol], known[0][symbol]) ** power
        ]
        if own:
            choices.append(own)
        else:
            added.append(name)
    for whole in (
        len(sizes),
        1 + len(names),
    ):  # the base and its single variations are whole where others are rounded
        for factors in itertools.product(*choices):
            found = _product_and_sum(sizes, known, list(factors), added, whole)
            if found is not None:
                return found
    return None


def _product_and_sum(
    sizes: Sizes, known: Known, factors: Powers, added: Sequence[str], whole: int
) -> Expression | None:
    rest = []
    for size, each in zip(sizes, known, strict=True):
        share = Fraction(size)
        for symbol, power in factors:
            share /= Fraction(each[symbol]) ** power
        rest.append(share)
    head = [[symbol, power] for symbol, power in factors]
    if not added:
        return _rounded([[rest[0].numerator, rest[0].denominator, head]], sizes, known)
    if len(added) > 6:
        return None
    for count, degrees in itertools.product(
        _MOST_COMBINATIONS, ((1,), (1, 2))
    ):  # many terms fit few numbers by chance
        symbols = [
            [(own, power) for own in symbols_of(name) if own in known[0] for power in degrees]
            for name in added
        ]
        for found in _sums(rest[:whole], known[:whole], symbols, count):
            terms = [
                [factor.numerator, factor.denominator, [*head, *map(list, term)]]
                for factor, term in found
            ]
            expression = _rounded(terms, sizes, known)
            if expression is not None:
                return expression
    return None


def _sums(
    rest: Sequence[Fraction], known: Known, symbols: Sequence[Sequence[tuple[str, int]]], count: int
) -> Iterator[list[tuple[Fraction, Powers]]]:
    """Sums of so many products that give the numbers, each with at most one symbol of each name."""
    terms = [
        [one for one in choice if one]
        for choice in itertools.product(*([None, *own] for own in symbols))
    ]
    exact = [[_product(each, term) for term in terms] for each in known]
    columns = np.array(exact, dtype=float) / np.array([float(number) for number in rest])[:, None]
    columns /= np.abs(columns).max(0)
    order = sorted(
        range(len(terms)),
        key=lambda place: (len(terms[place]), sum(power for _, power in terms[place])),
    )
    gram, ones = columns.T @ columns, columns.sum(0)
    if len(order) ** count > _MOST_COMBINATIONS[count]:
        return
    chosen = np.array(list(itertools.combinations(order, count)))
    for begin in range(0, len(chosen), _AT_ONCE):
        part = chosen[begin : begin + _AT_ONCE]
        matrices = gram[part[:, :, None], part[:, None, :]] + 1e-13 * np.eye(count)
        try:
            factors = np.linalg.solve(matrices, ones[part][..., None])[..., 0]
        except np.linalg.LinAlgError:
            continue
        worst = np.abs((columns[:, part] * factors[None]).sum(-1) - 1).max(0)
        for place in np.nonzero(worst < _NEAR)[0]:
            own = [terms[term] for term in part[place]]
            solved = _solved([[Fraction(row[term]) for term in part[place]] for row in exact], rest)
            if solved is not None:
                yield [(factor, term) for factor, term in zip(solved, own, strict=True) if factor]


def _product(known: Mapping[str, int], powers: Powers) -> int:
    made = 1
    for symbol, power in powers:
        made *= known[symbol] ** power
    return made


def _rounded(terms: list, sizes: Sizes, known: Known) -> Expression | None:
    """The sum of terms, or what it is rounded up to a whole number of elements; None: neither gives the sizes.

    Widths of elements come in this order: at odd numbers a wrong one shows. A sum that is whole everywhere stays
    exact, and answers nothing where it isn't whole.
    """
    for width in WIDTHS:
        with suppress(Inexact):
            if all(
                value([terms, width], each) == size for size, each in zip(sizes, known, strict=True)
            ):
                return [terms, width]
    return None


def _solved(rows: Sequence[Sequence[Fraction]], right: Sequence[Fraction]) -> list[Fraction] | None:
    """The exact solution of an overdetermined system; None: there is none, or more than one."""
    count = len(rows[0])
    matrix = [[*row, number] for row, number in zip(rows, right, strict=True)]
    for column in range(count):
        pivot = next((place for place in range(column, len(matrix)) if matrix[place][column]), None)
        if pivot is None:
            return None
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        matrix[column] = [number / matrix[column][column] for number in matrix[column]]
        for place, row in enumerate(matrix):
            if place != column and row[column]:
                matrix[place] = [
                    number - row[column] * other
                    for number, other in zip(row, matrix[column], strict=True)
                ]
    return (
        None
        if any(row[-1] for row in matrix[count:])
        else [matrix[place][-1] for place in range(count)]
    )
