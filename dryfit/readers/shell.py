"""Shell scripts that start a training: the words of their commands, with the variables that the script itself sets.

Nothing is run. Variables are followed from line to line, with ``${NAME:-default}``, arrays and whole numbers in
``$((...))``. What comes from the environment, from arguments or from another command is not known, and stays as it is
written.
"""

import ast
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml, yaml_value

_NAME = r"[A-Za-z_]\w*"
_ASSIGNMENT = re.compile(rf"({_NAME})(\+?)=(.*)", re.S)
_KEYWORDS = {
    "if",
    "then",
    "else",
    "elif",
    "fi",
    "for",
    "while",
    "do",
    "done",
    "exec",
    "time",
    "nohup",
    "local",
    "env",
    "sudo",
    "{",
    "}",
}
_EXPORTS = (
    ["export"],
    ["declare", "-x"],
    ["typeset", "-x"],
)  # what makes a variable one of the environment
_SEPARATORS = ("&&", "||", ";;", ";", "|", "&", "\n")
_UNKNOWN = re.compile(rf"\$(?:{_NAME}|[@*#?\d]|[({{])|`")


@dataclass
class Command:
    """A command with its words, and the variables of its environment: exported before it, or set in front of it.

    ``cut_off``: a comment among its lines ends it, and what was meant to follow is a command of its own, as in bash.
    """

    words: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    cut_off: bool = False

    def count(self, name: str) -> int | None:
        """A whole number of the environment; None: none."""
        text = self.environment.get(name, "")
        return int(text) if text.isdigit() else None


def is_known(text: str) -> bool:
    """Whether a word holds no variable or command that only a run would know."""
    return _UNKNOWN.search(text) is None


def beside(script: Path, name: str) -> Path | None:
    """A file that a command names, from the script's folder or one above it, where the command may run; None: none."""
    places = (folder / name for folder in (script.parent, *script.absolute().parents))
    return next((place for place in places if place.is_file()), None)


def commands(script: str) -> Iterator[Command]:
    """The script's commands in order, with their variables in place."""
    variables: dict[str, str] = {"HOME": "~", "PWD": "."}
    arrays: dict[str, list[str]] = {}
    exported: dict[str, str] = {}
    all_exported = False
    lines = [*_split(script), ([], False)]
    for (line, comment), (following, _) in pairwise(lines):
        while line and line[0] in _KEYWORDS:
            line = line[1:]
        exports = next((words for words in _EXPORTS if line[: len(words)] == words), [])
        if exports or line[:1] == ["local"]:
            line = line[max(len(exports), 1) :]
            for name in line:
                if name in variables:
                    exported[name] = variables[name]
        if line[:1] == ["set"]:
            all_exported = (all_exported or line[1:] in (["-a"], ["-o", "allexport"])) and line[
                1:
            ] != ["+a"]
            continue
        own: dict[str, str] = {}
        while line and (set_ := _ASSIGNMENT.fullmatch(line[0])):
            name, adds, value = set_.groups()
            line = line[1:]
            if value.startswith("("):
                value, line = value[1:], [*line]
                items = [value] if value else []
                while line and not (items and items[-1].endswith(")")):
                    items.append(line.pop(0))
                items = (
                    [item for item in [*items[:-1], items[-1].removesuffix(")")] if item]
                    if items
                    else []
                )
                arrays[name] = [
                    *(arrays.get(name, []) if adds else []),
                    *_expanded(items, variables, arrays),
                ]
            else:
                own[name] = (variables.get(name, "") if adds else "") + _filled(
                    _plain(value), variables
                )
        if not line or exports:
            variables |= own
            public = (
                own
                if exports or all_exported
                else {name: own[name] for name in own if name in exported}
            )
            exported |= public
        else:
            cut_off = comment and following[:1] != [] and following[0].startswith("-")
            yield Command(
                _expanded(line, {**variables, **own}, arrays), {**exported, **own}, cut_off
            )


