"""Fetch the benchmark's wheel by its digest, and write down its tasks and file systems."""

import zipfile
from typing import Any

from dryfit.common.files import atomic_open, scratch_folder, write_json, write_jsonl, write_report
from dryfit.common.terminal import log
from scripts.common.wheels import download_wheel, licence
from scripts.tasks.shell.execution.tasks import LEVELS, mixed, read_wheel


def main(source: dict[str, str], outputs: Any) -> None:
    """Write the tasks in the order of their digests, so that the first so many of them are a sample."""
    with scratch_folder(f"{outputs.tasks}.wheel") as folder:
        wheel = download_wheel(
            source["requirement"],
            source["sha256"],
            folder.resolve(),
            "dataset.benchmark",
            "; or dataset.benchmark: null, which leaves it out",
        )
        tasks, states = read_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive, atomic_open(outputs.license, "wb") as target:
            target.write(licence(archive))
    write_jsonl(outputs.tasks, mixed(tasks))
    write_json(outputs.states, {name: state._asdict() for name, state in states.items()})
    levels = {level: sum(task["level"] == level for task in tasks) for level in LEVELS}
    about = {"requirement": source["requirement"], "wheel_sha256": source["sha256"]}
    write_report(
        outputs.report, {**about, "levels": levels, "tasks": len(tasks)}, outputs.tasks, outputs.states, outputs.license
    )
    log.info("%s: %d tasks in %d file systems", source["requirement"], len(tasks), len(states))
