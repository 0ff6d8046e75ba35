"""Each optimizer's step: what is predicted is what a CPU measures, to the byte; states survive a checkpoint."""

import pytest
import torch

from scripts.memory.measure import measure
from scripts.memory.trace import trace
from scripts.settings.fields import BY_NAME
from scripts.settings.scenario import Scenario
from scripts.training.model import build_model
from scripts.training.optimizers import build_optimizer
from scripts.training.step import random_step
from tests.unit.decoders import DECODERS

ON_A_CPU = [name for name in BY_NAME["optimizer"].words if not name.startswith("paged")]


def scenario(**fields) -> Scenario:
    fields = {"model": DECODERS["qwen2"], "method": "full", "precision": "bf16", "sequence_length": 32, **fields}
    return Scenario.from_mapping(fields)


@pytest.mark.parametrize("optimizer", ON_A_CPU)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_is_traced_to_the_byte(method, optimizer):
    asked = scenario(method=method, optimizer=optimizer)
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    assert predicted["phases"] == measured["phases"]
    assert predicted["components"] == measured["components"]


def test_lion_and_adafactor_keep_less_than_adam():
    states = {
        optimizer: trace(scenario(optimizer=optimizer), timeline=False)["components"]["optimizer_states"]
        for optimizer in ("adamw", "adamw_8bit", "lion_8bit", "adafactor", "muon")
    }
    assert states["adafactor"] < states["muon"] < states["adamw"]
    assert states["lion_8bit"] < states["adamw_8bit"] < states["adamw"]


def test_muon_takes_the_matrices_of_layers_and_its_states_survive():
    asked = scenario(optimizer="muon", precision="fp32")

    def two_steps(after_one) -> list[torch.Tensor]:
        model = build_model(asked, "cpu")
        optimizer = build_optimizer(model, asked, learning_rate=1e-2)
        step = random_step(model, optimizer, asked, "cpu", max_grad_norm=None)
        step()
        optimizer = after_one(model, optimizer)
        random_step(model, optimizer, asked, "cpu", max_grad_norm=None)()
        return [parameter.detach() for parameter in model.parameters()]

    def restored(model, optimizer):
        new = build_optimizer(model, asked, learning_rate=1e-2)
        new.load_state_dict(optimizer.state_dict())
        return new

    def checked(model, optimizer):
        kinds = {name: set(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
        muon = {name for name, states in kinds.items() if states == {"momentum_buffer"}}
        assert muon == {name for name in kinds if "_proj.weight" in name}
        return optimizer

    for left, right in zip(two_steps(checked), two_steps(restored), strict=True):
        assert torch.equal(left, right)
