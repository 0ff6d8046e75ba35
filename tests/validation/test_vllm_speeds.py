"""Published speeds of vLLM: what the roofline gives beside them. The rows that were held out stay unread here."""

import re
from pathlib import Path

import pytest

from validation.vllm_speeds import main, rows


@pytest.mark.parametrize(("use", "words"), [("development", "twelve"), ("seen", "Three others")])
def test_speeds_are_as_near_as_the_document_says(use, words, capsys):
    main(use)
    last = capsys.readouterr().out.splitlines()[-1]
    text = " ".join(Path("docs/grpo.md").read_text().split())
    assert words in text
    if use == "development":
        median, worst = re.search(r"median ([\d.]+) %, worst ([\d.]+) %", last).groups()
        assert f"{median} % in the median, {worst} at worst" in text


def test_half_of_the_table_was_held_out():
    assert {row["model"] for row in rows("held out")}.isdisjoint(
        row["model"] for row in rows("development")
    )
    assert len(rows("held out")) == 17
