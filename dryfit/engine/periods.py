"""Two sequences of which the longer one repeats what the shorter one has once less, and the longer ones to come.

The step of a model with one more layer repeats some stretches of the shallower model's step: a layer's forward pass,
its backward pass, its part of each loop over parameters. :class:`Periods` finds these stretches. A number that belongs
to an element, such as the place of what it frees, grows evenly: with the repeat that the element lies in, and with the
number of repeats. So two sequences give its values in every longer one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch

LEAST_REPEATS = 2  # in the longer sequence; of two, the sequence after it has to show that a number grows evenly
ALIKE = 3  # elements that have to agree behind a stretch that is left out


class Unlike(Exception):
    """The sequences do not differ in repeats alone."""


class Repeats(NamedTuple):
    """A stretch of the longer sequence that repeats: its first element, the length of one repeat, their number."""

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        """The element behind it."""
        return self.start + self.length * self.count


class Periods:
    """How a sequence grows.

    ``shorter``, ``longer``: what the elements are, so that equal ones may correspond.

    Raises :class:`Unlike` if the longer sequence is not the shorter one with some stretches repeated once more.
    """

    def __init__(self, shorter: Sequence[Hashable], longer: Sequence[Hashable]) -> None:
        self.length = len(longer)
        self.runs = _runs(shorter, longer)

    def source(self, more: int) -> torch.Tensor:
        """For each element of the sequence with so many repeats more, the element of the longer one that it is."""
        places = torch.arange(self.length)
        parts = []
        for first, end, run in self._parts():
            if run is None:
                parts.append(places[first:end])
                continue
            rows, middle = places[first:end].view(run.count, run.length), _middle(run)
            parts += [rows[:middle].flatten(), rows[middle].repeat(more), rows[middle:].flatten()]
        return torch.cat(parts) if parts else places

    def extended(self, shorter: torch.Tensor, longer: torch.Tensor, more: int) -> torch.Tensor:
        """A number of each element in the sequence with so many repeats more, from those of the two sequences.

        Raises :class:`Unlike` if it does not grow evenly.
        """
        parts, shift = [], 0
        for first, end, run in self._parts():
            if run is None:
                own = longer[first:end]
                parts.append(own + (own - shorter[first - shift : end - shift]) * more)
            else:
                less = end - run.length
                rows = longer[first:end].unflatten(0, (run.count, run.length))
                before = shorter[first - shift : less - shift].unflatten(
                    0, (run.count - 1, run.length)
                )
                parts += _rows(rows, before, more)
                shift += run.length
        return torch.cat(parts) if parts else longer

    def in_shorter(self) -> torch.Tensor:
        """For each element of the longer sequence, the element of the shorter one that it is or repeats."""
        places, shift = torch.arange(self.length), 0
        for first, end, run in self._parts():
            places[first:end] -= shift
            if run is not None:
                places[first + (_middle(run) + 1) * run.length : end] -= run.length
                shift += run.length
        return places

    def _parts(self) -> Iterator[tuple[int, int, Repeats | None]]:
        """First elements and ends of the longer sequence's parts, runs and what lies between them."""
        at = 0
        for run in self.runs:
            yield at, run.start, None
            yield run.start, run.end, run
            at = run.end
        yield at, self.length, None


def _middle(run: Repeats) -> int:
    return (run.count - 1) // 2


def _rows(rows: torch.Tensor, before: torch.Tensor, more: int) -> list[torch.Tensor]:
    """A run's numbers by repeat: the first ones are counted from the front, the last from the back.

    Between them the middle one goes on by an even step. That step, and what one repeat more adds, are taken from
    neighbours that lie in the middle too, in both sequences. Without such neighbours front and back have to agree. With
    two repeats each is an end: they say the step, and the shorter sequence's says what one repeat more adds.
    """
    count = len(rows)
    middle = (count - 1) // 2
    by_front, by_back = (
        rows[:-1] - before,
        rows[1:] - before,
    )  # of repeats 0 and on, of repeats 1 and on
    onward = rows[middle + 1] - rows[middle]
    if middle + 1 < count - 1 or count == LEAST_REPEATS:
        step, growth = onward, by_front[middle]
    else:
        back = rows[middle] - rows[middle - 1]
        step = torch.where(by_front[middle] + onward == by_back[middle - 1], onward, back)
        growth = by_front[middle]
        if bool((growth + step != by_back[middle - 1]).any()):
            raise Unlike("a number does not grow evenly from repeat to repeat")
    repeats = torch.arange(more + 1).view(-1, *[1] * step.dim())
    first = rows[:middle] + by_front[:middle] * more
    inner = rows[middle] + growth * more + step * repeats
    last = rows[middle + 1 :] + by_back[middle:] * more
    return [part.flatten(0, 1) for part in (first, inner, last)]


def _runs(shorter: Sequence[Hashable], longer: Sequence[Hashable]) -> list[Repeats]:
    places: dict[Hashable, list[int]] = {}
    for place, token in enumerate(longer):
        places.setdefault(token, []).append(place)
    runs: list[Repeats] = []
    here = there = 0  # in the shorter sequence, in the longer one
    while True:
        same = _agreeing(shorter, here, longer, there)
        here, there = here + same, there + same
        if here == len(shorter) and there == len(longer):
            return runs
        length = _left_out(shorter, here, longer, there, places)
        lowest, count = runs[-1].end if runs else 0, 1
        repeat = longer[there : there + length]
        while (
            there - count * length >= lowest and longer[there - count * length :][:length] == repeat
        ):
            count += 1
        if count < LEAST_REPEATS:
            raise Unlike(f"{length} elements repeat only {count} times")
        runs.append(Repeats(there - (count - 1) * length, length, count))
        there += length


def _left_out(
    shorter: Sequence[Hashable],
    here: int,
    longer: Sequence[Hashable],
    there: int,
    places: dict[Hashable, list[int]],
) -> int:
    """How many elements the longer sequence repeats here: of several numbers the one after which most agrees."""
    if here == len(shorter):
        candidates = [len(longer)]
    else:
        candidates = [place for place in places.get(shorter[here], ()) if place > there]
    rest = shorter[here : here + ALIKE]
    best, most = 0, -1
    for place in candidates:
        length = place - there
        if length > there:
            break
        if (
            longer[place : place + len(rest)] != rest
            or longer[there:place] != longer[there - length : there]
        ):
            continue
        same = _agreeing(shorter, here, longer, place)
        if same > most:
            best, most = length, same
    if not best:
        raise Unlike(f"nothing repeats at {here} of {len(shorter)}, {there} of {len(longer)}")
    return best


def _agreeing(first: Sequence[Hashable], here: int, second: Sequence[Hashable], there: int) -> int:
    count, step = 0, 512
    limit = min(len(first) - here, len(second) - there)
    while step:
        while count + step <= limit and (
            first[here + count : here + count + step]
            == second[there + count : there + count + step]
        ):
            count += step
        step //= 2
    return count
