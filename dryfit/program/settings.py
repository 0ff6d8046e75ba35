"""A whole number that a program is set to: where it stands, and the same request with another number.

It stands among the program's arguments, in a file that the arguments name (YAML, JSON, TOML, Python), or in the
program's own text: a default of ``argparse``, a field of a dataclass, an assignment.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dryfit.common.errors import UserError

from .request import ProgramRequest

# What programs call the length of a row: nanoGPT's, transformers' and TRL's scripts, torchtune and torchtitan, axolotl,
# LLaMA-Factory, litgpt, llm.c.
LENGTHS = (
    "block_size",
    "max_seq_length",
    "max_seq_len",
    "max_length",
    "sequence_length",
    "seq_length",
    "seq_len",
    "sequence_len",
    "context_length",
    "cutoff_len",
    "model_max_length",
    "max_prompt_length",
)
_FILES = (".yaml", ".yml", ".json", ".toml", ".py")


@dataclass(frozen=True)
class ProgramSetting:
    """A number that a program is set to."""

    # What it is called, and what it is now.
    name: str
    value: int
    where: str  # the place, for people
    changed: Callable[[int], ProgramRequest]  # the request with another number in its place


def setting(asked: ProgramRequest, name: str) -> ProgramSetting:
    """Where a program's number of this name stands.

    Raises :class:`UserError` if no place sets it to a whole number.
    """
    found = next(_places(asked, name), None)
    if found is None:
        raise UserError(
            "Neither the program's arguments nor its text sets this to a whole number.",
            where="--vary",
            found=name,
            allowed="an argument of the program, with the value to begin with",
            write=f"dryfit run --vary {name} --gpu 4090 {asked.program} --{name}=1024",
        )
    return found


def length(asked: ProgramRequest) -> ProgramSetting:
    """The length of a program's rows, by the names that programs give it; else the tokens of ``--batch``.

    Rows that ``--batch`` makes up become as long.

    Raises :class:`UserError` if none of the names is set.
    """
    for kind in (_in_arguments, _in_files, _in_program):
        for name in LENGTHS:
            if found := next(kind(asked, name), None):
                return (
                    found
                    if asked.batch is None
                    else replace(found, changed=partial(_with_rows, found))
                )
    if asked.batch is not None:
        return ProgramSetting("tokens", asked.batch[1], "--batch", partial(_with_tokens, asked))
    raise UserError(
        "The program does not say how long its rows are, by any of the names that are known.",
        where="--longest",
        allowed=", ".join(LENGTHS),
        write=f"dryfit run --vary NAME --gpu 4090 {asked.program} --NAME=1024",
    )


def _with_tokens(asked: ProgramRequest, value: int) -> ProgramRequest:
    return replace(asked, batch=(asked.batch[0], value))


def _with_rows(found: ProgramSetting, value: int) -> ProgramRequest:
    """Another length, and made up rows that are as long."""
    return _with_tokens(found.changed(value), value)


def _places(asked: ProgramRequest, name: str) -> Iterator[ProgramSetting]:
    for kind in (_in_arguments, _in_files, _in_program):
        yield from kind(asked, name)


def _in_arguments(asked: ProgramRequest, name: str) -> Iterator[ProgramSetting]:
    """``--name=8``, ``--name 8``, ``name=8`` or ``section.name=8``."""
    words = asked.arguments
    spelled = rf"-{{0,2}}(?:[\w-]+\.)*{_spelled(name)}"
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if joined := re.fullmatch(rf"({spelled}=)(\d+)", word):
            changed = partial(_with_argument, asked, index, joined[1])
            yield ProgramSetting(name, int(joined[2]), f"the argument {word}", changed)
        elif word.startswith("-") and following.isdigit() and re.fullmatch(spelled, word):
            changed = partial(_with_argument, asked, index + 1, "")
            yield ProgramSetting(name, int(following), f"the argument {word} {following}", changed)


def _with_argument(asked: ProgramRequest, index: int, before: str, value: int) -> ProgramRequest:
    words = asked.arguments
    return replace(asked, arguments=(*words[:index], f"{before}{value}", *words[index + 1 :]))


def _in_files(asked: ProgramRequest, name: str) -> Iterator[ProgramSetting]:
    """A line of a file that the arguments name."""
    line = re.compile(
        rf"^[ \t]*[\"']?{_spelled(name)}[\"']?[ \t]*[:=][ \t]*(\d[\d_]*)[ \t]*,?[ \t]*(?:#.*)?$",
        re.M,
    )
    for word in asked.arguments:
        path = Path(word.rpartition("=")[2])
        if path.suffix in _FILES and path.is_file():
            text = _text_of(path)
            found = list(line.finditer(text))
            if len(found) == 1:
                yield _in_text(asked, name, str(path), text, found[0].span(1))


def _in_program(asked: ProgramRequest, name: str) -> Iterator[ProgramSetting]:
    """A default of the program's own parser or dataclass, or an assignment."""
    path = Path(asked.program)
    if asked.module or not path.is_file():
        return
    text = _text_of(path)
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, UnicodeError):  # said before it runs, or not written in UTF-8
        return
    defaults = [default for node in nodes if (default := _default(node, name))]
    if len(defaults) == 1:
        value, option, line = defaults[0]
        changed = partial(_with_option, asked, option)
        yield ProgramSetting(name, value, f"{path.name}:{line}, the default of {option}", changed)
    spelled = re.compile(_spelled(name))
    assigned = [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_number(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and spelled.fullmatch(target.id)
    ]
    if len(assigned) == 1:
        (number,) = assigned
        line = "".join(text.splitlines(keepends=True)[: number.lineno - 1])
        first = len(line.encode()) + number.col_offset  # columns count bytes
        last = first + number.end_col_offset - number.col_offset
        span = len(text.encode()[:first].decode()), len(text.encode()[:last].decode())
        yield _in_text(asked, name, asked.program, text, span)


def _default(node: ast.AST, name: str) -> tuple[int, str, int] | None:
    """The default, the option and the line, where a node gives a command line an option of this name."""
    spelled = re.compile(rf"--{_spelled(name)}")
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
        words = [
            each.value
            for each in node.args
            if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        option = next((word for word in words if spelled.fullmatch(word)), None)
        number = next((each.value for each in node.keywords if each.arg == "default"), None)
    elif (
        isinstance(node, ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.target, ast.Name)
    ):
        option = f"--{node.target.id}" if spelled.fullmatch(f"--{node.target.id}") else None
        number = next((each.value for each in node.value.keywords if each.arg == "default"), None)
    else:
        return None
    return (number.value, option, node.lineno) if option and _is_number(number) else None


def _with_option(asked: ProgramRequest, option: str, value: int) -> ProgramRequest:
    return replace(asked, arguments=(*asked.arguments, f"{option}={value}"))


def _in_text(
    asked: ProgramRequest, name: str, file: str, text: str, span: tuple[int, int]
) -> ProgramSetting:
    begin, end = span
    line = text.count("\n", 0, begin) + 1
    inside = Path(file).resolve()
    if asked.in_place or not inside.is_relative_to(Path.cwd()):
        raise UserError(
            f"{file}:{line} sets {name}. Another value is written into a copy of this folder alone.",
            where=file,
            allowed="a file below this folder, without --in-place; or an argument of the program",
            write=f"cd {inside.parent} && dryfit run ...",
        )

    def changed(value: int) -> ProgramRequest:
        return replace(
            asked, files={str(inside.relative_to(Path.cwd())): f"{text[:begin]}{value}{text[end:]}"}
        )

    return ProgramSetting(name, int(text[begin:end]), f"{file}:{line}", changed)


def _spelled(name: str) -> str:
    """A name, with dashes for underscores too."""
    return "[-_]".join(map(re.escape, re.split("[-_]", name)))


def _is_number(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape")
