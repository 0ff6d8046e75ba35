"""What fits which GPU: the largest micro-batch and sequence for each method, over the catalogue, and a sweep.

For a GPU that is named each border is traced; over the catalogue borders are replayed between traces, and are the same
numbers. In the sweep the analytic estimate answers, corrected by a trace. ``dryfit longest`` and ``dryfit batch`` ask
about one card and one method. :func:`becomes_possible`: on how many GPUs of each kind a step fits.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dryfit.analytic.certainty import OTHER_KERNELS
from dryfit.analytic.decoder import NotDescribed
from dryfit.cards.beside import Process, room_bytes
from dryfit.cards.gpus import EXPANDABLE_LINE, GIB, Gpu, catalogue
from dryfit.cards.verdict import verdict
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY
from dryfit.planner.calibrated import CalibratedEstimator, alone, sweep
from dryfit.planner.changes import COUNTS, apply, as_method, spread
from dryfit.planner.feasibility import feasibility
from dryfit.scenario.description import say_way
from dryfit.scenario.scenario import Scenario

METHODS = ("full", "lora", "qlora")
RANKS = (4, 8, 16, 32, 64)
LENGTHS = (256, 512, 1024, 2048, 4096)
MICRO_BATCHES = (1, 2, 4, 8)


def plan(scenario: Scenario, gpu: Gpu | None = None) -> dict[str, Any]:
    """Plan around a scenario.

    Returns ``scenario``; ``gpu`` and ``largest``, its rows by method, both None without a GPU; ``feasibility``: a row
    for each method and GPU of the catalogue (:func:`dryfit.planner.feasibility.feasibility`); ``sweep``: an estimate
    for each rank, length and micro-batch.
    """
    answer: dict[str, Any] = {"gpu": None, "largest": None, "scenario": scenario.to_mapping()}
    known = catalogue()
    gpus = [
        *known.values(),
        *([gpu] if gpu is not None and known.get(gpu.name) != replace(gpu, count=1) else []),
    ]
    steps = {method: alone(scenario, as_method(scenario, method)) for method in METHODS}
    rows = feasibility(steps, gpus, verify=[gpu.name] if gpu is not None else [])
    if gpu is not None:
        answer["gpu"] = gpu.to_mapping()
        answer["largest"] = {row["method"]: row for row in rows if row["gpu"] == gpu.name}
    positions = scenario.size("max_position_embeddings") or LENGTHS[-1]
    lengths = [length for length in LENGTHS if length <= positions]
    answer["feasibility"] = [row for row in rows if row["gpu"] in known]
    answer["sweep"] = sweep(
        scenario, ranks=RANKS, sequence_lengths=lengths, micro_batches=MICRO_BATCHES
    )
    return answer


def table(answer: Mapping[str, Any]) -> str:
    """The plan as text for a terminal."""
    scenario = answer["scenario"]
    parallel = scenario["parallel"]
    spread = (
        f", on each of {parallel['gpus']} GPUs with {say_way(parallel, as_title=True)}"
        if parallel["gpus"] > 1
        else ""
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
    grown = [
        _cell(cells[method]["expandable_segments"]) if method in cells else "?"
        for method in METHODS
    ]
    lines = [f"  {label:<22}{total_gib:>7.2f}" + "".join(text.rjust(20) for text in plain)]
    if grown != plain:
        lines.append(f"  {'':<29}" + "".join(text.rjust(20) for text in grown))
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    if not row["largest_micro_batch"]:
        return (
            "-" if not row["largest_sequence_length"] else f"- / {row['largest_sequence_length']}"
        )
    return f"{row['largest_micro_batch']} / {row['largest_sequence_length']}"


# --- on several GPUs of a kind ---------------------------------------------------------------------------------------


def becomes_possible(scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """On how many GPUs of each kind scenarios fit, divided with FSDP2: one GPU and :data:`COUNTS`.

    Each step is traced on the kernels of a GPU that nobody names; for other compute capabilities the difference of the
    analytic estimates is added.

    Returns ``counts``; ``scenarios``: by name a row for each count, with ``gpus``, ``peak_allocated_bytes`` and
    ``required_bytes`` of each GPU; ``gpus``: for each GPU of the catalogue ``gpu``, ``title``, ``total_gib`` and
    ``first``, by name the smallest count that fits (None: none does); ``first``: by name the ``gpu`` and ``gpus`` of
    the least memory in all that fit.
    """
    needs: dict[str, list[dict[str, Any]]] = {}
    kinds = [
        {
            "gpu": gpu.name,
            "title": gpu.title,
            "total_gib": round(gpu.total_bytes / GIB, 2),
            "first": {},
        }
        for gpu in catalogue().values()
    ]
    for name, scenario in scenarios.items():
        whole = replace(scenario, gpu=None)
        steps = {1: whole, **{count: apply(whole, spread(whole, count)[0]) for count in COUNTS}}
        estimates = {count: CalibratedEstimator(step) for count, step in steps.items()}
        traced = {count: estimates[count].verify(step) for count, step in steps.items()}
        needs[name] = [
            {
                "gpus": count,
                **{key: traced[count][key] for key in ("peak_allocated_bytes", "required_bytes")},
            }
            for count in steps
        ]
        for kind, gpu in zip(kinds, catalogue().values(), strict=True):
            fitting = (
                count
                for count, step in steps.items()
                if _fits(step, estimates[count], traced[count], gpu)
            )
            kind["first"][name] = next(fitting, None)
    first = {}
    for name in scenarios:
        possible = [
            (kind["first"][name] * gpu.usable_bytes, kind["first"][name], gpu.name)
            for kind, gpu in zip(kinds, catalogue().values(), strict=True)
            if kind["first"][name]
        ]
        first[name] = {"gpus": min(possible)[1], "gpu": min(possible)[2]} if possible else None
    return {"counts": [1, *COUNTS], "scenarios": needs, "gpus": kinds, "first": first}


def _fits(
    scenario: Scenario, estimate: CalibratedEstimator, traced: Mapping[str, Any], gpu: Gpu
) -> bool:
    """Whether a traced step fits a GPU. Where that runs other kernels and it is close, the step is traced on it."""
    process = Process.of(scenario)
    if (gpu.capability or DEFAULT_CAPABILITY) == DEFAULT_CAPABILITY:
        return verdict(traced, gpu, process).fits is True
    try:
        required = (
            traced["required_bytes"]
            + estimate.on(gpu).formula(scenario)
            - estimate.formula(scenario)
        )
        room = room_bytes(process, gpu)
        if abs(required - room) > OTHER_KERNELS * gpu.usable_bytes:
            return required <= room
    except NotDescribed:
        pass
    return verdict(CalibratedEstimator(scenario, gpu).verify(scenario), gpu, process).fits is True
