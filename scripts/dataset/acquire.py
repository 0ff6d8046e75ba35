"""Rule ``acquire_dataset``: read every configured source into one file, and record where each row came from.

Nothing is judged here but what can't be read at all; rows that can't be are in the rejected file with a reason.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import atomic_open, read_json, sha256_file, write_json
from scripts.common.job import job, log
from scripts.dataset.rows import write_row
from scripts.dataset.sources import Record, read_file

_COLUMNS = {"request": "request", "command": "command"}


def label(source: Mapping[str, Any]) -> str:
    """A source's name in rows and reports."""
    if source["type"] == "hub":
        return "/".join(str(source[key]) for key in ("repository", "config", "split") if source.get(key))
    return source["type"] if source["type"] == "embedded" else ", ".join(source["paths"])


def read_source(source: Mapping[str, Any], revisions: dict[str, str], about: dict) -> Iterator[tuple[str, Record]]:
    """Yield a source's records with the name of the file or repository they are from.

    Parameters
    ----------
    source
        One entry of ``dataset.sources``.
    revisions
        Commits that earlier runs resolved, by repository and revision; renewed.
    about
        Filled with what the report says of the source.
    """
    columns = {**_COLUMNS, **source.get("columns", {})}
    if source["type"] == "embedded":
        from scripts.dataset.embedded import generate

        about |= {"seed": source["seed"]}
        for number, fields in enumerate(generate(source["seed"], source["pairs"]), 1):
            yield "embedded", Record(number, fields)
    elif source["type"] == "files":
        about["files"] = []
        for path in source["paths"]:
            for record in read_file(path, columns, source.get("format")):
                yield path, record
            about["files"].append({"path": path, "sha256": sha256_file(path)})
    else:
        from scripts.dataset.hub import read_repository, resolve

        commit = resolve(source, revisions)
        about |= {key: source[key] for key in ("repository", "config", "split", "revision") if key in source}
        about["commit"] = commit
        for record in read_repository(source, commit, columns):
            yield label(source), record


def acquire(
    sources: list[Mapping[str, Any]], revisions: dict[str, str], pairs: Any, rejected: Any
) -> tuple[list[dict], Counter]:
    """Write the rows of all sources to two open files; return a summary of each source and the reasons of rejection."""
    summaries = []
    reasons: Counter = Counter()
    for source in sources:
        about: dict[str, Any] = {"license": source["license"], "name": label(source), "type": source["type"]}
        if source.get("attribution"):
            about["attribution"] = source["attribution"]
        if source["license"].lower() == "unknown":
            log.warning("The licence of %s is unknown: the card will say so.", label(source))
        about |= {"rejected": 0, "rows": 0}
        for name, record in read_source(source, revisions, about):
            row = {**record.fields, "line": record.line, "source": name}
            if record.reason:
                about["rejected"] += 1
                reasons[record.reason] += 1
                write_row(rejected, {**row, "reason": record.reason, "stage": "acquire"})
            else:
                about["rows"] += 1
                write_row(pairs, row)
        log.info("%s: %d rows, %d rejected", label(source), about["rows"], about["rejected"])
        summaries.append(about)
    return summaries, reasons


def main(sources: list, external: list, outputs: Any) -> None:
    """Read ``sources`` into ``outputs.pairs`` and the external test sets into ``outputs.external``."""
    # Not a declared output: it outlives reruns, so that a moved branch on the Hub is noticed.
    revisions_file = Path(outputs.report).with_name("revisions.json")
    revisions = read_json(revisions_file) if revisions_file.exists() else {}
    with (
        atomic_open(outputs.pairs) as pairs,
        atomic_open(outputs.external) as held_out,
        atomic_open(outputs.rejected) as rejected,
    ):
        summaries, reasons = acquire(sources, revisions, pairs, rejected)
        external_summaries, _ = acquire(external, revisions, held_out, rejected)
        rows = sum(summary["rows"] for summary in summaries)
        if not rows:
            common = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3)) or "no rows"
            raise UserError(
                f"Every row was rejected while reading: {common}.",
                where=", ".join(summary["name"] for summary in summaries),
                found=f"{sum(reasons.values())} rows, 0 usable",
                allowed="at least one row with a request and a command as text",
            )
    write_json(
        outputs.report,
        {
            "external": external_summaries,
            "licenses": sorted({summary["license"] for summary in summaries}),
            "reasons": dict(reasons),
            "rejected": sum(summary["rejected"] for summary in summaries),
            "rows": rows,
            "sources": summaries,
        },
    )
    if revisions:
        os.makedirs(revisions_file.parent, exist_ok=True)
        write_json(revisions_file, revisions)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.params.sources["sources"], snakemake.params.sources["external"], snakemake.output)
