"""Rule ``estimate_memory``: a scenario's memory from its model's configuration alone, without torch."""

from typing import Any

from scripts.common.files import write_report
from scripts.common.job import job, log
from scripts.memory.analytic.estimate import NotDescribed, analytic_estimate
from scripts.memory.analytic.rule_of_thumb import rule_of_thumb
from scripts.memory.check_run import checked_configuration
from scripts.memory.gpus import named
from scripts.settings.scenario import Scenario


def estimate(scenario: Scenario, where: object = "scenario") -> dict[str, Any]:
    """The analytic estimate on the GPU that a scenario names, and the rule of thumb.

    Returns
    -------
    dict
        ``analytic``, ``rule_of_thumb``: each with ``peak_allocated_bytes`` and ``components``, both None where the
        estimate describes the architecture or a setting not; ``reason``: why not, else None; ``scenario``.
    """
    gpu = named(scenario.gpu, where)
    try:
        analytic = analytic_estimate(scenario, where, capability=gpu.capability if gpu else None)
    except NotDescribed as error:
        return {"analytic": None, "reason": str(error), "rule_of_thumb": None, "scenario": scenario.to_mapping()}
    rule = rule_of_thumb(scenario, analytic["parameters"]["total"])
    return {"analytic": analytic, "reason": None, "rule_of_thumb": rule, "scenario": scenario.to_mapping()}


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    where = "the configuration"
    answer = estimate(Scenario.from_mapping({**mapping, "model": config}, defaults={}, where=where), where)
    write_report(output, answer)
    for name in ("rule_of_thumb", "analytic"):
        if answer[name]:
            log.info("%s: %.2f GB", name.replace("_", " "), answer[name]["peak_allocated_bytes"] / 1e9)
    if answer["reason"]:
        log.info("no estimate: %s", answer["reason"])


if __name__ == "__main__":
    with job(snakemake):
        main(checked_configuration(snakemake.input), snakemake.params.scenario, snakemake.output.estimate)
