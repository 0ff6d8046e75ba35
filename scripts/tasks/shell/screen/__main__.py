"""The screen on the command line: commands from standard input, one a line; a verdict for each, in order.

``ok``, ``danger<TAB>category<TAB>rule`` or ``unparsable``. ``--evaluate`` shows instead how a labelled set comes out:
three columns parted by tabs, ``danger`` or ``ok``, a category and a command; the first line is a header.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.terminal import command as command_line
from scripts.tasks.shell.screen.policy import UNPARSABLE, Policy, build

_COUNTS = ("dangerous", "refused", "same_category", "harmless", "false_alarms")


def labelled(path: str) -> list[tuple[str, str, str]]:
    """Rows (label, category, command) of a labelled set; :class:`UserError` for a missing file or a wrong row."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("The labelled set can't be read.", where=path, found=str(error)) from error
    rows = [(number, line.split("\t", 2)) for number, line in enumerate(lines[1:], 2)]
    for number, parts in rows:
        if len(parts) != 3 or parts[0] not in ("danger", "ok"):
            where, allowed = (
                f"{path}, line {number}",
                "danger or ok, a category and a command, parted by tabs",
            )
            raise UserError(
                "A row of the labelled set is incomplete.",
                where=where,
                found=parts,
                allowed=allowed,
            )
    return [(label, category, command) for _, (label, category, command) in rows]


def evaluate(rows: list[tuple[str, str, str]], policy: Policy) -> dict:
    """How a labelled set comes out, in all and by category; an unparsable command counts as refused.

    ``dangerous``, ``refused`` of these, ``same_category`` of these; ``harmless``, ``false_alarms`` of these; ``wrong``:
    the rows judged otherwise than labelled.
    """
    judged = [
        (label, category, command, policy.judge(command)) for label, category, command in rows
    ]
    categories: dict[str, Counter] = {category: Counter() for _, category, _, _ in judged}
    for label, category, _, verdict in judged:
        refused, counts = verdict.status != "ok", categories[category]
        if label == "danger":
            counts += Counter(
                dangerous=1, refused=refused, same_category=verdict.category == category
            )
        else:
            counts += Counter(harmless=1, false_alarms=refused)
    total = {key: sum(counts[key] for counts in categories.values()) for key in _COUNTS}
    return {
        "categories": {
            name: {key: categories[name][key] for key in _COUNTS} for name in sorted(categories)
        },
        "total": total
        | {
            "false_alarm_rate": total["false_alarms"] / total["harmless"]
            if total["harmless"]
            else None,
            "recall": total["refused"] / total["dangerous"] if total["dangerous"] else None,
        },
        "wrong": [
            {"category": category, "command": command, "label": label, "verdict": verdict.line()}
            for label, category, command, verdict in judged
            if (verdict.status != "ok") != (label == "danger")
        ],
    }


def table(result: dict) -> str:
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
        f"- {row['label']}, judged `{row['verdict']}`: `{row['command']}`"
        for row in result["wrong"]
    ]
    return "\n".join([*lines, "", *wrong]).replace("\t", " ").rstrip()


def main() -> int:
    """Command line: status 0 whatever the verdicts, 2 for a wrong file or policy."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.screen", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--policy", metavar="FILE.yaml", action="append", default=[], help="laid over the own one"
    )
    parser.add_argument(
        "--check", action="store_true", help="hold the policy against its schema and examples"
    )
    parser.add_argument("--evaluate", metavar="FILE.tsv", help="show how a labelled set comes out")
    parser.add_argument("--json", action="store_true", help="JSON rather than lines or Markdown")
    options = parser.parse_args()
    policy = build(*options.policy)
    if options.check:
        print(f"{len(policy.rules)} rules, each with its examples as it says")
    elif options.evaluate:
        result = evaluate(labelled(options.evaluate), policy)
        print(json.dumps(result, indent=2, sort_keys=True) if options.json else table(result))
    for line in () if options.check or options.evaluate else sys.stdin.buffer:
        try:
            verdict = policy.judge(line.decode("utf-8-sig").rstrip("\r\n"))
        except UnicodeDecodeError:
            verdict = UNPARSABLE
        print(json.dumps(asdict(verdict), sort_keys=True) if options.json else verdict.line())
    return 0


if __name__ == "__main__":
    command_line(main)
