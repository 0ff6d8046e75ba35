"""Records of modded-nanogpt: read at one commit, a log by its program alone, and the table shows the kept rows."""

import csv
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.repository import ROOT
from validation import modded_nanogpt
from validation.modded_nanogpt import (
    DRAWN,
    OPENED,
    ROWS,
    Checkout,
    files_of,
    shortened,
    table,
    write_tokens,
)

PROGRAM = """
import os, subprocess, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
with open(sys.argv[0]) as file:
    code = file.read()
num_iterations = 1390 # number of iterations to run
local_rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(local_rank)
dist.init_process_group(backend="nccl", device_id=torch.device(local_rank))
print(subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, text=True).stdout)
tokens = torch.empty(2048, dtype=torch.uint16, pin_memory=True)
scale = torch.tensor(1, dtype=torch.int32, device="cuda")
model = torch.nn.Sequential(torch.nn.Embedding(50304, 64), torch.nn.Linear(64, 64)).cuda()
model = DDP(torch.compile(model), device_ids=[local_rank])
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for step in range(num_iterations):
    loss = model(tokens.to(torch.int64).cuda()).float().square().mean() * scale
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"{step} {loss:.4f}")
print(f"peak memory consumption: {torch.cuda.max_memory_allocated() // 2**20} MiB")
dist.destroy_process_group()
"""
LOG = (
    PROGRAM
    + "\n"
    + "=" * 100
    + "\nRunning Python\npeak memory allocated: 123 MiB reserved: 456 MiB\n"
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    folder = tmp_path / "records" / "track_1_short"
    for name in (*OPENED, *(f"2026-01-{day:02d}_Other" for day in range(1, 15)), "2024-10-13_llmc"):
        (folder / name).mkdir(parents=True)
        (folder / name / "log.txt").write_text("a log in C" if "llmc" in name else LOG)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "records"]):
        subprocess.run([*git, *command], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.setattr(modded_nanogpt, "COMMIT", done.stdout.strip())
    shutil.rmtree(tmp_path / "records")  # what is checked out now doesn't matter
    return Checkout(tmp_path)


def test_a_program_is_read_without_its_log(checkout: Checkout) -> None:
    record = checkout.find("2025-01-04_SoftCap")
    assert (
        checkout.source(record) == PROGRAM.rstrip("\n") + "\n"
        and "peak memory allocated" not in PROGRAM
    )
    assert checkout.published(record) == [(123, 456)]
    assert checkout.source(checkout.find("2024-10-13_llmc")) is None
    assert (
        "no log with a Python program"
        in modded_nanogpt.trace_record(checkout, checkout.find("2024-10-13_llmc"))["refused"]
    )


def test_what_was_opened_is_not_drawn(checkout: Checkout) -> None:
    drawn = checkout.drawn()
    assert len(set(drawn)) == DRAWN and not any(name.endswith(OPENED) for name in drawn)
    assert drawn == checkout.drawn()


def test_a_program_takes_few_updates_and_stays_as_it_is_otherwise() -> None:
    assert (
        shortened("num_iterations: int = 1670  # x\nb = 1670")
        == "num_iterations: int = 3  # x\nb = 1670"
    )
    assert shortened("num_scheduled_iterations = 1515") == "num_scheduled_iterations = 6"
    assert shortened("num_extension_iterations: int = 40") == "num_extension_iterations: int = 2"


def test_a_log_may_hold_two_files() -> None:
    line = "-" * 40
    both = files_of(f"import a\n{line}\n# triton_kernels.py\n{line}\nimport triton\n")
    assert both == {"train_gpt.py": "import a\n", "triton_kernels.py": "import triton\n"}


def test_tokens_have_the_programs_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modded_nanogpt, "_TOKENS", 40_000)
    write_tokens(tmp_path / "data")
    file = tmp_path / "data" / "fineweb_val_000000.bin"
    header = np.fromfile(file, dtype=np.int32, count=256)
    tokens = np.fromfile(file, dtype=np.uint16, offset=1024)
    assert list(header[:3]) == [20240520, 1, len(tokens)]
    assert tokens[0] == 50256 and 20 < (tokens == 50256).sum() < 200


def test_the_rows_that_were_drawn_are_kept() -> None:
    with ROWS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    records = [row for row in rows if row["source"].startswith("KellerJordan")]
    assert [row["id"] for row in records if row["known"] == "open"] == list(OPENED)
    assert sum(row["known"] == "unread" for row in records) == DRAWN


@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_program_runs_whole_on_gpus_that_are_not_there(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modded_nanogpt, "_TOKENS", 40_000)
    found = modded_nanogpt.trace_record(checkout, checkout.find("2025-01-04_SoftCap"))
    assert "refused" not in found, found.get("error")
    weights = 4 * (50304 * 64 + 64 * 64 + 64) / 2**20
    workspace = 32  # cuBLAS's on an H100
    assert 5 * weights + workspace < found["allocated_mib"] < 8 * weights + workspace
    # weights, gradients, two states and DDP's buckets, and what the embedding's gradient takes while it is made
    assert found["compiled"]["graphs"] >= 2 and not found["compiled"]["skipped_frames"]


def test_the_command_prints_the_rows() -> None:
    command = [sys.executable, "-m", "validation.modded_nanogpt", "--table"]
    assert (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
        == table()
    )
