"""The benchmark of the shell task: a package of requests, commands and file systems."""

from collections.abc import Mapping
from typing import Any

from scripts.tasks.shell.execution import fetch_benchmark, sandbox
from scripts.tasks.shell.task import Shell


class Task(Shell):
    def fetch_benchmark(self, source: Mapping[str, Any], outputs: Any) -> None:
        fetch_benchmark.main(dict(source), outputs)

    def must_execute(self) -> None:
        """Raise where this machine can't run answers sealed off."""
        sandbox.must_work()
