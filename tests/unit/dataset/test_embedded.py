"""The embedded source: how much it knows, that it is right Bash, unambiguous, safe, and the same for a seed."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.files import read_yaml
from scripts.common.syntax import check_syntax
from scripts.dataset.embedded import VOCABULARY, generate, read_vocabulary
from scripts.dataset.text import clean_command, clean_request, command_key, defect, request_key

ROOT = Path(__file__).resolve().parents[3]
AREAS = {
    "archives", "containers", "disks", "files", "git", "network", "packages", "permissions", "processes", "systemd",
    "text",
}  # fmt: skip
# SHA-256 of what the command prints. A row that changes here changes every model trained on the embedded data.
ROWS = {
    (42, 4800): "3b53abaa5c06b890de2f21e807a0a4d6f2029ffc05360857d982efc6409ca6e5",
    (42, 300): "3c2db9fc424e821b436a6e9eab22cc71e17c10930b094b43ea71489843cd0d8f",
    (7, 500): "51860850820c75e824dfd117c957ea08a2eaa0de8709628c55529396b4675b1a",
    (1, 20000): "c79c813ab9cd97f697dbc45a440abdee211b2eb8099a1b338aeab3670e408851",
}


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return list(generate(seed=42, pairs=20_000))


@pytest.mark.parametrize(("seed", "number"), ROWS)
def test_the_rows_stay_the_same_byte_for_byte(seed, number):
    digest = hashlib.sha256()
    for row in generate(seed, number):
        digest.update((json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n").encode())
    assert digest.hexdigest() == ROWS[seed, number]


def test_the_intents_are_many_and_each_slot_is_used():
    _, slots, intents = read_vocabulary()
    assert len(intents) >= 80
    assert set(read_yaml(VOCABULARY)["intents"]) == AREAS
    assert all(len(intent.requests) >= 5 for intent in intents)
    assert {name for intent in intents for name in re.findall(r"<([a-z_]+?)\d?>", intent.command)} == set(slots)


WORDS = """\
frames: {"{Imperative}": 2, "How do I {imperative}?": 1}
slots:
  file: [[a b, .txt .csv]]
  dir: [the current directory => ., src]
  one: [only]
intents:
  files:
    copy:
      command: cp <file> <dir>
      requests: [copy <file> to <dir>, "~ copy of <file>, to <dir>"]
    rename:
      command: mv <file> <file2>
      requests: [call <file> <file2>]
