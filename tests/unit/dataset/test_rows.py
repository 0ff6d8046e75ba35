"""Rows between two steps: what is written is what is read, whatever the text looks like."""

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dryfit.common.errors import UserError
from scripts.dataset.rows import COLUMNS, count, must_keep_some, read_chunks, read_rows, write_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LOOKS_LIKE_SOMETHING_ELSE = [
    "",
    "null",
    "NaN",
    "true",
    "1e5",
    "007",
    "2024-01-01",
    "{}",
    '"',
    "\\/",
    "\x00\x1f\x7f",
]
LINE_ENDS = ["a\nb", "a\r\nb", "a\x0bb", "a\x85b", "a\u2028b", "a\u2029b"]
ROW = st.fixed_dictionaries(
    {"request": TEXT, "command": TEXT, "source": TEXT, "line": st.integers(1, 2**53)},
    optional={"intent": TEXT},
)


def records(rows: pd.DataFrame) -> list[dict]:
    return [
        {key: value for key, value in row.items() if value == value}
        for row in rows.to_dict("records")
    ]


def as_row(text: str) -> dict:
    return {"request": text, "command": text, "source": text, "line": 1}


@pytest.mark.thorough
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(ROW, min_size=1, max_size=6))
@example(rows=[as_row(text) for text in LOOKS_LIKE_SOMETHING_ELSE + LINE_ENDS])
@example(rows=[{**as_row("a"), "intent": "b"}, as_row("c")])
def test_what_is_written_is_read(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    write_rows(path, pd.DataFrame(rows))
    assert records(read_rows(path)) == rows
    assert len(path.read_text().splitlines()) == len(
        rows
    )  # for readers that split at every kind of line end
    assert [row for chunk in read_chunks(path, 2) for row in records(chunk)] == rows
    before = path.read_bytes()
    write_rows(path, read_rows(path))
    assert path.read_bytes() == before


def test_keys_are_sorted_nulls_left_out_and_no_rows_are_rows(tmp_path):
    write_rows(
        tmp_path / "rows.jsonl",
        pd.DataFrame([{"b": "ü", "line": 1, "a": None}, {"b": None, "line": 2, "a": "x"}]),
    )
    assert (tmp_path / "rows.jsonl").read_text() == '{"b": "ü", "line": 1}\n{"a": "x", "line": 2}\n'
    write_rows(tmp_path / "none.jsonl", pd.DataFrame(columns=list(COLUMNS)))
    assert (tmp_path / "none.jsonl").read_bytes() == b""
    rows = read_rows(tmp_path / "none.jsonl")
    assert list(rows) == list(COLUMNS) and rows.empty
    assert count(rows["request"]) == {}
    assert list(read_chunks(tmp_path / "none.jsonl", 5)) == []


def test_what_dominated_is_named_first():
    must_keep_some("clean", 1, {"a": 5}, "file")
    with pytest.raises(
        UserError, match=r"d \(9 of 17 rows\); c \(4 of 17 rows\); b \(3 of 17 rows\)\."
    ) as error:
        must_keep_some("clean", 0, {"a": 1, "b": 3, "c": 4, "d": 9}, "file")
    assert "stage 'clean'" in str(error.value)
