"""The syntax check: shfmt, a real parser of Bash, over many commands at once. Nothing is executed.

Each command goes into a file of its own, so that an error in one says nothing about the others, and one
process parses thousands of files. shfmt prints the canonical form of each; a comment in its last line says
whose it is.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common.errors import UserError

_FILES_A_PROCESS = 4_000  # their names stay far below any system's limit on arguments
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
            allowed="the package shfmt-py, as requirements.txt and envs/ pin it",
            write="pip install -r requirements.txt",
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
    results: list[Syntax] = []
    for start in range(0, len(commands), _FILES_A_PROCESS):
        results += _check(shfmt, commands[start : start + _FILES_A_PROCESS])
    return results


def _check(shfmt: str, commands: Sequence[str]) -> list[Syntax]:
    """One process over at most :data:`_FILES_A_PROCESS` commands."""
    # A mark that no command can contain, for it is made from all of them.
    mark = "#" + hashlib.sha256("\0".join(commands).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    with tempfile.TemporaryDirectory(prefix="syntax-") as folder:
        for number, command in enumerate(commands):
            with open(f"{folder}/{number}", "w", encoding="utf-8", errors="surrogatepass", newline="\n") as handle:
                handle.write(f"{command}\n{mark} {number}\n")
        names = [str(number) for number in range(len(commands))]
        done = subprocess.run(
            [shfmt, "--language-dialect", "bash", *names],
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )
    if done.returncode not in (0, 1):
        raise UserError(f"shfmt failed with status {done.returncode}.", where=shfmt, found=done.stderr[-500:])
    canonical: dict[int, str] = {}
    end = 0
    for match in re.finditer(rf"{mark} (\d+)\n", done.stdout):
        canonical[int(match[1])] = done.stdout[end : match.start()].strip()
        end = match.end()
    errors = {int(number): message for number, message in _ERROR.findall(done.stderr)}
    return [
        Syntax(None, errors.get(number, "the command swallows what follows it"))
        if number in errors or number not in canonical
        else Syntax(canonical[number], None)
        for number in range(len(commands))
    ]
