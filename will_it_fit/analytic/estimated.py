"""The answers that need no torch, as a value: the analytic estimate and the rule of thumb."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from will_it_fit.analytic.decoder import NotDescribed
from will_it_fit.analytic.estimate import analytic_estimate
from will_it_fit.analytic.rule_of_thumb import rule_of_thumb
from will_it_fit.cards.gpus import named
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
