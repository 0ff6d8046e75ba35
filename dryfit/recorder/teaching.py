"""One variant of a family's record: a short model traced at several sets of numbers, fitted, cut and checked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dryfit.derived.families import ModelFamily, Numbers
from dryfit.derived.form import Form, StepKey
from dryfit.derived.layers import Place, window
from dryfit.derived.layers import UnknownOrder as NoSuchOrder
from dryfit.derived.sizes import EXACT, Inexact, value, with_rounded
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY, SORTED_IN_PLACE, Capability, up
from dryfit.recorder.cutting import by_place, labels, program, stretches
from dryfit.recorder.fitting import NotFitted, fitted
from dryfit.recorder.traces import BySize, Taken, events, general, take
from dryfit.recorder.variants import LENGTHS, Variant
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.loaders import WeightLoader

AT_RANDOM = 1  # sets of numbers beside the base and its single variations
ODD = 4  # of which scales of quantized weights don't come out whole
CAPABILITIES = ((8, 6), (8, 9), (9, 0), (12, 0))  # before 8.0 other kernels run
WINDOW = 8  # tokens, of an attention that looks back at fewer than a row has
FEW = 4  # sets beside the base that suffice where the expressions are known
CHECKS = 2  # at random between the ends of the ranges, beside both ends
Log = Callable[[str], None]
Event = tuple[int, int]


class OtherEvents(Exception):
    """A number that nobody named changes the events."""


def scenario_of(family: ModelFamily, variant: Variant, numbers: Numbers, kinds: Sequence[str], **more: Any) -> Scenario:
    """A step of a model with these numbers and kinds of layers; ``more``: of its configuration."""
    window = {"sliding_window": WINDOW} if variant.flags.get("windowed") else {}
    step = {**variant.settings, "model": family.config(numbers, kinds, **{**window, **variant.particular, **more})}
    step |= {"sequence_length": numbers["s"], "micro_batch": numbers["b"]}
    if "r" in numbers:
        step["lora"] = {"rank": numbers["r"]}
    return Scenario.from_mapping(step, {})


def pinned(variant: Variant, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by symbol with those that flags and the method fix."""
    flags = variant.flags
    ones = {"b": flags.get("one_row"), "K": flags.get("one_group"), "g": flags.get("no_groups")}
    found = {symbol: (1,) if ones.get(symbol) else own for symbol, own in values.items()}
    if length := flags.get("length"):
        found["s"] = (length,)
    if "e" in found and len(found["s"]) == 1:
        limit, first = SORTED_IN_PLACE // found["s"][0], found["e"]
        inside = flags.get("sorted_in_place")
        found["e"] = tuple(e for e in first if (e <= limit) == bool(inside))
        if len(first) == 2:  # ends
            found["e"] = (first[0], min(first[1], limit)) if inside else (max(first[0], limit + 1), first[1])
    if variant.settings["method"] == "full":
        del found["r"]
    return found


# Lengths by how many chunks a loss in chunks takes of one row: what is taught, and the ends.
CHUNKED = {
    2: ((384, 389, 300, 511, 360), (259, 513)),
    4: ((896, 901, 811, 1000, 1020), (771, 1025)),
    8: ((1920, 1925, 1801, 2000, 2040), (1795, 2049)),
}


def teaching_points(family: ModelFamily, variant: Variant) -> tuple[list[str], list[Numbers]]:
    """The numbers that vary, and the sets to trace: the base, single variations in that order, others at random."""
    chunks = variant.flags.get("chunks")
    values = pinned(
        variant, {**family.points, **({"s": CHUNKED[chunks][0]} if chunks and not variant.flags.get("length") else {})}
    )
    draw = random.Random(1)
    lengths = values["s"]
    if variant.flags.get("windowed"):
        values["s"] = [up(length, 8) for length in lengths]
    elif len(lengths) > 1 and (limit := _sorted_up_to(values)):
        if variant.flags.get("sorted_in_place"):
            values["s"] = lengths if max(lengths) <= limit else CHUNKED[2][0]
        else:
            values["s"] = lengths if min(lengths) > limit else [length + limit for length in lengths]
    base = {symbol: own[0] for symbol, own in values.items()}
    names = [symbol for symbol, own in values.items() if len(own) > 1]
    points = [base, *({**base, name: values[name][1]} for name in names)]
    points += [{symbol: draw.choice(own) for symbol, own in values.items()} for _ in range(AT_RANDOM)]
    odd = {symbol: family.odd.get(symbol, own) if len(own) > 1 else own for symbol, own in values.items()}
    points += [{symbol: own[number % len(own)] for symbol, own in odd.items()} for number in range(ODD)]
    return names, [family.possible(point) for point in points]


