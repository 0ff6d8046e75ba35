"""A sweep of ranks as jobs of a real Slurm, one training requeued in the middle: the same results as without Slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dryfit.common.files import sha256_file
from tests.end_to_end import chain
from tests.slurm.one_node import PACKAGES, OneNodeSlurm, missing
from tests.workflow.plan import planned

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"Slurm is not installed: apt-get install {PACKAGES}"
)

RANKS = (2, 4)
NAME = chain.SETTINGS["run"]["name"]
# Long enough to be interrupted, a checkpoint after each step.
SWEEP = {
    "lora": {"rank": list(RANKS), "alpha": 8},
    "training": {"max_steps": 8, "save_every_steps": 1},
    "memory": {"scenarios": {"qlora": {"method": "qlora"}}},
}
# Sums of two threads round otherwise than those of one. A rule may take other threads on a cluster than here.
ONE_THREAD = ["train_adapter=1"]
# What every run of the sweep shares is made without Slurm.
SHARED = ("dataset", "gate", "results/models/smollm2-135m-instruct/weights.json")
OPTIONS = {
    "--workflow-profile": ["profiles/slurm"],
    "--slurm-status-command": ["squeue"],  # there is no accounting database
    "--slurm-init-seconds-before-status-checks": [
        "1"
    ],  # ten more after each check that finds nothing new
    "--latency-wait": ["5"],
    "--jobs": ["4"],
    "--set-threads": ONE_THREAD,
    "--max-threads": [
        str(min(2, os.cpu_count() or 1))
    ],  # rules ask for eight; the node has what this machine has
    "--default-resources": ["slurm_partition=main", "mem_mb=2000", "runtime=30", "disk_mb=1000"],
    "--set-resources": ["train_adapter:mem_mb=4000"],
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[OneNodeSlurm]:
    # Not below pytest's folder, which only its owner may enter: munge refuses it.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        running = OneNodeSlurm(Path(folder))
        try:
            running.start()
        except RuntimeError as error:  # this machine's affair, as a Slurm that is not installed
            pytest.skip(str(error))
        try:
            yield running
        finally:
            running.stop()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which all that the runs share is there; work in a copy."""
    project = chain.checkout(tmp_path_factory.mktemp("prepared") / "project")
    (project / "sweep.yaml").write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    chain.snakemake(project, "sweep.yaml", "--", *SHARED)
    return project


def submitted(project: Path, slurm: OneNodeSlurm, *targets: str) -> subprocess.Popen:
    """Snakemake with the Slurm profile, under way."""
    options = [word for option, values in OPTIONS.items() for word in (option, *values)]
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *options,
        "--configfile",
        "config/test.yaml",
        "sweep.yaml",
    ]
    log = open(project / "slurm.log", "wb")  # noqa: SIM115, the process writes on
    return subprocess.Popen(
        [*command, "--", *targets], cwd=project, env=slurm.environment, stdout=log, stderr=log
    )


def requeue_when_training(
    project: Path, slurm: OneNodeSlurm, process: subprocess.Popen, rank: int
) -> str:
    """Requeue the training of a rank once it has saved a checkpoint; returns the job's id."""
    end = time.monotonic() + 900
    while time.monotonic() < end:
        assert process.poll() is None, (project / "slurm.log").read_text()[-5000:]
        training = {
            job: state
            for job, (state, comment) in slurm.jobs().items()
            if "train_adapter" in comment and f"r{rank}" in comment
        }
        # A folder that is still being written has a hidden name, and nothing could resume from it.
        saved = list(
            (project / "results").glob(f"{NAME}-r{rank}/checkpoints/[!.]*/checkpoint.json")
        )
        for job, state in training.items():
            if state == "RUNNING" and saved:
                slurm.run("scontrol", "requeue", job)
                # Slurm lets a requeued job wait for two minutes; an administrator may shorten that, once it is pending.
                while slurm.jobs()[job][0] != "PENDING":
                    time.sleep(0.2)
                slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
                return job
        time.sleep(0.2)
    raise AssertionError(
        "no training was caught in the middle:\n" + (project / "slurm.log").read_text()[-5000:]
    )


def test_a_sweep_as_jobs_with_one_requeued(
    slurm: OneNodeSlurm, prepared: Path, tmp_path: Path
) -> None:
    project, alone = (
        shutil.copytree(prepared, tmp_path / name, symlinks=True) for name in ("slurm", "alone")
    )
    adapters = [f"results/{NAME}-r{rank}/adapter/adapter_model.safetensors" for rank in RANKS]
    process = submitted(project, slurm, *adapters)
    job = requeue_when_training(project, slurm, process, rank=4)
    assert process.wait(timeout=1500) == 0, (project / "slurm.log").read_text()[-8000:]
    assert slurm.jobs()[job][0] == "COMPLETED"
    asked = slurm.run("scontrol", "show", "job", job)
    assert "Restarts=1" in asked and "gpu:t4" in asked, (
        "the smallest GPU that the predicted step fits"
    )
    report = json.loads((project / f"results/{NAME}-r4/training.json").read_text())
    assert report["resumed_from_step"], "it went on from its checkpoint"

    # Without Slurm and without a break the same run comes out the same.
    chain.snakemake(alone, "sweep.yaml", "--set-threads", *ONE_THREAD, "--", adapters[1])
    assert sha256_file(project / adapters[1]) == sha256_file(alone / adapters[1])
    assert sha256_file(project / adapters[0]) != sha256_file(project / adapters[1])
    # Where the jobs ran reruns none of them.
    configuration = chain.CONFIGURATION.relative_to(chain.ROOT)
    assert planned(project, "--configfile", configuration, "sweep.yaml", "--", *adapters) == set()


def test_a_map_without_a_gpu_that_fits_names_one_that_would(
    tmp_path: Path, slurm: OneNodeSlurm, prepared: Path
) -> None:
    project = shutil.copytree(prepared, tmp_path / "project", symlinks=True)
    (project / "profiles/slurm/gpus.yaml").write_text(
        "- {gpu: {vram_gib: 0.6}, gres: t4}\n", encoding="utf-8"
    )
    process = submitted(project, slurm, f"results/{NAME}-r2/memory/training/measure.json")
    assert process.wait(timeout=300) == 1
    said = (project / "slurm.log").read_text()
    assert "more than any GPU of the cluster has" in said and "would do" in said
