"""The embedded source: how much it knows, that it is right Bash, unambiguous, safe, and the same for a seed."""

import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from scripts.tasks.shell import embedded
from scripts.tasks.shell.cleaning import defect
from scripts.tasks.shell.embedded import (
    SLOT,
    generate,
    held_out_harm,
    misspell,
    read_grammar,
    read_refusals,
    sentence,
    with_options,
)
from scripts.tasks.shell.screen.policy import screen
from scripts.tasks.shell.syntax import check_syntax
from scripts.tasks.support.keys import clean_block, clean_request, request_key

ROOT = Path(__file__).resolve().parents[4]
# SHA-256 of what the command prints. A row that changes here changes every model trained on the embedded data.
ROWS = {
    (42, 1800): "5ea7966e5260caab85211388afbb9485656ec54eda63f9de2f80173b5310caeb",
    (42, 300): "56e8b141cfd349fae5854e92ccdf36b0eb5abca37a74ba4d76218341819dcdbd",
    (7, 500): "7db96ae93a95d8500565cc1a7e15e019ec208ce4ba70890927c764cade909dfa",
    (1, 20000): "f8812221143f796c127773e6cafb2a02879088b6e1c397af64c60144821624b1",
}


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return list(generate(seed=42, pairs=20_000))


@pytest.mark.few(1)
@pytest.mark.parametrize(("seed", "number"), ROWS)
def test_the_rows_stay_the_same_byte_for_byte(seed, number):
    digest = hashlib.sha256()
    for row in generate(seed, number):
        digest.update((json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n").encode())
    assert digest.hexdigest() == ROWS[seed, number]


@pytest.mark.thorough
def test_rows_of_known_kinds_have_words_and_values_that_no_training_row_has():
    rows = list(generate(42, 600, programs=10, intents=100, known=200))
    known, others = (
        [row for row in rows if (row.get("split") == "known") == held] for held in (True, False)
    )
    assert (len(known), len(others)) == (200, 600)
    assert len({row["intent"] for row in others if "family" not in row}) == 100
    trained = {row.get("family", row["intent"]) for row in others if row.get("split") == "train"}
    assert {row.get("family", row["intent"]) for row in known} <= trained
    harm = [row["request"] for row in known if "family" in row]
    assert len(harm) == 16 and not {*harm} & {row["request"] for row in others}
    by_name = {intent.name: intent for intent in read_grammar().intents}
    taught, kept = embedded._divided(read_grammar())
    for one, other in zip(taught.intents, kept.intents, strict=True):
        assert not {*one.do} & {*other.do} and (other.do or not one.family or one.do)
        assert {*one.do} | {*other.do} == {*by_name[one.name].do}
    first, second = (
        {name: {*itertools.chain(*values)} for name, values in one.slots.items()}
        for one in (taught, kept)
    )
    assert not first["file"] & second["file"] and not first["number"] & second["number"]
    assert first["who"] == second["who"], "what has to be translated is taught"
    commands = {row["command"] for row in others}
    assert not commands & {row["command"] for row in known if "family" not in row}
    with pytest.raises(UserError, match="cannot ask so often"):
        list(generate(42, 30, programs=3, intents=3, known=100_000))


def programs(command: str) -> set[str]:
    """The first words of a pipe's parts, without sudo and slots."""
    parts = (part.removeprefix("sudo ").split() for part in re.split(r" \|\|? | && ", command))
    return {words[0] for words in parts if re.fullmatch(r"[a-z][\w-]*", words[0])}


def test_the_grammar_knows_many_programs_options_and_pipes():
    grammar = read_grammar()
    assert len(grammar.intents) >= 2000
    assert len(set().union(*(programs(intent.command) for intent in grammar.intents))) >= 180
    stages = Counter(
        min(3, intent.command.count(" | ") + 1)
        for intent in grammar.intents
        if intent.name[:5] == "pipe."
    )
    assert stages[2] >= 200 and stages[3] >= 50
    used = {
        name
        for intent in grammar.intents
        for name, _ in SLOT.findall(" ".join((intent.command, *intent.do)))
    }
    assert used == set(grammar.slots)


@pytest.mark.thorough
def test_each_intent_is_said_in_eight_forms_at_least():
    grammar = read_grammar()
    places = {form: kind for kind, forms in grammar.forms.items() for form in forms}
    assert len(places) >= 30
    for intent in grammar.intents[::4]:
        rng = random.Random(1)
        said = [sentence(intent, grammar, rng) for _ in range(300)]
        assert {"imperative", "polite", "question", "situation", "terse", "typo"} <= {
            kind for _, kind in said
        }
        own = len(intent.do) + len(intent.asks) + len(intent.nouns)
        assert len({(kind, text.split()[0]) for text, kind in said}) + own >= 9, intent.name


GRAMMAR_FILES = {
    "slots": """\
slots:
  file: [[a b, .txt .csv]]
  dir: [the current directory => ., src]
  one: [only]
""",
    "forms": """\
forms:
  imperative: {"{Do}": 2}
  question: {"How do I {do}?": 1}
little: [the]
kinds: {file: [the file]}
""",
    "files": """\
copy:
  run: cp [] <file> <dir>
  do: copy <file> to <dir> | put a copy of <file> into <dir>
  with:
    -i: asking first | with a question
    -v: verbosely
rename:
  run: mv <file> <file2>
  do: call <file> <file2>
""",
    "pipes": """\
sources:
  names: {run: ls <dir>, things: files in <dir>}
stages:
  count: {run: wc -l, do: "count the {things}"}
  sort: {run: sort, do: "sort the {things}", things: "sorted {things}"}
ends:
  save: {run: "> <file>", do: "{do} and save that in <file>"}
""",
}


def grammar_of(folder, old="", new=""):
    """A small grammar in a folder, with one text replaced in the file that has it."""
    places = [name for name, text in GRAMMAR_FILES.items() if old in text]
    for name, text in GRAMMAR_FILES.items():
        (folder / f"{name}.yaml").write_text(
            text.replace(old, new, 1) if name == places[0] else text
        )
    return read_grammar(folder)


def test_a_grammar_of_another_folder(tmp_path):
    grammar = grammar_of(tmp_path)
    assert grammar.slots["file"] == [["a.txt", "a.csv", "b.txt", "b.csv"]]
    assert grammar.slots["dir"] == [["the current directory => ."], ["src"]]
    commands = {intent.name: intent.command for intent in grammar.intents}
    assert commands["files.copy -i -v"] == "cp -iv <file> <dir>"
    assert commands["pipe.names sort count"] == "ls <dir> | sort | wc -l"
    assert commands["pipe.names count save"] == "ls <dir> | wc -l > <file>"
    rows = list(generate(1, 60, grammar))
    assert {row["intent"] for row in rows} == set(commands)
    assert any(
        "the current directory" in row["request"] and row["command"].endswith(" .") for row in rows
    )


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("ls [] <dir>", (), "ls <dir>"),
        ("ls [] <dir>", ("-a", "-l"), "ls -al <dir>"),
        ("ls []", ("-t",), "ls -t"),
        ("tar -x[]f <tar>", ("-v",), "tar -xvf <tar>"),
        ("grep -r[] 'x' f", ("-n", "-A 3"), "grep -rn -A 3 'x' f"),
        (
            "find <dir> [^] -type f []",
            ("^-maxdepth 2", "-size +1M"),
            "find <dir> -maxdepth 2 -type f -size +1M",
        ),
        ("find <dir> [^] -type f []", (), "find <dir> -type f"),
    ],
)
def test_options_stand_where_people_write_them(command, options, expected):
    assert with_options(command, options) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("slots:", "slotz:", ["Unknown key: slotz", "write:   slots:"]),
        ("  run: cp", "  rum: cp", ["copy.rum", "files.yaml"]),
        ("  run: mv <file> <file2>\n", "", ["A key is missing: rename.run", "files.yaml"]),
        ("mv <file> <file2>", "7", ["rename.run is text", "run: '7'"]),
        (
            "cp [] <file> <dir>",
            "cp [] <fil> <dir>",
            ["<fil> has no value", "files.copy", "cp <file> <dir>"],
        ),
        ("mv <file> <file2>", "mv <one> <one2>", ["<one2> has no second value", "files.rename"]),
        (
            "copy <file> to <dir>",
            "copy <file>",
            ["does not name the slots", "a request with <file> <dir>"],
        ),
        ("mv <file> <file2>", "cp <file> <dir>", ["does not name the slots", "files.rename"]),
        ("rename:", "copy:", ["'copy' stands here twice", "lines 1 and 7"]),
        ("a b, .txt", "a a, .txt", ["a value twice", "slots.file", "a.txt"]),
        ("[only]", "[]", ["slots.one is an empty list"]),
        ("[only]", "[7]", ["slots.one.0 is text", "one: ['7']"]),
        ('"How do I {do}?": 1', '"How?": 1', ["How?", "forms.yaml"]),
        ('"{Do}": 2', '"{Do}": 0', ["forms.imperative.{Do}", "at least 1"]),
        ('"count the {things}"', '"count them"', ["stages.count.do", "pipes.yaml"]),
        ("slots:\n", "slots: [\n", ["not YAML", "slots.yaml, line"]),
        (
            "rename:",
            "again:\n  run: mv <file> <file2>\n  do: name <file> <file2>\nrename:",
            ["Two intents have one command", "files.again", "files.rename"],
        ),
        (
            "mv <file> <file2>",
            "mv [] <file> <file2>",
            [
                "",
                "a place for options and no option",
                "files.rename.run",
                "mv [] <file> <file2>",
                "the first [] is their place",
            ],
        ),
        (
            "    -v: verbosely\n",
            "    -v: verbosely\n  apart: [[-i, -n]]\n",
            [
                "",
                "names an option that `with` does not have",
                "files.copy.apart",
                "found:   '-n'",
                "allowed: -i, -v",
            ],
        ),
        ("    -i:", "    -1:", ["", "An option is a number", "files.copy", "write:   '-1': ..."]),
    ],
)
def test_wrong_words_are_an_error_that_names_the_place(tmp_path, old, new, expected):
    with pytest.raises(UserError) as error:
        grammar_of(tmp_path, old, new)
    for text in expected:
        assert text in str(error.value)
    assert (str(tmp_path) in str(error.value)) == (
        expected[0] != ""
    )  # not where intents are made of them


