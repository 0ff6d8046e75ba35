"""Readers of data files: each yields records in order and rejects a row with its line and reason.

What makes a whole file useless (broken JSON, a column that is not there or there twice, another encoding) is an error
with file and line; what spoils one row rejects that row. The CSV and JSON-lines readers of pandas and datasets can't
do that (they stop at one spoilt row, or fill up, convert or rename in silence, and keep no line numbers:
tests/unit/dataset/test_sources.py), so those two are read here; Parquet has neither lines nor spoilt rows.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common.errors import UserError

MAXIMUM_LINE_BYTES = 1 << 20  # a longer line is no pair of request and command, and would have to fit in memory
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ROLES = ("request", "command", "intent")
_TWICE = "\0twice"
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class Record(NamedTuple):
    """One row of a source.

    Attributes
    ----------
    line
        Line in the file (JSONL, CSV) or number of the row (Parquet, Hub, embedded), from 1.
    fields
        ``request``, ``command`` and perhaps ``intent``; whatever could be read of a rejected row.
    reason
        Why the row is rejected, or None.
    """

    line: int
    fields: dict[str, str]
    reason: str | None = None


def storable(text: str) -> str:
    """The text with what UTF-8 can't hold (half surrogate pairs) replaced, so that it can be written down."""
    return text.encode("utf-8", "replace").decode("utf-8")


