"""The largest value of a program's setting at which it fits: the program runs at each value that is tried.

What a program needs grows with a length or a number of rows, nearly evenly. So a straight line through the two nearest
values says where to look next, and only values that were run are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dryfit.common.errors import UserError

MOST_RUNS = 12


@dataclass
class Tried:
    """Runs of a program at values of a setting."""

    # Bytes that a card must have, and whether they fit, by value.
    required: dict[int, int] = field(default_factory=dict)
    fits: dict[int, bool] = field(default_factory=dict)
    # Why the program came to no update at a value; such a value counts as too large.
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def largest(self) -> int | None:
        """The largest value that fits, of those below the first that does not; None: none was seen to fit."""
        first = self.too_large
        below = [
            value for value, fits in self.fits.items() if fits and (first is None or value < first)
        ]
        return max(below, default=None)

    @property
    def too_large(self) -> int | None:
        return min((value for value, fits in self.fits.items() if not fits), default=None)

    @property
    def is_flat(self) -> bool:
        """Whether the program takes the same at two values or more: then the setting does not decide its memory."""
        return len(self.required) > 1 and len(set(self.required.values())) == 1


def largest(
    run: Callable[[int], tuple[int, bool]], usable_bytes: int, first: int, multiple: int
) -> Tried:
    """Look for the border between values that fit and values that do not, in at most :data:`MOST_RUNS` runs.

    Parameters
    ----------
    run
        The bytes required at a value, and whether they fit; of the first value a ``UserError`` goes through.
    usable_bytes
        Of the card.
    first
        The value to begin with.
    multiple
        Values are multiples of this.
    """
    tried = Tried()
    value = max(multiple, first // multiple * multiple)
    for _ in range(MOST_RUNS):
        try:
            tried.required[value], tried.fits[value] = run(value)
        except UserError as error:
            if not tried.fits:
                raise
            tried.refused[value], tried.fits[value] = error.problem, False
        low, high = tried.largest or 0, tried.too_large
        if (high is not None and high - low <= multiple) or tried.is_flat:
            break
        value = _next(tried, usable_bytes, low, high, multiple)
    return tried


def _next(tried: Tried, usable_bytes: int, low: int, high: int | None, multiple: int) -> int:
    """The value that a straight line through the nearest two gives, within the border's bounds."""
    known = sorted(tried.required, key=lambda value: abs(tried.required[value] - usable_bytes))[:2]
    guess = None
    if len(known) == 2:
        (one, other), (at_one, at_other) = known, (tried.required[value] for value in known)
        if at_one != at_other:
            guess = one + (usable_bytes - at_one) * (other - one) / (at_other - at_one)
    if guess is None:
        guess = 2 * low if high is None else (low + high) / 2
    least = low + multiple
    most = max(least, high - multiple) if high is not None else 4 * max(low, multiple)
    return min(max(int(guess) // multiple * multiple, least), most)


def to_mapping(tried: Tried, name: str, multiple: int) -> Mapping[str, object]:
    """Plain values: the border, and each run."""
    runs = [
        {
            "value": value,
            "required_bytes": tried.required.get(value),
            "fits": tried.fits[value],
            "refused": tried.refused.get(value),
        }
        for value in sorted(tried.fits)
    ]
    border = {"largest": tried.largest, "too_large": tried.too_large}
    return {"argument": name, "multiple": multiple, **border, "runs": runs}