def test_rows_differ_and_only_requests_for_harm_are_families():
    rows = list(generate(seed=42, pairs=1800))
    assert len({row["intent"] for row in rows}) == 1800
    assert len({row["request"] for row in rows}) == 1800
    families = {intent.family for intent in read_grammar().intents if intent.family}
    assert families == {f"refuse.{category}" for category in read_refusals().taught}


def test_each_entry_of_a_slot_is_as_likely_as_the_others(tmp_path):
    rows = list(generate(1, 60, grammar_of(tmp_path, "src]", "[s t u v w x y z, 1 2 3]]")))
    here = sum(
        "the current directory" in row["request"]
        for row in rows
        if row["intent"][:10] == "files.copy"
    )
    there = sum(row["intent"][:10] == "files.copy" for row in rows)
    assert 0.3 < here / there < 0.7, (here, there)


def test_requests_for_harm_are_held_out_by_category():
    refusals = read_refusals()
    screened = {path.stem for path in (ROOT / "config/screen").glob("*.yaml")}
    screened -= {"places", "programs", "schema"}
    assert screened <= {*refusals.taught, *refusals.held_out}
    assert list(refusals.held_out) == sorted(screened)[1::3]
    asked = list(held_out_harm())
    assert len(asked) == 60 and len({row["request"] for row in asked}) == 60
    assert not any(SLOT.search(row["request"]) for row in asked)
    taught = {request for requests in refusals.taught.values() for request in requests}
    assert not taught & {request for requests in refusals.held_out.values() for request in requests}
    assert check_syntax([refusals.line])[0].error is None and screen(refusals.line).status == "ok"


