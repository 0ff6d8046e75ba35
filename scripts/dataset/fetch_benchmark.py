"""Rule ``fetch_benchmark``: the tasks of a benchmark: rows of a file, or of the package that the task knows."""

from collections.abc import Mapping
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_open, sha256_file, write_json, write_jsonl, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.dataset.sources import columns_of, read_file
from scripts.tasks.support import registry
from scripts.tasks.text import Task


def read_own(task: Task, source: Mapping[str, Any], outputs: Any) -> None:
    """Write the rows of a benchmark's file as tasks, in their order.

    UserError: naming the first row that can't be asked: a benchmark of which rows are missing is another one.
    """
    tasks = []
    for record in read_file(
        source["path"], columns_of(source), source.get("format"), guess=task.guesses_columns
    ):
        fields = record.fields
        reason = record.reason or task.defect(fields["request"], fields["command"])
        if reason:
            raise UserError(
                f"A row of the benchmark can't be asked: {reason}.",
                where=f"{source['path']}, line {record.line}",
                found=str(fields.get("request", ""))[:120],
                allowed="a request and its answer as text in each row",
            )
        request, command = (
            task.clean_request(fields["request"]),
            task.clean_answer(fields["command"]),
        )
        about = {key: fields[key] for key in ("turns",) if key in fields}
        tasks.append(
            {
                "alternatives": [],
                "command": command,
                "id": f"{len(tasks)}",
                "request": request,
                **about,
            }
        )
    with atomic_open(outputs.license, "wb"):
        pass
    write_jsonl(outputs.tasks, tasks)
    write_json(outputs.states, {})
    about = {
        "file": {"path": source["path"], "sha256": sha256_file(source["path"])},
        "requirement": source["path"],
    }
    write_report(
        outputs.report,
        {**about, "tasks": len(tasks)},
        outputs.tasks,
        outputs.states,
        outputs.license,
    )
    log.info("%s: %d requests", source["path"], len(tasks))


def main(task: Task, source: Mapping[str, Any], outputs: Any) -> None:
    """Read a benchmark's file, or fetch its package."""
    if "path" in source:
        read_own(task, source, outputs)
    else:
        task.fetch_benchmark(source, outputs)


if __name__ == "__main__":
    with job(snakemake):
        main(registry.of_job(snakemake.params.task), snakemake.params.benchmark, snakemake.output)
