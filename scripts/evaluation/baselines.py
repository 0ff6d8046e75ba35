"""What training has to beat without a model: the nearest training row's answer, with the values of the request."""

import re
from collections.abc import Mapping, Sequence

_ENDS = re.compile(r"^[\"'(]+|[\"'),:;?!]+$|\.$")


def plain_words(rows: Sequence[Mapping[str, str]]) -> frozenset[str]:
    """Words of requests that are no values: their own row's command lacks them, or begins with them."""
    words = ((word, row["command"]) for row in rows for word in _words(row["request"]))
    return frozenset(
        word.lower() for word, command in words if not _standing(word).search(command, 1)
    )


def with_values_of(request: str, row: Mapping[str, str], plain: frozenset[str]) -> str:
    """The row's command, with the values that its request names replaced by those of another request.

    A value is a word of the row's request that its command has too and that is not ``plain``. A word of the same shape
    that only the other request has takes its place; of several the first, of names without a mark the last.
    """
    own, others = _words(row["request"]), _words(request)
    free = [word for word in others if word not in own and word.lower() not in plain]
    command = row["command"]
    for value in dict.fromkeys(
        word for word in own if word not in others and word.lower() not in plain
    ):
        like = [word for word in free if _shape(word) == _shape(value)]
        if like and _standing(value).search(command, 1):
            new = like[-1] if value.isalpha() else like[0]
            free.remove(new)
            command = _standing(value).sub(lambda _, new=new: new, command)
    return command


def _standing(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def _words(text: str) -> list[str]:
    return [word for raw in text.split() if (word := _ENDS.sub("", _ENDS.sub("", raw)))]


def _shape(word: str) -> tuple[bool, ...]:
    """What a value looks like: a path, a name with an ending, a number, an upper-case word, or another word."""
    return "/" in word, bool(re.search(r"\w\.\w", word)), word[:1].isdigit(), word.isupper()
