"""Screening the dataset: what passes, what is refused and how it is counted."""

import json
from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from scripts.dataset import screen_dataset
from tests.task_parts import shell

ROWS = [
    ("list files", "ls"),
    ("clean up", "rm -rf /"),
    ("something", "if true; then"),
    ("wipe", "rm -rf ~"),
    ("show the date", "date"),
    ("something else", "echo 'open"),
]


def run(folder: Path, pairs: list[tuple[str, str]]) -> tuple[list, list, dict]:
    rows = [
        {"request": left, "command": right, "source": "t", "line": at}
        for at, (left, right) in enumerate(pairs, 1)
    ]
    inputs = {"pairs": str(folder / "clean.jsonl"), "clean": str(folder / "clean.json")}
    Path(inputs["pairs"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(inputs["clean"], {}, inputs["pairs"])
    outputs = {"pairs": "safe.jsonl", "rejected": "rejected.jsonl", "report": "screen.json"}
    outputs = {name: str(folder / file) for name, file in outputs.items()}
    screen_dataset.main(shell("screening"), inputs, outputs)
    files = outputs["pairs"], outputs["rejected"]
    kept, rejected = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] for path in files
    )
    return kept, rejected, read_report(outputs["report"], *files)


def test_dangerous_and_unparsable_commands_are_refused_and_counted(tmp_path):
    kept, rejected, report = run(tmp_path, ROWS)
    assert [row["line"] for row in kept] == [1, 5]
    assert [(row["line"], row["reason"].split(":")[0], row["stage"]) for row in rejected] == [
        (2, "danger", "screen"),
        (3, "the screen can't parse the command", "screen"),
        (4, "danger", "screen"),
        (6, "the screen can't parse the command", "screen"),
    ]
    assert {key: report[key] for key in ("rows", "kept", "removed", "danger", "unparsable")} == {
        "rows": 6,
        "kept": 2,
        "removed": 4,
        "danger": 2,
        "unparsable": 2,
    }
    assert sum(report["reasons"].values()) == 4
    assert sum(report["categories"].values()) == sum(report["rules"].values()) == 2
    assert all(
        row["detail"] in report["rules"] for row in rejected if row["reason"].startswith("danger")
    )


@pytest.mark.thorough
def test_nothing_refused(tmp_path):
    kept, rejected, report = run(tmp_path, [("list files", "ls")])
    assert (len(kept), rejected, report["removed"], report["reasons"]) == (1, [], 0, {})


@pytest.mark.thorough
def test_everything_refused_names_the_reasons(tmp_path):
    with pytest.raises(UserError, match="can't parse the command \\(2 of 3 rows\\)"):
        run(tmp_path, [ROWS[1], ROWS[2], ROWS[5]])
    assert not (tmp_path / "screen.json").exists()


def test_a_changed_input_is_noticed(tmp_path):
    run(tmp_path, ROWS)
    with open(tmp_path / "clean.jsonl", "a") as file:
        file.write('{"request": "show", "command": "ls", "source": "t", "line": 9}\n')
    inputs = {"pairs": str(tmp_path / "clean.jsonl"), "clean": str(tmp_path / "clean.json")}
    with pytest.raises(
        UserError, match=r"clean\.jsonl is not what the step that made it has written"
    ):
        screen_dataset.main(shell("screening"), inputs, {})
