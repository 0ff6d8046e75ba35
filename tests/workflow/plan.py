"""Ask Snakemake what it would run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATS = re.compile(r"^job +count\n-+ +-+\n(.*?)^total ", re.MULTILINE | re.DOTALL)


def snakemake(project: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run Snakemake in a checkout, with this environment's packages."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *map(str, arguments)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def planned(project: Path, *arguments: str | Path) -> set[str]:
    """Names of the rules that a dry run would run; ``all`` is left out, since it does nothing."""
    done = snakemake(project, "--dry-run", *arguments)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    stats = STATS.search(text)
    if stats is None:
        assert "Nothing to be done" in text, text[-3000:]
        return set()
    return {line.split()[0] for line in stats[1].splitlines()} - {"all"}


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
