"""Ask Snakemake what it would run."""

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.warm import launchers

TARGETS = {"all", "dataset", "execute", "gate", "memory", "merge", "publish", "sweep", "train"}
FOLDERS = ("/weights", "/merged")  # outputs that are folders
STATS = re.compile(r"^job +count\n-+ +-+\n(.*?)^total ", re.MULTILINE | re.DOTALL)


def snakemake(project: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run Snakemake in a checkout, with this environment's packages."""
    command = [str(Path(launchers(), "snakemake")), "--cores", "2", *map(str, arguments)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


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
    """Let everything that the arguments ask for pass as made, with files that say nothing; returns their paths.

    ``--touch`` records what each was made with, so plans over it are those over a run that took an hour.
    """
    summary = snakemake(project, "--summary", *arguments)
    assert summary.returncode == 0, summary.stderr[-3000:]
    table = summary.stdout[summary.stdout.index("output_file\t") :].splitlines()[1:]
    paths = [line.split("\t")[0] for line in table]
    config = (project / "config/models/llama-3.2-1b.json").read_text(encoding="utf-8")
    for path in paths:
        folder = project / path if path.endswith(FOLDERS) else (project / path).parent
        folder.mkdir(parents=True, exist_ok=True)
        if folder != project / path:
            (project / path).write_text(
                config if path.endswith("config.json") else "{}" if ".json" in path else ""
            )
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
