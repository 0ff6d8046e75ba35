"""The gate between planning and training: stop before it costs anything when the step does not fit the GPU.

Nothing is changed in silence. A step that does not fit fails the rule with the numbers, the GPU and what would fit;
an explicit override lets it through and is recorded, so that the model card says so.
"""

from collections.abc import Mapping
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_report, write_report
from scripts.common.job import job, log
from scripts.memory.core.cuda_rules import DEFAULT_CAPABILITY
from scripts.memory.gpus import GIB, Gpu, find, from_device, verdict
from scripts.scenario.scenario import Scenario

NOTHING_TO_GATE = "no GPU found or named: nothing to gate"


def found_in_machine() -> Gpu | None:
    """The first CUDA device of this machine; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return from_device(properties.name, properties.total_memory, (properties.major, properties.minor))


def chosen_gpu(setting: Any) -> Gpu | None:
    """The GPU to fit: the one found in the machine for ``auto`` (None without one), or the one that is named."""
    return found_in_machine() if setting == "auto" else find(setting, "memory.gate.gpu")


def decide(traced: Mapping[str, Any], gpu: Gpu | None, override: bool) -> dict[str, Any]:
    """Judge a traced step.

    Returns
    -------
    dict
        ``gpu``, ``fits`` and ``headroom_bytes`` (None when nothing was checked), ``required_bytes``,
        ``peak_allocated_bytes``, ``override`` (as configured), ``overridden`` (it was needed), ``reason``,
        ``suggestions`` (what would fit, if it does not), ``effective_batch``.
    """
    scenario = Scenario.from_mapping(traced["scenario"], defaults={}, where="the configuration")
    step = traced["trace"]
    suggestions: list[dict[str, Any]] = []
    answer: dict[str, Any] = {"fits": None, "headroom_bytes": None}
    reason = NOTHING_TO_GATE
    if gpu is not None:
        if (gpu.capability or DEFAULT_CAPABILITY) != tuple(traced["capability"] or DEFAULT_CAPABILITY):
            from scripts.memory.trace import trace  # another GPU runs other kernels

            step = trace(scenario, capability=gpu.capability, timeline=False)
        answer = verdict(step["required_bytes"], gpu)
        reason = (
            f"the step needs {step['required_bytes'] / GIB:.2f} GiB; {gpu.title} has {gpu.usable_bytes / GIB:.2f} GiB"
            f" ({gpu.total_bytes / GIB:.2f} less {gpu.context_bytes / GIB:.2f} of CUDA context)"
        )
        if not answer["fits"]:
            from scripts.memory.planner import suggest

            suggestions = suggest(scenario, gpu, step)
    return {
        **answer,
        "effective_batch": scenario.micro_batch * scenario.gradient_accumulation,
        "gpu": gpu.to_mapping() if gpu else None,
        "overridden": override and answer["fits"] is False,
        "override": override,
        "peak_allocated_bytes": step["peak_allocated_bytes"],
        "reason": reason,
        "required_bytes": step["required_bytes"],
        "suggestions": suggestions,
    }


def refusal(decision: Mapping[str, Any]) -> UserError:
    """The message of a step that does not fit."""
    options = [f"{item['write']}   # {item['cost']}" for item in decision["suggestions"]]
    return UserError(
        f"The training step does not fit: {decision['reason']}, {-decision['headroom_bytes'] / GIB:.2f} GiB too few.",
        where="training (and memory.gate.gpu) in the configuration",
        allowed="one of these, the cheapest first (the effective batch stays"
        f" {decision['effective_batch']}); or memory.gate.override: true, which the model card will mention",
        write="\n".join(options) or "memory: {gate: {override: true}}",
    )


def main(traced: str, settings: Mapping[str, Any], output: str) -> None:
    decision = decide(read_report(traced), chosen_gpu(settings["gpu"]), settings["override"])
    if decision["fits"] is False and not decision["override"]:
        raise refusal(decision)
    write_report(output, decision)
    if decision["overridden"]:
        log.warning("OVERRIDDEN: %s", decision["reason"])
    else:
        log.info("%s", decision["reason"])


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.trace, snakemake.params.gate, snakemake.output.gate)
