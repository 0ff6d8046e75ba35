"""Which intents a sample asks for, how often, and which of them may be held out.

``config/datasets/embedded/usage.yaml`` has public counts of how often people use a program. A sample of the most used
programs gives each rows by the root of its uses: in proportion, half of them would be about ``find``. An intent may be
held out where every word of its command, values aside, stands in training commands of the same program.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median

from scripts.common.code_digests import ROOT
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_yaml
from will_it_fit.common.schema import validate

USAGE = ROOT / "config" / "datasets" / "embedded" / "usage.yaml"
HARM = "requests for harm"  # the group of the intents that are refused, beside those of the programs
HARM_SHARE = 0.1  # of a sample's rows, as long as programs have turns
_TIMES = 5  # rows of one intent; a program with no other intents then waits until all have had so many
_STAGES = re.compile(r" (?:\|\|?|&&) ")
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")
_LETTERS = re.compile(r"-[A-Za-z]{2,}")
_WHOLE_WORDS = frozenset({"find"})  # programs whose options are words behind one dash
_SLOTS = re.compile(r"(?:[./'\"]*<[a-z_]+\d?>[/'\"]*)+")


@cache
def read_uses(path: Path = USAGE) -> dict[str, float]:
    """How often each program is used, in commands of NL2Bash, the most used first.

    A program that NL2Bash leaves out counts by its tldr pages, at the median of the commands for each page of the
    programs that have both. A :class:`UserError` names what is wrong with the file.
    """
    content = read_yaml(path)
    validate(content, read_yaml(path.parent.with_name("embedded.schema.yaml"))["usage"], path)
    counts: Mapping[str, Mapping[str, int]] = content["programs"]
    each = median([one["commands"] / one["languages"] for one in counts.values() if len(one) == 2] or [1])
    uses = {name: float(one.get("commands", each * one.get("languages", 0))) for name, one in counts.items()}
    return dict(sorted(uses.items(), key=lambda item: (-item[1], item[0])))


def most_used(programs: int) -> dict[str, float]:
    """So many programs that are used most, with their uses."""
    return dict(itertools.islice(read_uses().items(), programs))


def stages(command: str) -> list[list[str]]:
    """The words of each command of a pipe, without ``sudo``; a quoted text is one word."""
    found = [_WORD.findall(stage.removeprefix("sudo ")) for stage in _STAGES.split(command)]
    return [words for words in found if words]


def programs_of(command: str) -> frozenset[str]:
    """The programs of a pipe, with what ``xargs`` runs."""
    return frozenset(word for words in stages(command) for word in words[: 1 + (words[0] == "xargs")])


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


def may_be_held_out(commands: Sequence[str]) -> list[bool]:
    """Which of the intents, by their commands, can all be held out while the others still have all of their parts.

    The earlier in the sequence, the sooner an intent is among them.
    """
    parts = [parts_of(command) for command in commands]
    left = Counter(part for one in parts for part in one)
    found = []
    for one in parts:
        found.append(all(left[part] > 1 for part in one))
        if found[-1]:
            left.subtract(one)
    return found


def turns(groups: Mapping[int, str], uses: Mapping[str, float]) -> Iterator[int]:
    """Intents by their number, as they come to be asked: whose turn it is, without an end.

    Parameters
    ----------
    groups
        The program that each intent is about, or :data:`HARM`.
    uses
        By program; rows follow their root.
    """
    of: dict[str, list[int]] = {}
    for number, name in groups.items():
        of.setdefault(name, []).append(number)
    roots = {name: uses[name] ** 0.5 for name in of if name != HARM}
    if not roots:
        raise UserError("No intent of the grammar is about the programs in usage.yaml.", where="usage.yaml: programs")
    asked: Counter[int] = Counter()  # times by intent
    had: Counter[str] = Counter()  # rows by group
    for most in itertools.count(_TIMES, _TIMES):  # an intent is asked for so often before the others' programs wait
        left = {*of}
        while left:
            harm_is_due = HARM in left and had[HARM] < HARM_SHARE * asked.total()
            next_in_line = min(left, key=lambda name: ((had[name] + 1) / roots.get(name, 1e-9), name))
            group = HARM if harm_is_due else next_in_line
            number = min(of[group], key=lambda one: asked[one])  # the first of those asked least
            if asked[number] == most:
                left.remove(group)
                continue
            asked[number] += 1
            had[group] += 1
            yield number
