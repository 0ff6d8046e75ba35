"""Rule ``screen_dataset``: keep the rows whose answer the task's screen lets pass; a task without one keeps all.

Dangerous answers and those that it can't parse go to the rejected file, with the rule that matched.
"""

from dryfit.common.files import read_report, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.common.reports import CARRIED, carry
from scripts.dataset.rows import count, must_keep_some, read_rows, write_rows
from scripts.tasks.support import registry
from scripts.tasks.text import Task


def main(task: Task, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    """Screen the cleaned pairs; write those that pass, the others, and the counts."""
    import pandas as pd

    read_report(inputs["clean"], inputs["pairs"])
    rows = read_rows(inputs["pairs"])
    verdicts = task.screen(list(rows["command"]))
    found = pd.DataFrame(verdicts, rows.index, columns=["status", "category", "rule"])
    passes, danger = found["status"] == "ok", found["status"] == "danger"
    reasons = ("danger: " + found["category"]).where(
        danger, f"the screen can't parse the {task.answer}"
    )[~passes]
    must_keep_some("screen", int(passes.sum()), count(reasons), inputs["pairs"])
    write_rows(outputs["pairs"], rows[passes])
    details = found["rule"][~passes]
    write_rows(
        outputs["rejected"], rows[~passes].assign(detail=details, reason=reasons, stage="screen")
    )
    report = {
        CARRIED: carry(clean=inputs["clean"]),
        "categories": count(found["category"][danger]),
        "danger": int(danger.sum()),
        "kept": int(passes.sum()),
        "reasons": count(reasons),
        "removed": int((~passes).sum()),
        "rows": len(rows),
        "rules": count(found["rule"][danger]),
        "unparsable": int((~passes & ~danger).sum()),
    }
    write_report(outputs["report"], report, outputs["pairs"], outputs["rejected"])
    log.info(
        "%(rows)d rows: %(danger)d dangerous, %(unparsable)d unparsable; %(kept)d kept", report
    )


if __name__ == "__main__":
    with job(snakemake):
        main(
            registry.of_job(snakemake.params.task),
            dict(snakemake.input.items()),
            dict(snakemake.output.items()),
        )
