"""What fits which GPU: the largest micro-batch and sequence for each method, over the catalogue, and a sweep.

python -m scripts.planner.plan SCENARIO.yaml [--gpu NAME] [--several] [--table]   for people with --table, else JSON
python -m scripts.planner.plan [SCENARIO.yaml] --page [--output FILE]     a page to try settings on, in a browser

For the GPU that the scenario or --gpu names, each answer is verified with the trace. Over the catalogue, in the sweep
and on the page the analytic estimate answers, corrected by two traces for each method (--verify: every cell of the
catalogue traced, in minutes). --several: also for two, four and eight of each GPU, the model divided with FSDP2.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import write_report, write_text
from scripts.common.job import command, job, log
from scripts.memory.gpus import GIB, Gpu, find
from scripts.planner.page_data import choices, layout_of
from scripts.planner.search import (
    COUNTS,
    CalibratedEstimator,
    anchored,
    apply,
    as_method,
    becomes_possible,
    divided,
    feasibility,
    largest,
    sweep,
)
from scripts.settings.scenario import ROOT, Scenario, load_scenario, read_yaml

METHODS = ("full", "lora", "qlora")
RANKS = (4, 8, 16, 32, 64)
LENGTHS = (256, 512, 1024, 2048, 4096)
MICRO_BATCHES = (1, 2, 4, 8)

Bases = dict[str, tuple[Scenario, CalibratedEstimator]]


def corrected_estimates(scenario: Scenario) -> Bases:
    """Each method's step and its estimate, corrected by traces."""
    return {method: anchored(scenario, as_method(scenario, method)) for method in METHODS}


def plan(
    scenario: Scenario, bases: Bases, gpu: Gpu | None = None, *, verify: bool = False, several: bool = False
) -> dict[str, Any]:
    """Plan around a scenario, with :func:`corrected_estimates` of it.

    Returns
    -------
    dict
        ``scenario``; ``gpu`` and ``largest`` (by method: the largest ``micro_batch`` at the scenario's length and the
        longest ``sequence_length`` at a micro-batch of 1), both None without a GPU; ``feasibility``: a row for each
        method and GPU of the catalogue, and with ``several`` for :data:`COUNTS` of them; ``sweep``: a row for each
        rank, length and micro-batch.
    """
    answer: dict[str, Any] = {"gpu": None, "largest": None, "scenario": scenario.to_mapping()}
    if gpu is not None:
        answer["gpu"] = gpu.to_mapping()
        answer["largest"] = {
            method: largest_settings(apply(scenario, as_method(scenario, method)), gpu) for method in METHODS
        }
    positions = scenario.size("max_position_embeddings") or LENGTHS[-1]
    lengths = [length for length in LENGTHS if length <= positions]
    answer["feasibility"] = feasibility(bases, verify=verify)
    if several:
        parts = {method: divided(scenario, as_method(scenario, method)) for method in METHODS}
        for count in COUNTS:
            answer["feasibility"] += feasibility({name: found[count] for name, found in parts.items() if found})
    answer["sweep"] = sweep(scenario, ranks=RANKS, sequence_lengths=lengths, micro_batches=MICRO_BATCHES)
    return answer


def largest_settings(scenario: Scenario, gpu: Gpu) -> dict[str, Any]:
    """The largest micro-batch and the longest sequence that fit a GPU, verified with the trace."""
    alone = scenario.changed(micro_batch=1, gradient_accumulation=1)
    return {field: largest(alone, gpu, field) for field in ("micro_batch", "sequence_length")}


def table(answer: Mapping[str, Any]) -> str:
    """The plan as text for a terminal."""
    scenario = answer["scenario"]
    lines = [
        f"{scenario['model_name'] or scenario['model']['model_type']}, {scenario['precision']}:"
        f" the largest micro-batch at {scenario['sequence_length']} tokens, the longest sequence at a micro-batch of 1"
    ]
    if answer["largest"]:
        gpu = answer["gpu"]
        lines.append(f"  {gpu['title']}, {gpu['usable_bytes'] / GIB:.2f} GiB usable (verified by the trace)")
        for method, found in answer["largest"].items():
            batch, length = found["micro_batch"], found["sequence_length"]
            lines.append(
                f"    {method:<6} micro-batch {batch['value'] or '-':>6}   sequence {length['value'] or '-':>7}"
            )
    lines.append(f"  {'GPU':<22}{'GiB':>7}" + "".join(f"{method:>20}" for method in METHODS))
    rows: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
    for row in answer["feasibility"]:
        rows.setdefault((row["gpus"], row["gpu"]), {})[row["method"]] = row
    for (count, name), cells in rows.items():
        text = "".join((_cell(cells[method]) if method in cells else "?").rjust(20) for method in METHODS)
        label = name if count == 1 else f"{count} x {name}"
        lines.append(f"  {label:<22}{next(iter(cells.values()))['total_gib']:>7.2f}{text}")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    if not row["largest_micro_batch"]:
        return "-" if not row["largest_sequence_length"] else f"- / {row['largest_sequence_length']}"
    return f"{row['largest_micro_batch']} / {row['largest_sequence_length']}"


