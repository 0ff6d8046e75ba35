"""Values as text that people read: sizes, values of YAML, and what must not reach a terminal or a log.

Sizes are in GiB of 2^30 bytes. GB are the rule of thumb's alone, in the documents that quote it.
"""

import json
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

GIB, MIB = 2**30, 2**20
# What steers a terminal: C0 and C1 but for line breaks and tabs, and the marks that turn text round.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_TOKEN = re.compile(r"\bhf_\w{6,}")


def closest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that a misspelt one is most like; ``cutoff`` is difflib's, from 0 to 1."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=cutoff)
    return next(
        iter(near or (name for name in names if len(name) > 3 and str(word).startswith(name))), None
    )


def gib(size: float, digits: int = 2) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.{digits}f} GiB"


def size_text(size: float) -> str:
    """Bytes in GiB; less than a tenth of one in MiB."""
    return gib(size) if abs(size) >= GIB / 10 else f"{size / MIB:.1f} MiB"


def bytes_of(text: str) -> int | None:
    """A size as people write it, ``14.2GiB``, ``9,5 GB`` or ``900 MiB``; None for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    unit = found and _UNITS.get(found[2].lower())
    return round(float(found[1].replace(",", ".")) * unit) if found and unit else None


_UNITS = {"gib": GIB, "gb": 10**9, "mib": MIB, "mb": 10**6}


def yaml_text(value: Any) -> str:
    """A value as it would stand in a YAML file, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Lines of columns, each as wide as its longest cell; ``right``: the columns whose cells end at one edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def printable(text: str) -> str:
    """A text that may come from a file, for a terminal: what would steer it is shown as an escape."""
    return _CONTROLS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def without_secrets(text: str) -> str:
    """The text without the token of the environment, or anything that looks like one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)
