"""Estimate a scenario's memory from its model's configuration alone: rule of thumb and analytic estimate, no torch."""

from typing import Any

from scripts.common.files import write_json
from scripts.common.job import job, log
from scripts.memory.analytic.estimate import analytic_estimate
from scripts.memory.analytic.rule_of_thumb import rule_of_thumb
from scripts.scenario.scenario import Scenario


def estimate(scenario: Scenario) -> dict[str, Any]:
    """Both estimates of a scenario; for an architecture that isn't described both are None, with the reason."""
    formula = analytic_estimate(scenario)
    if formula is None:
        reason = f"no analytic estimate for {scenario.model['model_type']}"
        return {"analytic": None, "reason": reason, "rule_of_thumb": None, "scenario": scenario.to_mapping()}
    return {
        "analytic": formula,
        "reason": None,
        "rule_of_thumb": rule_of_thumb(scenario, formula["parameters"]["total"]),
        "scenario": scenario.to_mapping(),
    }


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    scenario = Scenario.from_mapping({**mapping, "model": config}, defaults={}, where="the configuration")
    answer = estimate(scenario)
    write_json(output, answer)
    for name in ("rule_of_thumb", "analytic"):
        if answer[name]:
            log.info("%s: %.2f GB", name.replace("_", " "), answer[name]["peak_allocated_bytes"] / 1e9)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.config, snakemake.params.scenario, snakemake.output.estimate)
