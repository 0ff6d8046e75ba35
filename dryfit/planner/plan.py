"""What fits which GPU: the largest micro-batch and sequence for each method, over the catalogue, and a sweep.

python -m dryfit.planner.plan SCENARIO.yaml [--gpu NAME] [--several] [--table]   for people with --table, else JSON

For the GPU that the scenario or --gpu names each border is traced; over the catalogue borders are replayed between
traces, and are the same numbers (--verify: each traced too, in minutes). In the sweep the analytic estimate answers,
corrected by a trace. --several: also for two, four and eight of each GPU, sharded with FSDP2.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dryfit.cards.gpus import EXPANDABLE_LINE, GIB, Gpu, catalogue, find
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.terminal import command
from dryfit.planner.calibrated import alone, sharded, sweep
from dryfit.planner.changes import COUNTS, as_method
from dryfit.planner.feasibility import feasibility
from dryfit.readers.request import parse_request
from dryfit.scenario.description import say_way
from dryfit.scenario.scenario import Scenario
from dryfit.tracing import imports

METHODS = ("full", "lora", "qlora")
RANKS = (4, 8, 16, 32, 64)
LENGTHS = (256, 512, 1024, 2048, 4096)
MICRO_BATCHES = (1, 2, 4, 8)


def plan(
    scenario: Scenario,
    gpu: Gpu | None = None,
    *,
    verify: bool = False,
    several: bool = False,
    swept: bool = True,
) -> dict[str, Any]:
    """Plan around a scenario; ``swept``: with a sweep.

    Returns
    -------
    dict
        ``scenario``; ``gpu`` and ``largest``, its rows by method, both None without a GPU; ``feasibility``: a row for
        each method and GPU of the catalogue (:func:`dryfit.planner.feasibility.feasibility`), and with ``several``
        for :data:`COUNTS` of them; ``sweep``: an estimate for each rank, length and micro-batch.
    """
    answer: dict[str, Any] = {"gpu": None, "largest": None, "scenario": scenario.to_mapping()}
    known = catalogue()
    gpus = [*known.values(), *([gpu] if gpu is not None and known.get(gpu.name) != replace(gpu, count=1) else [])]
    traced = [one.name for one in gpus] if verify else [gpu.name] if gpu is not None else []
    steps = {method: alone(scenario, as_method(scenario, method)) for method in METHODS}
    rows = feasibility(steps, gpus, verify=traced)
    if gpu is not None:
        answer["gpu"] = gpu.to_mapping()
        answer["largest"] = {row["method"]: row for row in rows if row["gpu"] == gpu.name}
    positions = scenario.size("max_position_embeddings") or LENGTHS[-1]
    lengths = [length for length in LENGTHS if length <= positions]
    answer["feasibility"] = [row for row in rows if row["gpu"] in known]
    if several:
        by_method = {method: sharded(scenario, as_method(scenario, method)) for method in METHODS}
        for count in COUNTS:
            answer["feasibility"] += feasibility({name: steps[count] for name, steps in by_method.items() if steps})
    if swept:
        answer["sweep"] = sweep(scenario, ranks=RANKS, sequence_lengths=lengths, micro_batches=MICRO_BATCHES)
    return answer


def table(answer: Mapping[str, Any]) -> str:
    """The plan as text for a terminal."""
    scenario = answer["scenario"]
    parallel = scenario["parallel"]
    spread = (
        f", on each of {parallel['gpus']} GPUs with {say_way(parallel, as_title=True)}" if parallel["gpus"] > 1 else ""
    )
    lines = [
        f"{scenario['model_name'] or scenario['model']['model_type']}, {scenario['precision']}{spread}:"
        f" the most rows of {scenario['sequence_length']} tokens / the longest row alone; below them everything fits",
        f"  second line: with {EXPANDABLE_LINE}, set before Python starts",
    ]
    if answer["largest"]:
        gpu = answer["gpu"]
        lines.append(
            f"  {gpu['title']}, {gpu['usable_bytes'] / GIB:.2f} GiB usable: these borders are traced themselves"
        )
        lines += _rows(gpu["name"], answer["largest"], gpu["total_bytes"] / GIB)
    lines.append("  All GPUs: borders replayed between traces of each method")
    lines.append(f"  {'GPU':<22}{'GiB':>7}" + "".join(f"{method:>20}" for method in METHODS))
    rows: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
    for row in answer["feasibility"]:
        rows.setdefault((row["gpus"], row["gpu"]), {})[row["method"]] = row
    for (count, name), cells in rows.items():
        label = name if count == 1 else f"{count} x {name}"
        lines += _rows(label, cells, next(iter(cells.values()))["total_gib"])
    return "\n".join(lines)


def _rows(label: str, cells: Mapping[str, Mapping[str, Any]], total_gib: float) -> list[str]:
    """A GPU's line, and a second one where expandable segments make a difference."""
    plain = [_cell(cells[method]) if method in cells else "?" for method in METHODS]
    grown = [_cell(cells[method]["expandable_segments"]) if method in cells else "?" for method in METHODS]
    lines = [f"  {label:<22}{total_gib:>7.2f}" + "".join(text.rjust(20) for text in plain)]
    if grown != plain:
        lines.append(f"  {'':<29}" + "".join(text.rjust(20) for text in grown))
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    if not row["largest_micro_batch"]:
        return "-" if not row["largest_sequence_length"] else f"- / {row['largest_sequence_length']}"
    return f"{row['largest_micro_batch']} / {row['largest_sequence_length']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dryfit.planner.plan", description=__doc__.splitlines()[0])
    parser.add_argument("scenario", type=Path, nargs="?", metavar="SCENARIO.yaml")
    parser.add_argument("--gpu", help="a name in config/gpus.yaml, instead of the scenario's")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    parser.add_argument("--verify", action="store_true", help="trace every cell of the table")
    parser.add_argument("--several", action="store_true", help="also for 2, 4 and 8 of each GPU, with FSDP2")
    options = parser.parse_args(arguments)
    imports.ends_with_its_answer = arguments is None
    scenario = _scenario(options)
    named = options.gpu or scenario.gpu
    gpu = find(named, "--gpu" if options.gpu else options.scenario) if named is not None else None
    answer = plan(scenario, gpu, verify=options.verify, several=options.several, swept=not options.table)
    print(table(answer) if options.table else json.dumps(answer, sort_keys=True))
    return 0


def _scenario(options: argparse.Namespace) -> Scenario:
    if options.scenario is None:
        raise UserError(
            "Name a scenario file.",
            where="the command line",
            allowed="the path of a scenario file",
            write="python -m dryfit.planner.plan mine.yaml",
        )
    mapping, card = read_yaml(options.scenario), find(options.gpu, "--gpu") if options.gpu else None
    several = {"gpu": card.setting} if card and card.count > 1 and isinstance(mapping, dict) else {}
    return parse_request({**mapping, **several} if several else mapping, options.scenario).scenario


if __name__ == "__main__":
    command(main)
