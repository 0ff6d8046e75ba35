"""Where a training reports its curve: TensorBoard for real; the others by stand-ins that have their functions."""

import sys
from types import ModuleType

import pytest

from dryfit.common.errors import UserError
from scripts.common.machine import refuse_missing_trackers
from scripts.training import train
from scripts.training.tracking import Trackers
from tests.unit.training.prepared import LOOP, STEP, describe, encode, save_model


def test_what_is_not_installed_is_one_error_that_names_all_of_it(monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in ("wandb", "mlflow") else object()
    )
    refuse_missing_trackers(["tensorboard"])
    with pytest.raises(UserError, match="not installed: wandb, mlflow") as error:
        refuse_missing_trackers(["wandb", "tensorboard", "mlflow"])
    assert error.value.write == "pip install wandb mlflow"


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with recording functions in the place of a tracker; returns what they were called with."""
    calls = []

    def put(name, *functions, **broken):
        module = ModuleType(name)
        for function in functions:
            called = lambda *args, function=function, **named: calls.append((function, args, named))  # noqa: E731
            setattr(module, function, broken.get(function, called))
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("importlib.util.find_spec", lambda asked: object())
        return calls

    return put


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_begun_told_each_step_and_ended(tmp_path, stand_in, name):
    calls = stand_in(name, "init", "log", "finish")
    trackers = Trackers([name], tmp_path / "one-r4", {"seed": 1})
    trackers.report(1, {"loss": 2.0, "gradient_norm": None})
    trackers.end()
    (begun, _, named), (_, told, step), (ended, _, _) = calls
    assert (begun, named["name"], named["config"], ended) == (
        "init",
        "one-r4",
        {"seed": 1},
        "finish",
    )
    assert told == ({"loss": 2.0},) and step == {"step": 1}


def test_mlflow_gets_parameters_and_metrics(tmp_path, stand_in):
    calls = stand_in(
        "mlflow", "set_experiment", "start_run", "log_params", "log_metrics", "end_run"
    )
    trackers = Trackers(["mlflow"], tmp_path / "one-r4", {"lora": {"rank": 4}})
    trackers.report(3, {"loss": 2.0})
    trackers.end()
    assert [call[0] for call in calls] == [
        "set_experiment",
        "start_run",
        "log_params",
        "log_metrics",
        "end_run",
    ]
    assert calls[2][1] == ({"lora": "{'rank': 4}"},) and calls[3][1:] == (
        ({"loss": 2.0},),
        {"step": 3},
    )


def test_a_tracker_that_fails_ends_no_training_and_is_asked_once(tmp_path, stand_in, caplog):
    def unreachable(*args, **named):
        raise ConnectionError("nobody answers")

    calls = stand_in("wandb", "init", "log", "finish", log=unreachable)
    trackers = Trackers(["wandb"], tmp_path, {})
    for step in (1, 2):
        trackers.report(step, {"loss": 1.0})
    trackers.end()
    assert [call[0] for call in calls] == ["init"] and caplog.text.count(
        "takes no more of this training"
    ) == 1


def test_tensorboard_reads_the_curve_that_a_training_wrote(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    base, encoded = (
        describe(save_model(tmp_path / "source"), tmp_path / "base"),
        encode(tmp_path / "encoded"),
    )
    folder = tmp_path / "run"
    outputs = {
        "adapter": folder / "adapter" / "adapter_model.safetensors",
        "report": folder / "training.json",
    }
    outputs["curve"] = folder / "training.jsonl"
    inputs = {**encoded, "weights": str(base / "weights.json")}
    train.main(base, train.Settings(STEP, LOOP, 0, "code"), inputs, outputs, 1, ["tensorboard"])
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss", "learning_rate", "gradient_norm", "validation_loss"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert (
        "sequence_length"
        in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    )
