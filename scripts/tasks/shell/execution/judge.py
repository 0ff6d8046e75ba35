"""Did an answer do what a reference did? Decided from what both did in the sandbox, by rules, without a model.

An answer is right when, for one of the references, each of these holds (``docs/execution.md`` gives the reasons):

``end``      it ended by itself, within its limits;
``status``   both succeeded (exit status 0) or both failed;
``changes``  the same paths were added, removed or changed, and are of the same type, permissions and content
             afterwards; where the reference's own content differs from run to run (the time in it, salt), of the same
             type and permissions;
``output``   the same standard output, after the steps below. Not looked at where the reference changed files in
             silence: ``cp -v`` does what ``cp`` does.

A reference that leaves no trace (no output, no change) proves nothing, since ``true`` would be right: a task whose
first reference leaves none is *undecidable* and belongs in no denominator; a second one without is not used.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Listings, whose order is the file system's or the program's own; and what picks from lines by their place.
LISTS = re.compile(r"^\s*(find|ls|du|grep\s+(-\w+\s+)*-\w*[rR]\w*)\b")
PICKS = re.compile(r"\b(tac|head|tail|nl|shuf|cat -n|paste|comm|uniq|awk|wc|tree)\b")
# What a request says when the order of lines matters.
ORDER = re.compile(
    r"\b(sort|order|alphabet|ascending|descending|reverse|rank|top|bottom|first|last|newest|oldest|latest|recent"
    r"|(larg|small|bigg|long|short)est|most|least|by (name|size|date|time|depth|number))",
    re.IGNORECASE,
)
# A path of more than one part, and what may stand before and behind it; "./x" is "x" too. A name alone stays as it is:
# "root" is no path, and with "x/" `ls -F` says that x is a folder.
PATH = re.compile(r"""(?m)(?<![^\s'"])(?:\./|/)?((?:[^\s/'"]+/)+[^\s/'"]+)/?(?=[\s'"]|$)""")
HERE = re.compile(r"""(?m)(?<![^\s'"])\./(?=[^\s/])""")
# What a request says when blanks and line breaks matter.
BLANKS = re.compile(
    r"\b(blank|space|whitespace|tab|indent|newline|empty line|line break|column|align|wrap|squeeze)",
    re.I,
)
UUID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
NUMBER = re.compile(r"[0-9]+([.,:][0-9]+)*")


class Reference(NamedTuple):
    """A command that fulfils the request, and what it did: twice, at different times."""

    request: str
    command: str
    result: Mapping[str, Any]
    again: Mapping[str, Any]


def traceless(result: Mapping[str, Any]) -> bool:
    """Whether nothing that a command did can be seen."""
    return not result["changes"] and not result["stdout"].strip()


def spaces(text: str) -> str:
    """Runs of blanks are one, blank lines and blanks around lines none."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def paths(text: str) -> str:
    """``./x/y``, ``/x/y/`` and ``x/y`` are one path, since commands run in ``/``."""
    return PATH.sub(r"\1", HERE.sub("", text))


def order(text: str) -> str:
    """Lines in an order of their own."""
    return "\n".join(sorted(text.splitlines()))


def numbers(text: str) -> str:
    """Without digits."""
    return NUMBER.sub("0", UUID.sub("0", text))


def same_output(answer: str, reference: Reference) -> bool:
    wanted = reference.result["stdout"]
    steps = [paths] if BLANKS.search(reference.request) else [spaces, paths]
    command = reference.command
    if LISTS.search(command) and not PICKS.search(command) and not ORDER.search(reference.request):
        steps.append(order)
    if wanted != reference.again["stdout"]:
        steps.append(numbers)
    for step in steps:
        if answer == wanted:
            return True
        answer, wanted = step(answer), step(wanted)
    return answer == wanted


def same_changes(answer: Mapping[str, Any], reference: Reference) -> bool:
    """Whether an answer left the file system as the reference did."""
    got, wanted, again = (
        {path: after for path, (_, after) in result["changes"].items()}
        for result in (answer, reference.result, reference.again)
    )
    if set(got) != set(wanted):
        return False
    return all(
        got[path] == after
        or (after != again.get(path) and got[path] and after and got[path][:2] == after[:2])
        for path, after in wanted.items()
    )


def terms(answer: Mapping[str, Any], reference: Reference) -> dict[str, bool]:
    """Each term of the judgement, for one reference."""
    wanted = reference.result
    silent = bool(wanted["changes"]) and not wanted["stdout"].strip()
    return {
        "end": answer["end"] == "exit",
        "status": (answer["status"] == 0) == (wanted["status"] == 0),
        "changes": answer["complete"] and same_changes(answer, reference),
        "output": silent or same_output(answer["stdout"], reference),
    }


def judge(
    answer: Mapping[str, Any], references: Sequence[Reference]
) -> tuple[bool, dict[str, bool]]:
    """Whether an answer is right, and the terms for the reference that it comes closest to."""
    scores = [terms(answer, one) for one in references if not traceless(one.result)]
    best = max(scores, key=lambda held: sum(held.values()), default={"end": False})
    return all(best.values()), best


def decidable(references: Sequence[Reference]) -> bool:
    """Whether the first reference leaves a trace by which it is right itself when it runs again, and another is not.

    Where all that it leaves is a number that differs from run to run, any number would be right.
    """
    first = references[0]
    if (
        traceless(first.result)
        or traceless(first.again)
        or not all(terms(first.again, first).values())
    ):
        return False
    only_output = not first.result["changes"] and first.result["stdout"] != first.again["stdout"]
    return not only_output or any(character.isalpha() for character in first.result["stdout"])
