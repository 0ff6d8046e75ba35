"""Threads of others about trainings of images, films, speech and encoders: the file, the draw, one question asked."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from validation import threads


def test_each_question_can_be_asked_and_the_draw_comes_out_again() -> None:
    rows = threads.read()
    assert len({row.id for row in rows}) == len(rows) and len(rows) >= 87
    for row in rows:
        words = shlex.split(row.question)
        named = Path(words[0])
        assert (
            named.suffix not in (".sh", ".toml", ".yaml", ".json")
            or (threads.FILES / named).is_file()
        ), row.id
        assert "--gpu" in words and row.link.startswith("https://") and row.settings
        assert row.outcome in ("ran", "ran_out") and row.drawn in (
            "first",
            "second",
            "third",
            *threads.LATER,
            "later",
        )
    assert threads.draw(rows) == {row.link for row in rows if row.drawn == "first"}
    for draw in threads.LATER:
        assert threads.later_draw(rows, draw) == {row.id for row in rows if row.drawn == draw}
    whole = {row.link for row in rows if row.drawn == "fifth"}
    assert all(row.drawn == "fifth" for row in rows if row.link in whole)


def test_the_file_is_written_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rows = threads.TABLE.read_text(encoding="utf-8"), threads.read()
    monkeypatch.setattr(threads, "TABLE", tmp_path / "threads.csv")
    threads.write(rows)
    assert threads.TABLE.read_text(encoding="utf-8") == before


def test_the_table_counts_each_question_and_names_those_that_are_wrong() -> None:
    rows = threads.read()
    told = threads.counts(rows, first=False)
    assert told["all"] == len(rows) == sum(count for name, count in told.items() if name != "all")
    lines = threads.table(rows).splitlines()
    wrong = told["unsafe"] + told["wrong_on_the_safe_side"]
    assert sum(line.startswith("| [") for line in lines) == wrong


def test_a_question_keeps_its_first_verdict() -> None:
    row = next(
        row for row in threads.read() if row.id == "df-8560"
    )  # no recipe trains all weights by this script
    now = threads.ask(replace(row, first_verdict="fits", verdict=""))
    assert (
        (now.verdict, now.first_verdict) == ("no_answer", "fits")
        and now.why
        and not now.required_gib
    )
