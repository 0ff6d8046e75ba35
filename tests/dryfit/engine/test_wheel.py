"""The engine's wheel in an environment that has nothing of this project: loops of four kinds are priced there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from dryfit.engine.replay import compiled
from tests.repository import ROOT

pytest.importorskip("trl")
PROGRAM = """
import json, sys
import torch
from torch.nn import functional
from step_memory import Options, on_meta, trace_step, trace_trainer
import trainers

def loop(wrap=lambda *items: items):
    with on_meta():
        model, batch = torch.nn.Linear(64, 64), torch.empty(8, 64)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model, optimizer = wrap(model, optimizer)

    def step(batch):
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return trace_step(model, optimizer, step, batch, Options(capability=(8, 9)))

def accelerated():
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    return loop(lambda *items: accelerator.prepare(*items, device_placement=[False, False]))

def plain_trainer():
    return trace_trainer(lambda: trainers.plain("meta", "out"))

def trl_trainer():
    return trace_trainer(lambda: trainers.sft("meta", "out"))

answers = {each.__name__: each().peak_allocated_bytes for each in (loop, accelerated, plain_trainer, trl_trainer)}
assert not any(name.split(".")[0] in ("scripts", "tests", "dryfit") for name in sys.modules)
print(json.dumps(answers))
"""


def built(folder, **environment):
    """The engine's wheel, from a copy of its sources."""
    source = shutil.copytree(
        ROOT / "dryfit" / "engine", folder / "source", ignore=shutil.ignore_patterns("__py*")
    )
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    command = [*build, "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    (wheel,) = folder.glob("torch_step_memory-*.whl")
    return wheel


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory):
    return built(tmp_path_factory.mktemp("wheel"))


@pytest.mark.thorough
@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_holds_the_compiled_replay_where_there_is_a_compiler(tmp_path, as_it_is, compiler):
    if compiler and compiled() is None:
        pytest.skip("no C compiler")
    wheel = as_it_is if compiler else built(tmp_path, PATH=str(tmp_path), CC="")
    names = zipfile.ZipFile(wheel).namelist()
    assert "step_memory/native/replay.c" in names and "step_memory/native/blocks.h" in names
    assert any(name.endswith(".so") for name in names) == compiler
    assert wheel.name.endswith("-py3-none-any.whl") != compiler
    python = "import sys; from step_memory.replay import allocator_for; print(type(allocator_for([])[0]).__name__)"
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    run = subprocess.run(
        [sys.executable, "-c", python],
        env={
            "PATH": str(tmp_path),
            "HOME": str(tmp_path),
            "PYTHONPATH": str(tmp_path / "installed"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == ("NativeAllocator" if compiler else "Allocator")


@pytest.mark.nightly
def test_the_wheel_prices_loops_where_nothing_else_of_the_project_is(tmp_path, as_it_is):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    packages = next((tmp_path / "env" / "lib").iterdir()) / "site-packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(packages),
    ]
    subprocess.run([*install, str(as_it_is)], check=True, capture_output=True)
    metadata = next(packages.glob("torch_step_memory-*/METADATA")).read_text()
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist")] == [
        "Requires-Dist: torch<3,>=2.7"
    ]
    (packages / "libraries.pth").write_text(
        sysconfig.get_path("purelib")
    )  # torch and the loops' own libraries
    shutil.copy(Path(__file__).parent / "trainers.py", tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    run = subprocess.run([python, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    assert answers["loop"] == answers["accelerated"]
    assert all(peak > 0 for peak in answers.values())
