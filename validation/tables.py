"""Tables: the rows of ``validation/data``, and rows as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "data"


def rows_of(file: str | Path, **having: str) -> list[dict[str, str]]:
    """The rows of a CSV file of ``validation/data``; ``having``: those alone with these values."""
    with open(FOLDER / file, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [row for row in rows if all(row[name] == value for name, value in having.items())]


def markdown(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Rows as Markdown. A column whose name ends in ``:`` holds numbers, which stand to the right."""
    names = "|".join(
        f" {name} " if name else " " for name in (column.removesuffix(":") for column in columns)
    )
    rules = " | ".join("---:" if name.endswith(":") else "---" for name in columns)
    return "\n".join(
        [f"|{names}|", f"| {rules} |", *(f"| {' | '.join(map(str, cells))} |" for cells in rows)]
    )
