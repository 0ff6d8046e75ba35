"""The table of timed steps, its summaries, and what the documentation says about them."""

import json
import statistics

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
    assert 0.6 < sum(not row.looked_at for row in ROWS) / len(ROWS) < 0.75


def test_the_report_holds_every_row_and_its_own_sums():
    assert [result["id"] for result in REPORT["rows"]] == [row.id for row in ROWS]
    assert REPORT["summaries"] == times.summaries(REPORT["rows"])
    assert REPORT["ratios"] == times.ratios(REPORT["rows"])


def test_a_row_is_compared_with_what_was_measured():
    (row,) = [row for row in ROWS if row.id == "time-mistral-main-011"]
    compared = times.compare(row, 2 * row.step_seconds)
    assert (compared["error_percent"], compared["fitted"]) == (100.0, True)


def test_all_of_the_l40s_rows_are_told_with_what_chose_the_share_of_its_cache():
    rows = [
        row for row in REPORT["rows"] if row["kind"].startswith("L40S") and not row.get("fitted")
    ]
    errors = {row["id"]: abs(row["error_percent"]) for row in rows if "error_percent" in row}
    assert len(errors) == 58 and statistics.median(errors.values()) < 7
    assert sum(error <= 20 for error in errors.values()) == 54 and not any(
        row["unread"] for row in rows
    )
    looked_at = {row.id for row in ROWS if row.looked_at}
    others = [error for name, error in errors.items() if name not in looked_at]
    assert (
        len(others) == 41
        and round(statistics.median(others), 1) == 6.4
        and sum(one <= 20 for one in others) == 38
    )
    assert all(
        told in PAGE
        for told in ("-68.1 %", "6.2 %, 54", "a third, 17", "38 of them are within 20 %")
    )


def test_the_page_shows_the_report():
    for summary in REPORT["summaries"]:
        if summary["rows"] > 10:
            line = f"{summary['rows']} | {summary['median_percent']:.1f} % | {summary['worst_percent']:+.1f} %"
            assert line in PAGE, summary
