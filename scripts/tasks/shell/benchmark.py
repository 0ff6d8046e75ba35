"""The benchmark of the shell task: a package of requests, commands and file systems."""

import zipfile
from collections.abc import Mapping
from typing import Any

from dryfit.common.files import atomic_open, scratch_folder, write_json, write_jsonl, write_report
from dryfit.common.terminal import log
from scripts.common.wheels import download_wheel, licence
from scripts.tasks.shell.execution import sandbox
from scripts.tasks.shell.execution.tasks import LEVELS, mixed, read_wheel
from scripts.tasks.shell.task import Shell


class Task(Shell):
    def fetch_benchmark(self, source: Mapping[str, str], outputs: Any) -> None:
        """Fetch the wheel by its digest, and write down its tasks and file systems.

        The tasks stand in the order of their digests, so that the first so many of them are a sample.
        """
        with scratch_folder(f"{outputs.tasks}.wheel") as folder:
            otherwise = "; or dataset.benchmark: null, which leaves it out"
            given = source["requirement"], source["sha256"]
            wheel = download_wheel(*given, folder.resolve(), "dataset.benchmark", otherwise)
            tasks, states = read_wheel(wheel)
            with zipfile.ZipFile(wheel) as archive, atomic_open(outputs.license, "wb") as target:
                target.write(licence(archive))
        write_jsonl(outputs.tasks, mixed(tasks))
        write_json(outputs.states, {name: state._asdict() for name, state in states.items()})
        levels = {level: sum(task["level"] == level for task in tasks) for level in LEVELS}
        about = {"requirement": source["requirement"], "wheel_sha256": source["sha256"]}
        report = {**about, "levels": levels, "tasks": len(tasks)}
        write_report(outputs.report, report, outputs.tasks, outputs.states, outputs.license)
        log.info("%s: %d tasks in %d file systems", source["requirement"], len(tasks), len(states))

    def must_execute(self) -> None:
        """Raise where this machine can't run answers sealed off."""
        sandbox.must_work()
