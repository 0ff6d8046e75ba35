"""The trace against what others measured on real GPUs.

    python -m validation.measurements                      the sources whose versions are installed here
    python -m validation.measurements --source a100 --json validation/data/validation.json
    python -m validation.measurements --tables             the kept report as Markdown, nothing is traced

Each row is a training step that somebody ran and measured with ``torch.cuda.max_memory_allocated`` or
``max_memory_reserved``. The program that ran it is traced (:mod:`validation.programs`), and the difference is
the row's error. Environments with the versions that were measured: ``envs/validation-*.yaml``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.common.files import read_json, write_json
from dryfit.common.terminal import command, progress
from validation.rows import MIB, SOURCES, STAGES, MeasuredRow, read
from validation.tables import FOLDER, markdown

REPORT = FOLDER / "validation.json"
ORDERS = 9  # how many orders of a threaded loading are replayed; the median counts


def validate(rows: Sequence[MeasuredRow], orders: int = ORDERS) -> list[dict[str, Any]]:
    """Trace every row and compare.

    Parameters
    ----------
    orders
        Where several threads loaded the model the order was chance; that many are traced and the medians taken.

    Returns
    -------
    list of dict
        See :func:`compare`; of a row that the trace refuses, ``refused``: the reason.
    """
    from validation import environments

    environments.prepare()
    from validation.programs import check_versions, run

    known: dict[str, Mapping[str, Any] | str] = {}
    results = []
    for row in progress(rows, "rows", unit="rows"):
        key = repr((row.scenario, row.program, sorted(row.settings.items(), key=str), row.session))
        if key not in known:  # some rows repeat others
            check_versions(row)
            try:
                known[key] = run(row, orders).to_mapping()
            except UserError as error:
                known[key] = error.problem
        results.append(compare(row, known[key]))
    return results


def compare(row: MeasuredRow, report: Mapping[str, Any] | str) -> dict[str, Any]:
    """Put a row's measurement beside its prediction.

    Parameters
    ----------
    report
        A :class:`~dryfit.engine.report.Report` as a mapping, with ``orders`` where several are possible; or why
        the row was not traced.

    Returns
    -------
    dict
        The row's settings; ``measured_bytes``, ``predicted_bytes`` and ``difference_bytes`` by stage;
        ``error_percent`` of ``allocated`` and ``reserved``; ``orders``, and where they are several ``range_bytes``, the
        lowest and highest prediction; for a row with an ``outcome`` whether it ``fits`` and ``required_bytes``.
    """
    result: dict[str, Any] = {
        "id": row.id,
        "model": row.model,
        "method": method(row),
        "attention": row.scenario.attention,
        "micro_batch": row.scenario.micro_batch,
        "sequence_length": row.scenario.sequence_length,
        "measured_bytes": dict(row.measured_bytes),
    }
    if isinstance(report, str):
        return result | {"error_percent": {}, "refused": report}
    orders = [stages(order) for order in report.get("orders") or [report]]
    typical = {
        stage: int(statistics.median_low([order[stage] for order in orders])) for stage in STAGES
    }
    result |= {
        "predicted_bytes": typical,
        "difference_bytes": {
            stage: typical[stage] - value for stage, value in row.measured_bytes.items()
        },
        "error_percent": {
            stage: round(100 * (typical[stage] / row.measured_bytes[stage] - 1), 4)
            for stage in ("allocated", "reserved")
            if stage in row.measured_bytes
        },
        "orders": len(orders),
    }
    if row.outcome is not None:  # whether the run got through: the question that the gate answers
        gpu = find("t4", "the measurements")
        needed = report["required_bytes"]
        result |= {
            "outcome": row.outcome,
            "required_bytes": needed,
            "fits": needed + gpu.context_bytes <= gpu.total_bytes,
        }
    if len(orders) > 1:
        result["range_bytes"] = {
            stage: [min(order[stage] for order in orders), max(order[stage] for order in orders)]
            for stage in STAGES
        }
    return result


def stages(report: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by stage of a report, or of one of its orders."""
    return {
        "resident": report["resident_bytes"],
        "allocated": report["peak_allocated_bytes"],
        "reserved": report["peak_reserved_bytes"],
    } | {phase: report["phases"][phase] for phase in ("forward", "backward", "optimizer")}


def method(row: MeasuredRow) -> str:
    """What a row trains: the scenario's method, or the kind of its adapters."""
    adapter = row.scenario.adapter
    return adapter["peft_type"].lower().replace("_", " ") if adapter else row.scenario.method


