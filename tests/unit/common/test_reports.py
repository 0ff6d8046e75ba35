"""Files that documents read: only what a report vouches for, and reports that carry others."""

import json
from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import sha256_file, write_json, write_jsonl, write_report
from scripts.common.reports import CARRIED, carried_by, carry, gather
from tests.unit.documents import inputs


def test_a_figure_changed_by_hand_is_noticed_and_the_file_to_delete_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "comparison.json"
    write_report(path, inputs.files()["comparison"])
    assert gather({"comparison": str(path)})["comparison"]["tuned"]["exact"]["count"] == 83
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"count": 83', '"count": 183', 1), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"(?s)comparison\.json is not what the step that made it.*rm "
    ):
        gather({"comparison": str(path)})
    write_json(path, {key: value for key, value in json.loads(text).items() if key != "sha256"})
    with pytest.raises(UserError, match=r"(?s)No report lists.*rm .*comparison\.json"):
        gather({"comparison": str(path)})


def test_rows_are_read_only_where_a_report_vouches_for_them(tmp_path: Path) -> None:
    rows, report = tmp_path / "answers.jsonl", tmp_path / "metrics.json"
    write_jsonl(rows, [{"answer": "ls"}, {"answer": "pwd"}])
    write_report(report, {"n": 2}, rows)
    given = {"answers": str(rows), "metrics": str(report)}
    assert gather(given)["answers"] == [{"answer": "ls"}, {"answer": "pwd"}]
    write_jsonl(rows, [{"answer": "ls"}, {"answer": "whoami"}])
    with pytest.raises(
        UserError, match=r"(?s)answers\.jsonl is not what the step that made it.*rm "
    ):
        gather(given)
    with pytest.raises(UserError, match=r"answers\.jsonl"):
        gather({"answers": str(rows)})


def test_a_report_carries_what_the_reports_before_it_said_and_carried(tmp_path: Path) -> None:
    first, rows, second, third = (
        str(tmp_path / f"{name}.json") for name in ("first", "rows", "second", "third")
    )
    rows += "l"
    write_jsonl(rows, [{"row": 1}])
    write_report(first, {"n": 1}, rows)
    write_report(second, {CARRIED: carry(first=first, rows=rows), "n": 2})
    write_report(third, {CARRIED: carry(seconds=[second])})
    paths, contents = carried_by(third)
    assert paths == {"first": first, "rows": rows, "seconds": [second]}
    assert contents["first"]["n"] == 1 and contents["rows"] == [{"row": 1}]
    (kept,) = contents["seconds"]
    assert kept["n"] == 2 and CARRIED not in kept
    entry = json.loads(Path(third).read_text(encoding="utf-8"))[CARRIED]["first"]
    assert entry["sha256"] == sha256_file(first) and entry["bytes"] == Path(first).stat().st_size
