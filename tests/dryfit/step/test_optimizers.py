"""Each optimizer's step: what is predicted is what a CPU measures, to the byte; states survive a checkpoint."""

from importlib.util import find_spec

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.scenario.fields import BY_NAME
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from dryfit.step.optimizers import (
    BUILDERS,
    MOMENTS,
    PROJECTED_EVERY,
    AdamWWithFp32States,
    build_optimizer,
)
from dryfit.step.step import forward_backward, random_batch, random_step
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


WIDER = {"optimizer": "adamw", "optimizer_state_precision": "fp32"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_weights_with_fp32_states_are_traced_to_the_byte(precision):
    asked = scenario(precision=precision, **WIDER)
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    for field in ("phases", "components", "peak_allocated_bytes", "resident_bytes"):
        assert predicted[field] == measured[field], field


def test_the_tensors_of_a_step_with_fp32_states_are_those_of_the_trace():
    """Weights, gradients and states of a real step, counted one by one."""
    asked = scenario(**WIDER)
    model = build_model(asked, "cpu")
    optimizer = build_optimizer(model, asked)
    random_step(model, optimizer, asked, "cpu", max_grad_norm=None)()
    batch = random_batch(asked, "cpu", model.config.vocab_size)
    forward_backward(model, batch, asked)
    parameters = list(model.parameters())
    states = [optimizer.state[parameter][name] for parameter in parameters for name in MOMENTS]
    counted = {
        "weights_bf16": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.grad.nbytes for parameter in parameters),
        "optimizer_states": sum(state.nbytes for state in states),
    }
    assert {state.dtype for state in states} == {torch.float32}
    assert {parameter.grad.dtype for parameter in parameters} == {torch.bfloat16}
    found = trace(asked, "cpu", timeline=False)["components_by_phase"]["optimizer"]
    assert counted == {name: found[name] for name in counted}
    largest = max(parameter.numel() for parameter in parameters)
    norm = 2  # bytes of the gradients' norm, in bf16
    assert found["temporaries"] == 4 * largest + norm  # one tensor at a time, in fp32


def test_fp32_states_step_as_pytorchs_adamw():
    """In fp32 the two are the same; 16-bit weights are those of an fp32 step, rounded."""
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    settings = {"lr": 1e-2, "weight_decay": 0.1}

    def stepped(kind, dtype) -> torch.Tensor:
        parameter = torch.nn.Parameter(start.to(dtype))
        optimizer = kind([parameter], **settings)
        for gradient in gradients:
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        return parameter.detach()

    wide = stepped(torch.optim.AdamW, torch.float32)
    torch.testing.assert_close(stepped(AdamWWithFp32States, torch.float32), wide)
    half = stepped(AdamWWithFp32States, torch.bfloat16)
    torch.testing.assert_close(half.float(), wide, rtol=2**-7, atol=2**-7)


def test_fp32_states_come_back_from_a_checkpoint_as_they_were():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamWWithFp32States([parameter], lr=1e-2)
    parameter.grad = torch.linspace(0.1, 1.0, 4).bfloat16()
    optimizer.step()
    restored = AdamWWithFp32States([parameter], lr=1e-2)
    restored.load_state_dict(optimizer.state_dict())
    for name in MOMENTS:
        assert torch.equal(restored.state[parameter][name], optimizer.state[parameter][name])
    assert restored.state[parameter]["step"] == 1


@pytest.mark.parametrize("fields", [{"precision": "fp32"}, {"method": "qlora"}])
def test_where_fp32_is_trained_the_states_are_fp32_anyway(fields):
    told, untold = (
        trace(scenario(**fields, **more), timeline=False)
        for more in ({"optimizer_state_precision": "fp32"}, {})
    )
    assert told["peak_allocated_bytes"] == untold["peak_allocated_bytes"]
    assert told["components"] == untold["components"]


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_fp32_states_are_divided_as_what_is_trained(strategy):
    asked = scenario(**WIDER, parallel={"strategy": strategy, "gpus": 2})
    plain = scenario(optimizer="adamw", parallel={"strategy": strategy, "gpus": 2})
    wide, narrow = (
        trace(one, timeline=False)["components_by_phase"]["optimizer"]["optimizer_states"]
        for one in (asked, plain)
    )
    assert wide == pytest.approx(2 * narrow, rel=0.02)


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
