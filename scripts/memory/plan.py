"""Rule ``plan_memory``: what fits which GPU around a run's step, and the data of the planner's page."""

from collections.abc import Mapping
from typing import Any

from scripts.common.job import job
from scripts.runs.check_configuration import checked_configuration
from will_it_fit.cards.gpus import find
from will_it_fit.common.files import write_report
from will_it_fit.common.terminal import log
from will_it_fit.planner.calibrated import CalibratedEstimator, alone
from will_it_fit.planner.changes import as_method
from will_it_fit.planner.gpu_counts import becomes_possible
from will_it_fit.planner.plan import METHODS, page_data, plan, table
from will_it_fit.scenario.scenario import Scenario


def main(
    config: str, mapping: Mapping[str, Any], divided_ones: Mapping[str, Mapping[str, Any]], output: str, page: str
) -> None:
    """The rule's work; ``divided_ones``: by name what the document asks for on several GPUs."""
    scenario = Scenario.from_mapping({**mapping, "model": config}, defaults={}, where="the configuration")
    steps = {method: alone(scenario, as_method(scenario, method)) for method in METHODS}
    bases = {method: (step, CalibratedEstimator(step)) for method, step in steps.items()}
    own = find(scenario.gpu) if scenario.gpu is not None else None
    answer = plan(scenario, own, estimates={method: estimate for method, (_, estimate) in bases.items()})
    if divided_ones:
        where = "memory.scenarios in the configuration"
        answer["several_gpus"] = becomes_possible(
            {
                name: Scenario.from_mapping({**one, "model": config}, defaults={}, where=where)
                for name, one in divided_ones.items()
            }
        )
    write_report(output, answer)
    data = page_data(scenario, bases, own, several=bool(divided_ones), rows=answer["feasibility"])
    write_report(page, data, indent=None)
    log.info("%s", table(answer))


if __name__ == "__main__":
    with job(snakemake):
        main(
            checked_configuration(snakemake.input),
            snakemake.params.scenario,
            snakemake.params.several_gpus,
            snakemake.output.plan,
            snakemake.output.planner,
        )