def _sorted_up_to(values: Mapping[str, Sequence[int]]) -> int:
    """The longest row whose tokens' experts are sorted in place; 0: there are none."""
    return SORTED_IN_PLACE // values["e"][0] if "e" in values else 0


def checking_points(family: ModelFamily, variant: Variant) -> list[Numbers]:
    """The least of all numbers together, the largest, and some between, evenly over orders of magnitude."""
    chunks = variant.flags.get("chunks")
    ends = pinned(variant, {**family.ends, **({"s": CHUNKED[chunks][1]} if chunks else {})})
    if variant.flags.get("windowed"):
        ends["s"] = up(ends["s"][0], 8), ends["s"][1] // 8 * 8
    elif len(ends["s"]) > 1 and (limit := _sorted_up_to(ends)):
        low, high = ends["s"]
        ends["s"] = (low, min(high, limit)) if variant.flags.get("sorted_in_place") else (max(low, limit + 1), high)
    draw = random.Random(2)
    low, high = ({symbol: own[at] for symbol, own in ends.items()} for at in (0, -1))
    between = [
        {symbol: round(own[0] * (own[-1] / own[0]) ** draw.random()) for symbol, own in ends.items()}
        for _ in range(CHECKS)
    ]
    for point in between:
        for symbol in {"d", "h", "m", "S", *("s" * bool(variant.flags.get("windowed")))} & {*point}:
            point[symbol] = up(point[symbol], 8)
    return [family.possible(point) for point in (low, high, *between)]