def to_record(line: int, row: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    """Pick the mapped columns of a row; a field that is missing or no text rejects it."""
    fields: dict[str, str] = {}
    reason = f"the key {storable(row[_TWICE])!r} stands there twice" if _TWICE in row else None
    for role in _ROLES:
        value = row.get(columns[role]) if role in columns else None
        if value is None:
            problem = f"{role} is missing"
        elif not isinstance(value, str):
            problem = f"{role} is not text but {type(value).__name__}"
        elif storable(value) != value:
            fields[role] = storable(value)
            problem = f"{role} has half a surrogate pair"
        else:
            fields[role] = value
            continue
        if role != "intent":
            reason = reason or problem
    return Record(line, fields, reason)


def check_columns(found: Iterable[str], columns: Mapping[str, str], where: object) -> None:
    """Every mapped column is there, and none has the name of another; else an error shows those that are."""
    found = [str(name) for name in found]
    if twice := [name for name, times in Counter(found).items() if times > 1]:
        raise UserError(
            "Columns have the same name, so it can't be told which one is meant.",
            where=where,
            found=twice,
            allowed="a name of its own for each column",
            write=",".join(
                f"{name}_{found[:at].count(name) + 1}" if name in twice else name for at, name in enumerate(found)
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


def _lines(path: Path) -> Iterator[tuple[int, bytes, str | None]]:
    """Lines of a file as number, bytes and reason of rejection; a line that is too long is skipped, not loaded."""
    with open(path, "rb") as handle:
        start = handle.read(4)
        for mark, encoding in _OTHER_ENCODINGS.items():
            if start.startswith(mark):
                raise UserError(
                    f"The file is {encoding}, not UTF-8.",
                    where=path,
                    allowed="UTF-8",
                    write=f"iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}",
                )
        handle.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
        number = 0
        while line := handle.readline(MAXIMUM_LINE_BYTES + 1):
            number += 1
            if len(line) > MAXIMUM_LINE_BYTES:
                head = line[:200]
                while line and not line.endswith(b"\n"):
                    line = handle.readline(MAXIMUM_LINE_BYTES)
                yield number, head, f"line is longer than {MAXIMUM_LINE_BYTES} bytes"
            elif b"\0" in line:
                yield number, line, "line has a NUL byte"
            else:
                yield number, line, None


def _decoded(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Lines as text; a line that is not UTF-8 is rejected, and a file without any line that is raises."""
    good = bad = 0
    first_bad = 0
    for number, line, reason in _lines(path):
        try:
            text = line.decode("utf-8")
            good += bool(line.strip()) and reason is None
        except UnicodeDecodeError as error:
            text = line.decode("utf-8", "replace")
            if reason is None:
                reason = f"line is not UTF-8 (byte {error.start + 1})"
                bad += 1
                first_bad = first_bad or number
        yield number, text, reason
    if bad and not good:
        raise UserError(
            "The file is not UTF-8: none of its lines is.",
            where=f"{path}, line {first_bad}",
            allowed="UTF-8",
            write=f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}",
        )


def _rejected_line(number: int, text: str, reason: str) -> Record:
    """A line that could not be taken apart: its beginning stands in for the request."""
    return Record(number, {"request": storable(text[:200])}, reason)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary; with a key twice, the key :data:`_TWICE` says which."""
    row = dict(pairs)
    if len(row) < len(pairs):
        row[_TWICE] = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
    return row


def read_json(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Records of a file that is one list of JSON objects."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        place = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        raise UserError(f"This is not JSON in UTF-8: {error}.", where=place) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            "This is not a list of JSON objects.",
            where=path,
            allowed="one list of objects; or one object a line, as format: jsonl",
            write='[{"request": "...", "command": "..."}]',
        )
    for number, row in enumerate(rows, 1):
        if number == 1:
            check_columns([key for key in row if key != _TWICE], columns, path)
        yield to_record(number, row, columns)


def read_json_lines(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Records of a file with one JSON object a line."""
    first = True
    for number, text, reason in _decoded(path):
        if reason:
            yield _rejected_line(number, text, reason)
            continue
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except RecursionError:
            raise UserError("This line is not JSON that can be read: nested too deeply.", where=where) from None
        except ValueError as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                f"This line is not JSON: {message}.",
                where=where,
                found=text.strip()[:120],
                allowed="one JSON object a line",
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                "This line is not a JSON object.",
                where=where,
                found=text.strip()[:120],
                allowed="one object a line",
                write='{"request": "...", "command": "..."}',
            )
        if first:
            check_columns([key for key in row if key != _TWICE], columns, where)
            first = False
        yield to_record(number, row, columns)


def read_csv(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Records of a CSV file with a header, as RFC 4180 has it (quoted fields may span lines)."""
    rejected: list[Record] = []
    begun: list[int] = []  # lines of the record at hand

    def good_lines() -> Iterator[str]:
        for number, text, reason in _decoded(path):
            if reason:
                rejected.append(_rejected_line(number, text, reason))
            else:
                begun.append(number)
                yield text

    csv.field_size_limit(MAXIMUM_LINE_BYTES)
    rows = csv.reader(good_lines(), strict=True)
    header: list[str] | None = None
    while True:
        begun.clear()
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"The CSV can't be read: {error}.",
                where=f"{path}, line {begun[0]}" + (f" to {begun[-1]}" if len(begun) > 1 else ""),
                allowed='fields with a comma, quote or line break in double quotes, and quotes in them doubled ("")',
            ) from None
        if header is None and rejected:
            raise UserError(
                f"The header can't be read: {rejected[0].reason}.",
                where=f"{path}, line {rejected[0].line}",
                allowed="a first line with the names of the columns",
            )
        yield from rejected
        rejected.clear()
        if row is None:
            return
        if not row:
            continue
        line = begun[0]
        if header is None:
            header = row
            check_columns(header, columns, f"{path}, line {line}")
        elif len(row) != len(header):
            yield _rejected_line(line, ",".join(row), f"row has {len(row)} fields instead of {len(header)}")
        else:
            yield to_record(line, dict(zip(header, row, strict=True)), columns)


def read_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Records of a Parquet file."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_columns(pq.read_schema(path).names, columns, path)
        rows = pd.read_parquet(path, columns=list(columns.values())).astype(object)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"The Parquet file can't be read: {error}", where=path) from None
    for number, row in enumerate(rows.where(rows.notna(), None).to_dict("records"), 1):
        yield to_record(number, row, columns)


def read_file(path: str, columns: Mapping[str, str], format: str | None) -> Iterator[Record]:
    """Records of one file.

    Parameters
    ----------
    path
        The file.
    columns
        Names of the columns that hold ``request``, ``command`` and perhaps ``intent``.
    format
        ``jsonl``, ``json``, ``csv`` or ``parquet``; None: by the ending of its name.

    Raises
    ------
    UserError
        When the file is missing, empty, not UTF-8, malformed, or lacks a column.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError("The data file does not exist.", where="dataset.sources", found=path, allowed="a file's path")
    format = format or FORMATS.get(file.suffix.lower())
    if format is None:
        raise UserError(
            "The format of this file can't be told from its name.",
            where="dataset.sources",
            found=path,
            allowed="a name that ends in " + ", ".join(FORMATS) + "; or the format, stated",
            write="format: jsonl",
        )
    readers = {"jsonl": read_json_lines, "json": read_json, "csv": read_csv, "parquet": read_parquet}
    empty = True
    for record in readers[format](file, columns):
        empty = False
        yield record
    if empty:
        raise UserError("The file has no rows.", where=path, allowed="at least one pair of request and command")