def options(words: list[str], script: Path) -> dict[str, Any]:
    """``--name value``, ``--name=value`` and ``--name value value``, by names with underscores; a flag alone is true.

    What only a run would know is left out.
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif re.match(r"-[A-Za-z]", word):
            name = None
        elif name is not None and not word.startswith((">", "2>", "<")):
            found[name].append(word)
    read = {
        name: [yaml_value(text, script) for text in texts]
        for name, texts in found.items()
        if all(map(is_known, texts))
    }
    return {
        name: values[0] if len(values) == 1 else values or True for name, values in read.items()
    }


def with_file(words: list[str], script: Path, tool: str = "") -> dict[str, Any]:
    """The settings of a file that a command names first or as ``--config``, and over them the command's own.

    Those are ``--name value`` or ``name=value``.

    UserError: if the file isn't there.
    """
    first = words[0] if words and not words[0].startswith("-") and "=" not in words[0] else None
    pairs = [word for word in words if re.match(r"[\w.]+=", word)]
    settings = options([word for word in words[1 if first else 0 :] if word not in pairs], script)
    for name, _, value in (word.partition("=") for word in pairs):
        settings |= {name: yaml_value(value, script)} if is_known(value) else {}
    named = first or settings.pop("config", None)
    if named is None:
        return settings
    path = beside(script, str(named)) if is_known(str(named)) else None
    if path is None:
        raise UserError(
            "The command trains from a file that isn't there.",
            where=script,
            found=named,
            allowed=f"a file beside the script, or above it{tool}",
        )
    content = read_yaml(path)
    return {**(content if isinstance(content, Mapping) else {}), **settings}


def _split(script: str) -> Iterator[tuple[list[str], bool]]:
    """Words of each command as they are written, quotes and all, and whether a comment among its lines ends it."""
    joined = comment = False
    words: list[str] = []
    word, place, depth = "", 0, 0
    while place < len(script):
        sign, rest = script[place], script[place:]
        if rest.startswith("\\\n"):
            joined, place = True, place + 2
            continue
        if sign == "\\":
            word, place = word + rest[:2], place + 2
            continue
        if sign in "'\"":
            end = _closing(script, place)
            word, place = word + script[place : end + 1], end + 1
            continue
        if rest.startswith(("$(", "${", "`")) or (sign == "(" and word.endswith("=")):
            if sign == "(":  # an array: its words are taken one by one, over several lines
                depth, word, place = depth + 1, word + sign, place + 1
                continue
            end = _closing(script, place)
            word, place = word + script[place : end + 1], end + 1
            continue
        if sign == "#" and not word:
            comment = joined and bool(words)
            place += len(rest.partition("\n")[0])
            continue
        separator = next((one for one in _SEPARATORS if rest.startswith(one)), None)
        if sign == ")" and depth:
            depth, word, place = depth - 1, word + sign, place + 1
            continue
        if separator and not depth and not re.search(r"[<>]$", word):
            if word:
                words.append(word)
            if words:
                yield words, comment
            joined = comment = False
            words, word, place = [], "", place + len(separator)
            continue
        if sign.isspace():
            if word:
                words.append(word)
            word, place = "", place + 1
            continue
        word, place = word + sign, place + 1
    if word:
        words.append(word)
    if words:
        yield words, comment


def _closing(script: str, place: int) -> int:
    """Where a quote or ``$(``, ``${`` that begins here ends."""
    sign = script[place]
    if sign == "$":
        opening, closing = script[place + 1], {"(": ")", "{": "}"}[script[place + 1]]
        depth = 0
        for end in range(place + 1, len(script)):
            depth += (script[end] == opening) - (script[end] == closing)
            if not depth:
                return end
        return len(script) - 1
    end = place + 1
    while end < len(script) and script[end] != sign:
        end += 2 if script[end] == "\\" and sign != "'" else 1
    return min(end, len(script) - 1)


def _expanded(
    words: list[str], variables: Mapping[str, str], arrays: Mapping[str, list[str]]
) -> list[str]:
    found: list[str] = []
    for word in words:
        whole = re.fullmatch(rf'"?\$\{{({_NAME})\[[@*]\]\}}"?', word)
        if whole:
            found += arrays.get(whole[1], [word])
        elif re.fullmatch(r'"?\$[@*]"?', word):  # the script has no arguments
            continue
        elif re.fullmatch(
            rf"\$(?:{_NAME}|\{{{_NAME}\}})", word
        ):  # unquoted: as many words as the value has
            found += _filled(word, variables).split() or []
        else:
            found.append(_filled(_plain(word), variables))
    return found


_LITERAL = "\0"  # stands for a dollar sign that single quotes or a backslash keep


def _plain(word: str) -> str:
    """A word without its quotes; dollar signs that they keep are marked."""
    text, place, double = "", 0, False
    while place < len(word):
        sign = word[place]
        if sign == '"':
            double, place = not double, place + 1
        elif sign == "'" and not double:
            end = word.find("'", place + 1)
            end = len(word) if end < 0 else end
            text, place = text + word[place + 1 : end].replace("$", _LITERAL), end + 1
        elif sign == "\\" and place + 1 < len(word):
            text, place = text + word[place + 1].replace("$", _LITERAL), place + 2
        else:
            text, place = text + sign, place + 1
    return text


def _filled(text: str, variables: Mapping[str, str]) -> str:
    """A text with its variables in place; what is not known stays as it is written."""

    def of_name(match: re.Match[str]) -> str:
        name, default = match["name"] or match["bare"], match["default"]
        if name in variables:
            return variables[name]
        return match[0] if default is None else default

    text = text.replace("$(pwd)", ".")
    pattern = re.compile(
        rf"\$\{{(?P<name>{_NAME})(?::?-(?P<default>[^{{}}]*))?\}}|\$(?P<bare>{_NAME})"
    )
    for _ in range(4):  # a default may name another variable
        filled = pattern.sub(of_name, text)
        filled = re.sub(r"\$\(\(([^$]*?)\)\)", lambda match: _computed(match, variables), filled)
        filled = re.sub(r"\$\(expr ([^$]*?)\)", lambda match: _computed(match, variables), filled)
        if filled == text:
            break
        text = filled
    return text.replace(_LITERAL, "$")


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _computed(match: re.Match[str], variables: Mapping[str, str]) -> str:
    """Whole numbers of an arithmetic expression, whose names may be bare."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError(node)

    text = re.sub(_NAME, lambda name: variables.get(name[0], name[0]), match[1])
    try:
        return str(value(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return match[0]
