"""Estimate a scenario's memory from its model's configuration alone: rule of thumb and closed form, no torch."""

from typing import Any

from scripts.common.files import write_json
from scripts.common.job import job, log
from scripts.common.scenario import Scenario
from scripts.memory.closed_form import closed_form
from scripts.memory.rule_of_thumb import rule_of_thumb


def estimate(scenario: Scenario) -> dict[str, Any]:
    """Both estimates of a scenario; for an architecture that isn't described both are None, with the reason."""
    formula = closed_form(scenario)
    if formula is None:
        reason = f"no closed form for {scenario.model['model_type']}"
        return {"closed_form": None, "reason": reason, "rule_of_thumb": None, "scenario": scenario.to_mapping()}
    return {
        "closed_form": formula,
        "reason": None,
        "rule_of_thumb": rule_of_thumb(scenario, formula["parameters"]["total"]),
        "scenario": scenario.to_mapping(),
    }


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    scenario = Scenario.from_mapping({**mapping, "model": config}, defaults={}, where="the configuration")
    answer = estimate(scenario)
    write_json(output, answer)
    for name in ("rule_of_thumb", "closed_form"):
        if answer[name]:
            log.info("%s: %.2f GB", name.replace("_", " "), answer[name]["peak_allocated_bytes"] / 1e9)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.config, snakemake.params.scenario, snakemake.output.estimate)
