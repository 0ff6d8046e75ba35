"""Rule ``acquire_dataset``: read every configured source into one table, and record where each row came from.

Nothing is judged here but what can't be read at all; rows that can't be are in the rejected file with a reason.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import (
    read_json,
    read_jsonl,
    read_report,
    sha256_file,
    write_json,
    write_jsonl,
    write_report,
)
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.dataset.rows import COLUMNS, TEST, Rows, count, must_not_drop_many, write_rows
from scripts.dataset.sources import SourceRecord, columns_of, read_file
from scripts.tasks.support import registry
from scripts.tasks.text import Task


def label(source: Mapping[str, Any]) -> str:
    """A source's name in rows and reports."""
    if source["type"] == "hub":
        return "/".join(
            str(source[key]) for key in ("repository", "config", "split") if source.get(key)
        )
    return (
        ", ".join(source["paths"])
        if "paths" in source
        else source.get("requirement", source["type"])
    )


def read_source(
    task: Task, source: Mapping[str, Any], revisions: dict[str, str], about: dict
) -> Iterator[tuple[str, SourceRecord]]:
    """Yield the records of an entry of ``dataset.sources`` with the name of the file or repository they are from.

    ``revisions`` (commits that earlier runs resolved) is renewed, ``about`` filled with what the report says.
    """
    columns = columns_of(source) or (
        None if task.guesses_columns else {"request": "request", "command": "command"}
    )
    if source["type"] in task.source_types:
        for origin, number, fields in task.read(source, about):
            yield origin, SourceRecord(number, fields)
    elif source["type"] == "files":
        about["files"] = []
        for path in source["paths"]:
            for record in read_file(
                path, columns, source.get("format"), guess=task.guesses_columns
            ):
                yield path, record
            about["files"].append({"path": path, "sha256": sha256_file(path)})
    elif source["type"] == "benchmark":
        report = read_report(source["report"], source["tasks"])
        about |= {
            key: report[key] for key in ("requirement", "wheel_sha256", "file") if key in report
        }
        for number, task in enumerate(read_jsonl(source["tasks"]), 1):
            for command in (task["command"], *task["alternatives"]):
                yield (
                    label(source),
                    SourceRecord(number, {"request": task["request"], "command": command}),
                )
    else:
        from scripts.dataset.hub import read_repository, resolve

        commit = resolve(source, revisions)
        about |= {
            key: source[key]
            for key in ("repository", "config", "split", "revision")
            if key in source
        }
        about["commit"] = commit
        for record in read_repository(source, commit, columns, guess=task.guesses_columns):
            yield label(source), record


def acquire(
    task: Task, sources: list[Mapping[str, Any]], revisions: dict[str, str]
) -> tuple[Rows, list[dict]]:
    """The rows of all sources, those that could not be read with a ``reason``, and a summary of each source."""
    import pandas as pd

    tables = [pd.DataFrame(columns=[*COLUMNS, "reason"])]
    summaries = []
    for source in sources:
        name = label(source)
        about: dict[str, Any] = {"license": source["license"], "name": name, "type": source["type"]}
        if source.get("attribution"):
            about["attribution"] = source["attribution"]
        if source["license"].lower() == "unknown":
            log.warning("The licence of %s is unknown: the card will say so.", name)
        found = read_source(task, source, revisions, about)
        rows = (
            {**fields, "line": line, "reason": reason, "source": origin}
            for origin, (line, fields, reason) in found
        )
        table = pd.DataFrame(rows)
        if table.empty:  # a source that could not be reached
            table = tables[0][:0]
        rejected = int(table["reason"].notna().sum())
        about |= {"rejected": rejected, "rows": len(table) - rejected}
        log.info("%s: %d rows, %d rejected", name, about["rows"], rejected)
        tables.append(table)
        summaries.append(about)
    return pd.concat(tables[bool(sources) :], ignore_index=True), summaries


def main(
    task: Task,
    sources: list,
    external: list,
    outputs: Any,
    benchmark: Mapping[str, str] | None = None,
    examples: Mapping[str, str] | None = None,
    *,
    test: list | None = None,
    most_dropped: float = 1.0,
) -> None:
    """Read ``sources`` into ``outputs.pairs`` and the external test sets into ``outputs.external``.

    ``benchmark`` is one more of these: its ``requirement`` and ``license``, the paths of its ``tasks`` and ``report``.
    ``examples`` are the paths of the pairs (``found``) and the ``report`` of the source of that type.
    """
    import pandas as pd

    # Not a declared output: it outlives reruns, so that a moved branch on the Hub is noticed.
    revisions_file = Path(outputs.report).with_name("revisions.json")
    revisions = read_json(revisions_file) if revisions_file.exists() else {}
    sources = [
        {**source, **examples} if examples and source["type"] == "examples" else source
        for source in sources
    ]
    rows, summaries = acquire(task, sources, revisions)
    if test:
        held, about = acquire(task, test, revisions)
        held = held.drop(columns=["intent", "family"], errors="ignore").assign(split=TEST)
        rows = pd.concat([held, rows], ignore_index=True)  # of two equal rows the first one is kept
        summaries += [{**one, "test": True} for one in about]
    more = [{"type": "benchmark", **benchmark}] if benchmark else []
    held_out, external_summaries = acquire(task, [*external, *more], revisions)
    reasons = count(rows["reason"])
    if rows["reason"].notna().all():
        common = ", ".join(f"{reason} ({number})" for reason, number in list(reasons.items())[:3])
        raise UserError(
            f"Every row was rejected while reading: {common}.",
            where=", ".join(summary["name"] for summary in summaries),
            found=f"{len(rows)} rows, 0 usable",
            allowed="at least one row with a request and an answer as text",
        )
    must_not_drop_many("reading", rows, most_dropped)
    for path, table in ((outputs.pairs, rows), (outputs.external, held_out)):
        write_rows(path, table[table["reason"].isna()].drop(columns="reason"))
    every = pd.concat([rows, held_out], ignore_index=True)
    write_jsonl(outputs.benchmark, read_jsonl(benchmark["tasks"]) if benchmark else ())
    write_rows(outputs.rejected, every[every["reason"].notna()].assign(stage="acquire"))
    write_report(
        outputs.report,
        {
            "external": external_summaries,
            "licenses": sorted({summary["license"] for summary in summaries}),
            "reasons": reasons,
            "rejected": sum(summary["rejected"] for summary in summaries),
            "rows": sum(summary["rows"] for summary in summaries),
            "sources": summaries,
        },
        *(outputs.pairs, outputs.external, outputs.benchmark, outputs.rejected),
    )
    if revisions:
        write_json(revisions_file, revisions)


if __name__ == "__main__":
    with job(snakemake):
        named = snakemake.params.sources["benchmark"]
        if named:
            named = {**named, "report": snakemake.input.benchmark, "tasks": snakemake.input.tasks}
        found, report = snakemake.input.example_pairs, snakemake.input.examples
        examples = {"found": found, "report": report} if found else None
        asked = snakemake.params.sources
        main(
            registry.of_job(snakemake.params.task),
            asked["sources"],
            asked["external"],
            snakemake.output,
            named,
            examples,
            test=asked["test"],
            most_dropped=asked["most_dropped"],
        )
