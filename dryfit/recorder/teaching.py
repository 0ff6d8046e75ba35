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
from dryfit.derived.layers import CHUNK_RADIUS, Kinds, Place, absolute, window
from dryfit.derived.layers import UnknownOrder as NoSuchOrder
from dryfit.derived.sizes import EXACT, Inexact, value, with_rounded
from dryfit.engine.cuda_rules import SORTED_IN_PLACE, Capability, up
from dryfit.recorder.cutting import by_place, labels, loops_of, program, stretches
from dryfit.recorder.fitting import NotFitted, fitted
from dryfit.recorder.traces import BySize, Taken, events, general, take
from dryfit.recorder.variants import LENGTHS, Variant
from dryfit.scenario.fields import CHUNK_TOKENS
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.loaders import WeightLoader

AT_RANDOM = 1  # sets of numbers beside the base and its single variations
ODD = 4  # of which scales of quantized weights don't come out whole
CAPABILITIES = ((8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))
OLDER = ((7, 0),)  # before 8.0 other kernels run
WINDOW = 8  # tokens, of an attention that looks back at fewer than a row has
FEW = 4  # sets beside the base that suffice where the expressions are known
CHECKS = 2  # at random between the ends of the ranges, beside both ends
Log = Callable[[str], None]
Event = tuple[int, int]


class OtherEvents(Exception):
    """A number that nobody named changes the events."""


def scenario_of(
    family: ModelFamily, variant: Variant, numbers: Numbers, kinds: Sequence[str], **more: Any
) -> Scenario:
    """A step of a model with these numbers and kinds of layers; ``more``: of its configuration."""
    window = {"sliding_window": WINDOW} if variant.flags.get("windowed") else {}
    step = {
        **variant.settings,
        "model": family.config(numbers, kinds, **{**window, **variant.particular, **more}),
    }
    step |= {"sequence_length": numbers["s"], "micro_batch": numbers["b"]}
    if "r" in numbers:
        step["lora"] = {"rank": numbers["r"]}
    return Scenario.from_mapping(step, {})


def sequence_of(family: ModelFamily, variant: Variant) -> tuple[str, str]:
    """The kinds of the layers that are traced for a variant, and another order of them that is checked."""
    return family.sequences[variant.flags.get("layers", 0)]


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
            found["e"] = (
                (first[0], min(first[1], limit)) if inside else (max(first[0], limit + 1), first[1])
            )
    if variant.settings["method"] == "full":
        del found["r"]
    return found


# What is taught of a loss in chunks, by how many there are. With five, three and two of them each chunk has stood
# between all neighbours that it can have.
CHUNKED_ROW = (76, 256, 121, 185, 53)  # tokens beyond whole chunks, of one row
CHUNKED_ROWS = {  # rows and their tokens
    5: ((9, 120), (10, 120), (9, 136), (2, 600), (15, 80), (3, 400), (2, 530), (20, 58)),
    3: ((2, 300), (7, 90), (3, 210), (2, 380), (10, 70)),
    2: ((2, 200), (3, 120), (5, 80), (7, 60), (2, 230)),
}
CHUNKED_ENDS = {"b": (2, 64), "s": (130, 256)}  # of 2 and of 64 chunks; with one row "s" as below
CHUNKED_ROW_ENDS = (259, 16384)
CHUNKED_MORE = ((2, 4096), (64, 16))  # checked too
FEW_CHUNKS = 1900  # tokens of a row at most, where ends are not checked
SHORT = (384, 389, 300, 511, 360)  # where experts are sorted in place


