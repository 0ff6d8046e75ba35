"""The embedded source: requests and commands made from ``config/datasets/embedded.yaml``, the same for the same seed.

``python -m scripts.dataset.embedded --pairs 20000 [--seed 42]`` prints them, one JSON object a line.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from scripts.common.digests import ROOT
from scripts.common.errors import UserError
from scripts.common.files import read_yaml
from scripts.common.job import command as command_line
from scripts.dataset.text import key_number, request_key
from scripts.settings.configuration import validate

VOCABULARY = ROOT / "config" / "datasets" / "embedded.yaml"
_SLOT = re.compile(r"<([a-z_]+?)(\d?)>")
_MISSES = 300  # so many draws without anything new: an intent has nothing left to say


class Intent(NamedTuple):
    """One thing that people ask for: its name, the one Bash command, and the ways to ask, all with slots."""

    name: str
    command: str
    requests: tuple[str, ...]


class Vocabulary(NamedTuple):
    """What pairs are made of: frames around an imperative with their weights, values of slots, intents in order."""

    frames: dict[str, int]
    slots: dict[str, list[str]]
    intents: tuple[Intent, ...]


@cache
def read_vocabulary(path: Path = VOCABULARY) -> Vocabulary:
    """Read the word lists and check them.

    A :class:`UserError` names the key and the line to write, when a value is not what ``embedded.schema.yaml`` allows,
    a slot is unknown, a request does not say all that changes its command, or a name, command or value occurs twice.
    """
    content = read_yaml(path)
    validate(content, read_yaml(VOCABULARY.with_name("embedded.schema.yaml")), path)
    slots: dict[str, list[str]] = {}
    for name, entries in content["slots"].items():
        parts = ([[entry]] if isinstance(entry, str) else map(str.split, entry) for entry in entries)
        slots[name] = ["".join(words) for part in parts for words in itertools.product(*part)]
        if twice := [value for value, times in Counter(slots[name]).items() if times > 1]:
            raise UserError("A slot has a value twice.", where=f"{path}: slots.{name}", found=twice)
    intents: list[Intent] = []
    places: dict[str, str] = {}  # of names and commands
    for area, named in content["intents"].items():
        for name, lists in named.items():
            intent = Intent(name, lists["command"], tuple(lists["requests"]))
            where = f"{path}: intents.{area}.{name}"
            _check_intent(intent, slots, where)
            for text in (name, intent.command):
                if text in places:
                    raise UserError(
                        f"Two intents have one name or command; see {places[text]}.", where=where, found=text
                    )
                places[text] = where
            intents.append(intent)
    return Vocabulary(content["frames"], slots, tuple(intents))


def _check_intent(intent: Intent, slots: dict[str, list[str]], where: str) -> None:
    """An intent's slots exist, those with a digit have a second value, and each request names all of them."""
    needed = list(dict.fromkeys(_SLOT.findall(intent.command)))
    for name, number in needed:
        if len(slots.get(name, ())) < 1 + bool(number):
            close = difflib.get_close_matches(name, slots, n=1) or ["..."]
            raise UserError(
                f"The slot <{name}{number}> has no {'second ' if name in slots else ''}value.",
                where=where,
                found=intent.command,
                allowed=", ".join(slots),
                write="command: " + intent.command.replace(f"<{name}{number}>", f"<{close[0]}{number}>"),
            )
    for request in intent.requests:
        if set(_SLOT.findall(request)) != set(needed):
            names = " ".join(f"<{name}{number}>" for name, number in needed)
            raise UserError(
                "A request does not name the slots of its command, so it can't be told what the command must be.",
                where=where,
                found=request,
                allowed=f"a request with {names}",
                write=f"- {_SLOT.sub('...', request)} {names}",
            )


def fill(intent: Intent, request: str, slots: dict[str, list[str]], rng: random.Random) -> tuple[str, str]:
    """Fill the slots of a request and of the intent's command with the same values; returns both."""
    shown, typed = {}, {}
    for name, number in dict.fromkeys(_SLOT.findall(intent.command)):
        value = rng.choice(slots[name])
        while number and value in (shown.get(name), typed.get(name)):
            value = rng.choice(slots[name])
        left, _, right = value.partition(" => ")
        shown[name + number], typed[name + number] = left, right or left
    return (
        _SLOT.sub(lambda slot: shown[slot[1] + slot[2]], request),
        _SLOT.sub(lambda slot: typed[slot[1] + slot[2]], intent.command),
    )


def frame(request: str, frames: dict[str, int], rng: random.Random) -> str:
    """The request as a person would put it: framed if it is an imperative, else as it stands."""
    if request.startswith("~ "):
        request = request[2:]
        return request if rng.random() < 0.5 else request[0].upper() + request[1:]
    if not request[0].islower():
        return request
    chosen = rng.choices(list(frames), weights=list(frames.values()))[0]
    return chosen.format(imperative=request, Imperative=request[0].upper() + request[1:])


def _draw(intent: Intent, vocabulary: Vocabulary, seed: int) -> Iterator[tuple[str, str]]:
    """Distinct requests for one intent, until it has nothing new to say. One stream per intent and seed."""
    rng = random.Random(f"{seed} {intent.name}")
    seen: set[int] = set()
    misses = 0
    while misses < _MISSES:
        filled, command = fill(intent, rng.choice(intent.requests), vocabulary.slots, rng)
        request = frame(filled, vocabulary.frames, rng)
        key = key_number(request_key(request))
        misses = misses + 1 if key in seen else 0
        if not misses:
            seen.add(key)
            yield request, command


def generate(seed: int, pairs: int, vocabulary: Vocabulary | None = None) -> Iterator[dict]:
    """Make pairs (``request``, ``command``, ``intent``) of a vocabulary (the project's own), each intent in turn.

    Equal seeds give equal rows; the first rows of a larger number are those of a smaller one. A :class:`UserError`
    says how many distinct pairs there are, when that is fewer.
    """
    vocabulary = vocabulary or read_vocabulary()
    streams = {intent.name: _draw(intent, vocabulary, seed) for intent in vocabulary.intents}
    made = 0
    while made < pairs:
        if not streams:
            raise UserError(
                "The templates cannot make that many distinct pairs.",
                where="dataset.sources: pairs",
                found=pairs,
                allowed=f"at most {made}",
                write=f"pairs: {made}",
            )
        for name in list(streams):
            if made == pairs:
                break
            pair = next(streams[name], None)
            if pair is None:
                del streams[name]
                continue
            made += 1
            yield {"request": pair[0], "command": pair[1], "intent": name}


def main() -> None:
    """Print pairs as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4800, help="how many")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    for row in generate(options.seed, options.pairs):
        print(json.dumps(row, sort_keys=True, ensure_ascii=False))


if __name__ == "__main__":
    command_line(main)
