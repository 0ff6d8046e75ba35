"""All that a person may choose on the planner's page: every model, method and GPU, with their estimates as surfaces.

The page computes what it shows, in the browser: the analytic estimate at the chosen length and micro-batch
(:mod:`will_it_fit.analytic.surface`, exact to the byte), and what a GPU needs above that peak as
:class:`will_it_fit.planner.calibrated.CalibratedEstimator` has it, from traces, where there are any.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

from will_it_fit.analytic.certainty import over_peak
from will_it_fit.analytic.decoder import NotDescribed, describe
from will_it_fit.analytic.surface import kernels_of, surface
from will_it_fit.cards.gpus import GIB, Gpu, catalogue
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_json
from will_it_fit.hours.step_time import speed_of
from will_it_fit.planner.calibrated import CalibratedEstimator
from will_it_fit.planner.changes import COUNTS, Changes, apply
from will_it_fit.planner.largest_fit import LENGTH_STEP, MOST
from will_it_fit.scenario.hub import on_the_page
from will_it_fit.scenario.model import MODELS
from will_it_fit.scenario.parts import Parallel
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.scenario.strategies import DIVIDED, REPLICATED

TITLES = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
# How many GPUs: memory under DDP does not depend on their number.
LAYOUTS: dict[str, tuple[str, str, int]] = {
    "1": ("one GPU", "none", 1),
    "ddp": ("several, the whole model on each (DDP)", REPLICATED, 2),
    **{f"fsdp2-{count}": (f"{count}, the model divided (FSDP2)", DIVIDED, count) for count in COUNTS},
}
SHOWN = ("precision", "lora", "gradient_checkpointing", "attention", "optimizer", "loss", "adapter_precision")
CHOSEN = ("model", "model_name", "method", "sequence_length", "micro_batch", "parallel", "gpu")


def layout_of(parallel: Parallel) -> str | None:
    """The layout that a scenario's ``parallel`` is; None for a number of GPUs that the page does not have."""
    own = (REPLICATED, 2) if parallel.kind.replicates else (parallel.strategy, parallel.gpus)
    return next((name for name, (_, *layout) in LAYOUTS.items() if tuple(layout) == own), None)


