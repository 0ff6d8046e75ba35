"""Rule ``trace_memory``: a scenario's training step on the meta device, with the timeline for a figure."""

from typing import Any

from scripts.common.job import job
from scripts.runs.check_configuration import checked_configuration
from will_it_fit.common.files import write_report
from will_it_fit.common.terminal import log
from will_it_fit.common.text import gib
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.tracing import imports
from will_it_fit.tracing.scenario_trace import traced


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    where = "the configuration"
    answer = traced(Scenario.from_mapping({**mapping, "model": config}, {}, where), where, timeline=True)
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
        main(checked_configuration(snakemake.input), snakemake.params.scenario, snakemake.output.trace)
