"""Liger's fused loss, written out: the loss and gradients of the plain one, without its logits."""

import pytest
import torch
from torch.nn import functional

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.liger import IGNORED, fused_linear_cross_entropy, rotating
from dryfit.step.model import build_model
from dryfit.step.step import forward_backward, random_batch
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tokens", [1, 37, 200])
def test_loss_and_gradients_are_those_of_cross_entropy(tokens, softcap):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    target = torch.randint(50, (tokens,), generator=generator)
    target[1::3] = IGNORED
    results = []
    for fused in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss = fused_linear_cross_entropy(x, w, target, softcap)
        else:
            logits = x @ w.t()
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            loss = functional.cross_entropy(logits, target, ignore_index=IGNORED)
        (3 * loss).backward()
        results.append((loss.detach(), x.grad, w.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def scenario(**fields) -> Scenario:
    fields = {
        "method": "full",
        "precision": "fp32",
        "sequence_length": 96,
        "micro_batch": 2,
        **fields,
    }
    return Scenario.from_mapping({"model": DECODERS["qwen2"], **fields})


def test_a_step_learns_the_same_with_less_memory():
    asked = [scenario(loss=loss) for loss in ("full", "liger")]
    losses, grads = [], []
    for one in asked:
        model = build_model(one, "cpu")
        losses.append(forward_backward(model, random_batch(one, "cpu", 300), one))
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-3)
    wide = {**DECODERS["qwen2"], "vocab_size": 20_000}
    peaks = [
        trace(one.changed(model=wide, sequence_length=1024), timeline=False)["phases"]["backward"]
        for one in asked
    ]
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_ligers_kernels_compute_what_the_models_own_compute(family):
    losses, grads = [], []
    for kernels in ("transformers", "liger"):
        one = scenario(loss="liger", kernels=kernels, model=DECODERS[family])
        model = build_model(one, "cpu")
        with rotating(model):
            losses.append(forward_backward(model, random_batch(one, "cpu", 300), one))
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-3)


def test_what_liger_does_not_write_out_or_know_is_refused():
    with pytest.raises(UserError, match="need its package") as caught:
        build_model(scenario(loss="liger", kernels="liger", model=DECODERS["gemma2"]), "cpu")
    assert "smollm3" in caught.value.allowed and "dryfit[run]" in caught.value.write
    with pytest.raises(UserError, match="loss: chunked"):
        build_model(scenario(loss="liger", model=DECODERS["gpt2"]), "meta")
