"""Adapters whose factors are taken out of the base: saved for the base as it was, merged into it, resumed."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from dryfit.common.files import read_json
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from scripts.merging.merge import merge
from scripts.merging.verify import verify
from scripts.training import train_process
from scripts.training.initial_adapter import keep_start, start_folder
from scripts.training.train_process import save_adapter
from tests.unit.training.prepared import LOOP, STEP, save_model
from tests.unit.training.test_train_adapter import place, run, source  # noqa: F401

LORA = {"rank": 4, "alpha": 12}
DENSE = {key: value for key, value in STEP.items() if key != "quantization"} | {"method": "lora"}
TAKEN = {
    "pissa": {"initialization": "pissa", "rank_pattern": {"q_proj": 2}},
    "fast pissa, rslora": {"initialization": "pissa_niter_8", "rslora": True},
    "olora, alphas by pattern": {"initialization": "olora", "alpha_pattern": {"q_proj": 3}},
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("lora", TAKEN.values(), ids=TAKEN)
def test_the_merge_is_peft_s_own_of_the_model_that_was_trained(tmp_path, lora):
    """PEFT merges the trained factors into what it left of the base; here they are merged into the whole base."""
    base = save_model(tmp_path / "base")
    step = {**DENSE, "lora": {**LORA, **lora}, "model": read_json(base / "config.json")}
    scenario = Scenario.from_mapping(step)
    model = build_model(scenario, "cpu", weights=base)
    before = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    left = model.get_submodule(f"base_model.model.{name}").base_layer.weight
    assert not torch.allclose(left, before[f"{name}.weight"], atol=1e-3)  # factors were taken out

    start = keep_start(model, scenario, tmp_path / "checkpoints" / "digest")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    save_adapter(model, tmp_path / "adapter", "Small", start=start)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)

    merge(base, tmp_path / "adapter", tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    theirs = dict(model.merge_and_unload().named_parameters())
    for tensor, value in ours.items():
        torch.testing.assert_close(value, theirs[tensor], rtol=1e-4, atol=1e-5)
    changed = [tensor for tensor in ours if not torch.equal(ours[tensor], before[tensor])]
    assert len(changed) == 2 * 7
    report = verify(base, tmp_path / "adapter", tmp_path / "merged", layers=14)
    assert report["passed"] and len(report["checks"]["layers"]["layers"]) == 14


@pytest.mark.parametrize(
    ("step", "lora"),
    [
        (STEP, {"initialization": "olora"}),
        (DENSE, {"initialization": "pissa"}),
        (STEP, {"dora": True, "rslora": True}),
        (STEP, {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}),
        (DENSE, {"initialization": "mica"}),
    ],
    ids=["olora", "pissa", "dora", "modules_to_save", "mica"],
)
def test_each_adapter_is_trained_and_merged(place, tmp_path, step, lora):  # noqa: F811
    report = run(place, {**step, "lora": {**LORA, **lora}})
    assert report["validation_loss"] < report["first_loss"]
    assert not list((place["run"] / "checkpoints").iterdir())
    adapter = place["run"] / "adapter"
    merge(place["base"], adapter, tmp_path / "merged")
    assert verify(place["base"], adapter, tmp_path / "merged")["passed"]


def test_a_killed_training_goes_on_with_the_factors_it_began_with(place, monkeypatch):  # noqa: F811
    step = {**DENSE, "lora": {**LORA, "initialization": "pissa"}}
    whole = run(place, step)
    adapter = place["run"] / "adapter" / "adapter_model.safetensors"
    expected = load_file(adapter)
    for folder in (place["run"] / "kept").iterdir():
        folder.rename(place["run"] / "elsewhere")
    with monkeypatch.context() as killed:
        killed.setattr(train_process, "save_adapter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(place, step)
    report = run(place, step)
    assert report["resumed_from_step"] == LOOP["max_steps"]
    assert report["final_loss"] == whole["final_loss"]
    found = load_file(adapter)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_checkpoint_of_other_factors_is_dropped(tmp_path, caplog):
    base = save_model(tmp_path / "base")
    checkpoint = tmp_path / "checkpoints" / "digest"
    step = {**DENSE, "model": read_json(base / "config.json")}

    def kept(lora):
        scenario = Scenario.from_mapping({**step, "lora": {**LORA, **lora}})
        return keep_start(build_model(scenario, "cpu", weights=base), scenario, checkpoint)

    assert kept({}) is None and not start_folder(checkpoint).exists()
    assert kept({"initialization": "pissa"}) == start_folder(checkpoint)
    checkpoint.mkdir()
    kept({"initialization": "pissa"})
    assert checkpoint.is_dir()
    kept({"initialization": "olora"})
    assert not checkpoint.exists()
