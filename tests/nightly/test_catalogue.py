"""Every model of config/models/, whole, traced once: `make test-night`, each night (half an hour on a busy core).

The trace builds the model with transformers; the analytic estimate reads the configuration alone. They have to agree on
the parameters, and on the peak as far as the estimate's own documentation promises.
"""

import pytest
import torch
import transformers

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.common.files import read_yaml
from dryfit.scenario.hub import INDEX, MODELS
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace

# Families that the analytic estimate does not describe; what it describes it must go on describing.
NOT_DESCRIBED = {"gpt-oss-20b", "olmo-2-7b"}
# Those of 2025 and 2026, of whose families it describes some.
TODAY = {name for name, entry in read_yaml(INDEX)["models"].items() if "billions" in entry}


@pytest.mark.parametrize("name", sorted(TODAY))
def test_a_model_has_as_many_parameters_as_its_name_says(name: str) -> None:
    """All its parts, as transformers builds them: a size that is wrong or missing in the configuration shows here."""
    config = transformers.AutoConfig.from_pretrained(MODELS / f"{name}.json")
    kind = transformers.AutoModelForCausalLM
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        kind = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert round(billions, 1) == read_yaml(INDEX)["models"][name]["billions"]


@pytest.mark.parametrize("name", sorted(path.stem for path in MODELS.glob("*.json")))
def test_the_trace_of_a_model_agrees_with_its_configuration(name: str, record_property) -> None:
    asked = Scenario.from_mapping({"model": name, "micro_batch": 1, "sequence_length": 512})
    found = trace(asked, capability=(8, 0), timeline=False)
    record_property("peak_allocated_gib", round(found["peak_allocated_bytes"] / 2**30, 2))
    assert found["resident_bytes"] < found["peak_allocated_bytes"] <= found["required_bytes"]
    try:
        estimate = analytic_estimate(asked, name, capability=(8, 0))
    except NotDescribed:
        assert name in NOT_DESCRIBED | TODAY
        return
    assert name not in NOT_DESCRIBED
    assert found["parameters"] == estimate["parameters"]["total"]
    assert found["peak_allocated_bytes"] == pytest.approx(
        estimate["peak_allocated_bytes"], rel=0.03
    )
