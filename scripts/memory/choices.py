"""All that a person may choose on the planner's page: every model, method and GPU, with their estimates as surfaces.

The page computes what it shows, in the browser: the analytic estimate at the chosen length and micro-batch
(:mod:`scripts.memory.analytic.surface`, exact to the byte), and what a GPU needs above that peak as
:class:`scripts.memory.planner.Estimate` has it, from traces, where there are any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_json
from scripts.memory.analytic.decoder import NotDescribed, describe
from scripts.memory.analytic.surface import kernels_of, surface
from scripts.memory.gpus import Gpu, catalogue
from scripts.memory.planner import LENGTH_STEP, MOST, Changes, Estimate, apply
from scripts.scenario.scenario import MODELS, Scenario

TITLES = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
SHOWN = ("precision", "lora", "gradient_checkpointing", "attention", "optimizer", "loss", "adapter_precision")


def choices(
    scenario: Scenario,
    methods: Mapping[str, Changes],
    estimates: Mapping[str, Estimate],
    gpu: Gpu | None = None,
    models: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The page's data.

    Parameters
    ----------
    scenario
        What the page opens with, and where all settings come from that can't be chosen on it.
    methods
        What to change for each.
    estimates
        By method what traces showed of the scenario's own model; empty without traces.
    gpu
        The GPU that the page opens with; None: an RTX 4090.
    models
        Configurations by name, beside the scenario's; None: those of config/models/.

    Returns
    -------
    dict
        ``models``, ``methods``, ``gpus`` to choose from and ``chosen``, what the page opens with; ``settings``, the
        same for all; ``surfaces`` and ``surface_of``, the index of one by ``model|method|capability``; ``reasons`` by
        ``model|method`` where there is none; ``traced`` by ``model|method``: points of (estimate's peak, required
        bytes above it).
    """
    if models is None:
        models = {path.stem: read_json(path) for path in sorted(MODELS.glob("*.json"))}
    own = scenario.model_name or str(scenario.model["model_type"])
    if models.get(own) != scenario.model:
        models = {own: scenario.model, **models}
    gpus = {**{gpu.name: gpu for gpu in ([gpu] if gpu else [])}, **catalogue()}
    values = scenario.to_mapping()
    found: dict[str, Any] = {
        "chosen": {
            "model": own,
            "method": scenario.method,
            "gpu": gpu.name if gpu else "rtx-4090",
            "sequence_length": scenario.sequence_length,
            "micro_batch": scenario.micro_batch,
        },
        "gpus": [
            {
                "name": gpu.name,
                "title": gpu.title,
                "capability": _capability(gpu),
                "total_bytes": gpu.total_bytes,
                "usable_bytes": gpu.usable_bytes,
            }
            for gpu in sorted(gpus.values(), key=lambda gpu: gpu.usable_bytes)
        ],
        "limits": {"length_step": LENGTH_STEP, "most_rows": MOST},
        "methods": [{"name": name, "title": TITLES[name]} for name in methods],
        "models": [],
        "reasons": {},
        "settings": {name: values[name] for name in SHOWN},
        "surface_of": {},
        "surfaces": [],
        "traced": {f"{own}|{method}": estimate.points for method, estimate in estimates.items() if estimate.described},
    }
    known: dict[str, int] = {}
    for name, model in models.items():
        found["models"].append({"name": name, **_sizes(model)})
        for method, changes in methods.items():
            key = f"{name}|{method}"
            try:
                base = apply(scenario, {**changes, "model": model, "model_name": name, "gpu": None} | _SMALLEST)
                _add_surfaces(found, known, key, base, gpus.values())
            except (NotDescribed, UserError) as error:
                found["reasons"][key] = str(error).partition("\n")[0]
    return found


_SMALLEST: Changes = {"sequence_length": 1, "micro_batch": 1, "gradient_accumulation": 1}


def _capability(gpu: Gpu) -> str:
    return "default" if gpu.compute_capability is None else str(gpu.compute_capability)


def _sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    """How many parameters a model has, and how long its sequences may be; None where that is not known."""
    try:
        parameters = describe(model).parameter_counts()["total"]
    except NotDescribed:
        parameters = None
    return {"parameters": parameters, "positions": model.get("max_position_embeddings")}


def _add_surfaces(found: dict[str, Any], known: dict[str, int], key: str, base: Scenario, gpus: Any) -> None:
    """A surface for each compute capability; those that are alike are one."""
    made: dict[tuple, int] = {}
    for gpu in gpus:
        kernels = kernels_of(base, gpu.capability)
        if kernels not in made:
            form = surface(base, capability=gpu.capability)
            text = json.dumps(form, sort_keys=True)
            if text not in known:
                known[text] = len(found["surfaces"])
                found["surfaces"].append(form)
            made[kernels] = known[text]
        found["surface_of"][f"{key}|{_capability(gpu)}"] = made[kernels]
