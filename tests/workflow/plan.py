"""Ask Snakemake what it would run."""

from __future__ import annotations

import atexit
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.workflow.warm import ROOT

TARGETS = {"all", "dataset", "execute", "gate", "memory", "merge", "publish", "sweep", "train"}
STATS = re.compile(r"^job +count\n-+ +-+\n(.*?)^total ", re.MULTILINE | re.DOTALL)


@cache
def _warm() -> subprocess.Popen:
    """The process that has loaded Snakemake, of this process of tests."""
    command = [sys.executable, "-m", "tests.workflow.warm"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def snakemake(project: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run Snakemake in a checkout, with this environment's packages."""
    command = ["snakemake", "--cores", "2", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        said = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        request = {"command": command, "folder": str(project), "environ": dict(os.environ), **said}
        warm = _warm()
        warm.stdin.write(json.dumps(request) + "\n")
        warm.stdin.flush()
        status = int(warm.stdout.readline())
        texts = {name: Path(path).read_text(encoding="utf-8") for name, path in said.items()}
    return subprocess.CompletedProcess(command, status, **texts)


def planned_text(project: Path, *arguments: str | Path) -> str:
    """All that a dry run says."""
    done = snakemake(project, "--dry-run", *arguments)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    return text


def planned_jobs(project: Path, *arguments: str | Path) -> dict[str, int]:
    """The jobs that a dry run would run, counted by rule; target rules, which do nothing, are left out."""
    text = planned_text(project, *arguments)
    stats = STATS.search(text)
    if stats is None:
        assert "Nothing to be done" in text, text[-3000:]
        return {}
    rows = [line.split() for line in stats[1].splitlines()]
    return {rule: int(count) for rule, count in rows if rule not in TARGETS}


def planned(project: Path, *arguments: str | Path) -> set[str]:
    """Names of the rules that a dry run would run, without target rules."""
    return set(planned_jobs(project, *arguments))


def make_believe(project: Path, *arguments: str | Path) -> list[str]:
    """Let everything that the arguments ask for pass as made, with empty files; returns their paths.

    ``--touch`` records what each was made with, so plans over it are those over a run that took an hour.
    """
    summary = snakemake(project, "--summary", *arguments)
    assert summary.returncode == 0, summary.stderr[-3000:]
    table = summary.stdout[summary.stdout.index("output_file\t") :].splitlines()[1:]
    paths = [line.split("\t")[0] for line in table]
    for path in paths:
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).touch()
    touched = snakemake(project, "--touch", "--forceall", *arguments)
    assert touched.returncode == 0, touched.stderr[-3000:]
    return paths


def recorded_params(project: Path, path: str) -> str:
    """The params that Snakemake has recorded for an output."""
    record = project / ".snakemake" / "metadata" / base64.urlsafe_b64encode(path.encode()).decode()
    return " ".join(json.loads(record.read_text(encoding="utf-8"))["params"])


@contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    """A file with a text in it exchanged, put back afterwards."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")
