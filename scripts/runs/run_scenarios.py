"""The scenarios of a run: its own training step, and those of the memory profile.

The settings of one run go in, scenarios as mappings come out. What a scenario has a field for shapes the memory of
the step; whatever else ``training`` holds is about the loop around it.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dryfit.common.device import cuda_devices, expandable_segments_here, multiplies_bf16
from dryfit.scenario.fields import BY_NAME, scenario_defaults
from dryfit.scenario.hub import profiled
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.value_fields import DEFAULT_START

STEP = frozenset(field.name for field in fields(Scenario))
MOST_THREADS = 8  # of a training that doesn't say how many


def training_scenario(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run's own training step as a scenario without its model, which is the prepared config.json.

    Where the settings say nothing of the allocator its segments are expandable on CUDA, since training sets them so
    (:func:`dryfit.common.device.set_allocator`); the default of every other scenario is PyTorch's own.
    """
    own = {
        "allocator": {
            "expandable_segments": expandable_segments_here(settings["training"]["device"])
        }
    }
    step = own | {key: value for key, value in settings["training"].items() if key in STEP}
    if step["precision"] == "auto":
        faster = computes_in_bf16(settings["training"]["device"]) and not step.get("autocast")
        step |= {"precision": "bf16", "autocast": "bf16"} if faster else {"precision": "fp32"}
    return _of_method({**_defaults(settings), **step, "gpu": None, "lora": settings["lora"]})


def for_memory(scenario: dict[str, Any]) -> dict[str, Any]:
    """The same step for jobs about memory: theirs has an alpha of twice the rank, whatever the run's is.

    Alpha, with rsLoRA or by pattern too, scales the update and takes neither memory nor time. So another one is to
    trace and measure nothing again. Nor is a Gaussian start, which takes as much as the default's.
    Where it equals the rank, PyTorch's baddbmm, which adapts experts, leaves the factor of 1 out: the step with the
    factor is the one that needs more.
    """
    if not scenario["lora"]:
        return scenario
    scales = ("alpha", "alpha_pattern", "rslora")
    lora = {name: value for name, value in scenario["lora"].items() if name not in scales}
    if lora.get("initialization") == "gaussian":
        lora["initialization"] = DEFAULT_START
    if isinstance(lora.get("rank"), int):
        lora["alpha"] = 2 * lora["rank"]
    return {**scenario, "lora": lora}


def measured_step(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The training step as it is measured."""
    return for_memory(training_scenario(settings))


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields' own defaults, under those of the configuration."""
    return {**scenario_defaults(), **settings["scenario_defaults"]}


def computes_in_bf16(device: str) -> bool:
    """Whether ``precision: auto`` takes 16-bit weights: on a CPU that is faster in bf16."""
    return (device == "cpu" or (device == "auto" and not cuda_devices())) and multiplies_bf16()


def training_step_as_gated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The training step with the GPU that the gate is told about; with ``auto`` none, since it is found later."""
    gpu = settings["memory"]["gate"]["gpu"]
    return {**measured_step(settings), "gpu": None if gpu == "auto" else gpu}


def training_loop(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the loop around the training step; not its threads and trackers, which shape no adapter."""
    return {
        key: value
        for key, value in settings["training"].items()
        if key not in STEP | {"report_to", "threads"}
    }


def training_threads(settings: Mapping[str, Any]) -> int:
    """Threads of the training's job, at least one for each process; Snakemake gives no more than it has cores."""
    return max(settings["training"]["threads"] or MOST_THREADS, gpus_of_training(settings))


def step_grouping(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides, with the step, which rows meet in a batch."""
    loop = {key: settings["training"][key] for key in ("epochs", "max_steps", "rows_per_step")}
    return {**loop, "seed": settings["run"]["seed"]}


def answer_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that answers depend on: how they are made, and how many requests of each test are asked.

    ``dtype`` "auto" is left where the weights' own counts.
    """
    chosen = {
        name: settings["evaluation"][name]
        for name in ("batch_size", "dtype", "max_new_tokens", "requests")
    }
    if chosen["dtype"] == "auto" and computes_in_bf16(settings["training"]["device"]):
        chosen["dtype"] = "bfloat16"
    return {
        **chosen,
        "benchmark": (settings["dataset"]["benchmark"] or {"requests": 0})["requests"],
    }


def resource_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides, with the step, what the stages of a run need."""
    return {
        "device": settings["training"]["device"],
        "evaluation": answer_settings(settings),
        "gate": settings["memory"]["gate"],
        "loop": step_grouping(settings),
        "merging": {key: settings["merging"][key] for key in ("dtype", "verify")},
        "prompt": settings["prompt"],
        "source": {key: settings["model"]["source"][key] for key in ("dtype", "type")},
    }


def planned_step(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The step of which the planner says what fits which GPU: any method, so its adapter is always named."""
    step = {**settings["scenario_defaults"], "gpu": settings["memory"]["gpu"]}
    return _of_profile(for_memory({**step, "lora": settings["lora"]}))


def gpus_of_training(settings: Mapping[str, Any]) -> int:
    """How many GPUs the training takes, each with a process of its own."""
    return training_scenario(settings)["parallel"].get("gpus", 1)


def profile_scenarios(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The memory profile's scenarios by name: scenario_defaults, the run's adapter, then what differs.

    From the most costly method and precision to the least, as the memory profile's scenarios A, B and C. The model is a
    name in config/models/, or the file that rule ``fetch_configuration`` brings from the Hub.
    """
    memory = settings["memory"]
    name, hub = profiled(memory["model"])
    model = (
        {"model": f"results/memory/{name}/config.json", "model_name": memory["model"]}
        if hub
        else {"model": name}
    )
    common = {**_defaults(settings), "gpu": memory["gpu"], "lora": settings["lora"], **model}
    scenarios = {
        name: _of_profile(for_memory(_of_method({**common, **differences})))
        for name, differences in memory["scenarios"].items()
    }

    def cost(item: tuple[str, dict[str, Any]]) -> tuple[int, int, bool, str]:
        name, scenario = item
        precisions = ("fp32", "bf16-mixed", "fp16-mixed", "bf16", "fp16")
        return (
            BY_NAME["method"].words.index(scenario["method"]),
            precisions.index(scenario["precision"]),
            scenario.get("optimizer_state_precision") is None,  # narrower states take less
            name,
        )

    try:
        return dict(sorted(scenarios.items(), key=cost))
    except ValueError:
        return scenarios  # a method or precision that does not exist: check says which do


def sharded_scenarios(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The profile's full fine-tuning scenarios, without their model, where it is to say on how many GPUs they fit."""
    if not settings["memory"]["several_gpus"]:
        return {}
    return {
        name: {key: value for key, value in scenario.items() if key != "model"}
        for name, scenario in profile_scenarios(settings).items()
        if scenario["method"] == "full"
    }


def _of_profile(scenario: dict[str, Any]) -> dict[str, Any]:
    """A scenario of the memory profile, whose adapters start as plain ones: how they start takes memory in no step.

    And a quantized base has not all the starts that a dense one has.
    """
    if not isinstance(scenario["lora"], Mapping):
        return scenario
    return {**scenario, "lora": {**scenario["lora"], "initialization": DEFAULT_START}}


def _of_method(scenario: dict[str, Any]) -> dict[str, Any]:
    if scenario["method"] != "qlora":
        scenario["quantization"] = None
    if scenario["method"] == "full":
        scenario["lora"] = None
    return scenario
