"""A family's file holds what its variants ask for, and nothing of options that are gone."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from dryfit.data import data_path
from dryfit.derived.families import FAMILIES
from dryfit.derived.form import Records
from dryfit.recorder import __main__ as recorder

FAMILY = FAMILIES["olmo2"]


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> Path:
    """A copy of a family's file that recording writes to."""
    path = tmp_path / "olmo2.zip"
    shutil.copy(data_path("records", path.name), path)
    monkeypatch.setattr(recorder, "data_path", lambda *parts: tmp_path / parts[-1])
    return path


def index_and_names(path: Path) -> tuple[dict, list[str]]:
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("record.json")), file.namelist()


def test_what_no_option_asks_for_any_more_goes_from_the_file(recorded) -> None:
    before = recorded.read_bytes()
    members, files = recorder._read(recorded)
    one, text = next(iter(files.items()))
    recorder._write(recorded, FAMILY, members | {"old": "old", "older": one}, files | {"old": text})
    assert "old.json" in index_and_names(recorded)[1]
    recorder.record(FAMILY, lambda variant: False)
    assert recorded.read_bytes() == before
    Records(recorded).form(one)


def test_an_option_that_is_gone_takes_its_variants_along(recorded, monkeypatch) -> None:
    options = {name: one for name, one in recorder.OPTIONS.items() if name != "default"}
    monkeypatch.setattr("dryfit.recorder.variants.OPTIONS", options)
    before, _ = index_and_names(recorded)
    recorder.record(FAMILY, lambda variant: False)
    after, names = index_and_names(recorded)
    assert {*after["members"]} < {*before["members"]}
    assert {f"{name}.json" for name in after["members"].values()} == {*names} - {"record.json"}


@pytest.mark.parametrize("family", sorted(path.stem for path in data_path("records").glob("*.zip")))
def test_the_packages_files_hold_nothing_else(family) -> None:
    members, files = recorder._read(data_path("records", f"{family}.zip"))
    assert not recorder.pruned(
        FAMILIES[family], recorder.variants_of(FAMILIES[family]), members, files
    )
