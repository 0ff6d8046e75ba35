"""Rows follow how often programs are used, and what is held out was seen in other combinations."""

import itertools
from collections import Counter

import pytest

from scripts.dataset.embedded import generate, read_grammar
from scripts.dataset.usage import (
    HARM,
    HARM_SHARE,
    USAGE,
    first_program,
    may_be_held_out,
    most_used,
    parts_of,
    programs_of,
    read_uses,
    turns,
)
from will_it_fit.common.errors import UserError


def test_the_counts_of_the_sources_and_what_stands_for_a_missing_one():
    uses = read_uses()
    assert list(uses)[:4] == ["find", "xargs", "grep", "rm"]
    assert uses["find"] == 5457 + 566 and uses["whoami"] == 33 + 4  # NL2Bash's training and development sets
    assert 7 < uses["git"] / 20 == uses["awk"] / 15 < 10  # by the languages of their tldr pages
    assert list(most_used(3)) == ["find", "xargs", "grep"]
    assert most_used(len(uses)) == uses
    with pytest.raises(UserError, match="Not so many programs") as error:
        most_used(len(uses) + 1)
    assert error.value.write == f"programs: {len(uses)}"
    known = set().union(*(programs_of(intent.command) for intent in read_grammar().intents))
    assert set(uses) <= known, "a program without a task"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("programs: {}", "Wrong value for programs"),
        ("programs: {find: {}}", "find"),
        ("programs: {find: {commands: 0}}", "at least 1"),
        ("programs: {find: {command: 3}}", "Unknown key"),
    ],
)
def test_wrong_counts_are_named(tmp_path, text, expected):
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded.schema.yaml").write_text((USAGE.parent.parent / "embedded.schema.yaml").read_text())
    (tmp_path / "embedded" / "usage.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_uses(tmp_path / "embedded" / "usage.yaml")
    assert expected in str(error.value) and "usage.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("command", "programs", "parts"),
    [
        ("ls -lt <dir>", {"ls"}, {"ls", "ls -l", "ls -t"}),
        ("find <dir> -name '*.<kind>' | xargs grep -n '<word>'", {"find", "xargs", "grep"}, None),
        ("find <dir> -type f", {"find"}, {"find", "find -type", "find f"}),
        ("sudo chown -R <user>:<group> <folder>", {"chown"}, {"chown", "chown -R", "chown <user>:<group>"}),
        ("grep -E '<word>|<word2>' <text>", {"grep"}, {"grep", "grep -E", "grep '<word>|<word2>'"}),
        ("awk '{print $<column>}' <text> && wc -l", {"awk", "wc"}, None),
        ("cut -d, -f<column> <csv>", {"cut"}, {"cut", "cut -d,", "cut -f<column>"}),
        ("find <dir> -print0 | xargs -0 rm", {"find", "xargs", "rm"}, None),
        ("ls <dir> | xargs -I {} cp {} <folder>", {"ls", "xargs", "cp"}, None),
        ("ls <dir> | xargs -n1 -P <count> -r gzip", {"ls", "xargs", "gzip"}, None),
        ("cat <text> | xargs -n <count>", {"cat", "xargs"}, None),
        ("cat <text> | xargs", {"cat", "xargs"}, None),
    ],
)
def test_programs_and_parts_of_a_command(command, programs, parts):
    assert programs_of(command) == programs
    assert parts is None or parts_of(command) == parts


def test_what_may_be_held_out_leaves_all_of_its_parts():
    commands = ["ls", "ls -a", "ls -l", "ls -al", "ls -t", "sort -u", "sort"]
    free = may_be_held_out(commands)
    assert free == [True, True, True, False, False, False, True]
    left = set().union(*(parts_of(command) for command, one in zip(commands, free, strict=True) if not one))
    assert all(parts_of(command) <= left for command in commands)


def test_every_part_of_a_held_out_command_stands_in_a_training_command_of_the_program():
    by_name = {intent.name: intent for intent in read_grammar().intents}
    rows = [row for row in generate(42, 1900, programs=30) if "family" not in row]
    kept = {row["intent"] for row in rows if row.get("split") == "train"}
    free = {row["intent"] for row in rows} - kept
    assert len(free) > 300 and len(kept) > 150
    left = set().union(*(parts_of(by_name[name].command) for name in kept))
    assert [name for name in free if not parts_of(by_name[name].command) <= left] == []


def test_rows_follow_the_use_of_programs_and_only_the_most_used_are_asked_about():
    rows = list(generate(42, 1900, programs=30))
    harm = [row for row in rows if "family" in row]
    assert abs(len(harm) - HARM_SHARE * len(rows)) < 0.02 * len(rows)
    about = {intent.name: first_program(intent.command) for intent in read_grammar().intents}
    had = Counter(about[row["intent"]] for row in rows if "family" not in row)
    uses = most_used(30)
    assert {*had} == {*uses} - {"xargs"}, "nothing begins with xargs"
    assert had["find"] > 2 * had["grep"] > 4 * had["tar"]
    wanted = (uses["find"] / uses["ls"]) ** 0.5
    assert abs(had["find"] / had["ls"] - wanted) < 0.1 * wanted
    assert all(
        programs_of(intent.command) <= {*uses}
        for intent in read_grammar().intents
        if about[intent.name] in had and intent.name in {row["intent"] for row in rows} and not intent.family
    )
    commands = " ".join(row["command"] for row in rows)
    assert "| xargs -0 rm" in commands and "| xargs -I {} cp {}" in commands, "an option is taken for the program"
    assert max(Counter(row["intent"] for row in rows).values()) <= 5
    assert next(iter(generate(42, 300, programs=30)))["request"] == rows[0]["request"]


def test_a_turn_comes_by_the_root_of_the_uses():
    groups = {0: "often", 1: "often", 2: "seldom", 4: HARM}
    taken = list(itertools.islice(turns(groups, {"often": 400, "seldom": 100}), 12))
    assert [number in (0, 1) for number in taken if number != 4].count(True) in (7, 8)
    assert Counter(taken)[4] == 1 and {0, 1, 2} <= set(taken)
    assert Counter(itertools.islice(turns(groups, {"often": 400, "seldom": 100}), 400))[2] > 50, "turns have no end"
    with pytest.raises(UserError, match="No intent") as error:
        next(turns({0: HARM}, {"often": 1}))
    assert (error.value.found, error.value.write) == ("often", "programs: 30")
