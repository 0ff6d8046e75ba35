"""Rule ``plan_memory``: what fits which GPU around a run's step."""

from collections.abc import Mapping
from typing import Any

from scripts.common.job import job
from scripts.runs.check_configuration import checked_configuration
from will_it_fit.cards.gpus import find
from will_it_fit.common.files import write_report
from will_it_fit.common.terminal import log
from will_it_fit.planner.gpu_counts import becomes_possible
from will_it_fit.planner.plan import plan, table
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.tracing import imports


def main(
    config: str, mapping: Mapping[str, Any], on_several_gpus: Mapping[str, Mapping[str, Any]], output: str
) -> None:
    """The rule's work; ``on_several_gpus``: by name the scenarios that the document asks for on several GPUs."""
    scenario = Scenario.from_mapping({**mapping, "model": config}, defaults={}, where="the configuration")
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
