"""4-bit layers of earlier versions of bitsandbytes: what they kept, to the byte, and the same numbers."""

import pytest
import torch

from tests.will_it_fit.decoders import DECODERS
from will_it_fit.common.errors import UserError
from will_it_fit.engine.errors import TraceError
from will_it_fit.engine.older_layers import layers_of
from will_it_fit.scenario.contradictions import TRAINING, contradictions
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.step.model import build_model
from will_it_fit.step.step import forward_backward, random_batch
from will_it_fit.tracing.measure import measure
from will_it_fit.tracing.trace import trace


def scenario(version: str | None, **fields) -> Scenario:
    fields = {"method": "qlora", "precision": "bf16", "sequence_length": 64, "micro_batch": 2, **fields}
    versions = {"bitsandbytes": version}
    return Scenario.from_mapping(
        {"model": DECODERS["qwen2"], "gradient_checkpointing": False, "versions": versions, **fields}
    )


@pytest.mark.parametrize("version", ["0.42.0", "0.43.1"])
def test_a_step_is_traced_to_the_byte(version):
    asked = scenario(version)
    assert trace(asked, "cpu", timeline=False)["phases"] == measure(asked, "cpu", timeline=False)["phases"]


def test_inputs_live_as_long_as_the_graph_before_0_43_2():
    kept, freed, installed = (
        trace(scenario(version), timeline=False)["phases"] for version in ("0.43.1", "0.43.2", None)
    )
    assert freed == installed
    tokens, layers = 2 * 64, 2
    inputs = layers * tokens * (3 * 64 + 96) * 2  # of q, k and v together, o, gate and up together, down: the last 96
    assert kept["forward"] - freed["forward"] > 0.5 * inputs


def test_the_gradients_are_the_same():
    asked, found = scenario(None, precision="fp32"), []
    for version in ("0.43.1", None):
        with layers_of(version):
            model = build_model(asked, "cpu")
            loss = forward_backward(model, random_batch(asked, "cpu", asked.size("vocab_size")), asked)
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for old, new in zip(*found, strict=True):
        torch.testing.assert_close(old, new)


def test_what_is_no_version_is_refused():
    with pytest.raises(TraceError, match="'old' is no version"), layers_of("old"):
        pass
    with pytest.raises(UserError, match="is no version"):
        scenario("old")
    with pytest.raises(UserError, match="only 4-bit layers differ"):
        scenario("0.42.0", method="lora")
    (problem,) = contradictions(scenario("0.42.0"), "training", TRAINING, {"on_out_of_memory": "stop"})
    assert "is installed" in str(problem)
