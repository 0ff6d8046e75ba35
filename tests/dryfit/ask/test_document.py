"""docs/out-of-memory.md shows what its commands print: all are understood, and some are asked again.

Each asks for a trace, so a test asks five; the others' numbers are the engine's, whose tests are its own.
`python -m tests.dryfit.ask.test_document` asks all and writes what they print now, as many lines as stand there.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dryfit.ask.command import main, read

PAGE = Path(__file__).resolve().parents[3] / "docs" / "out-of-memory.md"
BLOCK = re.compile(r"```text\n\$ dryfit (.+)\n((?:.+\n)+?)```")
SHOWN = BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_each_report_has_a_command_with_its_output() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(BLOCK.search(section) for section in text.split("\n## ")[1:])
    assert len(SHOWN) == text.count("\n$ dryfit ")
    for command, _ in SHOWN:
        assert read(shlex.split(command)).question.scenario.model


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [5, 9, 11])
def test_what_is_shown_is_what_is_printed(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    command, output = SHOWN[number - 1]
    main(shlex.split(command))
    assert capsys.readouterr().out.startswith(output)


def _now(shown: re.Match[str]) -> str:
    command, lines = shown[1], shown[2].count("\n")
    done = subprocess.run(
        [sys.executable, "-m", "dryfit.ask", *shlex.split(command)], capture_output=True, text=True
    )
    if done.returncode == 2:
        sys.exit(f"dryfit {command}\n{done.stderr}")
    return (
        f"```text\n$ dryfit {command}\n"
        + "".join(done.stdout.splitlines(keepends=True)[:lines])
        + "```"
    )


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(_now, text), encoding="utf-8")
