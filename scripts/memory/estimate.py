"""Rule ``estimate_memory``: a scenario's memory from its model's configuration alone, without torch."""

from typing import Any

from scripts.common.job import job
from scripts.runs.check_configuration import checked_configuration
from will_it_fit.analytic.estimate import estimate
from will_it_fit.common.files import write_report
from will_it_fit.common.sizes import gib
from will_it_fit.common.terminal import log
from will_it_fit.scenario.scenario import Scenario


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    where = "the configuration"
    answer = estimate(Scenario.from_mapping({**mapping, "model": config}, defaults={}, where=where), where)
    write_report(output, answer.to_mapping())
    for name, found in (("rule of thumb", answer.rule_of_thumb), ("analytic", answer.analytic)):
        if found:
            log.info("%s: %s", name, gib(found["peak_allocated_bytes"]))
    if answer.reason:
        log.info("no estimate: %s", answer.reason)


if __name__ == "__main__":
    with job(snakemake):
        main(checked_configuration(snakemake.input), snakemake.params.scenario, snakemake.output.estimate)
