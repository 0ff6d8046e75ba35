"""Each JSON file that a job of a finished run reads, with one value edited: the job says which file to delete."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end import chain
from tests.warm import launchers

pytestmark = pytest.mark.thorough


def test_an_edited_value_is_noticed_by_whoever_reads_it(finished: tuple[Path, str], tmp_path: Path) -> None:
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
