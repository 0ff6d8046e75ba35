"""Predict the memory of training scenarios, before any weight is downloaded and without a GPU.

    python -m scripts.memory.predict SCENARIO.yaml [...]           one JSON object per file
    python -m scripts.memory.predict --table SCENARIO.yaml [...]   for people

Exit status 0: each fits the GPU it names (or names none); 1: one does not fit; 2: one is wrong, and standard error
shows the corrected line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.job import command
from scripts.memory.analytic.estimate import analytic_estimate
from scripts.memory.analytic.rule_of_thumb import rule_of_thumb
from scripts.memory.gpus import GIB, find, verdict
from scripts.scenario.scenario import Scenario, load_scenario

STACK = ("torch", "transformers", "peft", "bitsandbytes")


def predict(scenario: Scenario, where: object = "scenario") -> dict[str, Any]:
    """Three answers for a scenario, the verdict for its GPU, and what to change if it does not fit.

    Returns
    -------
    dict
        ``scenario``, ``rule_of_thumb``, ``analytic`` (None for an architecture that is not described), ``trace``,
        ``gpu``, ``fits``, ``headroom_bytes`` (all None without a GPU), ``suggestions``, ``versions``. Sizes in bytes.
    """
    gpu = find(scenario.gpu, where) if scenario.gpu is not None else None
    capability = gpu.capability if gpu else None
    formula = analytic_estimate(scenario, where, capability=capability)
    from scripts.memory.trace import trace

    traced = trace(scenario, capability=capability, timeline=False)
    count = traced["parameters"]
    answer: dict[str, Any] = {
        "scenario": scenario.to_mapping(),
        "rule_of_thumb": rule_of_thumb(scenario, count),
        "analytic": formula,
        "trace": traced,
        "gpu": None,
        "fits": None,
        "headroom_bytes": None,
        "suggestions": [],
        "versions": versions(),
    }
    if gpu:
        answer |= {"gpu": gpu.to_mapping(), **verdict(traced["required_bytes"], gpu)}
        if not answer["fits"]:
            from scripts.memory.planner import suggest

            answer["suggestions"] = suggest(scenario, gpu, traced)
    return answer


def versions() -> dict[str, str | None]:
    """Versions of what decides the answer."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def table(name: str, answer: dict[str, Any]) -> str:
    """The answers as text for a terminal."""
    scenario = answer["scenario"]
    traced = answer["trace"]
    lines = [
        f"{name}: {scenario['model_name'] or scenario['model']['model_type']}, {scenario['method']},"
        f" {scenario['precision']}, {scenario['micro_batch']} x {scenario['sequence_length']} tokens",
        f"  {'':<26}{'bytes':>16}{'GiB':>10}   to the trace",
    ]
    peak = traced["peak_allocated_bytes"]
    for label, key in (("rule of thumb", "rule_of_thumb"), ("analytic estimate", "analytic"), ("trace", "trace")):
        if answer[key] is None:
            lines.append(f"  {label:<26}{'not described for this architecture':>40}")
            continue
        size = answer[key]["peak_allocated_bytes"]
        lines.append(f"  {label:<26}{size:>16,}{size / GIB:>10.2f}   {100 * (size / peak - 1):+.2f} %")
    for label, key in (("  reserved", "peak_reserved_bytes"), ("  least the card must have", "required_bytes")):
        lines.append(f"  {label:<26}{traced[key]:>16,}{traced[key] / GIB:>10.2f}")
    lines.append("  at the peak of the trace:")
    for component, size in sorted(traced["components"].items(), key=lambda item: -item[1]):
        if size:
            lines.append(f"    {component:<24}{size:>16,}{size / GIB:>10.2f}")
    lines += verdict_lines(answer)
    return "\n".join(lines)


def verdict_lines(answer: dict[str, Any]) -> list[str]:
    """The verdict and the suggestions as text."""
    gpu = answer["gpu"]
    if gpu is None:
        return ["  no GPU named"]
    word = "fits" if answer["fits"] else "DOES NOT FIT"
    lines = [
        f"  {word} {gpu['title']}: {gpu['total_bytes'] / GIB:.2f} GiB less {gpu['context_bytes'] / 2**20:.0f} MiB of"
        f" CUDA context leave {gpu['usable_bytes'] / GIB:.2f} GiB; headroom {answer['headroom_bytes'] / GIB:+.2f} GiB"
    ]
    if answer["suggestions"]:
        lines.append("  what would fit, the cheapest first:")
        for item in answer["suggestions"]:
            lines.append(f"    {item['write']}   # {item['cost']}; headroom {item['headroom_bytes'] / GIB:+.2f} GiB")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.memory.predict", description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", type=Path, metavar="SCENARIO.yaml")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    options = parser.parse_args(arguments)
    status = 0
    for path, answer, message in answers(options.scenarios):
        if answer is None:
            print(message, file=sys.stderr)
            status = 2
            continue
        print(table(str(path), answer) if options.table else json.dumps(answer, sort_keys=True), flush=True)
        if answer["fits"] is False:
            status = max(status, 1)
    return status


def answers(paths: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any] | None, str | None]]:
    """Each file with its answer or what is wrong with it, in order; several files are traced side by side."""
    workers = min(len(paths), os.cpu_count() or 1)
    if workers == 1 or sys.platform != "linux":
        yield from map(answer_or_message, paths)
        return
    import scripts.memory.trace  # noqa: F401, once, before the processes part

    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(answer_or_message, paths)


def answer_or_message(path: Path) -> tuple[Path, dict[str, Any] | None, str | None]:
    """A file with the answer for it, or with the message that says what is wrong."""
    try:
        return path, predict(load_scenario(path), path), None
    except UserError as error:
        return path, None, str(error) if str(path) in str(error.where) else f"{error}\n  file:    {path}"


if __name__ == "__main__":
    command(main)
