"""Rule ``trace_memory``: a scenario's training step on the meta device, with the timeline for a figure."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scripts.common.files import write_report
from scripts.common.job import job, log
from scripts.memory.check_run import checked_configuration
from scripts.memory.gpus import named
from scripts.settings.scenario import Scenario

STACK = ("torch", "transformers", "peft", "bitsandbytes")


def traced(scenario: Scenario, where: object = "scenario", *, timeline: bool = False) -> dict[str, Any]:
    """The trace on the GPU that a scenario names.

    Returns
    -------
    dict
        ``trace`` (:func:`scripts.memory.trace.trace`); ``capability``: the GPU's, None for the default's; ``scenario``;
        ``versions`` of what decides the answer.
    """
    from scripts.memory.trace import trace

    gpu = named(scenario.gpu, where)
    capability = gpu.capability if gpu else None
    answer = trace(scenario, capability=capability, timeline=timeline, both_allocators=True)
    return {"capability": capability, "scenario": scenario.to_mapping(), "trace": answer, "versions": versions()}


def versions() -> dict[str, str | None]:
    """Versions of what decides the answer."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    where = "the configuration"
    answer = traced(Scenario.from_mapping({**mapping, "model": config}, {}, where), where, timeline=True)
    write_report(output, answer)
    log.info(
        "peak %.2f GB in the %s; the GPU must have at least %.2f GB",
        answer["trace"]["peak_allocated_bytes"] / 1e9,
        answer["trace"]["peak_phase"],
        answer["trace"]["required_bytes"] / 1e9,
    )


if __name__ == "__main__":
    with job(snakemake):
        main(checked_configuration(snakemake.input), snakemake.params.scenario, snakemake.output.trace)
