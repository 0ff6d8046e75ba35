"""Which intents a sample asks for, how often, and which of them may be held out.

``config/datasets/embedded/usage.yaml`` has public counts of how often people use a program. A sample of the most used
programs gives each rows by the root of its uses: in proportion, half of them would be about ``find``. An intent may be
held out where training commands of the same program teach every word of its command, values aside.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.schema import validate
from scripts.common.code_digests import ROOT

USAGE = ROOT / "config" / "datasets" / "embedded" / "usage.yaml"
HARM = (
    "requests for harm"  # the group of the intents that are refused; every other group is a program
)
HARM_SHARE = 0.08  # of a sample's rows
LEAST_ROWS = 3  # in which a part of a held-out command must stand, and one more: 28 of 140 had fewer, none was right
_TIMES = 5  # rows of one intent, before its program waits until every intent has had so many
_STAGES = re.compile(r" (?:\|\|?|&&) ")
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")
_LETTERS = re.compile(r"-[A-Za-z]{2,}")
_WHOLE_WORDS = frozenset({"find"})  # programs whose options are words behind one dash
_XARGS_VALUE = re.compile(
    "-[adEILnPs]"
)  # options of xargs with a word of their own: findutils' manual, and POSIX
_SLOTS = re.compile(r"(?:[./'\"]*<[a-z_]+\d?>[/'\"]*)+")


@cache
def read_uses(path: Path = USAGE) -> dict[str, float]:
    """How often each program is used, in commands of NL2Bash, the most used first.

    A program that NL2Bash leaves out counts by the languages of its tldr page: each language as many commands as in the
    median of the programs that have both figures.

    UserError: naming what is wrong with the file.
    """
    content = read_yaml(path)
    validate(content, read_yaml(path.parent.with_name("embedded.schema.yaml"))["usage"], path)
    counts: Mapping[str, Mapping[str, int]] = content["programs"]
    both = [one for one in counts.values() if len(one) == 2]
    commands_of_language = median([one["commands"] / one["languages"] for one in both] or [1])
    uses = {
        name: float(one.get("commands", commands_of_language * one.get("languages", 0)))
        for name, one in counts.items()
    }
    return dict(sorted(uses.items(), key=lambda item: (-item[1], item[0])))


def most_used(programs: int) -> dict[str, float]:
    """The programs that are used most, as many as asked, with their uses (:func:`read_uses`).

    UserError: if the file has fewer.
    """
    uses = read_uses()
    if programs > len(uses):
        raise UserError(
            "Not so many programs have counts of how often they are used.",
            where="dataset.sources: programs",
            found=programs,
            allowed=f"1 to {len(uses)}, or more programs in {USAGE.relative_to(ROOT)}",
            write=f"programs: {len(uses)}",
        )
    return dict(itertools.islice(uses.items(), programs))


def stages(command: str) -> list[list[str]]:
    """The words of each command of a pipe, without ``sudo``; a quoted text is one word."""
    commands = [_WORD.findall(stage.removeprefix("sudo ")) for stage in _STAGES.split(command)]
    return [words for words in commands if words]


def programs_of(command: str) -> frozenset[str]:
    """The programs of a pipe, with the one that ``xargs`` runs."""
    programs = set()
    for program, *words in stages(command):
        programs.add(program)
        if program == "xargs" and (run := _run_by_xargs(words)):
            programs.add(run)
    return frozenset(programs)


def _run_by_xargs(words: Sequence[str]) -> str | None:
    """The program among the words behind ``xargs``; None where there are options alone (it runs ``echo``)."""
    behind = iter(words)
    for word in behind:
        if not word.startswith("-"):
            return word
        if _XARGS_VALUE.fullmatch(word):
            next(behind, None)
    return None


def first_program(command: str) -> str:
    """The program that a command is about: the first of a pipe."""
    return stages(command)[0][0]


def parts_of(command: str) -> frozenset[str]:
    """A program and a word behind it, for each word of a command with slots that is more than slots.

    Letters behind one dash are options of their own: ``ls -lt`` has the parts ``ls``, ``ls -l`` and ``ls -t``.
    """
    parts = set()
    for program, *words in stages(command):
        parts.add(program)
        for word in words:
            if _LETTERS.fullmatch(word) and program not in _WHOLE_WORDS:
                parts |= {f"{program} -{letter}" for letter in word[1:]}
            elif not _SLOTS.fullmatch(word):
                parts.add(f"{program} {word}")
    return frozenset(parts)


def may_be_held_out(commands: Sequence[str], rows: Sequence[int]) -> list[bool]:
    """Which intents can be held out together, so that the rows of the others teach all of their parts.

    A part is taught where it stands in more than :data:`LEAST_ROWS` rows of other intents, beside more than one
    companion, and never only beside a part that the held-out command lacks.

    Parameters
    ----------
    commands, rows
        The command of each intent and how many rows ask for it. Earlier ones are chosen first.

    Returns
    -------
    list of bool
        For each intent, whether it may be held out.
    """
    parts = [parts_of(command) for command in commands]
    left: dict[str, set[int]] = {}  # by part, the intents that have it and stay
    held: dict[str, list[int]] = {}
    for number, own in enumerate(parts):
        for part in own:
            left.setdefault(part, set()).add(number)

    def teach(part: str, others: set[int], asked: list[int]) -> bool:
        if sum(rows[other] for other in others) <= LEAST_ROWS:
            return False
        beside = {parts[other] for other in others}
        always = frozenset.intersection(*beside)
        return len(beside) > 1 and all(always <= parts[number] for number in asked)

    free = []
    for number, own in enumerate(parts):
        free.append(
            all(teach(part, left[part] - {number}, [*held.get(part, ()), number]) for part in own)
        )
        for part in own if free[-1] else ():
            left[part].remove(number)
            held.setdefault(part, []).append(number)
    return free


def turns(groups: Mapping[int, str], uses: Mapping[str, float]) -> Iterator[int]:
    """The numbers of intents in the order in which they are asked for, a row each, without an end.

    Parameters
    ----------
    groups
        By an intent's number, the program that it is about, or :data:`HARM`.
    uses
        By program; the rows of a program follow the root of its uses.

    Raises
    ------
    UserError
        If no intent is about a program.
    """
    intents: dict[str, list[int]] = {}  # by group
    for number, group in groups.items():
        intents.setdefault(group, []).append(number)
    roots = {group: uses[group] ** 0.5 for group in intents if group != HARM}
    if not roots:
        raise UserError(
            "No intent of the grammar is about one of these programs.",
            where="dataset.sources: programs",
            found=", ".join(uses),
            allowed="a number with which the grammar has intents about some of the most used programs",
            write="programs: 30",
        )
    times: Counter[int] = Counter()  # that an intent was asked for
    rows: Counter[str] = Counter()  # of a group
    for most in itertools.count(_TIMES, _TIMES):
        waiting_for_turn = {*intents}
        while waiting_for_turn - {HARM}:
            harm_is_due = HARM in waiting_for_turn and rows[HARM] < HARM_SHARE * times.total()
            next_in_line = min(
                waiting_for_turn - {HARM},
                key=lambda group: ((rows[group] + 1) / roots[group], group),
            )
            group = HARM if harm_is_due else next_in_line
            number = min(
                intents[group], key=lambda one: times[one]
            )  # the first of those asked for least
            if times[number] == most:
                waiting_for_turn.remove(group)
                continue
            times[number] += 1
            rows[group] += 1
            yield number
