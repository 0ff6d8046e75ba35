"""Trace a scenario's training step on the meta device and keep what it found, with the timeline for a figure."""

from typing import Any

from scripts.common.files import write_json
from scripts.common.job import job, log
from scripts.memory.gpus import find
from scripts.memory.predict import versions
from scripts.scenario.scenario import Scenario


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    from scripts.memory.trace import trace

    scenario = Scenario.from_mapping({**mapping, "model": config}, defaults={}, where="the configuration")
    capability = find(scenario.gpu, "the configuration").capability if scenario.gpu is not None else None
    answer = trace(scenario, capability=capability)
    write_json(
        output,
        {"capability": capability, "scenario": scenario.to_mapping(), "trace": answer, "versions": versions()},
    )
    log.info(
        "peak %.2f GB in the %s; the card must have at least %.2f GB",
        answer["peak_allocated_bytes"] / 1e9,
        answer["peak_phase"],
        answer["required_bytes"] / 1e9,
    )


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.config, snakemake.params.scenario, snakemake.output.trace)
