"""Readers of data files: each yields records in order and rejects a row with its line and reason.

What makes a whole file useless (broken JSON, a column that is not there or there twice, another encoding) is an error
with file and line; what spoils one row rejects that row. The CSV and JSON readers of pandas and datasets can't do that
(they stop at one spoilt row, or fill up, convert or rename in silence, and keep no line numbers:
tests/unit/dataset/test_sources.py), so Python's own are used; Parquet has neither lines nor spoilt rows.
"""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dryfit.common.errors import UserError
from dryfit.common.terminal import log
from scripts.tasks.support import messages

MAXIMUM_LINE_CHARACTERS = (
    1 << 20
)  # a longer line is no pair of request and command, and would have to fit in memory
_ROLES = ("request", "command", "intent")
# Names that people give the columns, the first one that a file has: https://huggingface.co/datasets by their cards.
_GUESSES = {
    "messages": ("messages", "conversations", "conversation"),
    "request": ("request", "prompt", "instruction", "question", "input"),
    "command": ("command", "answer", "response", "completion", "output", "target", "query", "sql"),
}
# What begins a file in a wider encoding: a mark, the longer ones first, or zeros in the first two characters.
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_WIDE = {
    (True, False, False, False): "UTF-32LE",
    (False, False, False, True): "UTF-32BE",
    (True, False, True, False): "UTF-16LE",
    (False, True, False, True): "UTF-16BE",
}
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # what a byte becomes that is not UTF-8 (PEP 383)
_TWICE = "\0twice"  # the key of a row that says which of its keys stands there twice


# What a reader finds, with its line: a row (a mapping), a spoilt row's text with the reason, or the header (a tuple).
Item = tuple[int, Any, str | None]


class SourceRecord(NamedTuple):
    """One row of a source.

    ``line`` is the line in the file (JSON lines, CSV) or the number of the row (others), from 1; ``fields`` are
    ``request``, ``command`` (the answer) and perhaps ``intent``, ``turns`` and ``family``, or whatever could be read of
    a rejected row; ``reason`` is why the row is rejected, or None.
    """

    line: int
    fields: dict[str, Any]
    reason: str | None = None


def storable(text: str) -> str:
    """The text with what UTF-8 can't hold (half surrogate pairs) replaced, so that it can be written down."""
    return text.encode("utf-8", "replace").decode("utf-8")


def to_record(line: int, row: Mapping[str, Any], columns: Mapping[str, str]) -> SourceRecord:
    """Pick the mapped columns of a row; a field that is missing or no text rejects it."""
    fields: dict[str, str] = {}
    reason = f"the key {storable(row[_TWICE])!r} stands there twice" if _TWICE in row else None
    for role in _ROLES:
        value = row.get(columns[role]) if role in columns else None
        if value is None:
            problem = f"{role} is missing"
        elif not isinstance(value, str):
            problem = f"{role} is not text but {type(value).__name__}"
        else:
            fields[role] = storable(value)
            if fields[role] == value:
                continue
            problem = (
                f"{role} is not UTF-8"
                if _NO_UTF8.search(value)
                else f"{role} has half a surrogate pair"
            )
        if role != "intent":
            reason = reason or problem
    return SourceRecord(line, fields, reason)


def columns_of(source: Mapping[str, Any]) -> dict[str, str] | None:
    """The columns that a source names by their roles; None where it names none."""
    names = dict(source.get("columns", {}))
    if not names:
        return None
    if "answer" in names:
        names["command"] = names.pop("answer")
    return names if "messages" in names else {"request": "request", "command": "command", **names}


def guessed(header: Iterable[str]) -> dict[str, str]:
    """The columns of a file by the names that people give them; those of a pair where none is known."""
    header = list(header)
    found = {
        role: name
        for role, names in _GUESSES.items()
        if (name := next((one for one in names if one in header), None))
    }
    if "messages" in found:
        return {"messages": found["messages"]}
    return {"request": "request", "command": "command", **found}


