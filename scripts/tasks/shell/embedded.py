"""The embedded source: requests and commands made from the grammar in ``config/datasets/embedded/``.

A task (``tar -x[]f <tar>``) stands for as many intents as it has options and pairs of options that go together; a
source of lines and the stages of a pipe make the others. Each intent is put in many ways. Where rows of known intents
are held out, a phrase of each intent and a part of each slot's values are kept for them. The same seed gives the same
rows.
``python -m scripts.tasks.shell.embedded --pairs 2000 [--seed 42]`` prints them, one JSON object a line.
"""

import argparse
import difflib
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.schema import validate
from dryfit.common.terminal import command as command_line
from scripts.tasks.shell.refusals import GRAMMAR, SCHEMA, Refusals, read_refusals
from scripts.tasks.shell.usage import (
    HARM,
    HARM_SHARE,
    first_program,
    may_be_held_out,
    most_used,
    programs_of,
    turns,
)
from scripts.tasks.support.keys import key_number, request_key

SLOT = re.compile(r"<([a-z_]+?)(\d?)>")
_LETTER = re.compile(r"-[A-Za-z0-9]")
_MISSES = 300  # so many draws without anything new: an intent has nothing left to say
# Pairs of options of a task; pipes of two, of three, and into a file of a source: so many are made at most.
_PAIRS, _TWOS, _THREES, _ENDS = 6, 6, 2, 1
# Of a slot's values and of the requests for harm, every fourth and every eighth are kept for held-out rows.
_KEPT_VALUES, _KEPT_HARM = 4, 8
_GLUED = frozenset(
    "with without in at by from for as of to into and that only over under older larger".split()
)


class Intent(NamedTuple):
    """One thing that people ask for.

    ``family`` names what it shares with intents that must be in the same split, or is None. ``do`` are imperatives,
    ``asks`` questions and ``nouns`` what is wanted with its article, all with slots; ``options`` says the options of
    the command, each in several ways.
    """

    name: str
    family: str | None
    command: str
    do: tuple[str, ...]
    asks: tuple[str, ...]
    nouns: tuple[str, ...]
    options: tuple[tuple[str, ...], ...] = ()

    def phrases(self) -> Iterator[str]:
        """Every phrase with the options said in every way."""
        for phrase in (*self.do, *self.asks, *self.nouns):
            for options in itertools.product(*self.options):
                yield " ".join((phrase, *options))


class Grammar(NamedTuple):
    """Forms of sentences by kind, words that a terse request lacks, what stands before a slot, values, intents."""

    forms: dict[str, dict[str, int]]
    little: frozenset[str]
    kinds: dict[str, list[str]]
    slots: dict[str, list[list[str]]]
    intents: tuple[Intent, ...]


def ways(text: str | None) -> tuple[str, ...]:
    """The phrases of a line, which stand between ``|``."""
    return tuple(part.strip() for part in text.split("|")) if text else ()


def chance(*parts: str) -> int:
    """A number that is always the same for a text, as if drawn."""
    return int.from_bytes(hashlib.blake2b(" ".join(parts).encode(), digest_size=8).digest(), "big")


def with_options(command: str, options: tuple[str, ...]) -> str:
    """The command with options at its ``[]``, those that begin with ``^`` at its ``[^]``.

    Single letters stand behind one dash, or behind the letters that are there.
    """
    early = " ".join(option[1:] for option in options if option[0] == "^")
    later = [option for option in options if option[0] != "^"]
    letters = "".join(option[1] for option in later if _LETTER.fullmatch(option))
    words = [option for option in later if not _LETTER.fullmatch(option)]
    before, _, after = command.replace("[^]", early).partition("[]")
    if before and not before[-1].isspace():  # tar -x[]f
        before, letters = before + letters, ""
    if letters:
        words.insert(0, f"-{letters}")
    if words and after and not after[0].isspace():  # nothing can stand inside a word
        words.append("")
    glue = " " if words and before and not before[-1].isspace() else ""
    return re.sub(" {2,}", " ", f"{before}{glue}{' '.join(words)}{after}").strip()


