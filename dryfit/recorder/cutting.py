"""A trace cut into stretches: what one layer does in one pass over the layers, and what lies between passes."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dryfit.derived.layers import CHUNK, Kinds, Place, relation
from dryfit.recorder.traces import Taken

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_UNNAMED = re.compile(r"_|[A-Z]")  # a class's name in the place of a module's
_APART = "g"  # of no layer
_AT_ONCE = 3  # layers whose tensors are freed one after the other: not by a layer that goes on
_AFTER_CHUNKS = "aten::cat (backward)"  # of the chunks' gradients


class Chunk(NamedTuple):
    """A chunk of a loss, by its number."""

    number: int


Label = int | Chunk | str | None
Stretch = tuple[
    int, int | None, Any
]  # first event, end, layer; a mark has no end, and its phase and step


def labels(take: Taken) -> list[Label]:
    """By event its layer's number, ``g`` where it belongs to none, None where nothing tells."""
    by_id: dict[int, Label] = {}

    def own(identity: int) -> Label:
        if identity in by_id:
            return by_id[identity]
        label: Label = None
        if identity in take.sources:
            source = take.sources[identity]
            label = _APART if source is None else own(source)
        elif (origin := take.origins.get(identity)) is not None and origin.module:
            match = _LAYER.search(origin.module)
            label = int(match[1]) if match else None if _UNNAMED.match(origin.module) else _APART
        by_id[identity] = label
        return label

    found: list[Label] = []
    marks, phase = list(take.marks), "load"
    for place, (kind, identity) in enumerate(zip(take.kinds, take.ids, strict=True)):
        while marks and marks[0][2] <= place:
            phase = marks.pop(0)[0]
        told = kind == 1 or (kind == 2 and phase in ("optimizer", "between"))
        found.append(own(abs(identity)) if told else None)
    _label_loading(take, found)
    for first, end in _frees(take):
        owners = [own(-identity) for identity in take.ids[first:end]]
        if len({owner for owner in owners if isinstance(owner, int)}) >= _AT_ONCE:
            found[first:end] = owners
    _label_chunks(take, found)
    return found


def _label_chunks(take: Taken, found: list[Label]) -> None:
    """What is done in a chunk's turn belongs to it, and the end of the chunks' gradients, one after the other."""
    by_id: dict[int, Label] = {}
    for first, end, label in _chunks(take):
        end = next(
            (place for place in range(first, end) if isinstance(found[place], int)), end
        )  # autocast ends
        found[first:end] = [label] * (end - first)
        found[end] = found[end] or _APART
        by_id |= {take.ids[place]: label for place in range(first, end) if take.kinds[place] == 1}
    for first, end in _frees(take):
        owners = [by_id.get(-identity) for identity in take.ids[first:end]]
        if None not in owners and len({*owners}) > 1 and not isinstance(found[first], Chunk):
            found[first:end] = owners
            found[end] = found[end] or _APART


def _chunks(take: Taken) -> Iterator[tuple[int, int, Chunk]]:
    """From which event to which a chunk of the loss is taken, forward and again in the backward pass."""
    begins = [at for at, _ in take.chunks] + [len(take.ids)]
    for (first, number), following in zip(take.chunks, begins[1:], strict=True):
        end = min(following, *(at for *_, at in take.marks if at > first))
        made = (at for at in range(first, end) if take.kinds[at] == 1)
        named = (
            at
            for at in made
            if (origin := take.origins.get(take.ids[at])) and origin.operator == _AFTER_CHUNKS
        )
        yield first, next(named, end), Chunk(number)


def _frees(take: Taken) -> Iterator[tuple[int, int]]:
    """Stretches of the steps in which everything is freed, such as what autocast kept of all layers' weights."""
    first = None
    for place in range(take.marks[0][2], len(take.kinds) + 1):
        freed = place < len(take.kinds) and take.kinds[place] == 2
        if freed and first is None:
            first = place
        elif not freed and first is not None:
            yield first, place
            first = None