def to_records(
    line: int, row: Mapping[str, Any], columns: Mapping[str, str], path: str
) -> Iterator[SourceRecord]:
    """The rows of a file's row: one, or one for each answer of a conversation."""
    if "messages" not in columns:
        yield to_record(line, row, columns)
        return
    found, reason = messages.rows(row.get(columns["messages"]))
    if reason:
        shown = storable(json.dumps(row.get(columns["messages"]), ensure_ascii=False, default=str))[
            :200
        ]
        yield SourceRecord(line, {"request": shown}, reason)
    for fields in found:
        family = {"family": f"{path}, line {line}"} if len(found) > 1 else {}
        yield SourceRecord(
            line, json.loads(storable(json.dumps({**fields, **family}, ensure_ascii=False)))
        )


def check_columns(found: Iterable[str], columns: Mapping[str, str], where: object) -> None:
    """Every mapped column is there, and none has the name of another; else an error shows those that are."""
    found = [storable(str(name)) for name in found]
    if twice := [name for name, times in Counter(found).items() if name and times > 1]:
        raise UserError(
            "Columns have the same name, so it can't be told which one is meant.",
            where=where,
            found=twice,
            allowed="a name of its own for each column",
            write=",".join(
                f"{name}_{found[:at].count(name) + 1}" if name in twice else name
                for at, name in enumerate(found)
            ),
        )
    for role, column in columns.items():
        if column not in found:
            comma = "" if len(found) > 1 else ", separated by commas if the file is CSV"
            raise UserError(
                f"There is no column {column!r} for the {role}.",
                where=where,
                found=found,
                allowed=f"a column of the source for each of request and command{comma}",
                write=f"columns: {{request: {found[0] if found else '...'}, command: {found[-1] if found else '...'}}}",
            )


def _open(path: Path) -> TextIO:
    """Open a file in UTF-8; a byte that is not UTF-8 spoils no more than the field it stands in."""
    with open(path, "rb") as handle:
        start = handle.read(4)
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if encoding := marked or _WIDE.get(tuple(map(bool, start))):
        write = f"iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"
        raise UserError(
            f"The file is {encoding[:6]}, not UTF-8.", where=path, allowed="UTF-8", write=write
        )
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """JSON; an object with a key twice says so under :data:`_TWICE`."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            row[_TWICE] = next(
                key for key, times in Counter(key for key, _ in pairs).items() if times > 1
            )
        return row

    try:
        return json.loads(text, object_pairs_hook=build, strict=False)
    except (ValueError, RecursionError) as error:
        problem = (
            "it is nested too deeply"
            if isinstance(error, RecursionError)
            else getattr(error, "msg", error)
        )
        raise UserError(
            f"This is not JSON: {problem}.",
            where=f"{path}, line {line or getattr(error, 'lineno', 1)}",
            found=text.strip()[:120],
            allowed="JSON in UTF-8",
        ) from None


def read_json(path: Path) -> Iterator[Item]:
    """A file that is one list of JSON objects."""
    with _open(path) as handle:
        rows = _parse(handle.read(), path)
    yield from (
        (number, row, None)
        for number, row in enumerate(rows if isinstance(rows, list) else [[rows]], 1)
    )


def read_json_lines(path: Path) -> Iterator[Item]:
    """A file with one JSON object a line; a line that is too long is skipped, not loaded."""
    number = 0
    with _open(path) as handle:
        while line := handle.readline(MAXIMUM_LINE_CHARACTERS + 1):
            number += 1
            if len(line) > MAXIMUM_LINE_CHARACTERS:
                yield number, line, f"line is longer than {MAXIMUM_LINE_CHARACTERS} characters"
                while line and not line.endswith("\n"):
                    line = handle.readline(MAXIMUM_LINE_CHARACTERS)
            elif not line.isspace():
                yield number, _parse(line, path, number), None


def read_csv(path: Path) -> Iterator[Item]:
    """A CSV file with a header, as RFC 4180 has it (quoted fields may span lines)."""
    csv.field_size_limit(MAXIMUM_LINE_CHARACTERS)
    header: tuple[str, ...] | None = None
    line = 1  # where the record at hand begins
    with _open(path) as handle:
        rows = csv.reader(handle, strict=True)
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise UserError(
                    f"The CSV can't be read: {error}.",
                    where=f"{path}, line {line}"
                    + (f" to {rows.line_num}" if rows.line_num > line else ""),
                    allowed='fields with a comma, quote or line break in double quotes, quotes in them doubled ("")',
                ) from None
            if row is None:
                return
            if row and header is None:
                header = tuple(row)
                yield line, header, None
            elif row and len(row) != len(header):
                yield line, ",".join(row), f"row has {len(row)} fields instead of {len(header)}"
            elif row:
                yield line, dict(zip(header, row, strict=True)), None
            line = rows.line_num + 1


def parquet_columns(path: Path) -> list[str]:
    """The columns of a Parquet file; none where it can't be read, which the reader explains."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return []