def page_data(scenario: Scenario, bases: Bases, gpu: Gpu | None = None, *, several: bool = False) -> dict[str, Any]:
    """The data of the planner's page (:mod:`scripts.planner.page_data`); ``several``: traced on several GPUs too."""
    methods = {method: as_method(scenario, method) for method in METHODS}
    estimates = {
        (method, layout): estimate
        for method, (base, estimate) in bases.items()
        if (layout := layout_of(base.parallel)) is not None
    }
    if several:
        for method, changes in methods.items():
            parts = divided(scenario, changes)
            estimates |= {(method, f"fsdp2-{count}"): estimate for count, (_, estimate) in parts.items()}
    return choices(scenario, methods, estimates, gpu)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.planner.plan", description=__doc__.splitlines()[0])
    parser.add_argument("scenario", type=Path, nargs="?", metavar="SCENARIO.yaml")
    parser.add_argument("--gpu", help="a name in config/gpus.yaml, instead of the scenario's")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    parser.add_argument("--verify", action="store_true", help="trace every cell of the table")
    parser.add_argument("--several", action="store_true", help="also for 2, 4 and 8 of each GPU, with FSDP2")
    parser.add_argument("--page", action="store_true", help="write a page to try settings on")
    parser.add_argument("--output", type=Path, default=Path("planner.html"), help="where to (planner.html)")
    parser.add_argument("--without-traces", action="store_true", help="a page of the analytic estimate alone, at once")
    options = parser.parse_args(arguments)
    scenario = _scenario(options)
    named = options.gpu or scenario.gpu
    gpu = find(named, "--gpu" if options.gpu else options.scenario) if named is not None else None
    bases = {} if options.page and options.without_traces else corrected_estimates(scenario)
    if options.page:
        from scripts.planner.render_planner import page

        text = page(page_data(scenario, bases, gpu, several=options.several))
        try:
            write_text(options.output, text)
        except OSError as error:
            raise UserError(
                f"The page can't be written: {error.strerror}.", where=f"--output {options.output}"
            ) from None
        print(f"{options.output}: open it in a browser")
        return 0
    answer = plan(scenario, bases, gpu, verify=options.verify, several=options.several)
    print(table(answer) if options.table else json.dumps(answer, sort_keys=True))
    return 0


def _scenario(options: argparse.Namespace) -> Scenario:
    """The file's; for a page without one, the defaults on the model that the memory profile is about."""
    if options.scenario is not None:
        return load_scenario(options.scenario)
    if not options.page:
        raise UserError(
            "A plan is made around a scenario.",
            where="the command line",
            allowed="the path of a scenario file; or --page, which can do without",
            write="python -m scripts.planner.plan mine.yaml",
        )
    return Scenario.from_mapping({"model": read_yaml(ROOT / "config" / "config.yaml")["memory"]["model"]})


def write_plan(
    config: str, mapping: Mapping[str, Any], divided_ones: Mapping[str, Mapping[str, Any]], output: str, page: str
) -> None:
    """The rule's work; ``divided_ones``: by name what the document asks for on several GPUs."""
    scenario = Scenario.from_mapping({**mapping, "model": config}, defaults={}, where="the configuration")
    bases = corrected_estimates(scenario)
    answer = plan(scenario, bases)  # the catalogue; a GPU of one's own is the command line's
    if divided_ones:
        where = "memory.scenarios in the configuration"
        answer["several_gpus"] = becomes_possible(
            {
                name: Scenario.from_mapping({**one, "model": config}, defaults={}, where=where)
                for name, one in divided_ones.items()
            }
        )
    write_report(output, answer)
    gpu = find(scenario.gpu) if scenario.gpu is not None else None
    write_report(page, page_data(scenario, bases, gpu, several=bool(divided_ones)), indent=None)
    log.info("%s", table(answer))


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            write_plan(
                snakemake.input.config,
                snakemake.params.scenario,
                snakemake.params.several_gpus,
                snakemake.output.plan,
                snakemake.output.planner,
            )
    else:
        command(main)