def _task(area: str, name: str, task: Mapping[str, Any]) -> Iterator[Intent]:
    """The intents of a task: alone, with each option, with some pairs of options."""
    numbers = [
        key for kind in ("with", "more") for key in task.get(kind, {}) if not isinstance(key, str)
    ]
    if numbers:
        write = f"'{numbers[0]}': ..."
        raise UserError(
            "An option is a number, not text.", where=f"{area}.{name}", found=numbers, write=write
        )
    beside, alone = (
        {key: ways(text) for key, text in task.get(kind, {}).items()} for kind in ("with", "more")
    )
    said = {**beside, **alone}
    apart = task.get("apart", [])
    if unknown := [option for options in apart for option in options if option not in beside]:
        raise UserError(
            "`apart` names an option that `with` does not have.",
            where=f"{area}.{name}.apart",
            found=unknown[0],
            allowed=", ".join(beside),
        )
    if "[]" in task["run"] and not said:
        raise UserError(
            "A command has a place for options and no option.",
            where=f"{area}.{name}.run",
            found=task["run"],
            allowed="[] where `with` or `more` has options: the first [] is their place, others stay as they are",
        )
    pairs = [
        pair
        for pair in itertools.combinations(beside, 2)
        if _slots_differ(" ".join(pair)) and not any({*pair} <= {*options} for options in apart)
    ]
    pairs = sorted(pairs, key=lambda pair: chance(name, *pair))[:_PAIRS]
    nouns = tuple(f"the {text}" for text in (*ways(task.get("things")), *ways(task.get("thing"))))
    for options in [(), *((option,) for option in said), *pairs]:
        yield Intent(
            " ".join((f"{area}.{name}", *options)),
            None,
            with_options(task["run"], options),
            ways(task["do"]),
            ways(task.get("ask")),
            nouns,
            tuple(said[option] for option in options),
        )


def _pipes(pipes: Mapping[str, Any]) -> Iterator[Intent]:
    """Pipes of two, some of three, and some that end in a file."""
    stages: Mapping[str, Any] = pipes["stages"]
    for name, source in pipes["sources"].items():
        twos: list[Intent] = []
        threes: list[Intent] = []
        ends: list[Intent] = []
        for first, stage in stages.items():
            if stage.get("of") and not source.get(stage["of"]):
                continue
            two = _piped(
                f"pipe.{name} {first}", f"{source['run']} | {stage['run']}", stage, source["things"]
            )
            twos.append(two)
            for second, last in stages.items() if "things" in stage else ():
                if second != first and not last.get("of"):
                    things = stage["things"].format(things=source["things"])
                    threes.append(
                        _piped(
                            f"{two.name} {second}", f"{two.command} | {last['run']}", last, things
                        )
                    )
            for end, words in (
                pipes["ends"].items()
                if ">" not in stage["run"] and "less" not in stage["run"]
                else ()
            ):
                do = tuple(way.format(do=phrase) for way in ways(words["do"]) for phrase in two.do)
                ends.append(
                    Intent(f"{two.name} {end}", None, f"{two.command} {words['run']}", do, (), ())
                )
        for made, most in ((twos, _TWOS), (threes, _THREES), (ends, _ENDS)):
            usable = (one for one in made if _slots_differ(one.command))
            yield from sorted(usable, key=lambda one: chance(one.name))[:most]


def _slots_differ(command: str) -> bool:
    """Whether no slot stands there twice: the same value in two places is seldom what somebody wants."""
    names = [name + number for name, number in SLOT.findall(command)]
    return len(names) == len(set(names))


def _piped(name: str, command: str, stage: Mapping[str, Any], things: str) -> Intent:
    do, asks = (
        tuple(way.format(things=things) for way in ways(stage.get(key))) for key in ("do", "ask")
    )
    nouns = tuple(f"the {stage['things'].format(things=things)}" for _ in range("things" in stage))
    return Intent(name, None, command, do, asks, nouns)


