"""Public reports: the table is whole, the unread half is the one that was drawn, and the documents say what it says."""

import re
from dataclasses import replace

import pytest

from dryfit.common.errors import UserError
from tests.repository import ROOT
from validation import reports

REPORTS = reports.read()
BY_ID = {report.id: report for report in REPORTS}
README = (ROOT / "dryfit" / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")


def test_there_are_as_many_as_were_asked_for():
    assert len(REPORTS) == len(BY_ID) >= 80
    decidable = [report.drawn for report in REPORTS if report.decidable == "yes"]
    assert [decidable.count(name) for name in reports.SEEDS] == [40] * 5


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.id)
def test_a_row_says_what_was_stated_assumed_and_found(report: reports.PublicReport):
    on_github = r"https://github\.com/[\w.-]+/[\w.-]+/(issues/\d+|pull/\d+|blob/[0-9a-f]{40}/\S+)"
    assert re.fullmatch(on_github if "//github.com" in report.link else r"https://\S+", report.link)
    assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", report.date)
    assert report.outcome in ("ran", "ran_out") and bool(report.where) == (
        report.outcome == "ran_out"
    )
    assert bool(report.peak_gib) == bool(report.peak_is) and float(report.peak_gib or 1) > 0
    assert report.decidable == "yes" or report.decidable.startswith("no: ")
    assert report.outcome_seen_before_question in ("yes", "no")
    assert report.settings and report.drawn in reports.DRAWN and "--gpu" in report.question
    files = [
        word
        for word in report.question.split()
        if word.endswith((".yaml", ".yml", ".sh", ".py", ".json"))
    ]
    assert all((reports.FILES / name).is_file() for name in files)
    for said in (report.verdict, report.first_verdict):
        assert said in ("", reports.NOT_ASKED, *reports.VERDICTS)
    assert bool(report.first_verdict) or (
        report.drawn not in ("first", "third", "") and not report.verdict
    )
    assert bool(report.required_gib) == (report.verdict in reports.VERDICTS[:3])


def test_the_second_set_is_of_both_outcomes():
    decidable = [
        report
        for report in REPORTS
        if report.drawn in ("second", "rehearsal") and report.decidable == "yes"
    ]
    assert len(decidable) >= 80 and len({report.link for report in decidable}) >= 60
    assert 0.4 <= sum(report.outcome == "ran_out" for report in decidable) / len(decidable) <= 0.6


def test_each_wrong_verdict_has_its_cause():
    wrong = [
        report
        for report in REPORTS
        if reports.now(report) in ("unsafe", "wrong_on_the_safe_side", "no_answer")
    ]
    assert [report.id for report in wrong if not report.why] == []


def test_each_set_is_the_one_that_was_drawn():
    for name in reports.SEEDS:
        decidable = {
            report.id for report in REPORTS if report.drawn == name and report.decidable == "yes"
        }
        assert decidable == reports.draw(REPORTS, name)
    threads = [{one.link for one in REPORTS if one.drawn == drawn} for drawn in reports.DRAWN]
    assert len(set.union(*threads)) == sum(map(len, threads))


def test_the_first_verdict_of_a_report_is_kept():
    unread = replace(
        REPORTS[0], drawn="second", first_verdict="", verdict="", required_gib="", why=""
    )
    once = reports.asked(unread, {"error": "The file names no model."})
    assert (once.first_verdict, once.verdict, once.why) == (
        "no_answer",
        "no_answer",
        "The file names no model.",
    )
    answer = {"fits": True, "gpu": {"usable_bytes": 24 * 2**30}, "headroom_bytes": 2**30}
    again = reports.asked(once, answer)
    assert (again.first_verdict, again.verdict, again.required_gib) == (
        "no_answer",
        "fits",
        "23.00",
    )


def test_what_is_found_to_decide_nothing_keeps_its_first_verdict():
    unsafe = replace(
        REPORTS[0], decidable="yes", outcome="ran_out", first_verdict="fits", verdict="fits"
    )
    assert (reports.then(unsafe), reports.now(unsafe)) == ("unsafe", "unsafe")
    found = replace(unsafe, found_undecidable="the failure was no memory's")
    assert (reports.then(found), reports.now(found)) == ("unsafe", "undecidable")
    assert "the failure was no memory's" in reports.page([*REPORTS, replace(found, id="new-1")])


