"""What a job computes with, as one text."""

from pathlib import Path

import pytest

from scripts.common import contents
from scripts.common.contents import folder_digest, job_digest, missing_inputs


def test_a_job_is_told_by_its_code_and_by_what_it_is_given(
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


def test_a_job_is_the_same_before_and_after_its_inputs_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("given.yaml").write_text("a")
    inputs = ["given.yaml", "results/made.json", ".snakemake/storage/made"]
    before = job_digest("code", inputs)
    assert missing_inputs(inputs) == "missing: results/made.json"
    Path("results").mkdir()
    Path("results/made.json").write_text("a")
    assert job_digest("code", inputs) == before
    assert missing_inputs(inputs) == "missing: nothing"


def test_a_file_that_may_change_within_the_same_tick_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "settled.txt"
    path.write_text("a")
    now = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns)
    kept = contents._remembered(contents.STORE.absolute())
    monkeypatch.setattr(contents.time, "time_ns", lambda: now + contents.UNSETTLED_NANOSECONDS)
    contents.content_digest(path)
    assert str(path) not in kept
    monkeypatch.setattr(contents.time, "time_ns", lambda: now + contents.UNSETTLED_NANOSECONDS + 1)
    contents.content_digest(path)
    assert str(path) in kept


def test_weights_of_another_size_are_others_although_every_sample_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "SAMPLES", 1)
    monkeypatch.setattr(contents, "SAMPLE_BYTES", 8)
    digests = []
    for size in (64, 65):
        (tmp_path / "model.safetensors").write_bytes(b"x" * size)
        digests.append(folder_digest(tmp_path, ["*.safetensors"]))
    assert digests[0] != digests[1]
