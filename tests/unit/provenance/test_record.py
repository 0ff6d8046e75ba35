"""Provenance: the commit it says, the digests it lists, and files that other tools can read."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dryfit.common.errors import UserError
from dryfit.common.files import write_report
from dryfit.common.versions import VERSION
from scripts.provenance import record

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATION = {
    "dataset": {
        "name": "mine",
        "sources": [{"type": "embedded", "license": "Apache-2.0"}, {"type": "files", "paths": ["a.csv"]}],
    },
    "model": {"license": "Apache-2.0", "name": "small", "title": "Small"},
}


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    """Both files of a run of two inputs and two outputs."""
    run = tmp_path / "results" / "mine-r4"
    (run / "merged").mkdir(parents=True)
    (run / "merged" / "model.safetensors").write_bytes(b"weights")
    manifest = {"files": {"model.safetensors": {"bytes": 7, "sha256": "0" * 64}}, "versions": {"torch": "2.13.0"}}
    write_report(run / "merged" / "manifest.json", manifest)
    base = tmp_path / "results" / "models" / "small" / "model.safetensors"
    base.parent.mkdir(parents=True)
    base.write_bytes(b"base")
    paths = {
        "provenance": run / "provenance.json",
        "materials": run / "bill-of-materials.cdx.json",
    }
    outputs = [run / "merged" / "manifest.json", run / "merged" / "model.safetensors"]
    record.main(
        [str(base)],
        map(str, outputs),
        CONFIGURATION,
        {name: str(path) for name, path in paths.items()},
        "snakemake -c1",
    )
    return paths


def test_digests_of_what_went_in_and_came_out(written: dict[str, Path]) -> None:
    found = json.loads(written["provenance"].read_text())
    (path,) = found["inputs"]
    assert found["inputs"][path] == {"bytes": 4, "sha256": hashlib.sha256(b"base").hexdigest()}
    by_name = {Path(path).name: entry for path, entry in found["outputs"].items()}
    assert by_name["model.safetensors"]["sha256"] == "0" * 64, "the manifest knows: gigabytes aren't read twice"
    assert (
        by_name["manifest.json"]["sha256"]
        == hashlib.sha256((written["provenance"].parent / "merged" / "manifest.json").read_bytes()).hexdigest()
    )
    assert found["software"]["torch"] == "2.13.0" and found["software"]["snakemake"]
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_bytes"] > 2**28
    assert found["command"] == "snakemake -c1"
    assert found["configuration"] == CONFIGURATION


def test_bill_of_materials_is_valid_cyclonedx(written: dict[str, Path]) -> None:
    from cyclonedx.model.bom import Bom

    content = json.loads(written["materials"].read_text())
    bom = Bom.from_json(content)
    kinds = {component.name: component.type.value for component in bom.components}
    assert kinds["torch"] == "library" and kinds["small"] == "machine-learning-model" and kinds["a.csv"] == "data"
    (model,) = [component for component in bom.components if component.name == "small"]
    assert [entry.content for entry in model.hashes] == [hashlib.sha256(b"base").hexdigest()]
    assert bom.validate()


def test_the_same_run_writes_the_same_bytes(written: dict[str, Path]) -> None:
    content = json.loads(written["provenance"].read_text())
    del content["sha256"]  # the report's seal, which it gets when it is written
    assert record.bill_of_materials(content) == written["materials"].read_text()


def test_commit_and_changes_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(("git", "-C", tmp_path, *identity, *arguments), check=True, capture_output=True)

    assert record.source(tmp_path)["commit"] is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    assert record.source(tmp_path)["clean"] is True and len(record.source(tmp_path)["commit"]) == 40
    (tmp_path / "results").write_text("not tracked")
    assert record.source(tmp_path)["clean"] is True
    (tmp_path / "file").write_text("two")
    assert record.source(tmp_path)["clean"] is False
    copy = tmp_path / "copy"
    copy.mkdir()
    assert record.source(copy)["commit"] is None, "the commit of a repository around the copy is not the copy's"


def test_input_and_output_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(UserError, match="both"):
        record.main([str(path)], [str(path)], CONFIGURATION, {}, None)


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
