"""Provenance: the commit it says, the digests it lists, and files that other tools can read."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dryfit.common.files import write_report
from dryfit.common.versions import VERSION
from scripts.common.reports import CARRIED, carry
from scripts.provenance import record

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATION = {
    "dataset": {
        "name": "mine",
        "sources": [
            {"type": "embedded", "license": "Apache-2.0"},
            {"type": "files", "paths": ["a.csv"]},
        ],
    },
    "model": {"license": "Apache-2.0", "name": "small", "title": "Small"},
}


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    """What a run of two stages came from, with the reports that stand for all others."""
    run, models = tmp_path / "results" / "mine-r4", tmp_path / "results" / "models" / "small"
    (run / "merged").mkdir(parents=True)
    models.mkdir(parents=True)
    (run / "merged" / "model.safetensors").write_bytes(b"weights")
    manifest = {"sha256": {"model.safetensors": "0" * 64}, "versions": {"torch": "2.13.0"}}
    write_report(run / "merged" / "manifest.json", manifest)
    (models / "model.safetensors").write_bytes(b"base")
    write_report(models / "weights.json", {}, models / "model.safetensors")
    for name in ("acquire", "description"):
        write_report(models / f"{name}.json", {})
    carried = carry(**{name: str(models / f"{name}.json") for name in record.SOURCES})
    write_report(
        run / "verification.json",
        {CARRIED: carried | carry(manifest=str(run / "merged" / "manifest.json"))},
    )
    write_report(run / "drawn.json", {CARRIED: carry(profile=[])})
    paths = {name: run / f"{name}.json" for name in ("record", "provenance", "materials")}
    paths["summary"] = run / "summary.txt"
    inputs = {
        "drawn": str(run / "drawn.json"),
        "verification": str(run / "verification.json"),
        "unread": "none",
    }
    record.main(
        inputs,
        "mine-r4",
        CONFIGURATION,
        {name: str(path) for name, path in paths.items()},
        "snakemake -c1",
    )
    return paths


def test_digests_of_what_went_in_and_came_out(written: dict[str, Path]) -> None:
    found = json.loads(written["provenance"].read_text())
    names = {Path(path).name: entry for path, entry in found["inputs"].items()}
    assert sorted(names) == [
        "acquire.json",
        "description.json",
        "model.safetensors",
        "weights.json",
    ]
    assert names["model.safetensors"] == {"bytes": 4, "sha256": hashlib.sha256(b"base").hexdigest()}
    by_name = {Path(path).name: entry for path, entry in found["outputs"].items()}
    assert by_name["model.safetensors"]["sha256"] == "0" * 64, (
        "the manifest knows: gigabytes aren't read twice"
    )
    assert (
        by_name["manifest.json"]["sha256"]
        == hashlib.sha256(
            (written["provenance"].parent / "merged" / "manifest.json").read_bytes()
        ).hexdigest()
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
    assert (
        kinds["torch"] == "library"
        and kinds["small"] == "machine-learning-model"
        and kinds["a.csv"] == "data"
    )
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
        subprocess.run(
            ("git", "-C", tmp_path, *identity, *arguments), check=True, capture_output=True
        )

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
    assert record.source(copy)["commit"] is None, (
        "the commit of a repository around the copy is not the copy's"
    )


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