def held_out_harm() -> Iterator[dict]:
    """The requests for harm that no row has, slots filled: ``request``, ``category``, ``command`` (the refusal)."""
    refusals, grammar = read_refusals(), read_grammar()
    for category, requests in refusals.held_out.items():
        for request in requests:
            intent = Intent(request, None, refusals.line, (request,), (), ())
            asked, line = fill(intent, request, grammar, random.Random(request))
            yield {"category": category, "command": line, "request": asked}


def _refused(refusals: Refusals) -> Iterator[Intent]:
    """An intent for each request for harm; those of a category are held together."""
    for category, requests in refusals.taught.items():
        family = f"refuse.{category}"
        for number, request in enumerate(requests, 1):
            yield Intent(f"{family} {number}", family, refusals.line, (request,), (), ())


@cache
def read_grammar(folder: Path = GRAMMAR) -> Grammar:
    """Read the files of a grammar and check them.

    A :class:`UserError` names the file and the line to write, when a value is not what ``embedded.schema.yaml`` allows,
    a slot is unknown, a request does not say all that changes its command, or a command or value occurs twice.
    """
    schemas = read_yaml(SCHEMA)
    files = {
        path.stem: read_yaml(path)
        for path in sorted(folder.glob("*.yaml"))
        if path.stem not in ("refusals", "usage")
    }
    for name, content in files.items():
        validate(content, schemas.get(name, schemas["tasks"]), folder / f"{name}.yaml")
    forms, pipes, slots = (
        files.pop("forms"),
        files.pop("pipes", None),
        _values(files.pop("slots"), folder),
    )
    made = [
        one
        for area, tasks in files.items()
        for name, task in tasks.items()
        for one in _task(area, name, task)
    ]
    asked = {intent.command for intent in made}  # a task puts it better than two stages do
    made += (intent for intent in _pipes(pipes) if intent.command not in asked) if pipes else ()
    places: dict[str, str] = {}
    for intent in made:
        where = f"{folder}, {intent.name}"
        _check_intent(intent, slots, where)
        if twice := places.get(intent.command):
            raise UserError(
                f"Two intents have one command; see {twice}.", where=where, found=intent.command
            )
        places[intent.command] = where
    if (folder / "refusals.yaml").exists():
        made += _refused(read_refusals(folder))
    made.sort(key=lambda intent: chance(intent.name))
    return Grammar(forms["forms"], frozenset(forms["little"]), forms["kinds"], slots, tuple(made))


def _values(content: Mapping[str, Any], folder: Path) -> dict[str, list[list[str]]]:
    """Each slot's values by entry, every combination of an entry's words written out."""
    slots: dict[str, list[list[str]]] = {}
    for name, entries in content["slots"].items():
        parts = (
            [[entry]] if isinstance(entry, str) else list(map(str.split, entry))
            for entry in entries
        )
        slots[name] = [["".join(words) for words in itertools.product(*part)] for part in parts]
        values = Counter(itertools.chain(*slots[name]))
        if twice := [value for value, times in values.items() if times > 1]:
            raise UserError(
                "A slot lists a value twice.",
                where=f"{folder}/slots.yaml: slots.{name}",
                found=twice,
            )
    return slots


def _check_intent(intent: Intent, slots: Mapping[str, list[list[str]]], where: str) -> None:
    """An intent's slots exist, those with a digit have a second value, and each request names all of them."""
    needed = list(dict.fromkeys(SLOT.findall(intent.command)))
    for name, number in needed:
        if sum(map(len, slots.get(name, ()))) < 1 + bool(number):
            close = difflib.get_close_matches(name, slots, n=1) or ["..."]
            raise UserError(
                f"The slot <{name}{number}> has no {'second ' if name in slots else ''}value.",
                where=where,
                found=intent.command,
                allowed=", ".join(slots),
                write="run: "
                + intent.command.replace(f"<{name}{number}>", f"<{close[0]}{number}>"),
            )
    for request in intent.phrases():
        if set(SLOT.findall(request)) != set(needed):
            names = " ".join(f"<{name}{number}>" for name, number in needed)
            raise UserError(
                "A request does not name the slots of its command, so it can't be told what the command must be.",
                where=where,
                found=request,
                allowed=f"a request with {names}" if names else "a request without slots",
            )


