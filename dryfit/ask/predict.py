"""Predict the memory of training scenarios, before any weight is downloaded and without a GPU.

    python -m dryfit.ask.predict SCENARIO.yaml [...]           one JSON object per file
    python -m dryfit.ask.predict --table SCENARIO.yaml [...]   for people

Exit status 0: each fits the GPU it names (or names none); 1: one does not fit; 2: one is wrong, and standard error
shows the corrected line; 3: there is no answer, since something is missing here or failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.ask.answer import whole_answer
from dryfit.ask.text import table
from dryfit.common.errors import UserError
from dryfit.common.terminal import command
from dryfit.common.versions import INSTALL_TRACE, STACK
from dryfit.readers.request import read_request
from dryfit.tracing import imports


class Outcome(NamedTuple):
    """A file with its answer, or with the message that says why it got no answer; ``status``: what to exit with."""

    path: Path
    answer: dict[str, Any] | None
    message: str | None
    status: int


def _refused(error: UserError, path: Path, status: int = 2) -> Outcome:
    about = "" if str(path) in str(error.where) else f"\n  file:    {path}"
    return Outcome(path, None, f"{error}{about}", status)


def wrong(path: Path) -> Outcome | None:
    """The message for a file that is not a scenario, without loading a library; None for a scenario."""
    try:
        read_request(path)
    except UserError as error:
        return _refused(error, path)
    return None


def outcome(path: Path) -> Outcome:
    """Read a scenario file and predict."""
    try:
        answer = whole_answer(read_request(path), path)
        return Outcome(path, answer, None, 1 if answer["fits"] is False else 0)
    except UserError as error:
        return _refused(error, path)
    except ModuleNotFoundError as error:
        problem = f"The package {error.name} is not installed; the trace needs {', '.join(STACK)}."
        return _refused(UserError(problem, where=path, write=INSTALL_TRACE), path, 3)
    except Exception as error:
        problem = f"No answer: {type(error).__name__}: {str(error)[:500]}"
        hint = (
            "a scenario that this program can trace: another parallel.strategy or attention (eager), without"
            " gradient_checkpointing or loss: liger, often can be; if this one should, please report message and file"
        )
        return _refused(UserError(problem, where=path, allowed=hint), path, 3)


def outcomes(paths: Sequence[Path]) -> Iterator[Outcome]:
    """Each file's outcome, in order; several files are traced side by side."""
    if all(known := [wrong(path) for path in paths]):  # said at once
        yield from known
        return
    workers = min(len(paths), os.cpu_count() or 1)
    try:
        first = next(path for path, refused in zip(paths, known, strict=True) if refused is None)
        imports.import_quietly(read_request(first).scenario)  # once, before the processes part
    except ImportError:
        workers = 1  # each outcome says what is missing
    if workers == 1 or sys.platform != "linux":
        yield from map(outcome, paths)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(outcome, paths)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dryfit.ask.predict", description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", type=Path, metavar="SCENARIO.yaml")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    options = parser.parse_args(arguments)
    imports.ends_with_its_answer = arguments is None
    status = 0
    for path, answer, message, own in outcomes(options.scenarios):
        status = max(status, own)
        if answer is None:
            print(message, file=sys.stderr)
        else:
            print(table(str(path), answer) if options.table else json.dumps(answer, sort_keys=True), flush=True)
    return status


if __name__ == "__main__":
    command(main)
