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
- A root shell is refused, whatever program starts it (``sudo vim -c '!sh'``, an interpreter's prompt), one named
  command under ``sudo`` is judged as that command. Running downloaded or encoded text is refused whoever the sender is.
- Scheduling without an editor and start-up files written from a command are refused; copying a unit file of a
  project and adding settings (``export``, ``alias``) to one's own profile pass.
- Emptying the working directory (``rm -rf *``, ``find . -delete``) and ``rm -rf $unset/*`` are refused: the text does
  not say where it runs. A folder that is named, or entered on the same line, passes.
- Reading password hashes, private keys and tokens is refused, also from a cluster, a cloud or a vault; listing them,
  one's own password manager, using a key to log in and public keys pass.
- Data that a database, cluster or cloud holds is refused to be dropped as a whole; one named table, pod or object and
  what asks first pass. What a ``timeout`` or a count bounds fills nothing.
- A list of the whole machine, of all accounts or disks is as dangerous to delete as what it lists.
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
from scripts.dataset.commands import Refused
from scripts.dataset.rules import RULES, SEVERITIES
from scripts.dataset.shell import read


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


def labelled(path: str) -> list[tuple[str, str, str]]:
    """Rows (label, category, command) of a labelled set.

    Raises
    ------
    UserError
        There is no such file, or a row is not ``ok`` or ``danger``, a category and a command.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("The labelled set can't be read.", where=path, found=str(error)) from error
    rows = []
    for number, line in enumerate(lines[1:], 2):
        parts = line.split("\t", 2)
        if len(parts) != 3 or parts[0] not in ("danger", "ok"):
            raise UserError(
                "A row of the labelled set is incomplete.",
                where=f"{path}, line {number}",
                found=line[:80],
                allowed="danger or ok, a category and a command, separated by tabs; the first line is a header",
            )
        rows.append((parts[0], parts[1], parts[2]))
    return rows


def evaluate(rows: list[tuple[str, str, str]]) -> dict:
    """How a labelled set comes out.

    Returns
    -------
    dict
        ``categories``: for each the counts ``dangerous``, ``refused`` (of these), ``same_category`` (of these),
        ``harmless`` and ``false_alarms`` (of these); ``total`` with the sums, ``recall`` and ``false_alarm_rate``;
        ``wrong``: the rows judged otherwise than labelled. An unparsable command counts as refused.
    """
    categories: dict[str, Counter] = {}
    wrong = []
    for label, category, command in rows:
        counts = categories.setdefault(category, Counter())
        verdict = screen(command)
        refused = verdict.status != "ok"
        counts["dangerous" if label == "danger" else "harmless"] += 1
        if label == "danger":
            counts["refused"] += refused
            counts["same_category"] += verdict.category == category
        else:
            counts["false_alarms"] += refused
        if refused != (label == "danger"):
            wrong.append({"category": category, "command": command, "label": label, "verdict": verdict.line()})
    total = sum(categories.values(), Counter())
    names = ("dangerous", "refused", "same_category", "harmless", "false_alarms")
    return {
        "categories": {name: {key: categories[name][key] for key in names} for name in sorted(categories)},
        "total": {key: total[key] for key in names}
        | {
            "false_alarm_rate": total["false_alarms"] / total["harmless"] if total["harmless"] else None,
            "recall": total["refused"] / total["dangerous"] if total["dangerous"] else None,
        },
        "wrong": wrong,
    }


def table(result: dict) -> str:
    """An evaluation as Markdown."""
    lines = [
        "| category | dangerous | refused | as this category | recall | harmless | false alarms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in [*result["categories"].items(), ("**all**", result["total"])]:
        recall = f"{row['refused'] / row['dangerous']:.3f}" if row["dangerous"] else ""
        lines.append(
            f"| {name} | {row['dangerous']} | {row['refused']} | {row['same_category']} | {recall} |"
            f" {row['harmless']} | {row['false_alarms']} |"
        )
    wrong = [
        f"- {row['label']}, judged `{row['verdict']}`: `{row['command']}`".replace("\t", " ") for row in result["wrong"]
    ]
    return "\n".join([*lines, "", *wrong]).rstrip()


def main() -> int:
    """Command line: status 0 whatever the verdicts, 2 for a wrong file."""
    parser = argparse.ArgumentParser(prog="python -m scripts.dataset.screen", description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", metavar="FILE.tsv", help="show how a labelled set comes out, instead")
    parser.add_argument("--json", action="store_true", help="with --evaluate: JSON rather than Markdown")
    options = parser.parse_args()
    if options.evaluate:
        result = evaluate(labelled(options.evaluate))
        print(json.dumps(result, indent=2, sort_keys=True) if options.json else table(result))
        return 0
    for line in sys.stdin.buffer:
        print(screen(line.decode("utf-8", "replace").rstrip("\r\n")).line())
    return 0


if __name__ == "__main__":
    command_line(main)
