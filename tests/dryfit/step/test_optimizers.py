"""Each optimizer's step: what is predicted is what a CPU measures, to the byte; states survive a checkpoint."""

from importlib.util import find_spec

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.scenario.fields import BY_NAME
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from dryfit.step.optimizers import BUILDERS, PROJECTED_EVERY, build_optimizer
from dryfit.step.step import random_step
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS


def known(optimizer):
    """An optimizer, skipped where its package is not installed."""
    package = OPTIMIZERS[optimizer].package
    missing = package is not None and find_spec(package) is None
    return pytest.param(
        optimizer, marks=pytest.mark.skipif(missing, reason="`make test-optimizers` runs it")
    )


ON_A_CPU = [known(name) for name in BY_NAME["optimizer"].words if not name.startswith("paged")]


def test_each_optimizer_has_a_builder_and_apollo_is_refused():
    assert list(BUILDERS) == list(OPTIMIZERS)
    with pytest.raises(UserError, match="optimizer"):
        scenario(optimizer="apollo")


def scenario(**fields) -> Scenario:
    fields = {
        "model": DECODERS["qwen2"],
        "method": "full",
        "precision": "bf16",
        "sequence_length": 32,
        **fields,
    }
    return Scenario.from_mapping(fields)


@pytest.mark.few(4)
@pytest.mark.parametrize("optimizer", ON_A_CPU)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_is_traced_to_the_byte(method, optimizer):
    asked = scenario(method=method, optimizer=optimizer)
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    assert predicted["phases"] == measured["phases"]
    assert predicted["components"] == measured["components"]


@pytest.mark.thorough
def test_lion_and_adafactor_keep_less_than_adam():
    states = {
        optimizer: trace(scenario(optimizer=optimizer), timeline=False)["components"][
            "optimizer_states"
        ]
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
        kinds = {
            name: set(optimizer.state[parameter]) for name, parameter in model.named_parameters()
        }
        muon = {name for name, states in kinds.items() if states == {"momentum_buffer"}}
        assert muon == {name for name in kinds if "_proj.weight" in name}
        return optimizer

    for left, right in zip(two_steps(checked), two_steps(restored), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("optimizer", [known("adamw_torchao_8bit"), known("adamw_torchao_4bit")])
def test_a_compiled_step_is_counted_as_one_kernel_on_a_gpu(optimizer):
    asked = scenario(optimizer=optimizer)
    states, plain = (
        trace(asked, timeline=False),
        trace(scenario(optimizer="adamw_fused"), timeline=False),
    )
    assert states["components"]["optimizer_states"] < plain["components"]["optimizer_states"]
    held, least = (
        found["components_by_phase"]["optimizer"].get("temporaries", 0) for found in (states, plain)
    )
    assert held == least
    assert any("single_param_adam is compiled" in text for text in states["warnings"])


@pytest.mark.few(1)
@pytest.mark.parametrize("optimizer", [known(name) for name, one in OPTIMIZERS.items() if one.bits])
def test_the_bytes_of_a_state_are_those_of_the_trace(optimizer):
    wide = DECODERS["qwen2"] | {"hidden_size": 512, "intermediate_size": 1024}
    found = trace(scenario(model=wide, optimizer=optimizer), timeline=False)
    per_number = found["components"].get("optimizer_states", 0) / found["trainable_parameters"]
    assert optimizer.startswith("paged") or per_number == pytest.approx(
        OPTIMIZERS[optimizer].state_bytes(2), rel=0.05
    )


@pytest.mark.parametrize("optimizer", [known("galore")])
def test_galore_projects_in_each_predicted_step_and_seldom_in_training(optimizer):
    asked = scenario(optimizer=optimizer)
    model = build_model(asked, "meta")
    gaps = [
        build_optimizer(model, asked, largest_steps=largest).param_groups[0]["update_proj_gap"]
        for largest in (True, False)
    ]
    assert gaps == [1, PROJECTED_EVERY]
    assert "cuSOLVER" in " ".join(trace(asked, timeline=False)["notes"])


@pytest.mark.parametrize("optimizer", [name for name, one in OPTIMIZERS.items() if one.package])
def test_without_its_package_an_optimizer_says_what_to_install(optimizer, monkeypatch):
    monkeypatch.setattr("dryfit.scenario.scenario.find_spec", lambda name: None)
    for answer in (trace, lambda asked: measure(asked, "cpu")):
        with pytest.raises(
            UserError,
            match=f"optimizer: {optimizer}. needs the package {OPTIMIZERS[optimizer].package}",
        ) as caught:
            answer(scenario(optimizer=optimizer))
        assert caught.value.write == 'pip install "dryfit[optimizers]"'
