"""What is alive at the peak of a scenario's training step: the largest tensors, and what made them.

``dryfit explain WHAT --count 30 --layers`` prints it; with ``--json`` the answer has ``tensors``.
"""

import json
import re
from typing import Any

from dryfit.cards.gpus import find
from dryfit.common.text import aligned
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace

COLUMNS = ("bytes", "times", "component", "shape", "dtype", "module", "made by")


def explain(
    scenario: Scenario, where: object = "scenario", *, count: int = 10, layers: bool = False
) -> dict[str, Any]:
    """Trace a scenario and name the largest tensors at its peak.

    Parameters
    ----------
    scenario
        The step; the GPU it names decides the kernels.
    layers
        Take tensors together that differ in the number of their layer alone; ``times`` says how many they are.

    Returns
    -------
    dict
        ``peak_allocated_bytes``, ``peak_phase``, ``components``, and ``tensors``, the largest first: ``bytes`` (of
        one), ``times``, ``component``, ``shape``, ``dtype``, ``module``, ``line``, ``operator``.
    """
    gpu = find(scenario.gpu, where) if scenario.gpu is not None else None
    answer = trace(
        scenario, capability=gpu.capability if gpu else None, timeline=False, origins=True
    )
    tensors = [{**row, "times": 1} for row in answer["tensors"]]
    if layers:
        alike: dict[str, dict[str, Any]] = {}
        for row in tensors:
            module = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row["module"])
            key = json.dumps({**row, "module": module}, sort_keys=True)
            alike.setdefault(key, {**row, "module": module, "times": 0})["times"] += 1
        tensors = sorted(alike.values(), key=lambda row: -row["bytes"] * row["times"])
    kept = {key: answer[key] for key in ("components", "peak_allocated_bytes", "peak_phase")}
    return {**kept, "tensors": tensors[:count]}


def table(answer: dict[str, Any]) -> str:
    """The answer as text for a terminal."""
    peak = answer["peak_allocated_bytes"]
    lines = [f"peak {peak:,} bytes ({peak / 2**30:.2f} GiB), in the {answer['peak_phase']} phase"]
    lines += aligned([COLUMNS, *map(_cells, answer["tensors"])], right=(0, 1))
    shown = sum(row["bytes"] * row["times"] for row in answer["tensors"])
    lines.append(f"{shown:,} bytes of the peak, {100 * shown / peak:.0f} %")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shape = " x ".join(map(str, row["shape"])) or "-"
    made = ", ".join(filter(None, (row["operator"], row["line"])))
    return (
        f"{row['bytes']:,}",
        str(row["times"]),
        row["component"],
        shape,
        row["dtype"],
        row["module"] or "-",
        made,
    )
