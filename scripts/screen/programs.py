"""Facts about programs, from the table ``config/screen/programs.yaml``: what each does with its words."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

PLACES = ("all", "none", "first", "last", "but-last", "rest")  # which of the operands


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one program; the table's head says what each field means."""

    values: frozenset[str] = frozenset()
    wraps: int | None = None
    joins: int | None = None
    after: tuple[str, ...] = ()
    label: str = ""
    runs: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    escape: re.Pattern[str] | None = None
    shell: re.Pattern[str] | None = None
    reads: str = "all"
    pattern: tuple[str, ...] | None = None
    keys: tuple[str, ...] = ()
    reads_from: tuple[str, ...] = ()
    writes: str = "none"
    to: tuple[str, ...] = ()
    to_when: tuple[str, ...] = ()
    appends: tuple[str, ...] = ()
    into: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    deletes: str = "none"
    when: tuple[str, ...] = ()
    tree: tuple[str, ...] = ()
    bundle: bool = False
    sends: str = "none"
    send: tuple[str, ...] = ()
    sends_of: re.Pattern[str] | None = None


_NAMES = {"from": "reads_from"}


def _parsed(key: str, value: Any) -> Any:
    if key in ("escape", "shell", "sends_of"):
        return re.compile(value, re.MULTILINE)
    if key in ("label", "reads", "writes", "deletes", "sends", "wraps", "joins", "bundle"):
        return value
    return tuple(value.split())


@dataclass
class Programs:
    """The table, as it is asked for: a program's facts, and whether a name belongs to a group."""

    groups: dict[str, str] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _facts: dict[str, Facts] = field(default_factory=dict)
    _members: dict[str, re.Pattern[str]] = field(default_factory=dict)

    @cached_property
    def _by_name(self) -> dict[str, list[dict[str, Any]]]:
        out: dict[str, list[dict[str, Any]]] = {}
        for names, row in self.rows.items():
            for name in names.split():
                out.setdefault(name, []).append(row)
        return out

    def of(self, name: str) -> Facts:
        """A program's facts; of an unknown one, that it shows what it is given to read."""
        if name not in self._facts:
            if len(self._facts) > 4096:
                self._facts.clear()
            rows = list(self._by_name.get(name, ()))
            for pattern, found in self._by_name.items():
                if "*" in pattern and fnmatch.fnmatchcase(name, pattern):
                    rows += found
            merged: dict[str, Any] = {}
            values: set[str] = set()
            for row in rows:
                for key, value in row.items():
                    key = _NAMES.get(key, key.replace("-", "_"))
                    if key == "values":
                        values.update(value.split())
                    else:
                        merged[key] = _parsed(key, value)
            self._facts[name] = Facts(**merged, values=frozenset(values))
        return self._facts[name]

    def member(self, name: str, group: str) -> bool:
        """Whether a program is in a group."""
        if group not in self._members:
            self._members[group] = names_pattern(self.groups[group])
        return self._members[group].match(name) is not None


def names_pattern(names: str) -> re.Pattern[str]:
    """A pattern for names that may hold globs."""
    return re.compile("|".join(fnmatch.translate(name) for name in names.split()))