"""


def vocabulary_of(folder, text):
    (folder / "words.yaml").write_text(text)
    return read_vocabulary(folder / "words.yaml")


def test_a_vocabulary_of_another_file(tmp_path):
    vocabulary = vocabulary_of(tmp_path, WORDS)
    assert vocabulary.slots["file"] == ["a.txt", "a.csv", "b.txt", "b.csv"]
    rows = list(generate(1, 30, vocabulary))
    assert {row["intent"] for row in rows} == {"copy", "rename"}
    assert any(row["request"].endswith("to the current directory") and row["command"].endswith(" .") for row in rows)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("slots:", "slotz:", ["Unknown key: slotz", "write:   slots:"]),
        ("command: cp <file> <dir>", "comand: cp <file> <dir>", ["intents.files.copy.comand", "command: cp"]),
        ("      command: cp <file> <dir>\n", "", ["A key is missing: intents.files.copy.command", "write:"]),
        ("cp <file> <dir>", "7", ["intents.files.copy.command is text", "command: '7'"]),
        ("cp <file> <dir>", "ls", ["Wrong value for intents.files.copy.command", "<[a-z_]+"]),
        ("cp <file> <dir>", "cp <fil> <dir>", ["<fil> has no value", "intents.files.copy", "cp <file> <dir>"]),
        ("mv <file> <file2>", "mv <one> <one2>", ["<one2> has no second value", "intents.files.rename"]),
        ("copy <file> to <dir>", "copy <file>", ["does not name the slots", "write:   - copy ... <file> <dir>"]),
        ("mv <file> <file2>", "cp <file> <dir>", ["does not name the slots", "intents.files.rename"]),
        ("    rename:", "    copy:", ["'copy' stands here twice", "lines 8 and 11"]),
        ("a b, .txt", "a a, .txt", ["a value twice", "slots.file", "a.txt"]),
        ("[only]", "[]", ["slots.one is an empty list"]),
        ("[only]", "[7]", ["slots.one.0 is text", "one: ['7']"]),
        ('"{Imperative}": 2', '"{Other}": 2', ["A name under frames", "How do I {imperative}?"]),
        ('"{Imperative}": 2', '"{Imperative}": 0', ["Wrong value for frames.{Imperative}", "at least 1"]),
        ("slots:\n", "slots: [\n", ["not YAML", "words.yaml, line"]),
    ],
)
def test_wrong_words_are_an_error_that_names_the_place(tmp_path, old, new, expected):
    assert WORDS.count(old) >= 1
    with pytest.raises(UserError) as error:
        vocabulary_of(tmp_path, WORDS.replace(old, new, 1))
    for text in [*expected, str(tmp_path / "words.yaml")]:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("again", "place"),
    [
        ("    again:\n      command: mv <file> <file2>\n      requests: [name <file> <file2>]\n", "files.again"),
        ("  text:\n    rename:\n      command: cat <file>\n      requests: [show <file>]\n", "text.rename"),
    ],
)
def test_two_intents_with_one_command_or_name(tmp_path, again, place):
    with pytest.raises(UserError, match="one name or command") as error:
        vocabulary_of(tmp_path, WORDS + again)
    assert f"intents.{place}" in str(error.value) and "intents.files.rename" in str(error.value)


def test_the_default_number_is_distinct_and_spread_over_all_intents():
    rows = list(generate(seed=42, pairs=4800))
    assert len({(row["request"], row["command"]) for row in rows}) == 4800
    counts = Counter(row["intent"] for row in rows)
    assert len(counts) == len(read_vocabulary().intents)
    assert max(counts.values()) - min(counts.values()) <= 1


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
        assert (clean_request(row["request"]), clean_command(row["command"])) == (row["request"], row["command"])
        assert len(row["command"].split()) <= 20
        assert not re.search(r"<[a-z_]+\d?>", row["request"] + row["command"].replace("< ", ""))


def test_the_screen_lets_every_command_pass(pairs):
    screen = pytest.importorskip("scripts.screen.policy").screen
    verdicts = {row["command"]: screen(row["command"]) for row in pairs}
    assert {command: verdict for command, verdict in verdicts.items() if verdict.status != "ok"} == {}


def test_requests_are_phrased_in_many_ways(pairs):
    starts = Counter(row["request"].split()[0] for row in pairs)
    assert len(starts) > 150
    assert sum(row["request"].endswith("?") for row in pairs) > 2_000
    assert sum(row["request"][0].islower() for row in pairs) > 2_000


def test_commands_repeat_seldom_so_groups_stay_small(pairs):
    assert max(Counter(command_key(row["command"]) for row in pairs[:4800]).values()) <= 10


def test_the_seed_decides_and_a_smaller_number_is_a_beginning(pairs):
    assert list(generate(seed=42, pairs=300)) == pairs[:300]
    assert list(generate(seed=43, pairs=300)) != pairs[:300]


def test_equal_bytes_in_two_processes():
    def run(hash_seed: str) -> bytes:
        command = [sys.executable, "-m", "scripts.dataset.embedded", "--pairs", "500", "--seed", "7"]
        return subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": hash_seed}, capture_output=True).stdout

    first = run("1")
    assert first == run("2")
    assert [json.loads(line) for line in first.splitlines()] == list(generate(seed=7, pairs=500))


def test_more_than_the_templates_can_say(tmp_path):
    with pytest.raises(UserError, match="cannot make that many") as error:
        list(generate(1, 10**6, vocabulary_of(tmp_path, WORDS)))
    assert "write:   pairs: " in str(error.value)
