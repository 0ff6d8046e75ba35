"""The embedded source: requests and commands made from :mod:`scripts.dataset.intents`, the same for the same seed.

``python -m scripts.dataset.embedded --pairs 20000 [--seed 42]`` prints them, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator

from scripts.common.errors import UserError
from scripts.common.job import command as command_line
from scripts.dataset.intents import INTENTS, SLOTS, Intent
from scripts.dataset.text import key_number, request_key

_SLOT = re.compile(r"<([a-z_]+?)(\d?)>")
# Frames around an imperative, with their weights: half of the requests are plain.
_FRAMES = {
    "{Imperative}": 40,
    "{imperative}": 22,
    "How do I {imperative}?": 10,
    "How can I {imperative}?": 6,
    "Please {imperative}": 6,
    "I want to {imperative}": 5,
    "I need to {imperative}": 4,
    "Can you {imperative}?": 4,
    "Give me the command to {imperative}": 3,
}
_MISSES = 300  # so many draws without anything new: an intent has nothing left to say


def fill(intent: Intent, phrasing: str, rng: random.Random) -> tuple[str, str]:
    """Fill the slots of a phrasing and of the intent's command with the same values.

    Returns
    -------
    tuple of str
        The phrasing and the command.
    """
    shown: dict[str, str] = {}
    typed: dict[str, str] = {}
    for name, number in dict.fromkeys(_SLOT.findall(intent.command)):
        value = rng.choice(SLOTS[name])
        while number and value in (shown.get(name), typed.get(name)):
            value = rng.choice(SLOTS[name])
        left, _, right = value.partition(" => ")
        shown[name + number], typed[name + number] = left, right or left
    return (
        _SLOT.sub(lambda slot: shown[slot[1] + slot[2]], phrasing),
        _SLOT.sub(lambda slot: typed[slot[1] + slot[2]], intent.command),
    )


def frame(phrasing: str, rng: random.Random) -> str:
    """Turn a filled phrasing into a request: framed if it is an imperative, else as it stands."""
    if phrasing.startswith("~ "):
        phrasing = phrasing[2:]
        return phrasing if rng.random() < 0.5 else phrasing[0].upper() + phrasing[1:]
    if not phrasing[0].islower():
        return phrasing
    chosen = rng.choices(list(_FRAMES), weights=list(_FRAMES.values()))[0]
    return chosen.format(imperative=phrasing, Imperative=phrasing[0].upper() + phrasing[1:])


def _draw(intent: Intent, seed: int) -> Iterator[tuple[str, str]]:
    """Distinct requests for one intent, until it has nothing new to say. One stream per intent and seed."""
    rng = random.Random(f"{seed} {intent.name}")
    seen: set[int] = set()
    misses = 0
    while misses < _MISSES:
        phrasing, command = fill(intent, rng.choice(intent.phrasings), rng)
        request = frame(phrasing, rng)
        key = key_number(request_key(request))
        if key in seen:
            misses += 1
            continue
        seen.add(key)
        misses = 0
        yield request, command


def generate(seed: int, pairs: int) -> Iterator[dict]:
    """Make pairs of request and command, each intent in turn.

    Parameters
    ----------
    seed
        Equal seeds give equal rows; the first rows of a larger number are those of a smaller one.
    pairs
        How many.

    Yields
    ------
    dict
        ``request``, ``command``, ``intent``.

    Raises
    ------
    UserError
        When the templates can't make that many distinct pairs.
    """
    streams = {intent.name: _draw(intent, seed) for intent in INTENTS}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4800, help="how many")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    for row in generate(options.seed, options.pairs):
        print(json.dumps(row, sort_keys=True, ensure_ascii=False))


if __name__ == "__main__":
    command_line(main)
