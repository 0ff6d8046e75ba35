"""What a person wanted to know, in a few lines at the end of a command. Standard library only."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.cards.sentences import said_of
from dryfit.common.files import read_report
from dryfit.common.text import gib
from scripts.common.requests import TESTS
from scripts.common.resource_table import Stage, table


def reader(made: Collection[str]) -> Callable[[str], Any]:
    """A function that reads a report; it gives None for a file that is not there.

    ``made``: what the command asked for. Nobody knows whether other files are of today's settings: None, too.
    """
    return lambda path: read_report(path) if path in made and Path(path).is_file() else None


def run_lines(
    run: str, comparisons: Sequence[str], read: Callable[[str], Any], card: bool = False
) -> list[str]:
    """The lines about one run.

    Parameters
    ----------
    comparisons
        Paths of the memory profile's comparisons, in the order to show.
    read
        Gives a report's content by its path, or None.
    card
        Whether the run has its card.
    """
    folder = f"results/{run}"
    lines = [
        _scenario(Path(path).parent.name, compared)
        for path in comparisons
        if (compared := read(path))
    ]
    step, gate = (
        read(f"{folder}/memory/training/compare.json"),
        read(f"{folder}/memory/training/gate.json"),
    )
    if step:
        measured = step["measurement"]
        told = (
            f"; measured {gib(measured['peak_allocated_bytes'])} ({device_name(measured['device'])})"
            if measured
            else ""
        )
        off = step.get("differences", {}).get("measurement_to_trace")
        if off:  # the trace of that very device, which need not be the one that the first figure is about
            told += ", predicted for it " + (
                "to the byte" if off["bytes"] == 0 else f"{off['share']:+.2%} off"
            )
        lines.append(
            f"this run's step   {gib(step['trace']['peak_allocated_bytes'])} on a GPU{told}"
        )
    if gate:
        word = (
            said_of(gate)
            if gate["fits"] is not None or gate.get("verdict")
            else f"{gib(gate['required_bytes'])} needed"
        )
        lines.append(
            f"gate              {word}{', overridden' if gate['overridden'] else ''}: {gate['reason']}"
        )
    if resources := read(f"{folder}/memory/run.json"):
        lines += [f"  {line}" for line in table([Stage(**stage) for stage in resources["stages"]])]
        lines += (
            [f"{'hours':<17} the run {resources['hours']['line']}"] if resources["hours"] else []
        )
    if compared := read(f"{folder}/evaluation/comparison.json"):
        lines += quality_lines(compared)
    executed = read(f"{folder}/evaluation/execution.json")
    if executed and "dropped" not in executed:
        base, tuned = executed["base"], executed["tuned"]
        right = f"{tuned['count']} of {tuned['n']}, the base {base['count']}"
        lines.append(f"{'right when run':<17} {right}: {executed['compared']['verdict']}")
    lines += [f"card              {folder}/MODEL_CARD.md"] if card else []
    return [run, *(f"  {line}" for line in lines)] if lines else []


def quality_lines(compared: Mapping[str, Any]) -> list[str]:
    """For each test, the right answers of tuned, base and baselines; and the loss on all held-out requests."""
    flag = compared["right_flag"]
    lines = []
    for name in (name for name in TESTS if name in compared["tests"]):
        test = compared["tests"][name]
        counts = {"the base": test["base"], **test["baselines"]}
        others = ", ".join(
            f"{other.replace('_', ' ')} {one[flag]['count']}" for other, one in counts.items()
        )
        right = test["tuned"][flag]
        said = f"{right['count']} of {right['n']}"
        if flag != "exact":
            said += f" ({test['tuned']['exact']['count']} of them exact)"
        won = "beats" if test["beats_baselines"] else "does not demonstrably beat"
        lines.append(f"{f'right, {name}':<17} {said}, {others}: training {won} both baselines")
    base, tuned = compared["base"], compared["tuned"]
    return [
        *lines,
        f"{'loss':<17} {tuned['loss']:.3f}, the base {base['loss']:.3f}: {compared['loss']['verdict']}",
        *safety_lines(compared["safety"]),
    ]


def safety_lines(harms: Mapping[str, Any]) -> list[str]:
    """How often base and tuned model delete where only reading was asked for: requests of the own test, and strangers'.

    The first line says so where the tuned model does it more often than its base.
    """
    lines = []
    groups = harms.get("deletes_unasked", {})
    for group, whose in (("own", "its own test"), ("strangers", "strangers")):
        if group in groups:
            base, tuned = groups[group]["base"], groups[group]["tuned"]
            counts = f"{tuned['count']} of {tuned['n']} requests to read, of {whose}"
            lines.append(
                f"{'deletes unasked':<17} {counts}, the base {base['count']}: {groups[group]['verdict']}"
            )
    if any(one["verdict"] == "more often" for one in groups.values()):
        lines.insert(
            0, f"{'safety':<17} it deletes more often than its base where nobody asked for it"
        )
    return lines


def sweep_lines(summary: str, made: Collection[str]) -> list[str]:
    """The sweep's recommendation, and where its document lies."""
    if summary not in made or not Path(summary).is_file():
        return []
    chosen = read_report(summary)["recommendation"]
    said = f"take {chosen['run']}" if chosen["run"] else "no run can be recommended"
    return [f"sweep: {said}: {chosen['reason']}", f"  {Path(summary).with_name('SWEEP.md')}"]


def _scenario(name: str, compared: Mapping[str, Any]) -> str:
    needed, gpu = compared["trace"]["required_bytes"], compared["gpu"]
    fit = f", {said_of(compared)} {gpu['title']}" if gpu else ""
    return f"{name:<17} {gib(needed)}{fit}"


def device_name(device: Mapping[str, Any]) -> str:
    """The GPU's name; a CPU's name says no more than its architecture."""
    return device["name"] if device["type"] == "cuda" else "CPU"
