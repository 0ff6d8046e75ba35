"""Rule ``plan_memory``: what fits which GPU around a run's step."""

from collections.abc import Mapping
from typing import Any

from dryfit.cards.gpus import find
from dryfit.common.files import write_report
from dryfit.common.terminal import log
from dryfit.planner.plan import becomes_possible, plan, table
from dryfit.scenario.scenario import Scenario
from dryfit.tracing import imports
from scripts.common.job import job
from scripts.runs.check_configuration import checked_configuration


def main(
    config: str,
    mapping: Mapping[str, Any],
    on_several_gpus: Mapping[str, Mapping[str, Any]],
    output: str,
) -> None:
    """The rule's work; ``on_several_gpus``: by name the scenarios that the document asks for on several GPUs."""
    scenario = Scenario.from_mapping(
        {**mapping, "model": config}, defaults={}, where="the configuration"
    )
    answer = plan(scenario, find(scenario.gpu) if scenario.gpu is not None else None)
    if on_several_gpus:
        where = "memory.scenarios in the configuration"
        answer["several_gpus"] = becomes_possible(
            {
                name: Scenario.from_mapping({**one, "model": config}, defaults={}, where=where)
                for name, one in on_several_gpus.items()
            }
        )
    write_report(output, answer)
    log.info("%s", table(answer))


if __name__ == "__main__":
    with job(snakemake):
        imports.ends_with_its_answer = True
        main(
            checked_configuration(snakemake.input),
            snakemake.params.scenario,
            snakemake.params.several_gpus,
            snakemake.output.plan,
        )
