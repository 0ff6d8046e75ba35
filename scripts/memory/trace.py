"""Rule ``trace_memory``: a scenario's training step on the meta device, with the timeline for a figure."""

from typing import Any

from dryfit.common.files import write_report
from dryfit.common.terminal import log
from dryfit.common.text import gib
from dryfit.scenario.scenario import Scenario
from dryfit.tracing import imports
from dryfit.tracing.scenario_trace import traced
from scripts.common.job import job
from scripts.runs.check_configuration import checked_configuration


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    where = "the configuration"
    answer = traced(
        Scenario.from_mapping({**mapping, "model": config}, {}, where), where, timeline=True
    )
    write_report(output, answer.to_mapping())
    log.info(
        "peak %s in the %s; the GPU must have at least %s",
        gib(answer.trace["peak_allocated_bytes"]),
        answer.trace["peak_phase"],
        gib(answer.trace["required_bytes"]),
    )


if __name__ == "__main__":
    with job(snakemake):
        imports.ends_with_its_answer = True
        main(
            checked_configuration(snakemake.input),
            snakemake.params.scenario,
            snakemake.output.trace,
        )
