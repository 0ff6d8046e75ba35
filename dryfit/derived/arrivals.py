"""Experts that a file has one by one: a record holds them as one tensor, and here they arrive and are merged."""

from collections.abc import Mapping

from dryfit.derived.layers import Composition, UnknownOrder
from dryfit.engine.loading_rules import Loading, turns

Arrivals = Mapping[int, int]


def arrived(
    composed: Composition, arrivals: Arrivals, experts: int, workers: int, seed: int
) -> Composition:
    """A composition whose experts came to the device one by one.

    Parameters
    ----------
    arrivals
        By what a tensor is for (its place in ``told`` of the record) how many sources make it: 0, it comes whole.
    workers
        Threads that load. With one each tensor comes in its place; with several, those of ``arrivals`` are all
        that come, in the order of :func:`dryfit.engine.loading_rules.turns`.
    seed
        Of that order.

    Raises
    ------
    UnknownOrder
        If something else happens between two arrivals of several threads.
    """
    begin = composed.marks[0][2]
    arrives = lambda identity: identity > 0 and composed.about[identity - 1][0] in arrivals  # noqa: E731
    at = [place for place, (identity, _) in enumerate(composed.events[:begin]) if arrives(identity)]
    whole = [composed.events[place] for place in at]
    sources = [arrivals[composed.about[identity - 1][0]] for identity, _ in whole]
    new, renamed = Loading(1), {0: 0}
    about: list[tuple[int, int]] = []

    def copy(first: int, end: int) -> None:
        for identity, size in composed.events[first:end]:
            if identity > 0:
                renamed[identity] = new.allocate(size)
            elif identity:
                new.free(renamed[-identity])
            else:
                new.events.append((0, 0))

    def arrive(position: int) -> list[int]:
        size, count = whole[position][1], experts * sources[position] or 1
        return [new.allocate(size // count) for _ in range(count)]

    def settle(position: int, parts: list[int]) -> None:
        identity, size = whole[position]
        renamed[identity] = new.merged(parts, experts, size) if sources[position] else parts[0]

    if workers == 1:
        done = 0
        for position, place in enumerate(at):
            copy(done, place)
            settle(position, arrive(position))
            done = place + 1
    else:
        if at != list(range(at[0], at[0] + len(at))):
            raise UnknownOrder("something happens between the tensors that several threads load")
        copy(0, at[0])
        waiting: dict[int, list[int]] = {}
        for position, is_first in turns([size for _, size in whole], workers, seed):
            if is_first:
                waiting[position] = arrive(position)
            else:
                settle(position, waiting.pop(position))
        done = at[-1] + 1
    copy(done, begin)
    shift = len(new.events) - begin
    copy(begin, len(composed.events))
    names = {identity: old for old, identity in renamed.items()}
    nothing = composed.about[
        whole[0][0] - 1
    ]  # a part of an expert lives for a moment, and no answer names it
    about = [
        composed.about[names[identity] - 1] if identity in names else nothing
        for identity in range(1, new.next)
    ]
    return Composition(
        new.events, [(phase, step, first + shift) for phase, step, first in composed.marks], about
    )
