"""Rows of the dataset between two steps: a table in memory, one JSON object a line in a file.

A row has ``request``, ``command`` (the answer, whatever the task), ``source`` and ``line`` (where it came from). It may
have ``intent`` and ``family`` (what holds it together with other rows), ``turns`` (the messages of a conversation, of
which ``request`` is a transcript), ``split: train`` if it may not be held out, and ``split: test`` if it is of a test
file.
A rejected row also has ``stage`` and ``reason``, and perhaps ``detail``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_open
from dryfit.common.terminal import log

if TYPE_CHECKING:
    import pandas as pd
    from pandas import DataFrame as Rows
else:
    Rows = "pandas.DataFrame"  # imported by the functions that compute with it

SPLITS = ("train", "validation", "test")
TEST = SPLITS[2]
KNOWN = "known"  # of the held-out rows those whose kind is trained
COLUMNS = ("request", "command", "source", "line")
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")


def families_of(rows: Rows) -> pd.Series | None:
    """What holds rows together beside their texts; null where a row names nothing, None where none does."""
    named = [rows[name] for name in ("family", "intent") if name in rows]
    return named[0].fillna(named[1]) if len(named) == 2 else next(iter(named), None)


def read_rows(path: str | os.PathLike) -> Rows:
    """The rows of a file that a step wrote; a field that a row does not have is null."""
    import pandas as pd

    if not os.path.getsize(path):
        return pd.DataFrame(
            {name: pd.Series(dtype="int64" if name == "line" else "str") for name in COLUMNS}
        )
    return pd.read_json(path, lines=True, dtype=False)


def read_chunks(path: str | os.PathLike, size: int) -> Iterator[Rows]:
    """The same rows, so many at a time."""
    import pandas as pd

    if os.path.getsize(path):
        with pd.read_json(path, lines=True, dtype=False, chunksize=size) as chunks:
            yield from chunks


def write_rows(path: str | os.PathLike, rows: Rows) -> None:
    """Write the rows, in order, atomically."""
    with atomic_open(path) as handle:
        handle.writelines(to_lines(rows))


def to_lines(rows: Rows) -> Iterator[str]:
    """Each row as a line of JSON, keys sorted, nulls left out. What some readers take for a line's end is escaped."""
    for values in rows.itertuples(index=False, name=None):
        fields = zip(rows.columns, values, strict=True)
        row = {key: value for key, value in fields if value is not None and value == value}
        text = json.dumps(row, sort_keys=True, ensure_ascii=False)
        yield _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def count(values: pd.Series) -> dict[str, int]:
    """How often each value occurs, for a report."""
    return {str(value): int(number) for value, number in values.value_counts().items()}


def must_keep_some(stage: str, kept: int, reasons: dict[str, int], where: object) -> None:
    """Raise when a stage has rejected everything, naming the reasons that dominate."""
    if kept:
        return
    total = sum(reasons.values())
    most = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    common = "; ".join(f"{reason} ({number} of {total} rows)" for reason, number in most)
    raise UserError(
        f"Nothing is left of the dataset: stage {stage!r} rejected the last row. Most often: {common or 'no rows'}.",
        where=where,
        found=f"{total} rows, all rejected",
        allowed="at least one row that passes",
    )


def must_not_drop_many(stage: str, rows: Rows, most: float) -> None:
    """Say how many rows have a ``reason``, and raise when their share is above ``most``, with the first three."""
    dropped = rows[rows["reason"].notna()]
    if dropped.empty:
        return
    share = len(dropped) / len(rows)
    reasons = "; ".join(
        f"{reason} ({number})" for reason, number in list(count(dropped["reason"]).items())[:3]
    )
    log.warning("%s drops %d of %d rows: %s", stage, len(dropped), len(rows), reasons)
    if share <= most:
        return
    first = []
    for row in dropped.head(3).to_dict("records"):
        shown = (
            " ".join(str(row.get("request", "")).split())[:60],
            " ".join(str(row.get("command", "")).split())[:60],
        )
        first.append(
            f"{row['source']}, line {row['line']}: {row['reason']}: {shown[0]!r} -> {shown[1]!r}"
        )
    raise UserError(
        f"Many rows can't be used: {stage} drops {len(dropped)} of {len(rows)}, {share:.1%}.",
        where="\n           ".join(first),
        allowed=f"at most {most:.0%} dropped (dataset.most_dropped); or another task, if these checks are not for it",
        write=None if share == 1 else f"dataset:\n  most_dropped: {math.ceil(share * 100) / 100:g}",
    )
