"""What a run writes is known before: within 1 % of the files, and a full disk is refused before any job."""

from pathlib import Path

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model, parameter_count
from dryfit.step.optimizers import build_optimizer
from dryfit.step.step import random_step
from scripts.common import disk
from scripts.common.resource_table import FITS, TOO_SMALL
from scripts.training.loop_state import LoopState, copied
from scripts.training.train_process import save_adapter
from scripts.training.validation import ValidationHistory
from tests.dryfit.decoders import DECODERS

# Large enough for tensors to outweigh their names.
MODEL = DECODERS["llama"] | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4000}
SIZES = disk.ParameterCounts(
    1_000_000_000,
    10_000_000,
    base_width=4,
    merged_width=4,
    adapter_width=4,
    optimizer="adamw",
    state_width=4,
)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    fields = {
        "model": MODEL,
        "method": "lora",
        "precision": "fp32",
        "lora": {"rank": 64},
        "sequence_length": 8,
    }
    scenario = Scenario.from_mapping(fields)
    model = build_model(scenario, "cpu")
    optimizer = build_optimizer(model, scenario, learning_rate=1e-4)
    random_step(model, optimizer, scenario, "cpu", max_grad_norm=1.0)()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = disk.ParameterCounts.of(
        scenario.to_mapping(), "float32", "float32", parameter_count(model), trainable
    )
    save_adapter(model, tmp_path / "adapter", "base")
    checkpoint = LoopState(tmp_path / "checkpoint")
    progress = ValidationHistory(best_step=1, best_loss=0.5, best_tensors=copied(model))
    checkpoint.save(1, model, optimizer, [], 1.0, progress=progress)
    model.unload().save_pretrained(tmp_path / "merged")
    found = disk.written(sizes)
    adapter, checkpoints = size(tmp_path / "adapter"), size(tmp_path / "checkpoint")
    assert found["training"] == pytest.approx((2 * adapter, 2 * checkpoints), rel=0.01)
    merged = found["merged model"][0] - disk.COMPANIONS_BYTES
    assert merged == pytest.approx(
        (tmp_path / "merged" / "model.safetensors").stat().st_size, rel=0.01
    )


def test_each_stage_is_set_against_what_the_others_leave() -> None:
    rows = {row.stage: row for row in disk.stages(SIZES, 9_000_000_000, exports=["q8_0"])}
    left = [row.has_bytes for row in rows.values()]
    assert left == sorted(left, reverse=True) and left[1] == 5_000_000_000
    assert (
        rows["training"].needs_bytes == 2 * 160_000_000
    )  # two checkpoints, each of weights, the best ones so far and two states
    assert rows["export"].needs_bytes == 1_062_500_000
    assert [row.verdict for row in rows.values()] == [FITS, FITS, FITS, FITS, TOO_SMALL]
    small = {row.stage: row for row in disk.stages(SIZES, 3_000_000_000, there=["base model"])}
    assert small["base model"].needs_bytes == 0
    assert small["merged model"].change == "merging: {dtype: bfloat16}"


def test_a_full_disk_is_refused_before_any_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A results folder on a disk with 100 MB left; the boundary is the system's own answer."""
    real = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: real._replace(free=100_000_000))
    planned = [
        disk.Planned("tiny-r4", SIZES, ["training", "merged model"]),
        disk.Planned("tiny-r8", SIZES, ["training"]),
    ]
    with pytest.raises(UserError) as caught:
        disk.refuse_full(planned, tmp_path / "results")
    assert "0.09 GiB free" in caught.value.found
    # 80 MB of the first run's adapters, 4 GB merged, then the checkpoints of the second: of that 0.1 GB are there.
    assert caught.value.allowed.startswith("4.01 GiB more")
    assert "merged model of tiny-r4" in str(caught.value) and "no job was started" in str(
        caught.value
    )
    assert caught.value.where == (tmp_path / "results").resolve()
    disk.refuse_full(
        [disk.Planned("tiny-r4", SIZES, ["evaluation and documents"])], tmp_path / "results"
    )


def test_eight_bits_and_sixteen() -> None:
    step = {"adapter_precision": "base", "optimizer": "paged_adamw_8bit", "precision": "bf16"}
    sizes = disk.ParameterCounts.of(step, "bfloat16", "float32", 1000, 100)
    assert (sizes.adapter_width, sizes.base_width, sizes.merged_width) == (2, 2, 4)
    assert disk.written(sizes)["training"][1] == 2 * (2 * 200 + int(100 * 2 * (1 + 4 / 256)))
    over_int8 = disk.ParameterCounts.of(
        step | {"quantization": {"type": "int8"}}, "bfloat16", "float32", 1000, 100
    )
    assert over_int8.adapter_width == 4, "PEFT casts no adapter to a dtype of integers"
    assert torch.bfloat16.itemsize == disk.WIDTHS["bfloat16"]