def summary(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and worst error by source and statistic, with the row that is worst."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_source.setdefault(source_of(result["id"]), []).append(result)
    table: dict[str, Any] = {}
    for source, rows in by_source.items():
        measured = {row["id"]: row["error_percent"] for row in rows if row["error_percent"]}
        table[source] = {
            "rows": len(measured),
            "title": SOURCES[source].title,
            **_typical(measured),
        }
        first = {
            row["id"]: row["first_error_percent"] for row in rows if row.get("first_error_percent")
        }
        if first:
            table[source]["first"] = {"rows": len(first), **_typical(first)}
        judged = [row for row in rows if "outcome" in row]
        if judged:
            right = sum(row["fits"] == (row["outcome"] == "ran") for row in judged)
            table[source]["verdicts"] = {"right": right, "rows": len(judged)}
    return table


def _typical(errors: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Median and worst error of each statistic, and how many are within 1 %."""
    medians = {}
    for stage in ("allocated", "reserved"):
        own = {name: row[stage] for name, row in errors.items() if stage in row}
        if own:
            worst = max(own, key=lambda name: abs(own[name]))
            medians[stage] = {
                "median_percent": round(statistics.median(map(abs, own.values())), 4),
                "within_1_percent": sum(abs(value) <= 1 for value in own.values()),
                "worst_percent": abs(own[worst]),
                "worst_row": worst,
            }
    return medians


def source_of(identity: str) -> str:
    """The name of the source that a row belongs to."""
    return next(
        name
        for name, source in SOURCES.items()
        if any(identity.startswith(f"{session}-") for session in source.sessions)
    )


def overview(report: Mapping[str, Any]) -> str:
    """One line for each source, as Markdown: what README shows."""
    rows = []
    for name, source in SOURCES.items():
        entry = report["summary"].get(name)
        if entry is None:
            continue
        tried = [(source.title, source.developed_with, entry)]
        if "first" in entry:
            tried[0] = (f"{source.title}: as they came out", source.developed_with, entry["first"])
            if entry["first"] != {
                key: value for key, value in entry.items() if key not in ("first", "title")
            }:
                tried.append((f"{source.title}: now", source.changed, entry))
        for title, developed_with, own in tried:
            cells = [_errors(own.get(stage)) for stage in ("allocated", "reserved")]
            rows.append([title, own["rows"], developed_with, *cells])
    columns = (
        "measured on",
        "rows:",
        "developed with",
        "allocated: median, worst",
        "reserved: median, worst",
    )
    return markdown(columns, rows) + "\n"


def _errors(rows: Mapping[str, Any] | None) -> str:
    return (
        f"{rows['median_percent']:.3f} %, {rows['worst_percent']:.3f} %"
        if rows
        else "not published"
    )


def table(report: Mapping[str, Any], source: str) -> str:
    """The rows of a source, as Markdown."""
    columns = ["row", "model", "method", "attention", "tokens"]
    columns += ["allocated, MiB:", "traced:", "error:", "reserved, MiB:", "traced:", "error:"]
    columns += ["at the first try:"] if SOURCES[source].unread else []
    rows = []
    for row in report["rows"]:
        if source_of(row["id"]) != source:
            continue
        cells = [row["id"], row["model"].split("/")[-1], row["method"], row["attention"]]
        cells.append(f"{row['micro_batch']} x {row['sequence_length']}")
        for stage in ("allocated", "reserved"):
            if "refused" in row:
                measured = (
                    f"{row['measured_bytes'][stage] / MIB:.2f}"
                    if stage in row["measured_bytes"]
                    else ""
                )
                cells += [measured, "", row["refused"] if measured else ""]
                continue
            predicted = f"{row['predicted_bytes'][stage] / MIB:.2f}"
            if stage in row["error_percent"]:
                measured = f"{row['measured_bytes'][stage] / MIB:.2f}"
                cells += [measured, predicted, f"{row['error_percent'][stage]:+.3f} %"]
            else:
                cells += [row.get("outcome", ""), predicted, ""]
        if SOURCES[source].unread:
            cells.append(
                ", ".join(f"{error:+.3f} %" for error in row["first_error_percent"].values())
                or "not traced"
            )
        rows.append(cells)
    return markdown(columns, rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation.measurements", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--source",
        nargs="+",
        choices=SOURCES,
        default=["t4"],
        help="whose measurements (default: t4)",
    )
    parser.add_argument("--rows", nargs="+", metavar="ID", help="only these rows")
    parser.add_argument(
        "--orders",
        type=int,
        default=ORDERS,
        help=f"orders of a threaded loading (default: {ORDERS})",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the report; rows of other sources in it stay",
    )
    parser.add_argument(
        "--tables", action="store_true", help="print the kept report as Markdown, trace nothing"
    )
    arguments = parser.parse_args()
    if arguments.tables:
        report = read_json(arguments.json or REPORT)
        print(overview(report))
        for source in (name for name in SOURCES if name in report["summary"]):
            print(f"### {SOURCES[source].title}\n\n{table(report, source)}")
        return 0
    rows = [row for source in arguments.source for row in read(source)]
    if arguments.rows:
        unknown = set(arguments.rows) - {row.id for row in rows}
        if unknown:
            raise UserError(
                "There is no such row.",
                where=", ".join(SOURCES[source].file for source in arguments.source),
                found=", ".join(sorted(unknown)),
                allowed=f"{rows[0].id} ... {rows[-1].id}",
            )
        rows = [row for row in rows if row.id in arguments.rows]
    from validation import environments

    results = validate(rows, arguments.orders)
    report = {
        "rows": results,
        "summary": summary(results),
        "versions": {source: environments.installed() for source in arguments.source},
    }
    if arguments.json:
        write_json(arguments.json, merged(arguments.json, report))
    else:
        print(json.dumps(report, indent=2, sort_keys=True))
    return 0


def merged(path: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """A new report put into the one that is kept: rows of other sources stay, all in the order of the sources.

    Of rows that were unread the errors of the first try stay, whatever comes out later.
    """
    old = read_json(path) if path.exists() else {"rows": [], "versions": {}}
    first = {
        row["id"]: row["first_error_percent"] for row in old["rows"] if "first_error_percent" in row
    }
    fresh = {row["id"]: row for row in report["rows"]}
    for name, row in fresh.items():
        if SOURCES[source_of(name)].unread:
            fresh[name] = {**row, "first_error_percent": first.get(name, row["error_percent"])}
    rows = [row for row in old["rows"] if row["id"] not in fresh] + list(fresh.values())
    order = list(SOURCES)
    rows.sort(key=lambda row: (order.index(source_of(row["id"])), row["id"]))
    return {
        "rows": rows,
        "summary": summary(rows),
        "versions": old["versions"] | report["versions"],
    }


if __name__ == "__main__":
    command(main)
