"""Activations in the host's memory: the same numbers, and what a device then holds, to the byte."""

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step import step as step_module
from dryfit.step.model import build_model
from dryfit.step.step import forward_backward, random_batch
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

DEEP = {**DECODERS["qwen2"], "num_hidden_layers": 6}


def scenario(**fields) -> Scenario:
    fields = {
        "model": DECODERS["qwen2"],
        "method": "lora",
        "precision": "bf16",
        "sequence_length": 64,
        **fields,
    }
    return Scenario.from_mapping(fields)


class Elsewhere:
    """A host whose memory is not the CPU's: NumPy's, which no tracker counts; for tensors on `meta` their shape."""

    def __init__(self, pin_memory: bool = False) -> None:
        del pin_memory

    def pack_hook(self, tensor):
        form = (tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.is_meta:
            return None, form
        whole = 1 + sum(
            (count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        return tensor.as_strided((whole,), (1,)).view(torch.uint8).numpy().copy(), form

    def unpack_hook(self, packed):
        held, (shape, stride, dtype) = packed
        made = torch.empty_strided(
            shape, stride, dtype=dtype, device="meta" if held is None else "cpu"
        )
        if held is not None:
            with torch._C._DisableTorchDispatch():
                flat = torch.from_numpy(held).view(dtype)
                made.as_strided((flat.numel(),), (1,)).copy_(flat)
        return made


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "loss, checkpointing",
    [("full", False), ("full", True), ("full", "reentrant"), ("chunked", True)],
)
def test_what_a_device_then_holds_is_predicted_to_the_byte(loss, checkpointing, monkeypatch):
    monkeypatch.setattr(step_module, "save_on_cpu", Elsewhere)
    fields = {"loss": loss, "gradient_checkpointing": checkpointing, "model": DEEP}
    asked, plain = scenario(activation_offload=True, **fields), scenario(**fields)
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    assert predicted["phases"] == measured["phases"]
    assert predicted["phases"]["forward"] < trace(plain, "cpu", timeline=False)["phases"]["forward"]


@pytest.mark.thorough
def test_a_gpu_holds_what_is_used_and_no_copy_of_a_weight():
    short, long = (
        trace(
            scenario(activation_offload=True, gradient_checkpointing=False, model=model),
            timeline=False,
        )
        for model in (DECODERS["qwen2"], DEEP)
    )
    assert short["components"].get("activations") == long["components"].get("activations")
    assert "the time leaves out the copies of activations" in " ".join(short["notes"])


def test_gradients_are_the_same():
    found = []
    for waits in (False, True):
        asked = scenario(activation_offload=waits, precision="fp32")
        model = build_model(asked, "cpu")
        batch = random_batch(asked, "cpu", asked.size("vocab_size"))
        loss = forward_backward(model, batch, asked)
        found.append(
            [loss, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]
        )
    for plain, waited in zip(*found, strict=True):
        assert torch.equal(plain, waited)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_divided_models_are_refused(strategy):
    with pytest.raises(UserError, match="activation_offload: false"):
        scenario(activation_offload=True, parallel={"strategy": strategy, "gpus": 2})