def misspell(text: str, rng: random.Random) -> str:
    """The text with one typo, in a word of four letters or more: two letters swapped, one lost or one doubled."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if places:
        place = rng.choice(places)
        word, at = words[place], rng.randrange(1, len(words[place]) - 1)
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        words[place] = rng.choice(
            [swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]]
        )
    return " ".join(words)


def _said(phrase: str, intent: Intent, rng: random.Random) -> str:
    """A phrase with the options of the intent behind it, before the question mark if it has one."""
    end = "?" if phrase.endswith("?") else ""
    text = phrase.removesuffix("?")
    for number, option in enumerate(intent.options):
        chosen = rng.choice(option)
        glued = chosen.split()[0] in _GLUED and rng.random() < 0.6
        text += (
            f" and {chosen}"
            if number and rng.random() < 0.5
            else f"{'' if glued else ','} {chosen}"
        )
    return text + end


def sentence(intent: Intent, grammar: Grammar, rng: random.Random) -> tuple[str, str]:
    """One way to ask for an intent, with its slots; and the kind of form that it has."""
    kinds = {
        kind: sum(forms.values())
        for kind, forms in grammar.forms.items()
        if (kind != "noun" or intent.nouns) and (kind != "tool" or "|" not in intent.command)
    }
    if intent.asks:
        kinds["ask"] = 10
    kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
    if kind == "ask":
        return _said(rng.choice(intent.asks), intent, rng), kind
    do = _said(rng.choice(intent.do), intent, rng)
    words = intent.command.split()
    fields = {"do": do, "Do": do[0].upper() + do[1:], "program": words[words[0] == "sudo"]}
    if kind == "noun":
        fields["the"] = _said(rng.choice(intent.nouns), intent, rng)
    elif kind == "terse":
        fields["terse"] = " ".join(word for word in do.split() if word not in grammar.little)
    elif kind == "typo":
        fields["typo"] = misspell(do, rng)
    form = rng.choices(list(grammar.forms[kind]), weights=list(grammar.forms[kind].values()))[0]
    return form.format(**fields), kind


def fill(intent: Intent, request: str, grammar: Grammar, rng: random.Random) -> tuple[str, str]:
    """Fill the slots of a request and of the intent's command with the same values; returns both.

    Each entry of a slot is as likely as the others, however many values it stands for.

    Now and then a value gets the kind of thing that it is before it ("the file notes.txt").
    """
    shown, typed = {}, {}
    for name, number in dict.fromkeys(SLOT.findall(f"{intent.command} {request}")):
        value = rng.choice(rng.choice(grammar.slots[name]))
        while number and value in (shown.get(name), typed.get(name)):
            value = rng.choice(rng.choice(grammar.slots[name]))
        left, _, right = value.partition(" => ")
        shown[name + number], typed[name + number] = left, right or left
    for name in dict.fromkeys(name for name, _ in SLOT.findall(request)):
        before, slot, after = request.partition(f"<{name}>")
        last = before.rstrip().rpartition(" ")[2]
        told = (
            name in grammar.kinds
            and slot
            and before.endswith(" ")
            and shown[name][:4] not in ("the ", "this", "my h")
        )
        if (
            told
            and last not in {word for kind in grammar.kinds[name] for word in kind.split()}
            and rng.random() < 0.25
        ):
            request = f"{before}{rng.choice(grammar.kinds[name])} {slot}{after}"
    return (
        SLOT.sub(lambda slot: shown[slot[1] + slot[2]], request),
        SLOT.sub(lambda slot: typed[slot[1] + slot[2]], intent.command),
    )


def _draw(intent: Intent, grammar: Grammar, seed: int) -> Iterator[tuple[str, str]]:
    """Distinct requests for one intent, until it has nothing new to say. One stream per intent and seed."""
    rng = random.Random(f"{seed} {intent.name}")
    seen: set[int] = set()
    misses = 0
    while misses < _MISSES:
        request, command = fill(intent, sentence(intent, grammar, rng)[0], grammar, rng)
        key = key_number(request_key(request))
        misses = misses + 1 if key in seen else 0
        if not misses:
            seen.add(key)
            yield request, command


def _divided(grammar: Grammar) -> tuple[Grammar, Grammar]:
    """The grammar of training rows and that of held-out rows: no phrase of an intent and no copied value is in both.

    Intents of one task keep the same phrase. An intent that can't be asked anew, with one phrase or without a value to
    copy, has no phrase in the second grammar; of the requests for harm each has one in one of the two.
    """
    slots, kept_slots = _divided_slots(grammar.slots)
    taught, kept = [], []
    for intent in grammar.intents:
        if intent.family:
            first, second = intent.do, ()
            if chance(intent.name) % _KEPT_HARM == 0:
                first, second = second, first
        elif len(intent.do) > 1 and any(
            name in kept_slots for name, _ in SLOT.findall(intent.command)
        ):
            at = chance(intent.name.split()[0]) % len(intent.do)
            first, second = intent.do[:at] + intent.do[at + 1 :], intent.do[at : at + 1]
        else:
            first, second = intent.do, ()
        taught.append(intent._replace(do=first))
        kept.append(intent._replace(do=second, asks=(), nouns=()))
    return (
        grammar._replace(slots=slots, intents=tuple(taught)),
        grammar._replace(slots={**slots, **kept_slots}, intents=tuple(kept)),
    )


def _divided_slots(slots: Mapping[str, list[list[str]]]) -> tuple[dict[str, list[list[str]]], ...]:
    """A slot's values for training, and those kept for held-out rows: only such as stand alike in both texts.

    What reads differently in request and command has to be taught. A slot with few other values keeps none.
    """
    taught, kept = dict(slots), {}
    for name, entries in slots.items():
        copied = [value for entry in entries for value in entry if " => " not in value]
        copied.sort(key=lambda value, name=name: chance(name, value))
        chosen = frozenset(copied[: len(copied) // _KEPT_VALUES])
        if len(chosen) > 1:  # a command may need two of them
            halves = [
                [[v for v in entry if (v in chosen) == held] for entry in entries]
                for held in (False, True)
            ]
            taught[name], kept[name] = ([entry for entry in half if entry] for half in halves)
    return taught, kept


def _order(grammar: Grammar, programs: int | None, intents: int | None) -> Iterator[int]:
    """Whose turn it is to be asked for, by number: all intents in turn, or by how often their programs are used."""
    if programs is None:
        return itertools.cycle(range(len(grammar.intents)))
    uses = most_used(programs)
    groups: dict[int, str] = {}
    for number, intent in enumerate(grammar.intents):
        if intent.family or programs_of(intent.command) <= {*uses}:
            groups[number] = HARM if intent.family else first_program(intent.command)
    if intents is not None:  # whole tasks, so that their options are met alone and in pairs
        by_task = sorted(
            groups, key=lambda number: (chance(grammar.intents[number].name.split()[0]), number)
        )
        harmless = (
            number for number in turns({number: groups[number] for number in by_task}, uses)
        )
        chosen: set[int] = set()
        most = sum(group != HARM for group in groups.values())
        while len(chosen) < min(intents, most):
            number = next(harmless)
            chosen |= {number} if groups[number] != HARM else set()
        groups = {
            number: group for number, group in groups.items() if number in chosen or group == HARM
        }
    return turns(groups, uses)


def generate(
    seed: int,
    pairs: int,
    grammar: Grammar | None = None,
    programs: int | None = None,
    intents: int | None = None,
    known: int = 0,
) -> Iterator[dict]:
    """Make pairs (``request``, ``command``, ``intent``, perhaps ``family`` and ``split``) of a grammar.

    Parameters
    ----------
    grammar
        The project's own where left out.
    programs
        How many of the most used programs are asked about, by how often they are used (``usage.py``).
        None: each intent is asked for once before any is asked for again.
    intents
        Of these programs, how many different things are asked for, beside harm. None: all.
    known
        How many further pairs ask for what others ask for, in phrases and with values that no other pair has.

    Yields
    ------
    dict
        A row. ``split: train`` says that its intent may not be held out, ``split: known`` that the row may, though its
        intent is trained. Equal seeds give equal rows; without ``known`` the pairs of a smaller number are the
        beginning of those of a larger one.

    Raises
    ------
    UserError
        With the number of distinct pairs, when that is smaller.
    """
    grammar = grammar or read_grammar()
    taught, kept = _divided(grammar) if known else (grammar, grammar)
    streams = {number: _draw(intent, taught, seed) for number, intent in enumerate(taught.intents)}
    made: list[tuple[int, tuple[str, str]]] = []
    misses = 0  # intents in a row with nothing new to say
    for number in _order(grammar, programs, intents):
        if len(made) == pairs:
            break
        if not taught.intents[number].do:
            continue
        if (pair := next(streams[number], None)) is not None:
            made.append((number, pair))
        misses = misses + 1 if pair is None else 0
        if misses > 2 * len(grammar.intents):
            raise UserError(
                "The grammar cannot make that many distinct pairs.",
                where="dataset.sources: pairs",
                found=pairs,
                allowed=f"at most {len(made)}",
                write=f"pairs: {len(made)}",
            )
    rows = Counter(number for number, _ in made if not grammar.intents[number].family)
    asked = sorted(rows)
    free = may_be_held_out(
        [grammar.intents[number].command for number in asked], [rows[number] for number in asked]
    )
    trained = [number for number, held_out in zip(asked, free, strict=True) if not held_out]
    kinds = {grammar.intents[number].family for number, _ in made} - {None}
    harm = [number for number, intent in enumerate(grammar.intents) if intent.family in kinds]
    bound = {
        *trained,
        *(harm if known else ()),
    }  # of each kind of harm some requests are kept, so each is trained
    for number, (request, command) in made:
        yield _row(grammar.intents[number], request, command, "train" if number in bound else None)
    of_harm = round(known * HARM_SHARE)
    yield from _known_rows(kept, harm, of_harm, seed)
    yield from _known_rows(kept, trained, known - of_harm, seed)


def _known_rows(kept: Grammar, numbers: list[int], wanted: int, seed: int) -> Iterator[dict]:
    """Rows of trained intents in the phrases and with the values kept for them, one of each before the next."""
    waiting = [
        (number, _draw(kept.intents[number], kept, seed))
        for number in numbers
        if kept.intents[number].do
    ]
    made = 0
    while made < wanted:
        if not waiting:
            raise UserError(
                "The grammar cannot ask so often for what it trains in words and with values that it does not train.",
                where="dataset.sources: known",
                found=wanted,
                allowed=f"at most {made} of this kind, or more pairs to train on",
            )
        number, stream = waiting.pop(0)
        if (pair := next(stream, None)) is not None:
            waiting.append((number, stream))
            made += 1
            yield _row(kept.intents[number], *pair, "known")


def _row(intent: Intent, request: str, command: str, split: str | None) -> dict:
    row = {"request": request, "command": command, "intent": intent.name}
    row |= {"family": intent.family} if intent.family else {}
    return row | ({"split": split} if split else {})


def main() -> None:
    """Print pairs as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--programs", type=int, help="how many of the most used ones; left out: all alike"
    )
    options = parser.parse_args()
    for row in generate(options.seed, options.pairs, programs=options.programs):
        print(json.dumps(row, sort_keys=True, ensure_ascii=False))


if __name__ == "__main__":
    command_line(main)
