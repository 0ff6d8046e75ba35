"""The rule from end to end on a small model: what it keeps, what it notices, what it refuses."""

import json

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from scripts.training import train
from scripts.training import train_process as worker
from tests.unit.training.prepared import LOOP, STEP, describe, encode, save_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("source"))


@pytest.fixture
def place(tmp_path, source):
    """Everything that the rule reads, in a folder of its own."""
    return {
        "base": describe(source, tmp_path / "base"),
        "run": tmp_path / "run",
        **encode(tmp_path / "encoded"),
    }


def run(place, step=STEP, loop=LOOP, seed=0):
    """The rule; returns its report."""
    place["run"].mkdir(exist_ok=True)
    outputs = {
        "adapter": place["run"] / "adapter" / "adapter_model.safetensors",
        "report": place["run"] / "training.json",
        "curve": place["run"] / "training.jsonl",
    }
    for path in outputs.values():  # as Snakemake does before it runs a rule
        path.unlink(missing_ok=True)
    inputs = {name: place[name] for name in ("encoded", "train", "validation")}
    inputs["weights"] = str(place["base"] / "weights.json")
    train.main(place["base"], train.Settings(step, loop, seed, "code"), inputs, outputs, 1)
    return read_report(outputs["report"], outputs["adapter"], outputs["curve"])


@pytest.fixture
def steps(monkeypatch):
    """The steps that are taken, one entry each."""
    from dryfit.step import step as step_module

    real, taken = step_module.optimizer_step, []
    monkeypatch.setattr(
        step_module,
        "optimizer_step",
        lambda *args, **kwargs: taken.append(1) or real(*args, **kwargs),
    )
    return taken


