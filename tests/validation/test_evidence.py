"""The table that the library ships is that of the measurements, and docs/evidence.md shows it."""

from pathlib import Path

import pytest

from dryfit.evidence.measured import published
from validation import evidence

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"


@pytest.mark.thorough
def test_the_librarys_table_is_made_of_the_measurements() -> None:
    made, kept = [step.cells() for step in evidence.table()], [step.cells() for step in published()]
    assert kept == made, "python -m validation.evidence --write"


def test_every_row_has_a_source_a_card_a_name_of_its_own_and_a_figure() -> None:
    rows = published()
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.source and row.card and all(row.kinds) for row in rows)
    assert all(row.allocated_bytes or row.reserved_bytes or row.step_seconds for row in rows)
    assert all(
        row.memory_known
        for row in rows
        if row.allocated_error is not None or row.reserved_error is not None
    )
    assert all(row.time_known for row in rows if row.time_error is not None)


def test_the_rows_of_the_rtx_4080_are_in_it_with_the_published_errors() -> None:
    rows = [row for row in published() if row.card == "rtx-4080"]
    assert len(rows) == 12 and all(row.kinds.platform == "windows" for row in rows)
    assert max(abs(row.allocated_error) for row in rows) < 0.0003
    assert {row.time_known for row in rows} == {"unread"}


def test_all_58_rows_of_the_l40s_have_their_time() -> None:
    timed = [
        row
        for row in published()
        if row.card == "l40s" and row.time_error is not None and row.time_known != "fitted"
    ]
    assert len(timed) == 58 and round(min(row.time_error for row in timed), 3) == -0.681


def test_the_page_shows_the_tables_summary() -> None:
    assert evidence.summary_table(list(published())) in PAGE.read_text(encoding="utf-8")
