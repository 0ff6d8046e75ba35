"""The answer that one reads in ten seconds: eight lines of 100 characters, and nothing said twice."""

import io
import shlex
import sys

import pytest

from dryfit.ask.command import main
from dryfit.ask.short import WIDTH

MOST_LINES, MOST_WORDS = 8, 90
PLAIN = (
    "qwen2.5-coder-7b --gpu 4090 --quick",
    "qwen2.5-coder-7b --gpu 4090 --method full --quick",
    "qwen2.5-coder-7b --gpu 4090 --method lora -s 2048 --quick",
    "qwen3-8b --quick",
    "llama-3.1-8b --gpu 24GiB --method lora -s 4096 -b 2 --quick",
    "qwen2.5-coder-7b --gpu t4 -s 2048 --quick",
    "qwen3-4b --gpu rtx-3060-12gb -s 1024 --like peft --quick",
)


class _Terminal(io.TextIOWrapper):
    """Standard output that is a terminal, in one encoding."""

    def isatty(self) -> bool:
        return True


def shown(line: str, monkeypatch: pytest.MonkeyPatch, encoding: str, *, terminal: bool) -> str:
    kind = _Terminal if terminal else io.TextIOWrapper
    output = kind(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", output)
        main(shlex.split(line))
        output.flush()
    return output.buffer.getvalue().decode(encoding)


@pytest.mark.few(2)
@pytest.mark.parametrize("line", PLAIN)
def test_a_plain_answer_has_eight_lines_of_a_hundred_characters(line, monkeypatch) -> None:
    text = shown(line, monkeypatch, "utf-8", terminal=False)
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES, text
    assert max(map(len, lines)) <= WIDTH + len(line), text  # the last lines repeat the question
    assert all(len(one) <= WIDTH for one in lines[:-1]), text
    assert len(text.split()) <= MOST_WORDS, len(text.split())
    assert "{" not in text, "no mapping in YAML"
    assert lines[-1].startswith("more: dryfit explain "), "where the rest stands"


def test_each_figure_of_the_short_answer_is_explains(monkeypatch) -> None:
    question = "qwen2.5-coder-7b --gpu 4090 --quick"
    short = shown(question, monkeypatch, "utf-8", terminal=False)
    whole = shown(f"explain {question}", monkeypatch, "utf-8", terminal=False)
    assert "needs 9.77 of 23.14 GiB, 13.37 to spare" in short
    for figure in ("9.77 GiB", "23.14 GiB", "13.37 GiB"):
        assert figure in whole
    for words in ("rule of thumb", "as TRL has it:", "defaults used:", "evidence: "):
        assert words in whole and words not in short


@pytest.mark.parametrize(
    ("encoding", "terminal", "no_color", "has", "lacks"),
    [
        ("utf-8", True, None, ("\x1b[1;32mFITS\x1b[0m", "█", " · "), ("#",)),
        ("utf-8", True, "1", ("FITS  ", "█"), ("\x1b",)),
        ("utf-8", False, None, ("FITS  ", "█"), ("\x1b",)),
        ("ascii", True, None, ("\x1b[1;32mFITS", "###", "; "), ("█", "·")),
    ],
)
def test_colour_and_blocks_stand_where_they_can_be_shown(
    encoding, terminal, no_color, has, lacks, monkeypatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    line = "qwen2.5-coder-7b --gpu 4090 --quick"
    text = shown(line, monkeypatch, encoding, terminal=terminal)
    assert all(part in text for part in has), text
    assert not any(part in text for part in lacks), text
