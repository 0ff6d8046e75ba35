"""docs/out-of-memory.md shows what its commands print: all are understood, and some are asked again.

Each asks for a trace, so a test asks three; the others' numbers are the engine's, whose tests are its own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dryfit.ask.command import main, read

PAGE = Path(__file__).resolve().parents[3] / "docs" / "out-of-memory.md"
SHOWN = re.findall(r"```text\n\$ dryfit (.+)\n((?:.+\n)+?)```", PAGE.read_text(encoding="utf-8"))


def test_each_report_has_a_command_with_its_output() -> None:
    assert len(SHOWN) == len(re.findall(r"^## \d+\. ", PAGE.read_text(encoding="utf-8"), re.M)) == 26
    for command, _ in SHOWN:
        assert read(shlex.split(command)).question.scenario.model


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [5, 6, 11, 19, 25])
def test_what_is_shown_is_what_is_printed(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    command, output = SHOWN[number - 1]
    main(shlex.split(command))
    assert capsys.readouterr().out.startswith(output)
