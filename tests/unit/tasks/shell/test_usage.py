"""Rows follow how often programs are used, and what is held out was seen in other combinations."""

import itertools
from collections import Counter

import pytest

from dryfit.common.errors import UserError
from scripts.tasks.shell.embedded import generate, read_grammar
from scripts.tasks.shell.usage import (
    HARM,
    HARM_SHARE,
    LEAST_ROWS,
    USAGE,
    first_program,
    may_be_held_out,
    most_used,
    parts_of,
    programs_of,
    read_uses,
    turns,
)


def test_the_counts_of_the_sources_and_what_stands_for_a_missing_one():
    uses = read_uses()
    assert list(uses)[:4] == ["find", "xargs", "grep", "rm"]
    assert (
        uses["find"] == 5457 + 566 and uses["whoami"] == 33 + 4
    )  # NL2Bash's training and development sets
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
    (tmp_path / "embedded.schema.yaml").write_text(
        (USAGE.parent.parent / "embedded.schema.yaml").read_text()
    )
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
        (
            "sudo chown -R <user>:<group> <folder>",
            {"chown"},
            {"chown", "chown -R", "chown <user>:<group>"},
        ),
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


@pytest.mark.parametrize(
    ("commands", "rows", "free"),
    [
        (["ls", "ls -a", "ls -l", "ls -al", "ls -t"], [5, 5, 5, 5, 5], "ls"),
        # In three rows of others a part is not learned, in four it is.
        (["ls -al", "ls -a", "ls -l", "ls -at", "ls -lt"], [1, 1, 1, 2, 2], ""),
        (["ls -al", "ls -a", "ls -l", "ls -at", "ls -lt"], [1, 2, 2, 2, 2], "ls -al"),
        # In the others -t never stands without -r: which of the two sorts by time, nobody can tell.
        (["ls -lt", "ls -rt", "ls -art", "ls -l", "ls -al"], [5, 5, 5, 5, 5], "ls -l"),
        # The same companion in the held-out command does no harm.
        (
            [
                "find -type f -empty",
                "find -type f",
                "find -type f -size",
                "find -empty",
                "find -empty -ls",
            ],
            [5] * 5,
            "find -type f -empty",
        ),
        # One other intent is one companion, however many rows it has.
        (["sort -u", "sort -ru", "sort -r", "sort"], [5, 50, 5, 5], "sort"),
    ],
)
def test_what_may_be_held_out_is_taught_by_the_others(commands, rows, free):
    found = may_be_held_out(commands, rows)
    assert ", ".join(command for command, one in zip(commands, found, strict=True) if one) == free


def test_the_rows_of_others_teach_each_part_of_what_is_held_out():
    by_name = {intent.name: parts_of(intent.command) for intent in read_grammar().intents}
    for made in (
        generate(42, 1900, programs=30),
        generate(42, 600, programs=10, intents=100, known=100),
    ):
        rows = [row for row in made if "family" not in row and row.get("split") != "known"]
        kept = Counter(row["intent"] for row in rows if row.get("split") == "train")
        free = {row["intent"] for row in rows} - {*kept}
        assert len(free) > 20 and len(kept) > 60
        for part in set().union(*(by_name[name] for name in free)):
            having = [name for name in kept if part in by_name[name]]
            assert (
                sum(kept[name] for name in having) > LEAST_ROWS
                and len({by_name[name] for name in having}) > 1
            )
            always = frozenset.intersection(*(by_name[name] for name in having))
            assert all(always <= by_name[name] for name in free if part in by_name[name]), part


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
        if about[intent.name] in had
        and intent.name in {row["intent"] for row in rows}
        and not intent.family
    )
    commands = " ".join(row["command"] for row in rows)
    assert "| xargs -0 rm" in commands and "| xargs -I {} cp {}" in commands, (
        "an option is taken for the program"
    )
    assert max(Counter(row["intent"] for row in rows).values()) <= 5
    assert next(iter(generate(42, 300, programs=30)))["request"] == rows[0]["request"]


def test_a_turn_comes_by_the_root_of_the_uses():
    groups = {0: "often", 1: "often", 2: "seldom", 4: HARM}
    taken = list(itertools.islice(turns(groups, {"often": 400, "seldom": 100}), 12))
    assert [number in (0, 1) for number in taken if number != 4].count(True) in (7, 8)
    assert Counter(taken)[4] == 1 and {0, 1, 2} <= set(taken)
    counts = Counter(itertools.islice(turns(groups, {"often": 400, "seldom": 100}), 400))
    assert counts[2] > 50, "turns have no end"
    assert abs(counts[4] - HARM_SHARE * 400) < 5, "harm fills what programs leave"
    with pytest.raises(UserError, match="No intent") as error:
        next(turns({0: HARM}, {"often": 1}))
    assert (error.value.found, error.value.write) == ("often", "programs: 30")
