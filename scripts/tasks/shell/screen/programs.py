"""Facts about programs, from the table ``config/screen/programs.yaml``: what each does with its words."""

import fnmatch
import posixpath
import re
from functools import cache
from types import SimpleNamespace as Facts
from typing import Any

from dryfit.common.errors import UserError
from scripts.tasks.shell.screen.commands import MARK, OUTPUT

# The fields of a row that are not lists of options; the table's head says what each means.
_UNKNOWN: dict[str, Any] = dict.fromkeys("wraps joins pattern escape sends_of".split())
_UNKNOWN |= {
    "reads": "all",
    "writes": "none",
    "deletes": "none",
    "sends": "none",
    "values": frozenset(),
}
_UNKNOWN |= {"label": "", "bundle": False, "pairs": False}
_OPTIONS = "after runs words code keys reads_from to to_when appends into in_place when tree send script".split()


_PATTERNS = frozenset(("escape", "sends-of"))
_EXPLODES = re.compile(
    r"\((?:\?:)?(?:\[(?:[^\]\\]|\\.)+\]|\\?[^()\\])[+*]\)[+*{]"
)  # (a+)+, (\w*)*, ([a-z]+){2,}


def check_pattern(pattern: str, where: str) -> None:
    """A pattern compiles, and does not take for ever; else :class:`UserError`."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            "A pattern is no regular expression.", where=where, found=pattern, allowed=str(error)
        ) from None
    if _EXPLODES.search(pattern):
        raise UserError(
            "A pattern nests repetitions: it could run for ever.", where=where, found=pattern
        )


class Programs:
    """The table, as it is asked for: a program's facts, and whether a name belongs to a group."""

    def __init__(self, groups: dict[str, str], rows: list[tuple[str, dict[str, Any]]]) -> None:
        self.groups = groups
        patterns = {group: names_pattern(names) for group, names in groups.items()}
        self.member = cache(lambda name, group: patterns[group].match(name) is not None)
        self._rows = [(names_pattern(names), row) for names, row in rows]
        for names, row in rows:
            for key in _PATTERNS.intersection(row):
                check_pattern(row[key], f"the programs {names}, {key}")
        self.of = cache(self._of)

    def _of(self, name: str) -> Facts:
        """A program's facts; of an unknown one, that it shows what it is given to read."""
        facts = {**_UNKNOWN, **dict.fromkeys(_OPTIONS, ())}
        for pattern, row in self._rows:
            for key, value in row.items() if pattern.match(name) else ():
                key = "reads_from" if key == "from" else key.replace("-", "_")
                if key == "values":
                    value = facts[key] | set(value.split())
                elif key.replace("_", "-") in _PATTERNS:
                    value = re.compile(value, re.MULTILINE)
                elif key in _OPTIONS or key == "pattern":
                    value = tuple(value.split())
                facts[key] = value
        return Facts(**facts)


def names_pattern(names: str) -> re.Pattern[str]:
    """A pattern for names that may hold globs."""
    return re.compile("|".join(fnmatch.translate(name) for name in names.split()) or "(?!)")


def program_name(word: str) -> str:
    """The program that the first word of a command names: without the system's folders."""
    bare = MARK.sub("", word)
    if "/" not in bare.strip("/") and bare[:1] != "/":
        return bare or word
    base = bare.rsplit("/", 1)[-1]
    computed = bare != word and OUTPUT[0] in word
    return (
        base
        if base and (computed or re.search(r"(^|/)s?bin/[^/]+$", posixpath.normpath(bare)))
        else bare
    )
