"""Every row of torchtitan's pages that gives a peak of memory: traced, and which of them stayed unread until the end.

    python -m validation.torchtitan_rows --draw               which rows were drawn to stay unread
    python -m validation.torchtitan_rows --trace NAME ...     trace rows, and keep what came out
    python -m validation.torchtitan_rows --table              all traced rows

The rows are all of torchtitan's own pages at commit b5bcd76 that give a peak of memory. Five of them had been read
before the draw and belong to the other half. Of each group, half of the rest was drawn, rounded up, before a row was
traced. ``validation/data/torchtitan_pages.csv`` has the pages' rows with the settings of their traces, and
``torchtitan_rows.csv`` beside it keeps the traces and the published figures. Tracing needs
the extra `run` (Linux) and torchao.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from dryfit.common.files import write_text
from dryfit.common.terminal import command
from validation.tables import FOLDER, markdown, rows_of

TABLE = FOLDER / "torchtitan_rows.csv"
SEED = 38
OPEN = (
    "table1-fsdp",
    "table1-compile",
    "table3-fsdp",
    "table3-compile",
    "table4-2d",
)  # read before the draw


class TorchtitanRow(NamedTuple):
    """A published row: its page and line there, what it is, and how it is traced; ``why_not``: why it is not."""

    page: str
    line: int
    what: str
    settings: dict[str, Any] | None = None
    why_not: str = ""


def _row(cells: Mapping[str, str]) -> TorchtitanRow:
    settings: dict[str, Any] = {name: int(cells[name]) for name in _NUMBERS if cells[name]}
    settings |= dict.fromkeys(cells["flags"].split(), True)
    page = cells["page"], int(cells["line"]), cells["what"]
    return TorchtitanRow(
        *page, {"llama": cells["llama"], **settings} if cells["llama"] else None, cells["why_not"]
    )


_NUMBERS = ("rows", "tokens", "shard", "tensor", "context", "pipeline")  # of a Training
GROUPS = {
    group: {cells["id"]: _row(cells) for cells in rows}
    for group, rows in groupby(rows_of("torchtitan_pages.csv"), itemgetter("group"))
}
ROWS = {name: row for group in GROUPS.values() for name, row in group.items()}


def drawn() -> list[str]:
    """The rows whose figures nobody read before the trace was finished."""
    draw, unread = random.Random(SEED), []
    for rows in GROUPS.values():
        rest = sorted(set(rows).difference(OPEN))
        unread += sorted(draw.sample(rest, -(-len(rest) // 2)))
    return unread


class TracedRow(NamedTuple):
    """A row's trace: of a pipeline, of the GPU of one stage. Figures in GiB; ``published`` "" while unread."""

    id: str
    half: str
    place: str
    allocated_gib: str
    reserved_gib: str
    published_gib: str

    @property
    def error_percent(self) -> float | None:
        """Of reserved memory, which torchtitan's logs show."""
        return (
            100 * (float(self.reserved_gib) / float(self.published_gib) - 1)
            if self.published_gib
            else None
        )


def read() -> list[TracedRow]:
    """The kept traces, in the order of the file."""
    return [TracedRow(**row) for row in rows_of(TABLE)]


def highest(traces: Iterable[TracedRow]) -> Iterator[TracedRow]:
    """Of each row the GPU that reserves most: torchtitan publishes the maximum."""
    found: dict[str, TracedRow] = {}
    for one in traces:
        if one.id not in found or float(one.reserved_gib) > float(found[one.id].reserved_gib):
            found[one.id] = one
    yield from (found[name] for name in ROWS if name in found)


def _trace(name: str, place: int) -> TracedRow:
    from validation.torchtitan import Training, trace
    from validation.torchtitan_llama import LLAMAS

    settings = dict(ROWS[name].settings or {})
    report = trace(Training(LLAMAS[settings.pop("llama")], **settings), place)
    sizes = (
        f"{size / 2**30:.2f}" for size in (report.peak_allocated_bytes, report.peak_reserved_bytes)
    )
    return TracedRow(name, "unread" if name in drawn() else "read", str(place), *sizes, "")


def places(name: str) -> tuple[int, ...]:
    """The stages to trace: the first holds most micro-batches, the second a layer more, the last the scores."""
    length = (ROWS[name].settings or {}).get("pipeline", 1)
    return (0,) if length == 1 else (0, 1, length - 1)


def _keep(traced: TracedRow) -> None:
    kept = {(one.id, one.place): one for one in (read() if TABLE.exists() else [])}
    before = kept.get((traced.id, traced.place))
    kept[traced.id, traced.place] = traced._replace(
        published_gib=before.published_gib if before else ""
    )
    order = list(ROWS)
    rows = sorted(kept.values(), key=lambda one: (order.index(one.id), int(one.place)))
    lines = [",".join(TracedRow._fields), *(",".join(row) for row in rows)]
    write_text(TABLE, "\n".join(lines) + "\n")


def table(traces: list[TracedRow]) -> str:
    """Each row with both figures, and each half's median and worst, as Markdown."""
    cells, errors = [], dict[str, list[float]]()
    for one in highest(traces):
        error = one.error_percent
        if error is not None:
            errors.setdefault(one.half, []).append(abs(error))
        difference = "" if error is None else f"{error:+.1f} %"
        name = f"{one.id}{', unread' if one.half == 'unread' else ''}"
        sizes = (one.published_gib, one.reserved_gib, one.allocated_gib)
        cells.append((name, ROWS[one.id].what, *sizes, difference))
    shown = markdown(("row", "", "published:", "reserved:", "allocated:", "difference:"), cells)
    for half, found in errors.items():
        shown += f"\n\n{half}: {len(found)} rows, median {statistics.median(found):.1f} %, worst {max(found):.1f} %"
    return shown + "\n"


def main() -> None:
    """Draw, trace or print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="print which rows stayed unread")
    parser.add_argument(
        "--trace", nargs="+", metavar="NAME", choices=[name for name in ROWS if ROWS[name].settings]
    )
    parser.add_argument("--table", action="store_true", help="print the rows that are kept")
    asked = parser.parse_args()
    if asked.draw:
        print(*drawn(), sep="\n")
    for name in asked.trace or ():
        for place in places(name):
            _keep(_trace(name, place))
            print(name, place, flush=True)
    if asked.table:
        print(table(read()))


if __name__ == "__main__":
    command(main)
