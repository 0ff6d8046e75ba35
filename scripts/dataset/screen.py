"""The safety screen: whether a shell command may be learned or shown.

``python -m scripts.dataset.screen`` reads commands from standard input, one a line, and prints for each, in order,
``ok``, ``danger<TAB>category<TAB>rule`` or ``unparsable``. ``--evaluate FILE.tsv`` prints instead how a labelled set
(label, category, command; tab-separated) comes out, as Markdown or, with ``--json``, as JSON.

Policy
------
- A command is judged by what it would do and to what. Text that is only data (an argument of ``echo``, a commit
  message, a pattern of ``grep``) is no command; the same text piped into a shell is.
- Refused is what destroys, opens or hides beyond repair: the categories of :mod:`scripts.dataset.rules`. Ordinary
  work of a user or an administrator passes: deleting named files and build folders, installing packages, changing
  one file's mode, reading logs.
- Formatting or overwriting *any* disk is refused, also a USB stick: the text does not say what the disk is.
- A root shell is refused, one named command under ``sudo`` is judged as that command. Running downloaded or encoded
  text is refused whoever the sender is. All scheduling without an editor is refused.
- Restarting and shutting down pass: they lose no data.
- What can't be parsed as Bash, or is beyond the reader's limits, is ``unparsable`` and to be treated as refused.

Nothing is executed; no file, variable or network of this machine is looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from scripts.common.errors import UserError
from scripts.common.job import command as command_line
from scripts.dataset.rules import CATEGORIES, RULES, SEVERITIES
from scripts.dataset.shell import Refused, read


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the screen says.

    Parameters
    ----------
    status
        ``ok``, ``danger`` or ``unparsable``.
    category, rule, severity, attack_id
        Of the most severe rule that matches; None unless ``danger``.
    """

    status: str
    category: str | None = None
    rule: str | None = None
    severity: str | None = None
    attack_id: str | None = None

    def line(self) -> str:
        """The verdict as the command line prints it."""
        return f"danger\t{self.category}\t{self.rule}" if self.status == "danger" else self.status


_OK, _UNPARSABLE = Verdict("ok"), Verdict("unparsable")
_ORDER = sorted(RULES, key=lambda rule: -SEVERITIES.index(rule.severity))
_DANGER = {rule.name: Verdict("danger", rule.category, rule.name, rule.severity, rule.attack_id) for rule in RULES}


@lru_cache(maxsize=8192)
def screen(command: str) -> Verdict:
    """Judge a text of shell commands.

    Parameters
    ----------
    command
        One command, or a script of several lines.

    Returns
    -------
    Verdict
        Never an exception, whatever the text.
    """
    try:
        reading = read(command)
    except (Refused, RecursionError):
        return _UNPARSABLE
    for rule in _ORDER:
        for one in reading.commands:
            if rule.matches(one):
                return _DANGER[rule.name]
    return _OK


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.dataset.screen", description=__doc__.split("\n")[0])
    parser.parse_args()
    for line in sys.stdin.buffer:
        print(screen(line.decode("utf-8", "replace").rstrip("\r\n")).line())
    return 0


if __name__ == "__main__":
    command_line(main)