def test_the_report_says_what_was_computed_and_vouches_for_the_adapter(place):
    report = run(place)
    shares = report["token_shares"]
    assert sum(part["count"] for part in shares.values()) == report["computed_tokens"]
    assert sum(part["share"] for part in shares.values()) == pytest.approx(1)
    assert shares["answers"]["count"] == report["answer_tokens"]
    assert shares["prefix"]["count"] == report["packing"]["prefix_tokens"] * 16 > 0
    assert set(report["sha256"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
        "training.jsonl",
    }
    assert report["packing"]["exactness"] is None


def test_a_base_of_eight_bits_is_trained_like_one_of_four(place):
    packed = {
        **STEP,
        "packing": "shared_prefix",
        "micro_batch": 1,
        "sequence_length": 256,
        "gradient_accumulation": 2,
    }
    report = run(place, {**packed, "quantization": {"type": "int8"}}, {**LOOP, "rows_per_step": 4})
    assert report["quantized"]["linear_8bit_layers"] == 2 * 7
    assert report["validation_loss"] < report["first_loss"]
    assert report["packing"]["exactness"]["loss_difference"] < 1e-5


def test_packs_share_the_prefix_and_compute_less(place):
    packed = {
        **STEP,
        "packing": "shared_prefix",
        "micro_batch": 1,
        "sequence_length": 256,
        "gradient_accumulation": 2,
    }
    alone, report = run(place), run(place, packed, {**LOOP, "rows_per_step": 4})
    assert report["steps"] == alone["steps"]
    assert report["computed_tokens"] < 0.8 * alone["computed_tokens"]
    assert report["token_shares"]["padding"]["count"] == 0
    assert report["packing"]["exactness"]["loss_difference"] < 1e-5
    assert report["validation_loss"] < report["first_loss"]


def test_what_fails_after_the_last_step_costs_no_step(place, steps, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(worker, "save_adapter", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(place)
    assert len(steps) == 4
    report = run(place)
    assert len(steps) == 4 and report["resumed_from_step"] == 4
    assert not list((place["run"] / "checkpoints").iterdir())


def test_a_finished_training_comes_back_when_its_settings_do(place, steps):
    first = run(place)
    adapter = (place["run"] / "adapter" / "adapter_model.safetensors").read_bytes()
    other = run(place, seed=1)
    assert len(steps) == 8 and other["sha256"] != first["sha256"]
    assert run(place) == first and len(steps) == 8
    assert (place["run"] / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    kept = sorted((place["run"] / "kept").glob("*/adapter_model.safetensors"))
    assert len(kept) == 2
    for path in kept:  # damaged: not used
        path.write_bytes(bytes(len(adapter)))
    again = run(place)
    assert (
        len(steps) == 12
        and again["sha256"]["adapter_model.safetensors"]
        == first["sha256"]["adapter_model.safetensors"]
    )


@pytest.mark.thorough
def test_what_is_kept_is_named_as_it_is_described_now(place, steps):
    """The same weights may come from elsewhere: that costs no step, and the old name does not come back."""
    first, description = run(place), place["base"] / "description.json"
    about = json.loads(description.read_text())
    source = {**about["source"], "path": "elsewhere/renamed"}
    write_report(description, {**about, "source": source})
    again = run(place)
    assert len(steps) == 4 and again["final_loss"] == first["final_loss"]
    assert again["base"] == {"source": source}
    adapter = json.loads((place["run"] / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "renamed"


def spoil(path):
    """Some bytes in the middle become zeros."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("base/model.safetensors", ["base/model.safetensors", "base.json"]),
        ("base/tokenizer.json", ["base/tokenizer.json", "base.json"]),
        ("base/config.json", ["base/config.json", "base.json"]),
        ("base/chat_template.jinja", ["base/chat_template.jinja", "base.json"]),
        ("encoded/train.parquet", ["encoded/train.parquet"]),
        ("encoded/validation.parquet", ["encoded/validation.parquet"]),
    ],
)
def test_a_damaged_input_is_noticed_and_named(place, tmp_path, steps, file, named):
    path = tmp_path / file
    path.write_bytes(path.read_bytes())  # the source's weights are linked
    inode = path.read_bytes()
    path.unlink()
    path.write_bytes(inode)
    spoil(path)
    with pytest.raises(UserError, match="not what the step that made it has written") as error:
        run(place)
    assert all(f"{tmp_path / name}" in error.value.write for name in named) and not steps


@pytest.mark.few(1)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_an_error_before_the_first_step(place, tmp_path, steps, split):
    place |= encode(tmp_path / "encoded", **{split: 0})
    with pytest.raises(UserError, match=f"The {split} split has no rows"):
        run(place)
    assert not steps


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "rows"), [({"micro_batch": 8}, None), ({"packing": "shared_prefix"}, 8)]
)
def test_fewer_rows_than_a_step_make_one_step(place, tmp_path, step, rows):
    place |= encode(tmp_path / "encoded", train=3)
    report = run(place, {**STEP, **step}, {**LOOP, "rows_per_step": rows})
    assert (report["steps"], report["train_rows"]) == (1, 3)


def test_rows_that_teach_nothing_are_an_error(place, tmp_path, steps):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dryfit.common.files import write_report
    from dryfit.step.batches import IGNORED

    table = pq.read_table(place["train"])
    masked = pa.array(
        [[IGNORED] * len(row) for row in table["labels"].to_pylist()], table["labels"].type
    )
    pq.write_table(table.set_column(1, "labels", masked), place["train"])
    write_report(place["encoded"], {}, place["train"], place["validation"])
    with pytest.raises(UserError, match="20 rows of the train split have no token to learn"):
        run(place)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("step", "loop", "write"),
    [
        ({"packing": "rows"}, {}, "rows_per_step: 16"),
        ({}, {"rows_per_step": 3}, "rows_per_step: null"),
        ({"packing": "rows", "micro_batch": 1}, {"rows_per_step": 16}, "gradient_accumulation: "),
        ({"packing": "rows", "sequence_length": 16}, {"rows_per_step": 4}, "sequence_length: "),
    ],
)
def test_settings_that_contradict_each_other_stop_at_the_start(place, steps, step, loop, write):
    with pytest.raises(UserError) as error:
        run(place, {**STEP, **step}, {**LOOP, **loop})
    assert write in error.value.write and not steps


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_stops_at_the_start_and_loses_nothing(place, steps):
    first = run(place)
    with pytest.raises(UserError, match="device: auto"):
        run(place, loop={**LOOP, "device": "cuda"})
    assert run(place) == first and len(steps) == 4


@pytest.mark.thorough
def test_the_report_holds_no_time_in_what_is_kept_apart(place):
    """Two runs of the same settings differ in times alone."""
    first = run(place)
    for folder in (place["run"] / "kept").iterdir():
        folder.rename(place["run"] / "elsewhere")
    second = run(place)
    for report in (first, second):
        report.pop("times")
        report["sha256"].pop("training.json")
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def test_the_report_says_which_validation_the_adapter_is_of(place):
    watched = {**LOOP, "keep": "best", "validate_every_steps": 1, "validation_rows": 2}
    report = run(place, loop=watched)
    curve = [
        json.loads(line) for line in (place["run"] / "training.jsonl").read_text().splitlines()
    ]
    losses = {row["step"]: row["validation_loss"] for row in curve}
    assert report["validations"] == len(losses) == 4 and report["validation_rows"] == 2
    assert report["validation_loss"] == min(losses.values())
    assert losses[report["kept_step"] or 4] == min(losses.values())
    assert report["stopped_early"] is None
    assert report["times"]["validation_wall_seconds"] > 0
