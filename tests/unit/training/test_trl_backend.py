"""TRL's SFTTrainer behind the same rule: the same losses on the same rows, the same files."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from dryfit.common.files import read_json, read_jsonl
from scripts.merging.merge import merge
from scripts.merging.verify import verify
from scripts.training import train_process
from tests.unit.training.prepared import LOOP, STEP
from tests.unit.training.test_train_adapter import place, run, source  # noqa: F401

pytest.importorskip("trl")

TRL = {**LOOP, "backend": "trl", "epochs": 2, "max_steps": None}
OURS = {**TRL, "backend": "ours"}
PADDED = {**STEP, "micro_batch": 2, "gradient_accumulation": 2, "attention_mask": "padding"}
PADDED |= {"loss": "chunked"}
DENSE = {**PADDED, "method": "lora"}
QUANTIZED = {**PADDED, "adapter_precision": "bf16"}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(place, step, loop):  # noqa: F811
    """The report, the curve and the adapter of a training in a folder of its own."""
    place = {**place, "run": place["run"].with_name(f"run-{loop['backend']}")}
    report = run(place, step, loop)
    curve = list(read_jsonl(place["run"] / "training.jsonl"))
    return report, curve, load_file(place["run"] / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("step", "tolerance"),
    [
        (DENSE, 1e-5),
        ({**DENSE, "gradient_checkpointing": True}, 1e-5),
        ({**DENSE, "lora": {**STEP["lora"], "dora": True}}, 1e-5),
        (QUANTIZED, 2e-3),
        ({**DENSE, "precision": "bf16", "autocast": "bf16"}, 2e-2),
    ],
    ids=["fp32", "checkpointed", "dora", "nf4", "autocast"],
)
def test_both_backends_give_the_same_loss_on_the_same_rows(place, step, tolerance):  # noqa: F811
    ours, curve, adapter = trained(place, step, OURS)
    theirs, their_curve, their_adapter = trained(place, step, TRL)
    assert ours["steps"] == theirs["steps"] == len(curve) == len(their_curve) == 10
    for one, other in zip(curve, their_curve, strict=True):
        assert one.keys() == other.keys()
        for name in ("step", "rows", "tokens", "computed_tokens", "learning_rate", "micro_batch"):
            assert one[name] == other[name], name
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=20 * tolerance)
    assert theirs["validation_loss"] == pytest.approx(ours["validation_loss"], rel=tolerance)
    assert ours.keys() == theirs.keys() and ours["token_shares"] == theirs["token_shares"]
    assert adapter.keys() == their_adapter.keys()
    if tolerance == 1e-5:
        for name, tensor in adapter.items():
            torch.testing.assert_close(their_adapter[name], tensor, rtol=1e-2, atol=1e-4)


def test_a_step_of_fewer_rows_ends_an_epoch(place):  # noqa: F811
    """20 rows in steps of 8: two whole ones and one of 4."""
    _, curve, _ = trained(place, {**DENSE, "micro_batch": 4}, TRL)
    assert [row["rows"] for row in curve] == [8, 8, 4, 8, 8, 4]
    _, ours, _ = trained(place, {**DENSE, "micro_batch": 4}, OURS)
    assert sorted(row["rows"] for row in ours) == sorted(row["rows"] for row in curve)


def test_a_limit_of_steps_ends_within_an_epoch(place):  # noqa: F811
    report, curve, _ = trained(place, DENSE, {**TRL, "max_steps": 7})
    assert report["steps"] == len(curve) == 7


def test_what_it_wrote_is_merged(place, tmp_path):  # noqa: F811
    run(place, QUANTIZED, TRL)
    adapter = place["run"] / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    description = read_json(place["base"] / "description.json")
    assert config["base_model_name_or_path"] == train_process.base_name(description)
    merge(place["base"], adapter, tmp_path / "merged")
    assert verify(place["base"], adapter, tmp_path / "merged")["passed"]
    assert not list((place["run"] / "checkpoints").iterdir())


@pytest.mark.parametrize("killed_after", [4, 10])
def test_a_killed_training_goes_on_from_trl_s_checkpoint(place, monkeypatch, killed_after):  # noqa: F811
    _, curve, adapter = trained(place, DENSE, TRL)
    place = {**place, "run": place["run"].with_name("killed")}
    real = train_process.Trackers.report

    def fails(self, step, figures):
        real(self, step, figures)
        if step == killed_after + 1:
            raise ZeroDivisionError

    with monkeypatch.context() as killed:
        if killed_after == 10:
            killed.setattr(train_process, "save_adapter", lambda *_: 1 / 0)
        else:
            killed.setattr(train_process.Trackers, "report", fails)
        with pytest.raises(ZeroDivisionError):
            run(place, DENSE, TRL)
    report = run(place, DENSE, TRL)
    assert report["resumed_from_step"] == killed_after
    again = list(read_jsonl(place["run"] / "training.jsonl"))
    assert [row["step"] for row in again] == [row["step"] for row in curve]
    for one, other in zip(curve, again, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    found = load_file(place["run"] / "adapter" / "adapter_model.safetensors")
    for name, tensor in adapter.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_training_stops_early_and_keeps_the_best(place):  # noqa: F811
    loop = {**TRL, "learning_rate": 5.0, "validate_every_steps": 1, "early_stopping_patience": 2}
    report, curve, _ = trained(place, DENSE, {**loop, "keep": "best"})
    assert len(curve) < 10
    losses = [row["validation_loss"] for row in curve]
    assert report["validation_loss"] == min(losses)