def test_a_typo_leaves_slots_alone_and_more_than_can_be_said_is_refused(tmp_path):
    for seed in range(50):
        typed = misspell("copy <folder> to the <dir>", random.Random(seed))
        assert typed != "copy <folder> to the <dir>"
        assert typed.endswith("<folder> to the <dir>")
    with pytest.raises(UserError, match="cannot make that many") as error:
        list(generate(1, 10**6, grammar_of(tmp_path)))
    assert "write:   pairs: " in str(error.value)


@pytest.mark.thorough
def test_a_request_decides_its_command(pairs):
    commands = defaultdict(set)
    for row in pairs:
        commands[request_key(row["request"])].add(row["command"])
    assert [found for found in commands.items() if len(found[1]) > 1] == []


def test_the_commands_are_short_valid_bash_and_nothing_is_left_to_clean(pairs):
    syntax = check_syntax([row["command"] for row in pairs])
    assert [row["command"] for row, found in zip(pairs, syntax, strict=True) if found.error] == []
    for row in pairs:
        assert defect(row["request"], row["command"]) is None
        assert (clean_request(row["request"]), clean_block(row["command"])) == (
            row["request"],
            row["command"],
        )
        assert len(row["command"].split()) <= 24
        assert not re.search(r"<[a-z_]+\d?>", row["request"] + row["command"].replace("< ", ""))