def read_parquet(path: Path, columns: Iterable[str]) -> Iterator[Item]:
    """A Parquet file, of which only the columns that are asked for are loaded."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield 1, tuple(pq.read_schema(path).names), None
        rows = pd.read_parquet(path, columns=list(columns)).astype(object)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"The Parquet file can't be read: {error}", where=path) from None
    for number, row in enumerate(rows.where(rows.notna(), None).to_dict("records"), 1):
        yield number, row, None


_READERS = {"jsonl": read_json_lines, "ndjson": read_json_lines, "json": read_json, "csv": read_csv}


def read_file(
    path: str, columns: Mapping[str, str] | None, format: str | None, *, guess: bool = False
) -> Iterator[SourceRecord]:
    """Records of one file.

    ``columns`` are the names of those that hold ``request``, ``command`` and perhaps ``intent``, or ``messages``; None:
    those very names, or what the first row suggests (``guess``). ``format`` is ``jsonl``, ``json``, ``csv`` or
    ``parquet``, or None: by the ending of its name.

    UserError: when the file is missing, empty, UTF-16, malformed, or lacks a column.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(
            "The data file does not exist.",
            where="dataset.sources",
            found=path,
            allowed="a file's path",
        )
    format = format or file.suffix.lower().removeprefix(".")
    if format not in (*_READERS, "parquet"):
        raise UserError(
            "The format of this file can't be told from its name.",
            where="dataset.sources",
            found=path,
            allowed="a name that ends in .jsonl, .ndjson, .json, .csv or .parquet; or the format, stated",
            write="format: jsonl",
        )
    known = columns
    columns = columns or {"request": "request", "command": "command"}
    if format == "parquet":
        if guess and known is None:
            known = columns = guessed(parquet_columns(file))
        items = read_parquet(file, columns.values())
    else:
        items = _READERS[format](file)
    header, empty = None, True
    for line, content, reason in items:
        where = f"{path}, line {line}"
        if not reason and not isinstance(content, tuple | dict):
            raise UserError(
                "This is not a JSON object.",
                where=where,
                found=content,
                allowed="objects: one a line (format: jsonl), or one list of them (format: json)",
                write='{"request": "...", "command": "..."}',
            )
        if header is None and not reason:
            header = [key for key in content if key != _TWICE]
            if guess and known is None:
                columns = guessed(header)
                log.info(
                    "%s: %s", path, ", ".join(f"{role}: {name}" for role, name in columns.items())
                )
            check_columns(header, columns, where)
        if reason:  # the beginning of what could not be taken apart stands in for the request
            yield SourceRecord(line, {"request": storable(content[:200])}, reason)
        elif isinstance(content, dict):
            yield from to_records(line, content, columns, path)
        empty &= not reason and isinstance(content, tuple)
    if empty:
        raise UserError(
            "The file has no rows.", where=path, allowed="at least one pair of request and command"
        )
