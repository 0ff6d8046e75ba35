"""Rows of the dataset on their way through its steps: one JSON object a line, read and written a few at a time.

A row has ``request``, ``command``, ``source`` and ``line`` (where it came from), and perhaps ``intent``.
A rejected row also has ``stage`` and ``reason``, and perhaps ``detail``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO

from scripts.common.errors import UserError

_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
CHUNK = 4_000  # rows that are in memory at once


def to_line(row: dict) -> str:
    """One row as a line of JSON, keys sorted. What some readers take for the end of a line is escaped."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def write_row(handle: IO[str], row: dict) -> None:
    """Write one row; see :func:`to_line`."""
    handle.write(to_line(row))


def chunks(rows: Iterable[dict], size: int = CHUNK) -> Iterator[list[dict]]:
    """Rows in lists of at most ``size``."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def must_keep_some(stage: str, kept: int, reasons: Counter, where: object) -> None:
    """Raise when a stage has rejected everything, naming the reasons that dominate."""
    if kept:
        return
    total = sum(reasons.values())
    common = "; ".join(f"{reason} ({count} of {total} rows)" for reason, count in reasons.most_common(3))
    raise UserError(
        f"Nothing is left of the dataset: stage {stage!r} rejected the last row. Most often: {common or 'no rows'}.",
        where=where,
        found=f"{total} rows, all rejected",
        allowed="at least one row that passes",
    )
