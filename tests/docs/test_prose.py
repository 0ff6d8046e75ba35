"""The documents stay easy to read: short sentences and plain words."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "dryfit" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "config").rglob("*.md")),
    ROOT / "results" / "README.md",
]
WORDS = 30  # of a sentence, at most
UNPLAIN = re.compile(
    r"\b(?:is none|are none|was none|there is none|none is|none are|said of|told of|told apart|asked of|others'"
    r"|what became of|all the same|nobody knows|and how far|so that it is)\b",
    re.IGNORECASE,
)
# What is no prose: metadata, fenced code, comments and tags, images; then lines of tables and headings.
_BLOCKS = re.compile(
    r"\A---\n.*?\n---\n|^(`{3,})[^\n]*\n.*?^\1$|<!--.*?-->|</?\w+[^>\n]*>|!\[.*?\]\(.*?\)",
    re.M | re.S,
)
_LINES = re.compile(r"^(?:\s*\|.*|#.*|-{3,})$", re.M)
_SPANS = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
_ITEMS = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*>]|\d+\.) )")
_ENDS = re.compile(r"(?<=[.!?])[\"')*_]{0,3}\s+(?=[\"'(*_]{0,3}[\w§])")


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page in Markdown; a code span counts as one word, a link as its text."""
    text = _LINES.sub("", _BLOCKS.sub("", text))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", _SPANS.sub("§", text))
    for item in _ITEMS.split(text):
        yield from (
            " ".join(part.split()) for part in _ENDS.split(item.strip(" \n-*>")) if part.strip()
        )


def complaints(text: str) -> list[str]:
    """What a tired reader would stumble over, each with its sentence."""
    found = []
    for sentence in sentences(text):
        count = len(re.findall(r"\S*[\w§]\S*", sentence))
        plain = sentence.lstrip("*_\"'(")
        found += [f"{count} words: {sentence}"] if count > WORDS else []
        found += [f"{phrase[0]!r}: {sentence}" for phrase in UNPLAIN.finditer(plain)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_tired_reader_understands_each_sentence(page: Path) -> None:
    assert complaints(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One short sentence. And `a command with many words in it` that counts as one.", []),
        ("word " * 31 + ".", ["31 words"]),
        ("- " + "word " * 20 + "\n- " + "word " * 20, []),
        ("| " + "word " * 40 + "|", []),
        ("```\n" + "word " * 40 + "\n```\n", []),
        ("The machine is none that works.", ["'is none'"]),
        ("No row was read. **Not** tried.", []),
    ],
)
def test_what_counts(text: str, found: list[str]) -> None:
    said = complaints(text)
    assert len(said) == len(found) and all(
        line.startswith(start) for line, start in zip(said, found, strict=True)
    )
