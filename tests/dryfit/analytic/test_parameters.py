"""Parameters from the configuration alone are those of the model that transformers builds."""

import pytest

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import estimate
from dryfit.analytic.parameters import parameter_count
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import skeleton
from tests.dryfit.decoders import DECODERS
from tests.dryfit.families import FAMILIES

UNKNOWN = {"zamba2"}  # whose layers share weights


def built(scenario: Scenario) -> int:
    return sum(parameter.numel() for parameter in skeleton(scenario).parameters())


def scenario(model) -> Scenario:
    return Scenario.from_mapping({"model": model, "method": "full", "sequence_length": 128})


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNKNOWN))
def test_a_familys_parameters_are_exact(family):
    asked = scenario(FAMILIES[family])
    assert parameter_count(asked.model) == built(asked)


@pytest.mark.few(8, 24)
@pytest.mark.parametrize("name", sorted({path.stem for path in MODELS.glob("*.json")} - UNKNOWN))
def test_parameters_of_the_catalogue_are_exact(name):
    asked = scenario(name)
    assert parameter_count(asked.model) == built(asked)


def test_a_step_that_is_not_described_has_its_parameters_and_says_where_the_rest_comes_from():
    asked = scenario("deepseek-v4-flash")
    found, count = estimate(asked), built(asked)
    assert found.analytic is None and found.rule_of_thumb["exact_count"]["parameters"] == count
    assert found.reason == (
        "the analytic estimate does not describe the architecture deepseek_v4; the weights of its"
        f" {count / 1e9:.2f} billion parameters alone take {2 * count / 2**30:.1f} GiB"
    )


@pytest.mark.parametrize(
    "model", [FAMILIES["zamba2"], DECODERS["bloom"]], ids=lambda model: model["model_type"]
)
def test_a_family_that_is_not_known_has_no_figure(model):
    found = estimate(scenario(model))
    assert (
        found.analytic is None
        and found.rule_of_thumb is None
        and found.reason.endswith(model["model_type"])
    )


def test_a_size_that_is_missing_is_named():
    model = {key: value for key, value in FAMILIES["kimi_linear"].items() if key != "kv_lora_rank"}
    with pytest.raises(NotDescribed, match="does not say kv_lora_rank"):
        parameter_count(model)
