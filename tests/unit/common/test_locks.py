"""A dead Snakemake's lock goes; the lock of anybody who lives, or may live, stays."""

import json
import os
import subprocess
import sys

import pytest

from scripts.common.code_digests import ROOT

fcntl = pytest.importorskip("fcntl")

# A Snakemake as far as its lock goes: reads the Snakefile, locks, tells that it is there, and waits to be killed.
HOLDER = """
import pathlib, sys, time
from scripts.common.locks import WorkingDirectoryLock, at_work
living = WorkingDirectoryLock()
pathlib.Path(".snakemake/locks").mkdir(parents=True, exist_ok=True)
pathlib.Path(".snakemake/locks/0.output.lock").write_text("results/a")
{record}
print("ready", flush=True)
{work}
"""
START = "from scripts.common.locks import WorkingDirectoryLock; WorkingDirectoryLock()"


def holder(folder, record="living.record()", work="time.sleep(60)"):
    code = HOLDER.format(record=record, work=work)
    started = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment(), stdout=subprocess.PIPE)
    assert started.stdout.readline() == b"ready\n"
    return started


def environment():
    return {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}


def start(folder):
    """What the next Snakemake says when it starts, and whether the lock is still there."""
    done = subprocess.run([sys.executable, "-c", START], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, (folder / ".snakemake" / "locks" / "0.output.lock").exists()


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_ones_lock_goes_and_a_living_ones_stays(tmp_path):
    owner = holder(tmp_path)
    said, locked = start(tmp_path)
    assert locked and f"process {owner.pid}" in said and "is at work" in said
    kill(owner)
    said, locked = start(tmp_path)
    assert not locked and f"process {owner.pid}" in said and "was killed" in said
    assert start(tmp_path) == ("", False)


def test_a_lock_that_nobody_recorded_stays(tmp_path):
    """Another workflow's in this folder, which may be alive; or one from before the record was written."""
    kill(holder(tmp_path, record=""))
    assert start(tmp_path) == ("", True)


def test_a_lock_taken_after_the_recorded_one_stays(tmp_path):
    kill(holder(tmp_path))
    lock = tmp_path / ".snakemake" / "locks" / "0.output.lock"
    lock.unlink()
    lock.write_text("of another workflow")
    assert start(tmp_path) == ("", True)


def test_a_record_that_was_cut_off_is_no_record(tmp_path):
    kill(holder(tmp_path))
    record = tmp_path / ".snakemake" / "living"
    record.write_text(record.read_text()[:40])
    assert start(tmp_path) == ("", True)


def test_a_lock_of_another_machine_stays(tmp_path):
    kill(holder(tmp_path))
    record = tmp_path / ".snakemake" / "living"
    record.write_text(json.dumps({**json.loads(record.read_text()), "host": "another"}) + "\n")
    assert start(tmp_path) == ("", True)


def test_a_job_that_outlives_its_snakemake_keeps_the_lock(tmp_path):
    job = "import time\nfrom scripts.common.locks import at_work\nwith at_work(): print(1, flush=True); time.sleep(60)"
    owner = holder(tmp_path)
    left = subprocess.Popen([sys.executable, "-c", job], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE)
    assert left.stdout.readline() == b"1\n"
    kill(owner)
    said, locked = start(tmp_path)
    assert locked and f"process {left.pid}" in said
    kill(left)
    assert not start(tmp_path)[1]
