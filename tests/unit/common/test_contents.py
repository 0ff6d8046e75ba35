"""What a job computes with, as one text."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.contents import job_digest


def test_a_job_is_told_by_its_code_by_what_it_is_given_and_by_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("given.yaml", "results/made.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("a")
    assert job_digest("code", ["results/made.json", ".snakemake/gone"]) == "code"
    first = job_digest("code", ["given.yaml", "results/made.json"])
    Path("given.yaml").write_text("b")
    second = job_digest("code", ["given.yaml", "results/made.json"])
    assert first != second and first.startswith("code, reads ")
    assert job_digest("code", ["results/gone.json"]) == "code, without results/gone.json"
