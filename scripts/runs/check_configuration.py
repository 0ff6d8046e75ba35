"""Checks of a run's scenarios that need the memory's own knowledge: its model, its GPU, what can be trained."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.setting import describe
from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_report
from dryfit.scenario.contradictions import TRAINING, contradictions
from dryfit.scenario.hub import likely_id, nearest, profiled
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario, check_packages, rows_in_a_step
from dryfit.scenario.value_fields import Lora
from scripts.common.disk import ParameterCounts
from scripts.runs.adapter_settings import refused_together, unknown_modules, unmatched_patterns
from scripts.runs.run_scenarios import (
    profile_scenarios,
    training_loop,
    training_scenario,
    training_step_as_gated,
)
from scripts.runs.training_backends import refused_by_trl

# Stands for a base model whose configuration is not there yet; its sizes are then checked by the trace.
_ANY_MODEL = {"model_type": "any"}


def sizes(settings: Mapping[str, Any]) -> ParameterCounts:
    """What decides how much a run writes, as far as it is known before any job: zero parameters where nothing is."""
    step = training_scenario(settings)
    parameters, trainable = settings["model"].get("parameters") or 0, 0
    with suppress(
        UserError, NotDescribed
    ):  # not there yet, or of a family that only the trace knows
        model = read_json(Path("results", "models", settings["model"]["name"], "config.json"))
        parameters = describe(model).parameter_counts()["total"]
        lora = Scenario.from_mapping(
            {**step, "model": model}, {}, "training in the configuration"
        ).lora
        trainable = trained_parameters(model, lora) if lora else 0
    base = settings["model"]["source"]["dtype"]
    return ParameterCounts.of(
        step, base, settings["merging"]["dtype"] or base, parameters, trainable
    )


def trained_parameters(model: Mapping[str, Any], lora: Lora) -> int:
    """Parameters that an adapter writes, at most: what is taken out of the base is saved with twice the rank.

    With the largest rank that any layer has, and whole embeddings and output heads where these are trained.
    """
    largest = max([lora.rank, *(lora.rank_pattern or {}).values()])
    if lora.takes_from_base:
        largest *= 2
    whole = {"embed_tokens", "lm_head"} & {
        name.rsplit(".", 1)[-1] for name in lora.modules_to_save or ()
    }
    table = model.get("hidden_size", 0) * model.get("vocab_size", 0)
    return describe(model).adapter_parameters(replace(lora, rank=largest)) + len(whole) * table


def check(settings: Mapping[str, Any]) -> None:
    """Refuse scenarios, models and GPUs that do not exist, before any job starts.

    UserError: naming the setting, with the line to write.
    """
    memory, known = settings["memory"], sorted(path.stem for path in MODELS.glob("*.json"))
    name, hub = profiled(memory["model"])
    if hub is None and name not in known:
        near = nearest(memory["model"])
        raise UserError(
            "memory.model is not a model that the project knows.",
            where="the configuration",
            found=memory["model"],
            allowed=f"an id on the Hub, owner/name or owner/name@revision; or a name: {', '.join(known)}",
            write=f"memory:\n  model: {near[0] if near else likely_id(memory['model']) or known[0]}",
        )
    _check_source(settings["model"]["source"])
    for key, gpu in (("memory.gpu", memory["gpu"]), ("memory.gate.gpu", memory["gate"]["gpu"])):
        if key == "memory.gpu" or gpu != "auto":
            find(gpu, f"{key} in the configuration")
    for name, scenario in profile_scenarios(settings).items():
        if hub is not None and not Path(scenario["model"]).is_file():  # a rule fetches it
            scenario["model"] = _ANY_MODEL
        where = f"memory.scenarios.{name} (and scenario_defaults, lora) in the configuration"
        check_packages(_check_scenario(scenario, where), where)
    try:
        model = read_json(Path("results", "models", settings["model"]["name"], "config.json"))
    except UserError:  # not there yet; or broken, which the rule that reads it explains
        model = _ANY_MODEL
    # The gate's step leaves out what moves no memory. What can't be trained or converted may be in just that.
    lora = training_scenario(settings)["lora"]
    step = {**training_step_as_gated(settings), "lora": lora, "model": model}
    scenario = _check_scenario(step, "training (and scenario_defaults, lora) in the configuration")
    rows_in_a_step(scenario, training_loop(settings))
    wrong = list(contradictions(scenario, "training", TRAINING, training_loop(settings)))
    wrong += [*_wrong_adapter(scenario), *refused_by_trl(scenario, training_loop(settings))]
    if wrong:
        raise UserError.several(wrong)


def _wrong_adapter(scenario: Scenario) -> Iterator[UserError]:
    """What is wrong with the adapter of a training, as far as the model is known before any job."""
    lora = scenario.lora
    if lora is None:
        return
    yield from refused_together(lora, scenario.parallel.gpus)
    with suppress(NotDescribed):
        decoder = describe(scenario.model)
        every_layer = decoder.targets(replace(lora, target_modules="all-linear"))
        yield from unmatched_patterns(lora, decoder.targets(lora))
        yield from unknown_modules(lora, every_layer)


def rows_a_step(settings: Mapping[str, Any]) -> int:
    """Rows that one optimizer step of a run takes."""
    step = Scenario.from_mapping(
        {**training_scenario(settings), "model": _ANY_MODEL}, {}, "training"
    )
    return rows_in_a_step(step, training_loop(settings))


def _check_source(source: Mapping[str, Any]) -> None:
    """Refuse a model's folder that is not there, before a job finds it out."""
    folder = Path(source.get("path", ""))
    if source["type"] == "folder" and not (folder / "config.json").is_file():
        there = folder.is_dir()
        raise UserError(
            f"There is no {'config.json in the ' if there else ''}folder {folder} to take the base model from.",
            where="model.source.path in the configuration",
            found=str(folder.absolute()),
            allowed="a folder with config.json, tokenizer.json and *.safetensors, as save_pretrained writes them",
            write="model:\n  source: {type: folder, path: models/my-model}",
        )


def checked_configuration(inputs: Any) -> str:
    """The path of a rule's ``config``: where a ``description`` stands beside it, it must be what that step wrote."""
    if description := inputs.get("description"):
        read_report(str(description), inputs["config"])
    return inputs["config"]


def _check_scenario(mapping: Mapping[str, Any], where: str) -> Scenario:
    scenario = Scenario.from_mapping(mapping, {}, where)
    with suppress(NotDescribed):
        if scenario.lora is not None:
            describe(scenario.model).targets(scenario.lora, where)
    return scenario
