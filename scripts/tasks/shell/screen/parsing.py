"""A text of shell commands as a syntax tree, by tree-sitter-bash; shfmt decides what is Bash."""

import re
import subprocess
from functools import cache
from typing import Any

from scripts.tasks.shell.screen.commands import Refused
from scripts.tasks.shell.syntax import find_shfmt

PRIVATE = re.compile("[\ue000-\ue00f]")
_LONG = 2048  # characters
# The scanner of tree-sitter-bash 0.25 reads beyond C's table of 256 characters, up to a crash: a letter for each other.
_BEYOND = re.compile("[^\x00-\xff\ue000-\ue00f]")
_WITHIN = re.compile(
    r"(?<=[\w}/.-])\$([A-Za-z_]\w*)"
)  # the grammar cuts rm$IFS-rf$IFS/ into words, and ${IFS} not
_AFTER_IFS = re.compile(
    r"(?<=[\w}/.-])\$(?:IFS|\{IFS\})\$(?:(\d)|\{(\d)\})"
)  # rm$IFS$9-rf: $9 only ends the name
# Valid Bash that the grammar takes for an error, and a spelling with the same meaning for the screen that it reads.
# Tried only when parsing fails; shfmt then decides whether the original was valid.
_SPELLINGS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"(\d*)<>"), r"\1>"),
    (
        re.compile(r"(^|[;&|(]\s*|\b(?:sudo|do|then|else|exec|env)\s+)\{([^\s{};]*,[^\s{};]*)\}"),
        lambda match: match[1] + match[2].replace(",", " "),
    ),
    (re.compile(r"[@!?*+]\([^()]*\)"), "*"),
    (re.compile(r";;?&"), ";;"),
    (re.compile(r"(?<![\w$])coproc\s+"), " "),
    (re.compile(r"(?<=\s)/(?=\s+\])"), "'/'"),
    (re.compile(r"""(>>?\s*[^\s<>|;&]+)\s+(<<<\s*(?:'[^']*'|"[^"]*"|\S+))"""), r"\2 \1"),
)


@cache
def _parser() -> Any:
    import tree_sitter_bash
    from tree_sitter import Language, Parser

    return Parser(Language(tree_sitter_bash.language()))


def _tree(text: str) -> Any:
    """Root of the syntax tree, or None where there is an error in it."""
    spelt = _WITHIN.sub(r"${\1}", _AFTER_IFS.sub(r"${IFS}${\1\2-}", text))
    root = _parser().parse(_BEYOND.sub("\xff", spelt).encode()).root_node
    return None if root.has_error else root


def _valid_bash(text: str) -> bool:
    original = PRIVATE.sub("_", text).encode()
    return (
        subprocess.run(
            [find_shfmt(), "-ln", "bash"], input=original, capture_output=True
        ).returncode
        == 0
    )


def parse(text: str) -> Any:
    """Syntax tree of a text; :class:`Refused` where it is not Bash."""
    # The grammar looks for a way out of errors in a time that grows with the square; shfmt does not.
    root = _tree(text) if len(text) < _LONG or _valid_bash(text) else None
    changed = text
    for pattern, spelling in _SPELLINGS if root is None else ():
        again = pattern.sub(spelling, changed)
        if again != changed and len(text) < _LONG and (root := _tree(changed := again)) is not None:
            root = root if _valid_bash(text) else None
            break
    if root is None:
        raise Refused("not parsable as Bash")
    return root
