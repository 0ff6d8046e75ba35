"""Predict the memory of training scenarios, before any weight is downloaded and without a GPU.

    python -m will_it_fit.ask.predict SCENARIO.yaml [...]           one JSON object per file
    python -m will_it_fit.ask.predict --table SCENARIO.yaml [...]   for people

Exit status 0: each fits the GPU it names (or names none); 1: one does not fit; 2: one is wrong, and standard error
shows the corrected line; 3: there is no answer, since something is missing here or failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from will_it_fit.analytic.estimated import estimate
from will_it_fit.ask.answer_text import answers, explanation, head, other_ways, suggestions, time_lines
from will_it_fit.common.errors import UserError, printable
from will_it_fit.common.packages import STACK
from will_it_fit.common.terminal import command
from will_it_fit.planner.compare import compare, peaks_with_tool_defaults
from will_it_fit.readers.request import ScenarioRequest, read_request
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.scenario.strategies import REPLICATED
from will_it_fit.tracing import imports
from will_it_fit.tracing.scenario_trace import traced


def predict(scenario: Scenario, where: object = "scenario") -> dict[str, Any]:
    """What the workflow's rules say about a scenario, one after the other."""
    return compare(estimate(scenario, where), traced(scenario, where), where=where).to_mapping()


def answered(
    asked: ScenarioRequest,
    where: object = "scenario",
    shown: Callable[[dict[str, Any]], None] | None = None,
    watch: Callable[[str, int, Sequence[Any]], None] | None = None,
) -> dict[str, Any]:
    """The whole answer: what the rules say, what was assumed, the other way to use several GPUs, and other scripts.

    Parameters
    ----------
    shown
        Called with the answer as soon as its verdict stands, before what takes traces of its own.
    watch
        Hears of each search for a suggestion (:func:`will_it_fit.planner.suggestions.suggest`).
    """
    found = compare(estimate(asked.scenario, where), traced(asked.scenario, where), where=where)
    answer = found.to_mapping(suggested=False) | asked.origin_fields()
    answer["scripts_would_take"] = peaks_with_tool_defaults(asked, where)
    answer["warnings"] = [*asked.warnings, *answer["warnings"]]
    answer["strategies"] = {}
    if shown:
        shown(answer)
    if "parallel" in asked.assumed:
        if watch:
            watch("the same with DDP", 0, [])
        parallel = {"strategy": REPLICATED, "gpus": asked.scenario.parallel.gpus}
        other = compare(*(make(asked.scenario.changed(parallel=parallel), where) for make in (estimate, traced)))
        size = other.traced.trace["required_bytes"]
        answer["strategies"][REPLICATED] = {"required_bytes": size, **other.verdict._asdict()}
    answer["suggestions"] = found.suggestions(watch)
    return answer


def table(name: str, answer: dict[str, Any]) -> str:
    """The answer as text for a terminal."""
    lines = [*head(answer, file=name), *answers(answer), *time_lines(answer), *other_ways(answer)]
    trace = answer["trace"]
    lines += [f"  note: {note}" for note in trace["notes"]]
    lines += [f"  warning: {warning}" for warning in answer["warnings"]]
    lines += explanation(answer)
    return printable("\n".join([*lines, *suggestions(answer, lambda item: item["write"])]))


class Outcome(NamedTuple):
    """A file with its answer, or with the message that says why it got no answer; ``status``: what to exit with."""

    path: Path
    answer: dict[str, Any] | None
    message: str | None
    status: int


def wrong(path: Path) -> Outcome | None:
    """The message for a file that is not a scenario, without loading a library; None for a scenario."""
    try:
        read_request(path)
    except UserError as error:
        return Outcome(path, None, str(error) if str(path) in str(error.where) else f"{error}\n  file:    {path}", 2)
    return None


def outcome(path: Path) -> Outcome:
    """Read a scenario file and predict."""
    if known := wrong(path):
        return known
    try:
        answer = answered(read_request(path), path)
        return Outcome(path, answer, None, 1 if answer["fits"] is False else 0)
    except UserError as error:
        return Outcome(path, None, str(error) if str(path) in str(error.where) else f"{error}\n  file:    {path}", 2)
    except ModuleNotFoundError as error:
        problem = f"The package {error.name} is not installed; the trace needs {', '.join(STACK)}."
        return Outcome(path, None, str(UserError(problem, write="pip install -r requirements.txt")), 3)
    except Exception as error:
        problem = f"No answer: {type(error).__name__}: {str(error)[:500]}"
        hint = (
            "a scenario that this program can trace: another parallel.strategy or attention (eager), without"
            " gradient_checkpointing or loss: liger, often can be; if this one should, please report message and file"
        )
        return Outcome(path, None, str(UserError(problem, where=path, allowed=hint)), 3)


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
    parser = argparse.ArgumentParser(prog="python -m will_it_fit.ask.predict", description=__doc__.splitlines()[0])
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