def teaching_points(family: ModelFamily, variant: Variant) -> tuple[list[str], list[Numbers]]:
    """The numbers that vary, and the sets to trace: the base, single variations in that order, others at random."""
    values = pinned(variant, family.points)
    count, *_ = chunk_counts(family, variant)
    rows: Sequence[Sequence[int]] = ()
    if count and variant.flags.get("one_row"):
        values["s"] = [CHUNK_TOKENS * (count - 1) + rest for rest in CHUNKED_ROW]
    elif count:
        base, more, longer, *rows = CHUNKED_ROWS[count]
        values |= {"b": (base[0], more[0]), "s": (base[1], longer[1])}
    if len(values["s"]) > 1:
        values["s"] = [_aligned(variant, length) for length in values["s"]]
        limit = _sorted_up_to(values)
        if limit and variant.flags.get("sorted_in_place") and max(values["s"]) > limit:
            values["s"] = [_aligned(variant, length) for length in SHORT]
        elif limit >= min(values["s"]) and not variant.flags.get("sorted_in_place"):
            values["s"] = [length + limit for length in values["s"]]
        if (chosen := _chosen_from(family, variant)) and chosen >= min(values["s"]):
            values["s"] = [length + chosen for length in values["s"]]
    draw = random.Random(1)
    base = {symbol: own[0] for symbol, own in values.items()}
    names = [symbol for symbol, own in values.items() if len(own) > 1]
    points = [base, *({**base, name: values[name][1]} for name in names)]
    others = [
        {symbol: draw.choice(own) for symbol, own in values.items()} for _ in range(AT_RANDOM)
    ]
    odd = {
        symbol: family.odd.get(symbol, own) if len(own) > 1 else own
        for symbol, own in values.items()
    }
    others += [
        {symbol: own[number % len(own)] for symbol, own in odd.items()} for number in range(ODD)
    ]
    for point, (some, length) in zip(others, rows, strict=False):
        point |= {"b": some, "s": _aligned(variant, length)}
    return names, [family.possible(point) for point in (*points, *others)]


def chunk_counts(family: ModelFamily, variant: Variant) -> Sequence[int]:
    """In how many chunks the loss is taken where a variant is taught: the most first. 0: its length is one, or any."""
    if not variant.flags.get("in_chunks"):
        return (0 if "length" in variant.flags else variant.flags.get("chunks", 0),)
    limit = (
        max(_sorted_up_to(pinned(variant, family.points)), _chosen_from(family, variant))
        // CHUNK_TOKENS
    )
    if variant.flags.get("sorted_in_place"):
        return sorted({count for count in (limit, 5, 3, 2) if count <= min(limit, 5)}, reverse=True)
    return [max(5, limit + 1), *(count for count in (3, 2) if count > limit)]


def fewer_chunks(variant: Variant, count: int, points: Sequence[Numbers]) -> list[Numbers]:
    """The numbers with other rows and lengths, so that the loss is taken in so many chunks."""
    if variant.flags.get("one_row"):
        lengths = [CHUNK_TOKENS * (count - 1) + rest for rest in CHUNKED_ROW]
        rows: Sequence[tuple[int, int]] = [(1, length) for length in lengths]
    else:
        rows = CHUNKED_ROWS[count]
    pairs = zip(points, rows, strict=False)
    return [{**point, "b": some, "s": _aligned(variant, length)} for point, (some, length) in pairs]


def _aligned(variant: Variant, length: int) -> int:
    return up(length, 8) if variant.flags.get("aligned") else length


def _chosen_from(family: ModelFamily, variant: Variant) -> int:
    """The longest row all of whose tokens an indexer chooses, where rows of a variant are longer; else 0."""
    return variant.particular[family.chooses] if variant.flags.get("chosen") else 0


def _sorted_up_to(values: Mapping[str, Sequence[int]]) -> int:
    """The longest row whose tokens' experts are sorted in place; 0: there are none."""
    return SORTED_IN_PLACE // values["e"][0] if "e" in values else 0


