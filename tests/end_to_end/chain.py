"""Run the whole default chain with the tiny configuration, and read what it left."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "tests" / "config" / "tiny.yaml"
SETTINGS = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
RUN = f"results/{SETTINGS['run']['name']}-r{SETTINGS['lora']['rank']}"
NOTHING = "Nothing to be done"


def snakemake(
    folder: Path, *arguments: str | Path, python: Path | str = sys.executable, environ: dict[str, str] | None = None
) -> str:
    """Run the tiny configuration in ``folder``; returns all that Snakemake said. Fails with it when it fails."""
    command = [python, "-m", "snakemake", "--cores", "2", "--configfile", CONFIGURATION, "--directory", folder]
    done = subprocess.run(
        [str(part) for part in (*command, *arguments)],
        cwd=ROOT,
        env=environ or os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"snakemake failed in {folder}:\n{done.stdout[-20000:]}"
    return done.stdout


def finished_rules(output: str) -> set[str]:
    """The rules whose jobs Snakemake says it finished."""
    return set(re.findall(r"^Finished jobid: \d+ \(Rule: (\w+)\)$", output, re.MULTILINE)) - {"all"}


def summary(folder: Path) -> list[dict[str, str]]:
    """Every output file of the chain: its path (``output_file``), its ``rule``, its job's ``log-file(s)``."""
    table = re.search(r"^output_file\t.*\Z", snakemake(folder, "--summary"), re.MULTILINE | re.DOTALL)
    return list(csv.DictReader(table[0].splitlines(), delimiter="\t"))


def read(folder: Path, path: str) -> Any:
    """A JSON file below the run's folder."""
    return json.loads((folder / RUN / path).read_text(encoding="utf-8"))
