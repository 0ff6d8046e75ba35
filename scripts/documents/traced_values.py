"""Values that know where they came from, and texts that keep it: how a document's numbers are traced to their files.

:func:`sourced` turns what was read from a file into numbers and texts of the same value that carry file and key.
Computing with them, or formatting them, keeps the sources: the text of a number holds marks that no reader sees,
through f-strings, filters and macros, until :func:`collect` takes them out of the finished document and lists what they
said. So nothing is guessed by comparing figures, and templates know nothing of it.

>>> size = sourced({"peak": 7_120_000_000}, "trace.json")["peak"]
>>> text, numbers = collect(f"It takes {size / 1e9:.2f} GB.")
>>> text, numbers[0]["shown"], numbers[0]["from"]
('It takes 7.12 GB.', '7.12', {'trace.json': ['/peak']})
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NamedTuple

# Noncharacters of Unicode, which no text may hold: what is read has them written as escapes.
_OPEN, _BEGIN, _CLOSE = MARKS = "\ufdd0\ufdd1\ufdd2"
_MARK = re.compile(f"{_OPEN}(\\d+){_BEGIN}|{_CLOSE}")
_ESCAPES = {ord(mark): f"\\u{{{ord(mark):x}}}" for mark in MARKS}
# Not the number of a character, `&#64;`.
NUMBER = re.compile(r"(?<!&#)(?<!&#\d)(?<!&#\d\d)(?<!&#\d{3})\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


class ValueSource(NamedTuple):
    """A file and, as a JSON pointer (RFC 6901), the key in it; with ``#`` at its end, the key's name itself.

    In a template, the line.
    """

    file: str
    key: str


# Each set of sources once; a mark in a text holds its number. Only ever added to.
_KNOWN: dict[frozenset[ValueSource], int] = {}
_NUMBERED: list[frozenset[ValueSource]] = []


def sources_of(*values: Any) -> frozenset[ValueSource]:
    """The sources of all the values; none of a value that has none."""
    return frozenset().union(*(getattr(value, "__sources__", ()) for value in values))


def mark_sources(text: str, *values: Any) -> str:
    """A text that says something of the values: marked with their sources, beside those that it holds already."""
    if not (sources := sources_of(*values)):
        return text
    if sources not in _KNOWN:
        _KNOWN[sources] = len(_NUMBERED)
        _NUMBERED.append(sources)
    return f"{_OPEN}{_KNOWN[sources]}{_BEGIN}{text}{_CLOSE}"


def plain(text: str) -> str:
    """The text as a reader sees it."""
    return _MARK.sub("", str(text))


def _with(value: Any, sources: frozenset[ValueSource]) -> Any:
    """A value that was computed from others, with their sources."""
    if isinstance(value, tuple):
        return tuple(_with(item, sources) for item in value)
    kind = {int: Integer, float: Real, str: Text, list: TracedRows, dict: TracedFields}.get(
        type(value)
    )
    if kind is None or not sources:
        return value
    made = kind(value)
    made.__sources__ = sources
    return made


def _keeping(method: Callable) -> Callable:
    """The method of a built-in type; its result has the sources of all operands."""

    @wraps(method)
    def kept(self: Any, *others: Any, **named: Any) -> Any:
        value = method(self, *others, **named)
        if value is NotImplemented and isinstance(
            others[0], float
        ):  # an int leaves that to the float
            value = getattr(float, method.__name__)(float(self), *others)
        return value if value is NotImplemented else _with(value, sources_of(self, *others))

    return kept


def _marking(method: Callable) -> Callable:
    """A method that makes text of a number; what it makes is marked."""
    return wraps(method)(lambda self, *form: mark_sources(method(self, *form), self))


class _Sourced:
    __sources__: frozenset[ValueSource] = frozenset()  # no name that a template could ask for

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, _: Any) -> Any:
        return self


class Integer(_Sourced, int):
    """An int with its sources. A bare float on its left does not ask it: write ``size / 1e9``, not ``1e-9 * size``."""

    __str__ = _marking(int.__repr__)
    __format__ = _marking(int.__format__)


class Real(_Sourced, float):
    """A float with its sources."""

    __str__ = _marking(float.__repr__)
    __format__ = _marking(float.__format__)


class Text(_Sourced, str):
    """A text with its sources. ``str`` of it is the bare text; an f-string keeps them."""

    __format__ = _marking(str.__format__)

    def __add__(self, other: str) -> str:
        return f"{self}{other}"

    def __radd__(self, other: str) -> str:
        return f"{other}{self}"


class TracedRows(_Sourced, list):
    """A list that knows its source, so that its length does too."""


class TracedFields(_Sourced, dict):
    """A mapping with its source."""


_UNARY = "__neg__ __pos__ __abs__ __round__"
_BINARY = "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod divmod rdivmod"
for _kind, _base in ((Integer, int), (Real, float)):
    for _name in [*_UNARY.split(), *(f"__{name}__" for name in _BINARY.split())]:
        setattr(_kind, _name, _keeping(getattr(_base, _name)))
for _name in (
    "__getitem__",
    "capitalize",
    "lower",
    "lstrip",
    "replace",
    "rstrip",
    "strip",
    "title",
    "upper",
):
    setattr(Text, _name, _keeping(getattr(str, _name)))


def sourced(value: Any, file: str, key: str = "") -> Any:
    """The same structure; each number, each text and each name of a field knows its place in the file.

    Parameters
    ----------
    value
        What was read: mappings, lists, numbers, texts, booleans, None. The last two stay as they are.
    file
        Its path, as a reader would look for it.
    key
        JSON pointer of the value in the file.
    """
    sources = frozenset((ValueSource(file, key),))
    if isinstance(value, Mapping):
        fields = {}
        for name, item in value.items():
            place = f"{key}/{name.replace('~', '~0').replace('/', '~1')}"
            named = _with(name.translate(_ESCAPES), frozenset((ValueSource(file, f"{place}#"),)))
            fields[named] = sourced(item, file, place)
        return _with(fields, sources)
    if isinstance(value, list | tuple):
        return _with(
            [sourced(item, file, f"{key}/{place}") for place, item in enumerate(value)], sources
        )
    return _with(value.translate(_ESCAPES) if isinstance(value, str) else value, sources)


def count_of(values: Any) -> int:
    """How many there are, as a number that knows what was counted."""
    return _with(len(values), sources_of(values))


def collect(text: str, ignored: re.Pattern[str] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Take the marks out of a document.

    Parameters
    ----------
    text
        A rendered document with its marks.
    ignored
        What is no text of the document where it has no mark: tags of HTML.

    Returns
    -------
    str
        The document.
    list of dict
        Its numbers in order: ``line``; ``shown``, the digits; ``from``: keys by file, those of the text where the
        number is part of one, such as a version. Empty where something wrote it that this module knows nothing of.
    """
    pieces, starts, owners = (
        [],
        [],
        [],
    )  # of the document; where each begins in it, the sources that it shows
    open_marks: list[int] = []
    position = length = 0
    for mark in _MARK.finditer(text):
        pieces.append(text[position : mark.start()])
        starts.append(length)
        owners.append(open_marks[-1] if open_marks else None)
        length += len(pieces[-1])
        position = mark.end()
        open_marks.append(int(mark[1])) if mark[1] else open_marks.pop()
    document = "".join((*pieces, text[position:]))
    starts.append(length)
    owners.append(None)
    lines = [match.end() for match in re.finditer("\n", document)]
    skipped = (
        [place for match in ignored.finditer(document) for place in match.span()] if ignored else []
    )
    by_owner: dict[int | None, dict[str, list[str]]] = {None: {}}
    numbers = []
    for match in NUMBER.finditer(document):
        place = match.start()
        owner = owners[bisect_right(starts, place) - 1]
        if owner is None and bisect_right(skipped, place) % 2:
            continue
        if owner not in by_owner:
            by_owner[owner] = _by_file(_NUMBERED[owner])
        numbers.append(
            {"from": by_owner[owner], "line": bisect_right(lines, place) + 1, "shown": match[0]}
        )
    return document, numbers


def dump_yaml(value: Any) -> str:
    """YAML in the order given, long lines unbroken, without a final line break; marked where values have sources."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """The safe dumper; which quotes a text needs is decided without its marks."""

        def process_scalar(self) -> None:
            opening, _, closing = mark_sources("\0", self.event.value).partition("\0")
            self.stream.write(opening)
            super().process_scalar()
            self.stream.write(closing)

        def represent_number(self, data: Any) -> Any:
            node = super().represent_data(int(data) if isinstance(data, int) else float(data))
            node.value = _with(node.value, data.__sources__)
            return node

    for kind in (Integer, Real):
        Dumper.add_representer(kind, Dumper.represent_number)
    Dumper.add_representer(Text, yaml.SafeDumper.represent_str)
    Dumper.add_representer(TracedRows, yaml.SafeDumper.represent_list)
    Dumper.add_representer(TracedFields, yaml.SafeDumper.represent_dict)
    return yaml.dump(
        value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000
    ).rstrip("\n")


def _by_file(sources: Iterable[ValueSource]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for file, key in sorted(sources):
        keys.setdefault(file, []).append(key)
    return keys