def test_another_set_is_of_threads_that_nobody_read():
    new = replace(
        REPORTS[0], id="new-1", link="https://github.com/huggingface/trl/issues/1", drawn=""
    )
    assert [
        report.drawn for report in reports.added(REPORTS, [new, REPORTS[0]])[len(REPORTS) :]
    ] == ["fifth"]
    with pytest.raises(UserError, match="threads that were read before: new-2"):
        reports.added(REPORTS, [replace(REPORTS[0], id="new-2")])


def test_each_draw_has_columns_and_a_line_of_its_own():
    columns = "drawn second, once | drawn second, now | rehearsal, once | rehearsal, now | drawn first, once"
    assert columns in reports.page(REPORTS)
    asked = [
        replace(report, first_verdict="fits") if report.drawn == "fifth" else report
        for report in REPORTS
    ]
    _, _, fifth, fourth, third, second, _, worst = reports.readme_lines(asked).splitlines()
    ran_out = [
        report.id for report in asked if report.drawn == "fifth" and report.outcome == "ran_out"
    ]
    start = "| fifth, unread until commit 1b6b5838 of 2026-12-02 | 40 |"
    assert fifth.startswith(f"{start} {40 - len(ran_out)} | {len(ran_out)} |")
    assert fourth.startswith(
        "| fourth, unread until commit 565a3f00 of 2026-12-02 | 40 | 27 | 5 | 5 | 3 |"
    )
    assert third.startswith(
        "| third, unread until commit eec7c233 of 2026-12-01 | 40 | 27 | 8 | 5 | 0 |"
    )
    assert second.startswith(
        "| second, unread until commit 57d9f232 of 2026-12-01 | 40 | 29 | 5 | 2 | 4 |"
    )
    assert worst.startswith(
        f"Of the fifth draw 17 ran out of memory, and of these it said FITS to {', '.join(ran_out)}. "
    )
    assert "The first draw was 27 right and 9 unsafe of 38. Of it and 77 reports beside it" in worst


def test_no_file_lies_beside_without_a_question():
    named = " ".join([report.question for report in REPORTS])
    texts = "".join(
        path.read_text(encoding="utf-8") for path in reports.FILES.iterdir() if path.is_file()
    )
    for path in reports.FILES.rglob("*.*"):
        assert path.name in named or path.name in texts


@pytest.mark.parametrize(
    ("outcome", "peak", "said", "expected"),
    [
        ("ran_out", "", "does_not_fit", "right"),
        ("ran_out", "", "too_close", "right"),
        ("ran_out", "", "fits", "unsafe"),
        ("ran_out", "", "no_answer", "no_answer"),
        ("ran", "", "fits", "right"),
        ("ran", "", "does_not_fit", "wrong_on_the_safe_side"),
        ("ran", "23.3", "too_close", "right"),  # 97 % of 24 GiB
        ("ran", "23.2", "too_close", "wrong_on_the_safe_side"),
        ("ran", "", "too_close", "wrong_on_the_safe_side"),
        ("ran", "", "", ""),
    ],
)
def test_what_agrees(outcome: str, peak: str, said: str, expected: str):
    report = replace(
        REPORTS[0], decidable="yes", outcome=outcome, peak_gib=peak, peak_is=peak and "stated"
    )
    assert reports.agreement(report, said, "24.00") == expected
    assert (
        not said
        or reports.agreement(replace(report, decidable="no: why"), said, "24.00") == "undecidable"
    )


def test_the_documents_say_what_the_table_says():
    assert reports.page(REPORTS) == PAGE
    assert reports.readme_lines(REPORTS) in README


@pytest.mark.thorough
def test_the_same_is_answered_again():
    report = BY_ID["al-28-7b"]
    again = reports.asked(report, reports.ask(report))
    assert (again.verdict, again.required_gib) == (report.verdict, report.required_gib)
