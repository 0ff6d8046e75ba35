"""Predict the memory of training scenarios, before any weight is downloaded and without a GPU.

    python -m dryfit.ask.predict SCENARIO.yaml [...]           one JSON object per file
    python -m dryfit.ask.predict --table SCENARIO.yaml [...]   for people

Exit status 0: each fits the GPU it names (or names none); 1: one does not fit; 2: one is wrong, and standard error
shows the corrected line; 3: there is no answer, since something is missing here or failed.
"""

import argparse
import json
import sys
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
    """A file's answer, or the message that says why it got none; ``status``: what to exit with."""

    answer: dict[str, Any] | None
    message: str | None
    status: int


def outcome(path: Path) -> Outcome:
    """Read a scenario file and predict."""
    try:
        answer = whole_answer(read_request(path), path)
        return Outcome(answer, None, 1 if answer["fits"] is False else 0)
    except UserError as caught:
        error, status = caught, 2
    except ModuleNotFoundError as caught:
        problem = f"The package {caught.name} is not installed; the trace needs {', '.join(STACK)}."
        error, status = UserError(problem, where=path, write=INSTALL_TRACE), 3
    except Exception as caught:
        problem = f"No answer: {type(caught).__name__}: {str(caught)[:500]}"
        hint = (
            "a scenario that this program can trace: another parallel.strategy or attention (eager), without"
            " gradient_checkpointing or loss: liger, often can be; if this one should, please report message and file"
        )
        error, status = UserError(problem, where=path, allowed=hint), 3
    about = "" if str(path) in str(error.where) else f"\n  file:    {path}"
    return Outcome(None, f"{error}{about}", status)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dryfit.ask.predict", description=__doc__.splitlines()[0]
    )
    parser.add_argument("scenarios", nargs="+", type=Path, metavar="SCENARIO.yaml")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    options = parser.parse_args(arguments)
    imports.ends_with_its_answer = arguments is None
    status = 0
    for path in options.scenarios:
        answer, message, own = outcome(path)
        status = max(status, own)
        if answer is None:
            print(message, file=sys.stderr)
        else:
            print(
                table(str(path), answer) if options.table else json.dumps(answer, sort_keys=True),
                flush=True,
            )
    return status


if __name__ == "__main__":
    command(main)
