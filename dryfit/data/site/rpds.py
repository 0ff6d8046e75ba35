"""In a browser, in place of the package rpds, which is compiled: as much of it as jsonschema uses, and slower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class HashTrieMap(dict):
    """A mapping; what changes it gives a new one."""

    @classmethod
    def convert(cls, value: Any) -> HashTrieMap:
        return value if isinstance(value, cls) else cls(value)

    def insert(self, key: Any, value: Any) -> HashTrieMap:
        return HashTrieMap({**self, key: value})

    def update(self, *others: Mapping | Iterable, **more: Any) -> HashTrieMap:  # type: ignore[override]
        made = dict(self)
        for other in others:
            made.update(other)
        return HashTrieMap(made | more)

    def remove(self, key: Any) -> HashTrieMap:
        made = dict(self)
        del made[key]
        return HashTrieMap(made)


class HashTrieSet(frozenset):
    """A set; what changes it gives a new one."""

    def insert(self, value: Any) -> HashTrieSet:
        return HashTrieSet(self | {value})

    def discard(self, value: Any) -> HashTrieSet:
        return HashTrieSet(self - {value})

    def update(self, *others: Iterable) -> HashTrieSet:
        return HashTrieSet(self.union(*others))


class List(tuple):
    """A list; what changes it gives a new one."""

    def push_front(self, value: Any) -> List:
        return List((value, *self))