def _label_loading(take: Taken, found: list[Label]) -> None:
    """While loading, what no tensor stands for belongs to the layer in which it goes: another copy replaces it."""
    begin, current, at = take.marks[0][2], _APART, []
    for place in range(begin):
        current = current if found[place] is None else found[place]
        at.append(current)
    for place in range(begin):
        if take.kinds[place] == 2 and found[take.targets[place]] is None:
            found[take.targets[place]] = at[place]


def stretches(take: Taken, found: Sequence[Label]) -> list[Stretch]:
    """The events in order, cut where the layer changes; marks between them."""
    marks, cut, current, start = list(take.marks), [], _APART, 0

    def close(end: int) -> None:
        if end > start:
            cut.append((start, end, current))

    for place in range(len(take.kinds) + 1):
        while marks and marks[0][2] == place:
            close(place)
            phase, step, _ = marks.pop(0)
            cut.append((place, None, (phase, step)))
            current, start = _APART, place
        if place == len(take.kinds):
            close(place)
        elif found[place] is not None and found[place] != current:
            close(place)
            current, start = found[place], place
    return cut


def program(cut: Sequence[Stretch]) -> list[list[Any]]:
    """Marks, what lies between passes, and passes with the events of each layer or chunk, in order."""
    items: list[list[Any]] = []
    passes = between = 0
    now: dict[str, Any] | None = None
    for first, end, label in cut:
        if end is None:
            now = None
            items.append(["mark", *label])
        elif label == _APART:
            now = None
            items.append([_APART, between, (first, end)])
            between += 1
        else:
            kind, number = ("loop", label.number) if isinstance(label, Chunk) else ("pass", label)
            step = number - now["last"] if now and items[-1][0] == kind else 0
            if now is None or not step or step * now["way"] < 0:
                now = {"last": number, "way": 0, "spans": {}}
                items.append([kind, passes, now])
                passes += 1
            elif step:
                now["way"] = 1 if step > 0 else -1
            now["last"] = number
            now["spans"][number] = first, end
    return items


def loops_of(items: Sequence[Sequence[Any]]) -> dict[int, Kinds]:
    """By pass over chunks their kinds."""
    loops = [item for item in items if item[0] == "loop"]
    count = 1 + max((number for item in loops for number in item[2]["spans"]), default=0)
    return {item[1]: CHUNK * count for item in loops}


def by_place(
    take: Taken, items: Sequence[Sequence[Any]], kinds: Kinds, size_of: Callable[[int], Any]
) -> dict[Place, list[Any]]:
    """The events of each stretch as :class:`dryfit.derived.layers.Layers` has them in its templates.

    ``size_of`` gives an allocation's size and what it is for, by its place.
    """
    loops = loops_of(items)
    where: list[Place] = [(_APART, 0)] * len(take.kinds)
    for item in items:
        spans = {} if item[0] == "mark" else {0: item[2]} if item[0] == _APART else item[2]["spans"]
        for layer, (first, end) in spans.items():
            own = (_APART, item[1]) if item[0] == _APART else (item[1], layer)
            where[first:end] = [own] * (end - first)
    freed_at = {
        target: where[at]
        for at, (kind, target) in enumerate(zip(take.kinds, take.targets, strict=True))
        if kind == 2
    }
    handed: dict[tuple[Place, Place], int] = {}
    ordinal: dict[int, int] = {}
    for at, kind in enumerate(take.kinds):
        if kind == 1 and freed_at.get(at, where[at]) != where[at]:
            ordinal[at] = handed.setdefault((where[at], freed_at[at]), 0)
            handed[where[at], freed_at[at]] += 1
    found: dict[Place, list[Any]] = {}
    local: dict[int, int] = {}
    for at, (kind, target) in enumerate(zip(take.kinds, take.targets, strict=True)):
        own = where[at]
        events = found.setdefault(own, [])
        if kind == 1:
            local[at] = len(events)
            elsewhere = [relation(own, freed_at[at], kinds, loops)] if at in ordinal else []
            events.append([*size_of(at), *elsewhere])
        elif kind == 2:
            there = where[target]
            events.append(
                local[target]
                if there == own
                else [relation(own, there, kinds, loops), ordinal[target]]
            )
        else:
            events.append(None)
    return found
