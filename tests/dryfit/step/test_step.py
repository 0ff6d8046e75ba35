"""One step: transformers' own loss, the same in chunks; accumulation gives the whole batch's gradient."""

import pytest
import torch
from torch.nn import functional

from dryfit.scenario.scenario import Scenario
from dryfit.step import step as step_module
from dryfit.step.model import build_model
from dryfit.step.optimizers import build_optimizer
from dryfit.step.step import IGNORED, chunked_loss, forward_backward, optimizer_step, random_batch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
MODELS = {
    "qwen2": SIZES,
    "gemma2": {**SIZES, "head_dim": 8, "final_logit_softcapping": 5.0},  # caps its logits
    "cohere": {**SIZES, "eos_token_id": 1, "bos_token_id": 1},  # scales its logits
    "gpt2": {
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 1,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "vocab_size": 97,
    },
    "opt": {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "ffn_dim": 48,
        "hidden_size": 32,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "word_embed_proj_dim": 32,
    },
    "mixtral": {**SIZES, "num_experts_per_tok": 2, "num_local_experts": 4},
}


def scenario(model_type: str = "qwen2", **fields) -> Scenario:
    fields = {
        "method": "full",
        "precision": "fp32",
        "sequence_length": 24,
        "micro_batch": 3,
        **fields,
    }
    return Scenario.from_mapping(
        {"model": {"model_type": model_type, **MODELS[model_type]}, **fields}
    )


def batch_of(asked: Scenario, seed: int = 0) -> dict:
    """Rows of different lengths, padded on the right; the first half of each is the prompt."""
    batch = random_batch(asked, "cpu", 97, seed)
    for row in range(asked.micro_batch):
        length = asked.sequence_length - 5 * row
        batch["labels"][row, : length // 2] = IGNORED
        batch["labels"][row, length:] = IGNORED
        batch["input_ids"][row, length:] = 0
    return batch


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(first: dict, second: dict, tolerance: float = 1e-5) -> bool:
    scale = max(x.abs().max() for x in first.values())
    return first.keys() == second.keys() and all(
        (first[name] - second[name]).abs().max() <= tolerance * scale for name in first
    )


def test_loss_is_the_mean_over_answer_tokens():
    asked = scenario()
    model, batch = build_model(asked, "cpu"), batch_of(asked)
    loss = forward_backward(model, batch, asked)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    targets = batch["labels"][:, 1:]
    expected = functional.cross_entropy(
        logits.reshape(-1, 97), targets.reshape(-1), ignore_index=IGNORED
    )
    assert loss.shape == () and not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(loss, model(**batch).loss.detach())


@pytest.mark.few(6)
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("tokens", [7, 1000])
def test_chunked_loss_is_the_full_loss(model_type, tokens, monkeypatch):
    monkeypatch.setattr(step_module, "CHUNK_TOKENS", tokens)
    results = {}
    for kind in ("full", "chunked"):
        asked = scenario(model_type, loss=kind)
        model = build_model(asked, "cpu", seed=3)
        loss = forward_backward(model, batch_of(asked), asked)
        results[kind] = loss, gradients(model)
        assert all("forward" not in module.__dict__ for module in model.modules())
    torch.testing.assert_close(results["full"][0], results["chunked"][0])
    assert close(results["full"][1], results["chunked"][1])


def test_chunked_loss_under_adapters_and_without_gradients():
    asked = scenario(method="qlora", loss="chunked")
    model, batch = build_model(asked, "cpu"), batch_of(asked)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(model, batch), model(**batch).loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_right_needs_no_mask(attention):
    asked = scenario(attention=attention)
    batch = batch_of(asked)
    lengths = [asked.sequence_length - 5 * row for row in range(asked.micro_batch)]
    mask = torch.tensor([[int(i < n) for i in range(asked.sequence_length)] for n in lengths])
    without, masked = build_model(asked, "cpu"), build_model(asked, "cpu")
    first = forward_backward(without, batch, asked)
    second = forward_backward(masked, batch | {"attention_mask": mask}, asked)
    torch.testing.assert_close(first, second)
    assert close(gradients(without), gradients(masked))


def test_accumulated_shares_give_the_gradient_of_the_whole_batch():
    whole = scenario(micro_batch=3)
    batch = batch_of(whole)
    model = build_model(whole, "cpu")
    loss = forward_backward(model, batch, whole)
    parts = build_model(whole, "cpu")
    learned = (batch["labels"][:, 1:] != IGNORED).sum()
    total = 0.0
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        share = (one["labels"][:, 1:] != IGNORED).sum() / learned
        total += share * forward_backward(parts, one, whole, loss_scale=share)
    torch.testing.assert_close(total, loss)
    assert close(gradients(model), gradients(parts))


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_checkpointing_and_loop_change_memory_not_values(method):
    results = []
    for checkpointing, loop in ((False, "trainer"), (True, "trainer"), (True, "manual")):
        asked = scenario(method=method, gradient_checkpointing=checkpointing, loop=loop)
        model = build_model(asked, "cpu")
        loss = forward_backward(model, batch_of(asked), asked)
        results.append((loss, gradients(model)))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert close(results[0][1], grads, 1e-6)


def test_optimizer_step_clips_updates_and_drops_gradients():
    asked = scenario(method="qlora")
    model = build_model(asked, "cpu")
    optimizer = build_optimizer(model, asked, learning_rate=1e-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    forward_backward(model, batch_of(asked), asked)
    expected = torch.cat([p.grad.flatten() for p in trained]).norm()
    before = [p.detach().clone() for p in trained]
    norm = optimizer_step(model, optimizer, asked, max_grad_norm=1e-3)
    torch.testing.assert_close(norm, expected)
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    now = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(p, old) for p, old in zip(now, frozen, strict=True))
    forward_backward(model, batch_of(asked), asked)
    assert optimizer_step(model, optimizer, asked, max_grad_norm=None) is None


@pytest.mark.few(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused"])
def test_steps_are_the_same_bits_every_time(precision, optimizer):
    def train():
        asked = scenario(method="lora", precision=precision, optimizer=optimizer)
        model = build_model(asked, "cpu", seed=1)
        own = build_optimizer(model, asked, learning_rate=1e-2)
        losses = []
        for number in range(3):
            losses.append(forward_backward(model, batch_of(asked, number), asked))
            optimizer_step(model, own, asked, max_grad_norm=1.0)
        return torch.stack(losses), [
            p.detach().clone() for p in model.parameters() if p.requires_grad
        ]

    (first, weights), (second, again) = train(), train()
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@pytest.mark.thorough
def test_a_few_steps_learn():
    asked = scenario(
        method="qlora",
        lora={"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"},
    )
    model, batch = build_model(asked, "cpu"), batch_of(asked)
    optimizer = build_optimizer(model, asked, learning_rate=3e-2)
    losses = []
    for _ in range(15):
        losses.append(float(forward_backward(model, batch, asked)))
        optimizer_step(model, optimizer, asked, max_grad_norm=1.0)
    assert losses[-1] < losses[0] - 0.2


def test_random_batch_is_full_and_seeded():
    asked = scenario()
    batch = random_batch(asked, "cpu", 97, seed=5)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 24)
    assert torch.equal(batch["input_ids"], random_batch(asked, "cpu", 97, seed=5)["input_ids"])
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()
    assert random_batch(asked, "meta", 97)["labels"].device.type == "meta"
