"""A step's events put together from what each layer does in each pass over the layers.

A record holds *templates*: the events of one stretch of the step, either of one layer within a pass over all of them
or of what lies between passes. In which pass a layer does what depends on its kind and on those of its neighbours.
Nothing in a template names a layer: what lives on past its stretch says where it is freed, seen from its own stretch.
The chunks of a loss are passed over like layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Place = tuple[Any, int]  # ("g", number) between passes; (pass, layer) within one
Kinds = Sequence[str]
Window = tuple[str | None, ...]


class UnknownOrder(Exception):
    """The layers come in an order that no template was recorded for."""


class Composition(NamedTuple):
    """A step's events."""

    # ``(id, bytes)`` for an allocation, ``(-id, 0)`` for its end, ``(0, 0)`` where free segments are given back
    events: list[tuple[int, int]]
    marks: list[tuple[str, int, int]]  # ``(phase, step, index of its first event)``
    # By id, counted from 1: what it is for, and its size's number among the record's expressions
    about: list[tuple[int, int]]


CHUNK = "c"  # the kind of each chunk
CHUNK_RADIUS = 2  # neighbours that tell one chunk's events from another's: the first two and the last two are special


def relation(
    own: Place, other: Place, kinds: Kinds, loops: Mapping[int, Kinds] | None = None
) -> tuple[Any, ...]:
    """Where another stretch lies, seen from one, for models of any depth.

    ``g``: between passes. ``L``: so many layers on, in a pass. From outside of the layers: ``B`` counted from the first
    layer, ``E`` from the last; ``K`` and ``k``: the last and the first of its kind, where there are several.
    ``loops``: by pass over chunks their kinds; one further away is counted as from outside.
    """
    if other[0] == "g":
        return other
    at, layer = other
    loops = loops or {}
    inside = own[0] != "g" and (own[0] in loops) == (at in loops)
    if inside and (at not in loops or abs(layer - own[1]) <= CHUNK_RADIUS):
        return "L", at, layer - own[1]
    kinds = loops.get(at, kinds)
    last = len(kinds) - 1
    if 0 < layer < last and len(set(kinds)) > 1:
        if kinds[layer] not in kinds[layer + 1 :]:
            return "K", at, kinds[layer]
        if kinds[layer] not in kinds[:layer]:
            return "k", at, kinds[layer]
    return ("B", at, layer) if layer < len(kinds) / 2 else ("E", at, last - layer)


def absolute(
    own: Place, related: Sequence[Any], kinds: Kinds, loops: Mapping[int, Kinds] | None = None
) -> Place:
    """What :func:`relation` says, for these layers."""
    how, at = related[:2]
    if how == "g":
        return "g", at
    kinds = (loops or {}).get(at, kinds)
    last = len(kinds) - 1
    layer = {
        "L": lambda: own[1] + related[2],
        "B": lambda: related[2],
        "E": lambda: last - related[2],
        "K": lambda: last - list(kinds)[::-1].index(related[2]),
        "k": lambda: list(kinds).index(related[2]),
    }[how]()
    return at, layer


def window(kinds: Kinds, layer: int, radius: int) -> Window:
    """The kinds of a layer and its neighbours; of the layer also whether it is the last (!) or the first (?) of it.

    ``radius``: neighbours on either side that tell one layer's events from another's.
    """
    around = [
        kinds[at] if 0 <= at < len(kinds) else None
        for at in range(layer - radius, layer + radius + 1)
    ]
    if len(set(kinds)) > 1:
        around[radius] += "!" * (kinds[layer] not in kinds[layer + 1 :]) + "?" * (
            kinds[layer] not in kinds[:layer]
        )
    return tuple(around)


def windows(kinds: Kinds, radius: int) -> set[Window]:
    """Between which neighbours layers of these kinds stand."""
    return {window(kinds, layer, radius) for layer in range(len(kinds))}


def is_made(event: Any) -> bool:
    """Whether an event allocates."""
    return isinstance(event, list) and isinstance(event[0], int)


class Layers:
    """Templates, and which of them a layer follows.

    Parameters
    ----------
    program
        In order: ``["mark", phase, step]``, ``["g", number, template]``, ``["pass", number, direction]``, and
        ``["loop", number, direction]`` over chunks.
    templates
        Events: ``[size, what for]`` allocates, with a :func:`relation` behind it where it is freed elsewhere; a number
        frees what the same stretch allocated at that place, ``[relation, ordinal]`` what another one handed on;
        ``null`` gives free segments back.
    choices
        By pass, pairs of a :func:`window` and a template.
    """

    def __init__(
        self, program: Sequence[Sequence[Any]], templates: Sequence[Any], choices: Mapping[str, Any]
    ) -> None:
        self.program, self.templates = program, templates
        self._choices = {
            int(at): {tuple(around): template for around, template in pairs}
            for at, pairs in choices.items()
        }
        self._radius = {
            at: max((len(around) // 2 for around in known), default=0)
            for at, known in self._choices.items()
        }
        self._loops = {item[1] for item in program if item[0] == "loop"}

    def choose(self, at: int, kinds: Kinds, layer: int) -> int | None:
        """The template of a layer in a pass; None: the pass leaves it out.

        UnknownOrder: if layers around it come in an order that was not recorded.
        """
        known = self._choices[at]
        around = window(kinds, layer, self._radius[at])
        if around not in known:
            raise UnknownOrder(f"layers in the order {around} were not recorded")
        return known[around]

    def compose(
        self, kinds: Kinds, size_of: Callable[[int], int], chunked: Kinds = ""
    ) -> Composition:
        """The events of a model whose layers are of these kinds, and whose loss has such chunks.

        ``size_of`` gives the bytes of a size's number.
        """
        done = Composition([], [], [])
        handed: dict[tuple[Place, Place], list[int]] = {}
        loops = dict.fromkeys(self._loops, chunked)

        def run(template: int, own: Place) -> None:
            self._run(template, own, kinds, loops, size_of, done, handed)

        for item in self.program:
            if item[0] == "mark":
                done.marks.append((item[1], item[2], len(done.events)))
            elif item[0] == "g":
                run(item[2], ("g", item[1]))
            else:
                _, at, direction = item
                passed = loops.get(at, kinds)
                for layer in range(len(passed))[:: 1 if direction >= 0 else -1]:
                    template = self.choose(at, passed, layer)
                    if template is not None:
                        run(template, (at, layer))
        return done

    def _run(
        self,
        template: int,
        own: Place,
        kinds: Kinds,
        loops: Mapping[int, Kinds],
        size_of: Callable[[int], int],
        done: Composition,
        handed: dict[tuple[Place, Place], list[int]],
    ) -> None:
        events, about = done.events, done.about
        local: list[int] = []
        for event in self.templates[template]:
            made = 0
            if event is None:
                events.append((0, 0))
            elif isinstance(event, int):
                if local[event]:
                    events.append((-local[event], 0))
            elif isinstance(event[0], int):
                size = size_of(event[0])
                if size or event[0] >= 0:  # rules that allocate nothing leave no event
                    about.append((event[1], event[0]))
                    made = len(about)
                    events.append((made, size))
                if len(event) > 2:
                    handed.setdefault((own, absolute(own, event[2], kinds, loops)), []).append(made)
            else:
                there = absolute(own, event[0], kinds, loops)
                ready = handed.get((there, own), ())
                if event[1] >= len(ready):
                    raise UnknownOrder(f"{own} frees what {there} does not hand on")
                if ready[event[1]]:
                    events.append((-ready[event[1]], 0))
            local.append(made)
