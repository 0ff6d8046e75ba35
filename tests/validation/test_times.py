"""The table of timed steps, its summaries, and what the documentation says about them."""

import json

from tests.repository import ROOT
from validation import times
from validation.timed_rows import read

ROWS = read()
REPORT = json.loads(times.REPORT.read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "time.md").read_text(encoding="utf-8")


def test_every_row_has_a_source_a_licence_and_a_speed():
    assert len(ROWS) == 293 and len({row.id for row in ROWS}) == 293
    assert all(row.source and row.licence and row.step_seconds > 0 for row in ROWS)
    assert all(times.speed_of_row(row).memory_bytes_per_second for row in ROWS)


def test_at_most_a_tenth_of_the_rows_is_fitted_and_two_thirds_were_unread():
    fitted = [row for row in ROWS if row.id in times.FITTED]
    assert len(fitted) == len(times.FITTED) <= len(ROWS) / 10
    assert 0.6 < sum(row.unread for row in ROWS) / len(ROWS) < 0.75


def test_the_report_holds_every_row_and_its_own_sums():
    assert [result["id"] for result in REPORT["rows"]] == [row.id for row in ROWS]
    assert REPORT["summaries"] == times.summaries(REPORT["rows"])
    assert REPORT["ratios"] == times.ratios(REPORT["rows"])


def test_a_row_is_compared_with_what_was_measured():
    (row,) = [row for row in ROWS if row.id == "time-mistral-main-011"]
    compared = times.compare(row, 2 * row.step_seconds)
    assert (compared["error_percent"], compared["fitted"]) == (100.0, True)


def test_peft_s_other_methods_were_all_unread_and_the_worst_is_told():
    (found,) = (item for item in REPORT["summaries"] if item["kind"] == "L40S, other methods")
    assert (found["rows"], found["unread"], found["worst_percent"]) == (46, True, -72.53)
    rows = [row for row in REPORT["rows"] if row["kind"] == "L40S, other methods"]
    assert len(rows) == 49 and sum(abs(row.get("error_percent", 99)) <= 30 for row in rows) == 43
    assert "-72.5 %" in PAGE and "43 of the 46" in PAGE


def test_the_page_shows_the_report():
    for summary in REPORT["summaries"]:
        if summary["rows"] > 10:
            line = f"{summary['rows']} | {summary['median_percent']:.1f} % | {summary['worst_percent']:+.1f} %"
            assert line in PAGE, summary
