"""The syntax check: shfmt, a real parser of Bash, over many commands at once. Nothing is executed.

Files cost more than parsing, so many commands share one. Before each stands a mark, a statement with more spaces
than shfmt leaves. When shfmt has no complaint and prints every mark tidied at the beginning of a line,
each command was complete by itself: inside an open quote or here-document the spaces would have stayed,
inside an open block or after an open pipe the mark would be indented. Otherwise the file is halved, down to
single commands.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dryfit.common.errors import UserError

_FILES_A_PROCESS = 2_000  # their names stay far below any system's limit on arguments
_COMMANDS_A_FILE = 64
_ERROR = re.compile(r"^(\d+):\d+:\d+: (.*)$", re.MULTILINE)


class Syntax(NamedTuple):
    """What the parser says of one command: its canonical form, or None and what is wrong."""

    canonical: str | None
    error: str | None


def find_shfmt() -> str:
    """The shfmt program of this environment, or the one on PATH. Without one nothing can be called valid."""
    beside = Path(sys.executable).with_name("shfmt")
    program = str(beside) if beside.is_file() else shutil.which("shfmt")
    if program is None:
        raise UserError(
            "shfmt is not installed, so no command's syntax can be checked.",
            where=f"the environment {sys.prefix}",
            allowed="the package shfmt-py, as pyproject.toml and envs/ pin it",
            write="pip install shfmt-py",
        )
    return program


def check_syntax(commands: Sequence[str]) -> list[Syntax]:
    """Parse commands as Bash.

    Parameters
    ----------
    commands
        Texts without NUL bytes.

    Returns
    -------
    list of Syntax
        In the order of the commands.
    """
    shfmt = find_shfmt()
    # A mark that no command can contain, for it is made from all of them.
    digest = hashlib.sha256()
    for command in commands:
        digest.update(command.encode("utf-8", "surrogatepass") + b"\0")
    mark = digest.hexdigest()[:32]
    results: dict[int, Syntax] = {}
    pending = [
        range(len(commands))[start : start + _COMMANDS_A_FILE]
        for start in range(0, len(commands), _COMMANDS_A_FILE)
    ]
    while pending:
        batch, pending = pending[:_FILES_A_PROCESS], pending[_FILES_A_PROCESS:]
        for numbers, forms in zip(batch, _parse(shfmt, mark, commands, batch), strict=True):
            if not isinstance(forms, str):
                results.update(
                    zip(numbers, (Syntax(canonical, None) for canonical in forms), strict=True)
                )
            elif len(numbers) == 1:
                results[numbers[0]] = Syntax(None, forms)
            else:
                middle = len(numbers) // 2
                pending += [numbers[:middle], numbers[middle:]]
    return [results[number] for number in range(len(commands))]


def _parse(
    shfmt: str, mark: str, commands: Sequence[str], batch: Sequence[range]
) -> list[list[str] | str]:
    """Parse files of several commands in one process.

    Returns for each of the batch the canonical forms of its commands, or what is wrong with one of them.
    """
    with tempfile.TemporaryDirectory(prefix="syntax-") as folder:
        for name, numbers in enumerate(batch):
            between = f"\n:  {mark}  {name}\n"
            text = between + between.join(commands[number] for number in numbers) + "\n"
            with open(f"{folder}/{name}", "wb") as handle:
                handle.write(text.encode("utf-8", "surrogatepass"))
        done = subprocess.run(
            [shfmt, "--language-dialect", "bash", *map(str, range(len(batch)))],
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )
    if done.returncode not in (0, 1):
        raise UserError(
            f"shfmt failed with status {done.returncode}.", where=shfmt, found=done.stderr[-500:]
        )
    errors = {int(name): message for name, message in _ERROR.findall(done.stderr)}
    # One output for all files; each command's form comes after a mark of its file.
    forms: dict[int, list[str]] = {}
    parts = re.split(rf"^: {mark} (\d+)\n", done.stdout, flags=re.MULTILINE)
    for name, form in zip(parts[1::2], parts[2::2], strict=True):
        forms.setdefault(int(name), []).append(form.strip())
    results: list[list[str] | str] = []
    for name, numbers in enumerate(batch):
        lines = forms.get(name, [])
        if name in errors:
            results.append(errors[name])
        elif len(lines) != len(numbers) or any(mark in form for form in lines):
            results.append("a command swallows what follows it")
        else:
            results.append(lines)
    return results