@pytest.mark.thorough
def test_the_screen_lets_every_command_pass(pairs):
    verdicts = {row["command"]: screen(row["command"]) for row in pairs[:4000]}  # each intent twice
    assert {
        command: verdict for command, verdict in verdicts.items() if verdict.status != "ok"
    } == {}


def test_requests_are_phrased_in_many_ways_and_the_seed_decides(pairs):
    starts = Counter(row["request"].split()[0] for row in pairs)
    assert len(starts) > 150
    assert sum(row["request"].endswith("?") for row in pairs) > 2_000
    assert sum(row["request"][0].islower() for row in pairs) > 2_000

    def asked(rows):  # without what may be held out, which depends on all rows
        return [(row["request"], row["command"]) for row in rows]

    assert asked(generate(seed=42, pairs=300)) == asked(pairs[:300])
    assert asked(generate(seed=43, pairs=300)) != asked(pairs[:300])


@pytest.mark.thorough
def test_equal_bytes_in_two_processes():
    def run(hash_seed: str) -> bytes:
        command = [
            sys.executable,
            "-m",
            "scripts.tasks.shell.embedded",
            "--pairs",
            "500",
            "--seed",
            "7",
        ]
        return subprocess.run(
            command, cwd=ROOT, env={"PYTHONHASHSEED": hash_seed}, capture_output=True
        ).stdout

    first = run("1")
    assert first == run("2")
    assert [json.loads(line) for line in first.splitlines()] == list(generate(seed=7, pairs=500))


def test_options_that_contradict_each_other_or_share_a_value_do_not_stand_side_by_side(tmp_path):
    more = "    -v: verbosely\n    -n: without overwriting\n  apart: [[-i, -n]]\n"
    grammar = grammar_of(tmp_path, "    -v: verbosely\n", more)
    copies = {intent.command for intent in grammar.intents if intent.name.startswith("files.copy ")}
    assert copies == {f"cp -{letters} <file> <dir>" for letters in ("i", "v", "n", "iv", "vn")}
    more = "    -v: verbosely\n    -a <one>: after <one>\n    -b <one>: before <one>\n"
    (tmp_path / "another").mkdir()
    grammar = grammar_of(tmp_path / "another", "    -v: verbosely\n", more)
    commands = {
        intent.command for intent in grammar.intents if intent.name.startswith("files.copy ")
    }
    assert {
        "cp -a <one> <file> <dir>",
        "cp -v -a <one> <file> <dir>",
        "cp -v -b <one> <file> <dir>",
    } <= commands
    assert not any(command.count("<one>") > 1 for command in commands)