def choices(
    scenario: Scenario,
    methods: Mapping[str, Changes],
    estimates: Mapping[tuple[str, str], CalibratedEstimator],
    gpu: Gpu | None = None,
    models: Mapping[str, Any] | None = None,
    rows: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The page's data.

    Parameters
    ----------
    scenario
        What the page opens with, and where all settings come from that can't be chosen on it.
    methods
        What to change for each.
    estimates
        By method and layout (of :data:`LAYOUTS`) what traces showed of the scenario's own model; empty without.
    gpu
        The GPU that the page opens with; None: an RTX 4090.
    models
        Configurations by name, beside the scenario's; None: those of config/models/ that the page offers.
    rows
        Borders of the scenario's own model, as :func:`will_it_fit.planner.feasibility.feasibility` gives them.

    Returns
    -------
    dict
        ``models``, ``methods``, ``layouts``, ``gpus`` to choose from and ``chosen``, what the page opens with; each
        method has ``settings``, those that can't be chosen, and ``written``, what a scenario file must say of them;
        models, layouts and GPUs have theirs too; ``surfaces`` and ``surface_of``, the index of one by
        ``model|method|layout|capability``; ``reasons`` by ``model|method|layout`` where there is none; ``traced`` by
        the same: points of (estimate's peak, required bytes above it); ``borders`` by ``model|method|layout|gpu``:
        (length, rows) of the largest steps that fit by the trace; ``seconds`` by the same: (tokens, seconds) of traced
        steps; ``limits`` has ``over_peak``, by ``method|strategy`` the least and most needed over the peak.
    """
    if models is None:
        models = {name: read_json(MODELS / f"{name}.json") for name in on_the_page()}
    own = scenario.model_name or str(scenario.model["model_type"])
    if models.get(own, scenario.model) != scenario.model:
        own += " (changed)"
    models = {own: scenario.model, **models}
    gpus = {**({gpu.name: gpu} if gpu else {}), **catalogue()}
    parallels = _parallels(scenario)
    described = {key: estimate for key, estimate in estimates.items() if estimate.described}
    found: dict[str, Any] = {
        "chosen": {
            "model": own,
            "method": scenario.method,
            "gpu": gpu.name if gpu else "rtx-4090",
            "layout": layout_of(scenario.parallel) or _nearest_layout(scenario.parallel.strategy),
            "sequence_length": scenario.sequence_length,
            "micro_batch": scenario.micro_batch,
        },
        "gpus": _shown(gpus.values()),
        "layouts": [
            {"name": name, "title": title, "strategy": strategy, "gpus": count, "written": parallels[name]}
            for name, (title, strategy, count) in LAYOUTS.items()
        ],
        "borders": {f"{own}|{key}": steps for key, steps in _borders(scenario, rows).items()},
        "limits": {"length_step": LENGTH_STEP, "most_rows": MOST, "over_peak": _over_peak(methods)},
        "methods": [{"name": name, "title": TITLES[name], **_settings(scenario, methods[name])} for name in methods],
        "seconds": _seconds(own, estimates),
        **{"models": [], "reasons": {}, "surface_of": {}, "surfaces": []},
        "storage": scenario.quantization.storage if scenario.quantization else "uint8",
        "traced": {f"{own}|{method}|{layout}": each.points for (method, layout), each in described.items()},
    }
    _add_models(found, scenario, methods, parallels, models, gpus.values())
    return found


def _over_peak(methods: Iterable[str]) -> dict[str, tuple[float, float]]:
    """What is needed over the estimate's peak: the least and the most, by method and use of several GPUs."""
    strategies = dict.fromkeys(strategy for _, strategy, _ in LAYOUTS.values())
    return {f"{method}|{one}": tuple(over_peak((method, one, False))) for method in methods for one in strategies}


def _parallels(scenario: Scenario) -> dict[str, dict[str, Any]]:
    """By layout what a scenario says of several GPUs; for FSDP2 with what this scenario chose of it."""
    kept = asdict(scenario.parallel) if scenario.parallel.strategy == DIVIDED else {}
    return {
        name: {**(kept if strategy == DIVIDED else {}), "strategy": strategy, "gpus": count}
        for name, (_, strategy, count) in LAYOUTS.items()
    }


def _nearest_layout(strategy: str) -> str:
    """The first layout of a strategy; one GPU, if there is no such layout."""
    return next((name for name, (_, own, _) in LAYOUTS.items() if own == strategy), "1")


def _add_models(
    found: dict[str, Any],
    scenario: Scenario,
    methods: Mapping[str, Changes],
    parallels: Mapping[str, Mapping[str, Any]],
    models: Mapping[str, Any],
    gpus: Collection[Gpu],
) -> None:
    """Add the models, and for each method and layout the estimate's surface, or why the estimate gives none."""
    named, known = {path.stem for path in MODELS.glob("*.json")}, {}
    for name, model in models.items():
        found["models"].append({"name": name, "written": name if name in named else model, **_sizes(model)})
        for (method, changes), (layout, parallel) in product(methods.items(), parallels.items()):
            key = f"{name}|{method}|{layout}"
            choice = {"model": model, "model_name": name, "gpu": None, "parallel": parallel}
            try:
                base = apply(scenario, {**changes, **choice, **SMALLEST})
                _add_surfaces(found, known, key, base, gpus)
            except (NotDescribed, UserError) as error:
                found["reasons"][key] = str(error).partition("\n")[0]


def _shown(gpus: Iterable[Gpu]) -> list[dict[str, Any]]:
    """The GPUs to choose from, the smallest first."""
    known = catalogue()
    return [
        {
            "name": gpu.name,
            "title": gpu.title,
            "capability": _capability(gpu),
            "time_error": (speed := speed_of(gpu.name)) and speed.error,
            "total_bytes": gpu.total_bytes,
            "usable_bytes": gpu.usable_bytes,
            "written": {"name": gpu.name} if gpu.name in known else {"vram_gib": gpu.total_bytes / GIB},
        }
        for gpu in sorted(gpus, key=lambda gpu: gpu.usable_bytes)
    ]


def _seconds(
    model: str, estimates: Mapping[tuple[str, str], CalibratedEstimator]
) -> dict[str, list[tuple[int, float]]]:
    """By ``model|method|layout|gpu`` the tokens and seconds of the steps that were traced, the shortest first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for (method, layout), estimate in estimates.items():
        for tokens, by_gpu in sorted(estimate.times, key=lambda one: one[0]):
            for name, seconds in by_gpu.items():
                found.setdefault(f"{model}|{method}|{layout}|{name}", []).append((tokens, seconds))
    return found


def _borders(scenario: Scenario, rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """By method, layout and GPU the (length, rows) that are the largest to fit; empty: not even the smallest does."""
    found = {}
    for row in rows:
        own = row["gpus"] == scenario.parallel.gpus
        layout = layout_of(scenario.parallel if own else Parallel(DIVIDED, row["gpus"]))
        steps = (scenario.sequence_length, row["largest_micro_batch"]), (row["largest_sequence_length"], 1)
        if layout is not None:
            found[f"{row['method']}|{layout}|{row['gpu']}"] = [step for step in steps if all(step)]
    return found


SMALLEST: Changes = {"sequence_length": 1, "micro_batch": 1, "gradient_accumulation": 1}


def _settings(scenario: Scenario, changes: Changes) -> dict[str, Any]:
    """What is set for a method and can't be chosen: what the page shows, and what a scenario file must say of it."""
    try:
        values = apply(scenario, {**changes, "gpu": None, "parallel": {"strategy": "none", "gpus": 1}}).to_mapping()
    except UserError:  # what the scenario holds has no place in this method; there is no estimate then
        values = scenario.to_mapping()
    defaults = Scenario.from_mapping({"model": scenario.model, "method": values["method"]}).to_mapping()
    said = {name: value for name, value in values.items() if name in SHOWN or value != defaults[name]}
    if values["adapter"]:
        del said["lora"]
    return {
        "settings": {name: values[name] for name in SHOWN},
        "written": {name: value for name, value in said.items() if value is not None and name not in CHOSEN},
    }


def _capability(gpu: Gpu) -> str:
    return "default" if gpu.compute_capability is None else str(gpu.compute_capability)


def _sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    """How many parameters a model has in all and in linear layers, how long its sequences may be; None: not known."""
    try:
        counts = describe(model).parameter_counts()
    except NotDescribed:
        counts = {"total": None, "linear": None}
    positions = model.get("max_position_embeddings")
    return {"parameters": counts["total"], "linear_parameters": counts["linear"], "positions": positions}


def _add_surfaces(found: dict[str, Any], known: dict[str, int], key: str, base: Scenario, gpus: Iterable[Gpu]) -> None:
    """A surface for each compute capability; those that are alike are one."""
    made: dict[tuple, int] = {}
    for name, capability in {_capability(gpu): gpu.capability for gpu in gpus}.items():
        kernels = kernels_of(base, capability)
        if kernels not in made:
            form = surface(base, capability=capability)
            text = json.dumps(form, sort_keys=True)
            if text not in known:
                known[text] = len(found["surfaces"])
                found["surfaces"].append(form)
            made[kernels] = known[text]
        found["surface_of"][f"{key}|{name}"] = made[kernels]