class _Cut:
    """The traces of one model at several numbers, cut into stretches whose sizes are as many numbers."""

    def __init__(self, takes: Sequence[Taken], kinds: Sequence[str]) -> None:
        self.takes, self.first = takes, takes[0]
        self.told: dict[tuple[str, str, str], int] = {}
        self._about: dict[int, int] = {}  # by place
        first = self.first
        second = next(at for _, step, at in first.marks if step == 1)
        self.trained = sum(
            kind == 1 and about[0] == "gradients" and at >= second
            for at, (kind, about) in enumerate(zip(first.kinds, first.about, strict=True))
        )
        ends = [*(at for *_, at in first.marks[1:]), len(first.kinds)]
        self._optimizing = [
            range(at, end)
            for (phase, _, at), end in zip(first.marks, ends, strict=True)
            if phase in ("optimizer", "between")
        ]
        self.items = program(stretches(first, labels(first)))
        self.found = by_place(first, self.items, kinds, self._size_of)

    def arrivals(self, *, all_of_them: bool) -> dict[int, int]:
        """By what a tensor is for of how many sources' experts it is made.

        Raises
        ------
        OtherEvents
            If what a tensor is for doesn't say that.
        """
        found: dict[int, int] = {}
        others = set()
        for place, identity in enumerate(self.first.ids[: self.first.marks[0][2]]):
            if identity in self.first.arrivals:
                sources = self.first.arrivals[identity]
                if found.setdefault(self._about[place], sources) != sources:
                    others.add(self._about[place])
            elif identity > 0:
                others.add(self._about[place])
        found = {about: sources for about, sources in found.items() if sources or all_of_them}
        if others & {*found}:
            raise OtherEvents("tensors of one name come to the device in several ways")
        return found

    def _size_of(self, at: int) -> list[Any]:
        """An allocation's :class:`_SeenSize`, and the place of what it is for."""
        first, own = self.first, self.first.sizes[at]
        origin = first.origins.get(first.ids[at])
        named = (general(origin.module), origin.operator) if origin else ("", "")
        about = self._about[at] = self.told.setdefault((first.about[at][0], *named), len(self.told))
        if isinstance(own, BySize):
            name, fixed, slot, arguments = own.rule
            listed = [
                self._counted(tuple(each.sizes[at].rule[3][place] for each in self.takes), at)
                for place in range(len(arguments))
            ]
            return [_SeenSize(name, fixed, slot, listed), about]
        if at in first.cublas:
            return [_SeenSize("cublas"), about]
        if at == 0 and first.kinds[1] == 2 and first.targets[1] == 0:  # transformers warms the allocator up
            return [_SeenSize("warm"), about]
        return [self._counted(tuple(int(each.sizes[at]) for each in self.takes), at), about]

    def _counted(self, sizes: tuple[int, ...], at: int) -> _SeenSize:
        """Sizes as they are, or as numbers for each trained tensor."""
        count = self.trained
        if any(at in span for span in self._optimizing) and set(sizes) in ({count}, {2 * count}, {4 * count}):
            return _SeenSize("trained", sizes=(sizes[0] // count,))
        return _SeenSize("", sizes=sizes)


@dataclass(frozen=True)
class _SeenSize:
    """Sizes at several numbers: themselves, for each trained tensor, or by a rule and its arguments."""

    rule: str
    fixed: tuple[Any, ...] = ()
    slot: int = 0
    arguments: Sequence[_SeenSize] = ()
    sizes: tuple[int, ...] = ()


class _Fitted:
    """The expressions and rules of a variant, each once."""

    def __init__(self, points: Sequence[Numbers], names: Sequence[str], library: Sequence[Any]) -> None:
        self._known = [with_rounded(point, DEFAULT_CAPABILITY) for point in points]
        self._names = names
        self._library = {sizes: one for one in reversed(library) if (sizes := self._values(one))}
        self.sizes: list[Any] = []
        self.rules: list[Any] = []
        self._places: dict[tuple[int, ...], int] = {}

    def number(self, size: _SeenSize) -> int:
        """The place of a size's expression; of a rule, counted down from -1."""
        if size.rule == "trained":
            return self._place([[[size.sizes[0], 1, [["T", 1]]]], EXACT])
        if size.rule:
            own = [size.rule, [*map(_plain, size.fixed)], size.slot, [self.number(one) for one in size.arguments]]
            if own not in self.rules:
                self.rules.append(own)
            return -1 - self.rules.index(own)
        if size.sizes not in self._places:
            self._places[size.sizes] = self._place(self._fit(size.sizes))
        return self._places[size.sizes]

    def _fit(self, sizes: tuple[int, ...]) -> Any:
        if self._library and len({*sizes}) > 1:
            if sizes not in self._library:
                raise NotFitted(f"sizes {sizes[:8]} are none of another variant's")
            return self._library[sizes]
        return fitted(sizes, self._known, self._names)

    def _values(self, expression: Any) -> tuple[int, ...] | None:
        """An expression's values at all numbers; None: it has a symbol that they don't have."""
        with suppress(KeyError, Inexact):
            return tuple(value(expression, known) for known in self._known)
        return None

    def _place(self, expression: Any) -> int:
        if expression not in self.sizes:
            self.sizes.append(expression)
        return self.sizes.index(expression)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _taken(family: ModelFamily, variant: Variant, points: Sequence[Numbers], first: Taken | None = None) -> list[Taken]:
    """Traces at all numbers, which have to leave the events as they are, or as in the first one that was traced."""
    takes: list[Taken] = []
    for point in points:
        step = scenario_of(family, variant, point, family.sequence)
        takes.append(take(step, DEFAULT_CAPABILITY, origins=first is None))
        first = first or takes[0]
        if takes[-1].structure != first.structure:
            raise OtherEvents(f"{point} changes the events")
    return takes


def taught(family: ModelFamily, variant: Variant, library: Sequence[Any] = ()) -> dict[str, Any]:
    """The content of a variant for :class:`dryfit.derived.form.Form`, without its ranges.

    ``library``: expressions of the family's other variants. Where each size is one of them, a few sets of numbers
    suffice; else all are traced.

    Raises
    ------
    OtherEvents
        If a number changes the events.
    NotFitted
        If a size is no expression in the numbers.
    """
    names, points = teaching_points(family, variant)
    if family.exact_length:
        library = [*library, *(more for one in library for more in _at_length(one, points[0]["s"]))]
    few = [points[0], *points[1 + len(names) :][:FEW]]
    takes = _taken(family, variant, few)
    if library:
        with suppress(NotFitted):
            return _content(family, variant, _Cut(takes, family.sequence), _Fitted(few, (), library))
    rest = [point for point in points if point not in few]
    takes += _taken(family, variant, rest, takes[0])
    takes = [takes[[*few, *rest].index(point)] for point in points]
    return _content(family, variant, _Cut(takes, family.sequence), _Fitted(points, names, ()))


def _at_length(expression: Any, length: int) -> Iterator[Any]:
    """What an expression for one length may be for another: each term as it is, or in proportion to it."""
    terms, width = expression
    ratios = {Fraction(length + more, other + more) for other in LENGTHS if other != length for more in (0, -1, 3)}
    for ratio in ratios:
        for factors in itertools.islice(itertools.product((Fraction(1), ratio), repeat=len(terms)), 1, None):
            new = [Fraction(own[0], own[1]) * factor for own, factor in zip(terms, factors, strict=True)]
            yield [[[each.numerator, each.denominator, own[2]] for own, each in zip(terms, new, strict=True)], width]


def _content(family: ModelFamily, variant: Variant, cut: _Cut, values: _Fitted) -> dict[str, Any]:
    templates: list[Any] = []
    kinds = family.sequence

    def template(place: Place) -> int:
        own = [_event(event, values) for event in cut.found.get(place, [])]
        if own not in templates:
            templates.append(own)
        return templates.index(own)

    listed, choices = [], {}
    for item in cut.items:
        if item[0] == "mark":
            listed.append(["mark", item[1], item[2]])
        elif item[0] == "g":
            listed.append(["g", item[1], template(("g", item[1]))])
        else:
            listed.append(["pass", item[1], item[2]["way"]])
            chosen: dict[Any, int] = {}
            for layer in range(len(kinds)):
                own, around = template((item[1], layer)), window(kinds, layer, family.radius)
                if chosen.setdefault(around, own) != own:
                    raise OtherEvents(f"layers with the neighbours {around} do different things")
            choices[str(item[1])] = [[list(around), own] for around, own in chosen.items()]
    arriving = {}
    if cut.first.arrivals:
        loader = WeightLoader.installed()
        workers = loader.workers if variant.settings["method"] == "qlora" else loader.dense_workers
        arriving = {"workers": workers, "arrivals": [*cut.arrivals(all_of_them=workers > 1).items()]}
    return {
        **arriving,
        "program": listed, "templates": templates, "choices": choices, "sizes": values.sizes,
        "rules": values.rules, "told": [list(about) for about in cut.told],
    }  # fmt: skip


def _event(event: Any, values: _Fitted) -> Any:
    if isinstance(event, list) and isinstance(event[0], _SeenSize):
        return [values.number(event[0]), *map(_plain, event[1:])]
    return [_plain(part) for part in event] if isinstance(event, list) else event


def _in_one_order(events: Sequence[Event], marks: Sequence[tuple[str, int, int]]) -> list[Event]:
    """The events with those in the order of ids that free one after the other: whichever goes first, the same is left.

    In which order Python drops what a frame held may depend on how many layers a model has.
    """
    ordered: list[Event] = []
    freed: list[Event] = []
    begins = {at for *_, at in marks}
    for place, event in enumerate(events):
        if event[0] >= 0 or place in begins:
            ordered += sorted(freed)
            freed = []
        (freed if event[0] < 0 else ordered).append(event)
    return ordered + sorted(freed)


def differs(form: Form, scenario: Scenario, capability: Capability) -> str | None:
    """Where a form's events are not the trace's, in words; None: they are equal."""
    asked = StepKey.of(scenario)
    try:
        own = form.compose(asked.kinds, asked.numbers, capability)[0]
    except (Inexact, NoSuchOrder) as error:
        return str(error)
    traced, marks = events(scenario, capability)
    pairs = zip(_in_one_order(own.events, own.marks), _in_one_order(traced, marks), strict=False)
    for place, (left, right) in enumerate(pairs):
        if left != right:
            about = form.told[own.about[left[0] - 1][0]] if left[0] > 0 else ""
            return f"event {place}: derived {left} {about}, traced {right}"
    if len(own.events) == len(traced) and own.marks == marks:
        return None
    return f"{len(own.events)} events derived, {len(traced)} traced; marks {own.marks == marks}"


def checked(family: ModelFamily, variant: Variant, content: Mapping[str, Any], log: Log) -> dict[str, Any]:
    """The content with the ranges of numbers and the capabilities at which its events equal the trace's.

    Raises
    ------
    OtherEvents
        If they differ at numbers that were not taught.
    """
    form = Form(content)
    points = checking_points(family, variant)
    sequence, order = family.sequence, family.order
    orders = [order] + [sequence] * (len(points) - 1)  # what an order does depends on no number
    steps = [scenario_of(family, variant, point, kinds) for point, kinds in zip(points, orders, strict=True)]
    for point, step in zip(points, steps, strict=True):
        if why := differs(form, step, DEFAULT_CAPABILITY):
            raise OtherEvents(f"at {point}: {why}")
    capabilities = [list(DEFAULT_CAPABILITY)]
    for capability in CAPABILITIES:
        if why := differs(form, steps[-1], capability):
            log(f"not for capability {capability}: {why}")
        else:
            capabilities.append(list(capability))
    ranges = {
        symbol: [min(point[symbol] for point in points), max(point[symbol] for point in points)] for symbol in points[0]
    }
    return {**content, "ranges": ranges, "capabilities": capabilities}


def alike(
    family: ModelFamily, variant: Variant, form: Callable[[], Form], known: Collection[str], log: Log
) -> Iterator[str]:
    """Keys of configurations of the family's other models whose events are the same, but for those that are known."""
    _, points = teaching_points(family, variant)
    kinds = family.sequence
    base = StepKey.of(scenario_of(family, variant, points[0], kinds))
    for other in family.alike:
        step = scenario_of(family, variant, points[0], kinds, **other)
        if (key := base.key(StepKey.of(step).particular)) in known:
            continue
        why = differs(form(), step, DEFAULT_CAPABILITY)
        if why:
            log(f"not alike {other}: {why}")
        else:
            yield key
