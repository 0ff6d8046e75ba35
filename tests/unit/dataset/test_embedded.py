"""The embedded source: how much it knows, that it is right Bash, unambiguous, safe, and the same for a seed."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.syntax import check_syntax
from scripts.dataset.embedded import generate
from scripts.dataset.intents import INTENTS, SLOTS
from scripts.dataset.text import clean_command, clean_request, command_key, defect, request_key

ROOT = Path(__file__).resolve().parents[3]
AREAS = {
    "archives", "containers", "disks", "files", "git", "network", "packages", "permissions", "processes", "systemd",
    "text",
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return list(generate(seed=42, pairs=20_000))


def test_the_intents_are_many_distinct_and_complete():
    assert len(INTENTS) >= 80
    assert {intent.area for intent in INTENTS} == AREAS
    assert len({intent.name for intent in INTENTS}) == len({intent.command for intent in INTENTS}) == len(INTENTS)
    slot = re.compile(r"<([a-z_]+?)(\d?)>")
    for intent in INTENTS:
        assert len(set(intent.phrasings)) >= 5, intent.name
        needed = set(slot.findall(intent.command))
        assert needed and {name for name, _ in needed} <= set(SLOTS), intent.name
        for phrasing in intent.phrasings:
            # Whatever changes the command is said in the request.
            assert set(slot.findall(phrasing)) == needed, (intent.name, phrasing)
    assert all(len(set(values)) == len(values) for values in SLOTS.values())


def test_the_default_number_is_distinct_and_spread_over_all_intents():
    rows = list(generate(seed=42, pairs=4800))
    assert len({(row["request"], row["command"]) for row in rows}) == 4800
    counts = Counter(row["intent"] for row in rows)
    assert len(counts) == len(INTENTS)
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
    screen = pytest.importorskip("scripts.dataset.screen").screen
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


def test_more_than_the_templates_can_say(monkeypatch):
    monkeypatch.setattr("scripts.dataset.embedded.INTENTS", INTENTS[:1])
    with pytest.raises(UserError, match="cannot make that many"):
        list(itertools.islice(generate(seed=1, pairs=10**9), 10**6))