def checking_points(family: ModelFamily, variant: Variant) -> list[Numbers]:
    """The least of all numbers together, the largest, and some between, evenly over orders of magnitude."""
    flags = variant.flags
    ends = pinned(variant, family.ends)
    more: Sequence[tuple[int, int]] = ()
    if flags.get("in_chunks"):
        longest = min(CHUNKED_ROW_ENDS[1], ends["s"][1])
        ends |= {"s": (CHUNKED_ROW_ENDS[0], longest)} if flags.get("one_row") else CHUNKED_ENDS
        more = () if flags.get("one_row") else CHUNKED_MORE
    elif "chunks" in flags and "length" not in flags:
        ends["s"] = tuple(
            CHUNK_TOKENS * (flags["chunks"] - 1) + rest for rest in (3, CHUNK_TOKENS + 1)
        )
    if len(ends["s"]) > 1:
        low, high = (
            _aligned(variant, ends["s"][0]),
            ends["s"][1] // 8 * 8 if flags.get("aligned") else ends["s"][1],
        )
        if chosen := _chosen_from(family, variant):
            low = max(low, chosen + 3)
        elif family.chooses:
            high = min(high, variant.particular[family.chooses])
        if limit := _sorted_up_to(ends):
            beyond = limit + 1
            if flags.get(
                "in_chunks"
            ):  # with so many chunks as are taught, the last one of several tokens
                beyond = max(beyond, limit // CHUNK_TOKENS * CHUNK_TOKENS + 3)
            low, high = (
                (low, min(high, limit))
                if flags.get("sorted_in_place")
                else (max(low, beyond), high)
            )
        ends["s"] = _aligned(variant, low), high
    draw = random.Random(2)
    low, high = ({symbol: own[at] for symbol, own in ends.items()} for at in (0, -1))
    between = [
        {
            symbol: round(own[0] * (own[-1] / own[0]) ** draw.random())
            for symbol, own in ends.items()
        }
        for _ in range(CHECKS)
    ]
    for point in between:
        if flags.get(
            "in_chunks"
        ):  # a trace takes as long as there are chunks: the largest have many
            shorter = max(min(point["s"], FEW_CHUNKS), low["s"])
            point |= {"b": min(point["b"], 8), "s": _aligned(variant, shorter)}
        for symbol in {"d", "h", "m", "S", *("s" * bool(flags.get("aligned")))} & {*point}:
            point[symbol] = up(point[symbol], 8)
    between = [{**between[0], "b": count, "s": length} for count, length in more] + between
    return [family.possible(point) for point in (low, high, *between)]


class _Cut:
    """The traces of one model at several numbers, cut into stretches whose sizes are as many numbers."""

    def __init__(
        self, takes: Sequence[Taken], kinds: Sequence[str], told: dict[tuple[str, str, str], int]
    ) -> None:
        self.takes, self.first, self.told = takes, takes[0], told
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
        if (
            at == 0 and first.kinds[1] == 2 and first.targets[1] == 0
        ):  # transformers warms the allocator up
            return [_SeenSize("warm"), about]
        return [self._counted(tuple(int(each.sizes[at]) for each in self.takes), at), about]

    def _counted(self, sizes: tuple[int, ...], at: int) -> _SeenSize:
        """Sizes as they are, or as numbers for each trained tensor."""
        count = self.trained
        if any(at in span for span in self._optimizing) and set(sizes) in (
            {count},
            {2 * count},
            {4 * count},
        ):
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

    def __init__(
        self,
        points: Sequence[Numbers],
        names: Sequence[str],
        library: Sequence[Any],
        capability: Capability,
    ) -> None:
        self._known = [with_rounded(point, capability) for point in points]
        self._names, self._given, self._capability = names, library, capability
        self._library = {sizes: one for one in reversed(library) if (sizes := self._values(one))}
        self.sizes: list[Any] = []
        self.rules: list[Any] = []
        self._places: dict[tuple[int, ...], int] = {}

    def number(self, size: _SeenSize) -> int:
        """The place of a size's expression; of a rule, counted down from -1."""
        if size.rule == "trained":
            return self._place([[[size.sizes[0], 1, [["T", 1]]]], EXACT])
        if size.rule:
            own = [
                size.rule,
                [*map(_plain, size.fixed)],
                size.slot,
                [self.number(one) for one in size.arguments],
            ]
            if own not in self.rules:
                self.rules.append(own)
            return -1 - self.rules.index(own)
        if size.sizes not in self._places:
            self._places[size.sizes] = self._place(self._fit(size.sizes))
        return self._places[size.sizes]

    def at(self, points: Sequence[Numbers]) -> _Fitted:
        """The same expressions and rules, at other numbers."""
        other = _Fitted(points, (), [*self.sizes, *self._given], self._capability)
        other.sizes, other.rules = self.sizes, self.rules
        return other

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


def _taken(
    family: ModelFamily, variant: Variant, points: Sequence[Numbers], first: Taken | None = None
) -> list[Taken]:
    """Traces at all numbers, which have to leave the events as they are, or as in the first one that was traced."""
    takes: list[Taken] = []
    for point in points:
        step = scenario_of(family, variant, point, sequence_of(family, variant)[0])
        takes.append(
            take(
                step,
                variant.capability,
                origins=first is None,
                in_chunks="in_chunks" in variant.flags,
            )
        )
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
    fewer = []
    for count in chunk_counts(family, variant)[1:]:
        others = fewer_chunks(variant, count, [few[0], few[-1]])
        fewer.append((_taken(family, variant, others), others))
    if library:
        with suppress(NotFitted):
            return _content(
                family, variant, _Fitted(few, (), library, variant.capability), takes, fewer
            )
    rest = [point for point in points if point not in few]
    takes += _taken(family, variant, rest, takes[0])
    takes = [takes[[*few, *rest].index(point)] for point in points]
    return _content(family, variant, _Fitted(points, names, (), variant.capability), takes, fewer)


def _at_length(expression: Any, length: int) -> Iterator[Any]:
    """What an expression for one length may be for another: each term as it is, or in proportion to it."""
    terms, width = expression
    ratios = {
        Fraction(length + more, other + more)
        for other in LENGTHS
        if other != length
        for more in (0, -1, 3)
    }
    for ratio in ratios:
        for factors in itertools.islice(
            itertools.product((Fraction(1), ratio), repeat=len(terms)), 1, None
        ):
            new = [
                Fraction(own[0], own[1]) * factor
                for own, factor in zip(terms, factors, strict=True)
            ]
            yield [
                [
                    [each.numerator, each.denominator, own[2]]
                    for own, each in zip(terms, new, strict=True)
                ],
                width,
            ]


def _content(
    family: ModelFamily,
    variant: Variant,
    values: _Fitted,
    takes: Sequence[Taken],
    fewer: Sequence[tuple[Sequence[Taken], Sequence[Numbers]]],
) -> dict[str, Any]:
    """``fewer``: traces with fewer chunks of the loss, and at which numbers."""
    told: dict[tuple[str, str, str], int] = {}
    templates: list[Any] = []
    kinds, _ = sequence_of(family, variant)
    cut = _Cut(takes, kinds, told)
    counts = chunk_counts(
        family, variant
    )  # of few chunks, all of which are taught, each number has its own templates
    radius = CHUNK_RADIUS if counts[0] > 2 * CHUNK_RADIUS else 2 * CHUNK_RADIUS
    listed, choices = _chosen(family, kinds, radius, cut, values, templates)
    for others, points in fewer:
        fewer_cut = _Cut(others, kinds, told)
        own, more = _chosen(family, kinds, radius, fewer_cut, values.at(points), templates)
        if own != listed:
            raise OtherEvents("how many chunks the loss has changes what comes between")
        loops = loops_of(fewer_cut.items)
        for at, chosen in more.items():
            for layer, (around, template) in enumerate(chosen.items()):
                known = choices[at].setdefault(around, template)
                if known != template and (
                    at not in loops or not _same(templates, known, template, (at, layer), loops)
                ):
                    raise OtherEvents(
                        f"chunks or layers with the neighbours {around} do different things"
                    )
    arriving = {}
    if cut.first.arrivals:
        loader = WeightLoader.installed()
        workers = loader.workers if variant.settings["method"] == "qlora" else loader.dense_workers
        arriving = {
            "workers": workers,
            "arrivals": [*cut.arrivals(all_of_them=workers > 1).items()],
        }
    return {
        **arriving,
        "program": listed,
        "templates": templates,
        "sizes": values.sizes,
        "rules": values.rules,
        "choices": {
            str(at): [[list(around), own] for around, own in chosen.items()]
            for at, chosen in choices.items()
        },
        "told": [list(about) for about in told],
    }


def _same(
    templates: Sequence[Any], left: int, right: int, own: Place, loops: Mapping[int, Kinds]
) -> bool:
    """Whether two templates do the same in this chunk: of few chunks one may be the next and the last but one."""

    def resolved(event: Any) -> Any:
        parts = event if isinstance(event, list) else [event]
        return [
            absolute(own, part, "", loops) if isinstance(part, list) and part[1] in loops else part
            for part in parts
        ]

    return [*map(resolved, templates[left])] == [*map(resolved, templates[right])]


def _chosen(
    family: ModelFamily,
    kinds: Kinds,
    around_chunks: int,
    cut: _Cut,
    values: _Fitted,
    templates: list[Any],
) -> tuple[list[Any], dict[int, dict[Any, int]]]:
    """A record's program and, by pass, the templates of layers and chunks; new ones are added to ``templates``."""
    loops = loops_of(cut.items)

    def template(place: Place) -> int:
        own = [_event(event, values) for event in cut.found.get(place, [])]
        if own not in templates:
            templates.append(own)
        return templates.index(own)

    listed: list[Any] = []
    choices: dict[int, dict[Any, int]] = {}
    for item in cut.items:
        if item[0] == "mark":
            listed.append(["mark", item[1], item[2]])
        elif item[0] == "g":
            listed.append(["g", item[1], template(("g", item[1]))])
        else:
            listed.append([item[0], item[1], item[2]["way"]])
            in_loop = item[0] == "loop"
            passed, radius = (loops[item[1]], around_chunks) if in_loop else (kinds, family.radius)
            chosen = choices.setdefault(item[1], {})
            for layer in range(len(passed)):
                own, around = template((item[1], layer)), window(passed, layer, radius)
                if chosen.setdefault(around, own) != own:
                    raise OtherEvents(
                        f"chunks or layers with the neighbours {around} do different things"
                    )
    return listed, choices


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
    asked = StepKey.of(scenario, capability)
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


def checked(
    family: ModelFamily, variant: Variant, content: Mapping[str, Any], log: Log
) -> dict[str, Any]:
    """The content with the ranges of numbers and the capabilities at which its events equal the trace's.

    Raises
    ------
    OtherEvents
        If they differ at numbers that were not taught.
    """
    form = Form(content)
    points = checking_points(family, variant)
    sequence, order = sequence_of(family, variant)
    orders = [order] + [sequence] * (len(points) - 1)  # what an order does depends on no number
    steps = [
        scenario_of(family, variant, point, kinds)
        for point, kinds in zip(points, orders, strict=True)
    ]
    for point, step in zip(points, steps, strict=True):
        if why := differs(form, step, variant.capability):
            raise OtherEvents(f"at {point}: {why}")
    capabilities = [list(variant.capability)]
    for capability in OLDER if variant.flags.get("before_8") else CAPABILITIES:
        if why := differs(form, steps[-1], capability):
            log(f"not for capability {capability}: {why}")
        else:
            capabilities.append(list(capability))
    asked = [StepKey.of(step).numbers for step in steps]
    ranges = {
        symbol: [
            min(numbers[symbol] for numbers in asked),
            max(numbers[symbol] for numbers in asked),
        ]
        for symbol in asked[0]
    }
    return {**content, "ranges": ranges, "capabilities": capabilities}


def base_key(family: ModelFamily, variant: Variant) -> StepKey:
    """What a variant's record answers, by the step that it is taught with."""
    _, points = teaching_points(family, variant)
    return StepKey.of(
        scenario_of(family, variant, points[0], sequence_of(family, variant)[0]), variant.capability
    )


def alike_keys(family: ModelFamily, variant: Variant) -> dict[str, Scenario]:
    """By key the steps of the family's other models whose events may be the same."""
    _, points = teaching_points(family, variant)
    base = base_key(family, variant)
    kinds, _ = sequence_of(family, variant)
    steps = [scenario_of(family, variant, points[0], kinds, **other) for other in family.alike]
    return {base.key(StepKey.of(step).particular): step for step in steps}


def alike(
    family: ModelFamily,
    variant: Variant,
    form: Callable[[], Form],
    known: Collection[str],
    log: Log,
) -> Iterator[str]:
    """Keys of configurations of the family's other models whose events are the same, but for those that are known."""
    for key, step in alike_keys(family, variant).items():
        if key in known:
            continue
        if why := differs(form(), step, variant.capability):
            log(f"not alike {step.model}: {why}")
        else:
            yield key
