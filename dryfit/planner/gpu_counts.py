"""On how many GPUs of each kind a step fits, divided with FSDP2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dryfit.analytic.certainty import OTHER_KERNELS
from dryfit.analytic.decoder import NotDescribed
from dryfit.cards.beside import Process, room_bytes
from dryfit.cards.gpus import GIB, Gpu, catalogue
from dryfit.cards.verdict import verdict
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY
from dryfit.planner.calibrated import CalibratedEstimator
from dryfit.planner.changes import COUNTS, apply, spread
from dryfit.scenario.scenario import Scenario


def becomes_possible(scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """On how many GPUs of each kind scenarios fit, divided with FSDP2: one GPU and :data:`COUNTS`.

    Each step is traced on the kernels of a GPU that nobody names; for other compute capabilities the difference of the
    analytic estimates is added.

    Returns
    -------
    dict
        ``counts``; ``scenarios``: by name a row for each count, with ``gpus``, ``peak_allocated_bytes`` and
        ``required_bytes`` of each GPU; ``gpus``: for each GPU of the catalogue ``gpu``, ``title``, ``total_gib`` and
        ``first``, by name the smallest count that fits (None: none does); ``first``: by name the ``gpu`` and ``gpus``
        of the least memory in all that fit.
    """
    needs: dict[str, list[dict[str, Any]]] = {}
    kinds = [
        {"gpu": gpu.name, "title": gpu.title, "total_gib": round(gpu.total_bytes / GIB, 2), "first": {}}
        for gpu in catalogue().values()
    ]
    for name, scenario in scenarios.items():
        whole = replace(scenario, gpu=None)
        steps = {1: whole, **{count: apply(whole, spread(whole, count)[0]) for count in COUNTS}}
        estimates = {count: CalibratedEstimator(step) for count, step in steps.items()}
        traced = {count: estimates[count].verify(step) for count, step in steps.items()}
        needs[name] = [
            {"gpus": count, **{key: traced[count][key] for key in ("peak_allocated_bytes", "required_bytes")}}
            for count in steps
        ]
        for kind, gpu in zip(kinds, catalogue().values(), strict=True):
            fitting = (count for count, step in steps.items() if _fits(step, estimates[count], traced[count], gpu))
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


def _fits(scenario: Scenario, estimate: CalibratedEstimator, traced: Mapping[str, Any], gpu: Gpu) -> bool:
    """Whether a traced step fits a GPU. Where that runs other kernels and it is close, the step is traced on it."""
    process = Process.of(scenario)
    if (gpu.capability or DEFAULT_CAPABILITY) == DEFAULT_CAPABILITY:
        return verdict(traced, gpu, process).fits is True
    try:
        required = traced["required_bytes"] + estimate.on(gpu).formula(scenario) - estimate.formula(scenario)
        room = room_bytes(process, gpu)
        if abs(required - room) > OTHER_KERNELS * gpu.usable_bytes:
            return required <= room
    except NotDescribed:
        pass
    return verdict(CalibratedEstimator(scenario, gpu).verify(scenario), gpu, process).fits is True
