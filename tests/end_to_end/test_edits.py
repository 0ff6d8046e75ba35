"""Each JSON file that a job of a finished run reads, with one value edited: the job says which file to delete."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end import chain
from tests.warm import launchers

pytestmark = pytest.mark.thorough


def test_an_edited_value_is_noticed_by_whoever_reads_it(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = chain.linked(finished[0], tmp_path / "edited")
    configuration = folder / chain.CONFIGURATION.relative_to(chain.ROOT)
    command = [f"{launchers()}/python", "-m", "tests.end_to_end.edits", folder, configuration]
    done = subprocess.run(list(map(str, command)), cwd=chain.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tried = [json.loads(line) for line in done.stdout.splitlines()]
    silent = {
        (one["rule"], one["path"]): one["said"]
        for one in tried
        if "\n  write:   rm " not in (one["said"] or "") or "Traceback" in one["said"]
    }
    assert not silent
    rules = {one["rule"] for one in tried}
    assert {
        "compare_memory",
        "gate_memory",
        "train_adapter",
        "merge_adapter",
        "compare_models",
        "render_documents",
    } <= rules
    assert chain.NOTHING in chain.snakemake(folder, "--dry-run"), "all is as it was"


def test_a_rules_script_runs_alone_and_leaves_the_run_as_it_was(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, made = finished[0], f"{chain.RUN}/evaluation/comparison.json"
    command = [f"{launchers()}/python", "-m", "scripts.runs.alone", made, "--output", str(tmp_path)]
    command += ["--configfile", str(chain.CONFIGURATION.relative_to(chain.ROOT))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "right answers against the base" in done.stderr, done.stderr[
        -3000:
    ]
    assert (tmp_path / made).read_bytes() == (folder / made).read_bytes()
    assert chain.NOTHING in chain.snakemake(folder, "--dry-run")
    command[3] = "nosuch.json"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "No job of this configuration makes this file." in done.stderr
