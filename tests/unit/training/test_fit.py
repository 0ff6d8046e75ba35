"""The loop on a small real model: it learns, accumulation changes nothing, a killed run ends like one that was not."""

import json

import pytest
import torch

from scripts.scenario.scenario import Scenario
from scripts.training import train
from scripts.training.batches import IGNORED, Row
from scripts.training.model import build_model, build_optimizer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LOOP = {"epochs": 2, "max_steps": None, "learning_rate": 0.02, "warmup_ratio": 0.1, "max_grad_norm": 1.0}


def scenario(**differences):
    return Scenario.from_mapping(
        {
            "model": LLAMA,
            "method": "qlora",
            "precision": "fp32",
            "sequence_length": 16,
            "micro_batch": 4,
            "gradient_checkpointing": False,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"},
            **differences,
        }
    )


def rows(count=40):
    """A prompt of two tokens, and an answer that follows from it."""
    pairs = [(3 + n % 20, 30 + n % 3) for n in range(count)]
    return [Row([a, b, (a + b) % 60, 2], [IGNORED, IGNORED, (a + b) % 60, 2]) for a, b in pairs]


def fit(tmp_path, step=None, loop=LOOP, save_every=3, stop_after=None):
    """Train from the same start; returns the adapter, the curve and the step it was resumed from."""
    step = step or scenario()
    torch.use_deterministic_algorithms(True)
    model = build_model(step, "cpu", seed=0)
    optimizer = build_optimizer(model, step, learning_rate=loop["learning_rate"])
    if stop_after is not None:
        taken = 0
        update = optimizer.step

        def killed_step(*args, **kwargs):
            nonlocal taken
            if taken == stop_after:
                raise KeyboardInterrupt
            taken += 1
            return update(*args, **kwargs)

        optimizer.step = killed_step
    checkpoint = train.Checkpoint(tmp_path / "checkpoint")
    settings = {**loop, "save_every_steps": save_every}
    curve, start = train.fit(model, optimizer, rows(), step, settings, 7, 0, checkpoint)
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return adapter, curve, start


def test_it_learns(tmp_path):
    _, curve, start = fit(tmp_path)
    assert start == 0 and len(curve) == 20
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert curve[0]["learned_tokens"] == 8 and curve[0]["tokens"] == 16


def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    whole, whole_curve, _ = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_after=8)
    adapter, curve, start = fit(tmp_path / "killed")
    assert start == 6  # the last multiple of save_every_steps
    assert curve == whole_curve
    assert all(torch.equal(adapter[name], whole[name]) for name in whole)


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop_after=2)
    assert not (tmp_path / "checkpoint").exists()


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path):
    one_step = {**LOOP, "max_steps": 1}
    together, curve, _ = fit(tmp_path / "a", scenario(micro_batch=8), one_step)
    apart, other_curve, _ = fit(tmp_path / "b", scenario(micro_batch=2, gradient_accumulation=4), one_step)
    assert curve[0]["loss"] == pytest.approx(other_curve[0]["loss"], rel=1e-5)
    assert curve[0]["gradient_norm"] == pytest.approx(other_curve[0]["gradient_norm"], rel=1e-4)
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-3, atol=1e-5)


def test_the_adapter_is_saved_with_the_same_bytes_every_time(tmp_path):
    step = scenario()
    texts = set()
    for attempt in ("a", "b"):
        train.save_adapter(build_model(step, "cpu", seed=0), tmp_path / attempt, "base/model")
        texts.add((tmp_path / attempt / "adapter_config.json").read_text())
        assert sorted(path.name for path in (tmp_path / attempt).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    assert len(texts) == 1
    config = json.loads(texts.pop())
    assert config["base_model_name_or_path"] == "base/model" and config["r"] == 4
    assert config["target_modules"] == sorted(config["target_modules"])
    first, second = ((tmp_path / attempt / "adapter_model.safetensors").read_bytes() for attempt in ("a", "b"))
    assert first == second


def test_validation_loss_is_the_mean_over_answer_tokens(tmp_path):
    model = build_model(scenario(), "cpu", seed=0)
    loss = train.validation_loss(model, rows(10), 4, 0)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
            for row in rows(10)
        ]
    assert loss == pytest.approx(sum(expected) / 10, rel=1e-4)  # every row has two answer tokens
    assert model.training
