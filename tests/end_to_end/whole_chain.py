"""The chain of the stages that compute on a card: train, merge, verify, evaluate, each from what the last one left.

:func:`run` goes through it in processes of their own, as Snakemake does: on this machine's GPU or over a simulated one.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.repository import ROOT
from tests.warm import launchers


def started(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """What a stage wrote, and what it said."""
    command = [f"{launchers()}/python", "-P", "-m", "tests.end_to_end.stages", str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads((done.stdout.splitlines() or ["{}"])[-1]), done.stderr


def ended(folder: Path, *words: str) -> dict[str, Any]:
    """The same of a stage that must not fail."""
    found, said = started(folder, *words)
    assert "error" not in found, said
    return found


def run(folder: Path, case: str, *, is_resumed: bool = False, real: bool = False) -> dict[str, Any]:
    """Go through the whole chain in an empty folder; returns what each stage wrote, by its name.

    ``case``: a training of :mod:`tests.end_to_end.stages`. ``is_resumed``: it is killed behind its first checkpoint and
    started again.
    """
    card = ["0", "real"] if real else ["0"]
    started(folder, "make")
    found = {"training": ended(folder, case, *card, *(["resumed"] if is_resumed else []))}
    started(folder, "merge", case, *card[1:])
    for stage in ("merge check", "evaluation", "evaluation merged"):
        found[stage] = ended(folder, stage, *card)
    return found


def check(found: dict[str, Any], gpus: int, is_resumed: bool) -> None:
    """What holds of a chain's files on any card."""
    report = found["training"]["report"]
    assert report["steps"] == len(found["training"]["curve"]) == 2
    assert report["resumed_from_step"] == (1 if is_resumed else None)
    assert len(report["ranks"]) == gpus and report["peak_allocated_bytes"] > 2**20
    assert report["device"] != "cpu"
    verified = found["merge check"]
    assert verified["complete"] and verified["passed"]
    assert verified["checks"]["logits"]["device"] == "cuda"
    for stage in ("evaluation", "evaluation merged"):
        assert len(found[stage]["answers"]) == 4
        assert math.isfinite(found[stage]["metrics"]["loss"])
