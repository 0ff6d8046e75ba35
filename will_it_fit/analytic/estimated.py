"""Rule ``estimate_memory``: a scenario's memory from its model's configuration alone, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.common.job import job, log
from scripts.runs.check_configuration import checked_configuration
from will_it_fit.analytic.decoder import NotDescribed
from will_it_fit.analytic.estimate import analytic_estimate
from will_it_fit.analytic.rule_of_thumb import rule_of_thumb
from will_it_fit.cards.gpus import named
from will_it_fit.common.files import write_report
from will_it_fit.common.sizes import gib
from will_it_fit.scenario.scenario import Scenario


@dataclass(frozen=True)
class Estimated:
    """The answers that need no torch.

    Attributes
    ----------
    analytic, rule_of_thumb
        Each with ``peak_allocated_bytes`` and ``components``; both None where the estimate does not describe the
        architecture or a setting.
    reason
        Why they are None, else None.
    """

    scenario: Scenario
    analytic: Mapping[str, Any] | None
    rule_of_thumb: Mapping[str, Any] | None
    reason: str | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "scenario": self.scenario.to_mapping()}


def estimate(scenario: Scenario, where: object = "scenario", *, blocks: bool = True) -> Estimated:
    """The analytic estimate on the GPU that a scenario names, and the rule of thumb; ``blocks`` as there."""
    gpu = named(scenario.gpu, where)
    try:
        analytic = analytic_estimate(scenario, where, capability=gpu.capability if gpu else None, blocks=blocks)
    except NotDescribed as error:
        return Estimated(scenario, None, None, str(error))
    return Estimated(scenario, analytic, rule_of_thumb(scenario, analytic["parameters"]["total"]))


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
