"""A run's settings as a question: a file's sections are the schema's, and are checked before they count."""

from pathlib import Path

import pytest
import yaml

from dryfit import readers
from dryfit.ask.command import main
from dryfit.common.errors import UserError
from scripts.ask.__main__ import step_of_a_run
from scripts.runs.configuration import read_schema


def test_the_sections_of_a_run_are_the_schemas() -> None:
    assert set(read_schema()["properties"]) == readers.RUN_SECTIONS


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"dataset": {"packed": True}}, "Unknown key: dataset.packed"),
        ({"training": {"sequence_length": 0}}, "training.sequence_length"),
        ({"dataset": {}, "training": {}}, None),
    ],
)
def test_a_runs_settings_are_checked_before_they_count(
    content, says, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(readers, "step_of_a_run", step_of_a_run)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    if says is None:
        assert main([str(path), "--gpu", "24GiB", "--quick"]) == 0
        return
    with pytest.raises(UserError) as caught:
        main([str(path), "--gpu", "24GiB", "--quick"])
    assert says in str(caught.value)
