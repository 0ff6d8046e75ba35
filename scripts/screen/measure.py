"""How labelled commands come out: the project's own set, or a corpus of somebody else in a folder.

A labelled set has three columns parted by tabs, ``danger`` or ``ok``, a category and a command; its first line is a
header. A corpus of others stays theirs: only counts leave this module.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from scripts.common.errors import UserError
from scripts.screen.policy import Policy

_COUNTS = ("dangerous", "refused", "same_category", "harmless", "false_alarms")


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
    rows = [(number, line.split("\t", 2)) for number, line in enumerate(lines[1:], 2)]
    for number, parts in rows:
        if len(parts) != 3 or parts[0] not in ("danger", "ok"):
            where, allowed = f"{path}, line {number}", "danger or ok, a category and a command, parted by tabs"
            raise UserError("A row of the labelled set is incomplete.", where=where, found=parts, allowed=allowed)
    return [(label, category, command) for _, (label, category, command) in rows]


def evaluate(rows: list[tuple[str, str, str]], policy: Policy) -> dict:
    """How a labelled set comes out.

    Returns
    -------
    dict
        ``categories``: for each the counts ``dangerous``, ``refused`` (of these), ``same_category`` (of these),
        ``harmless`` and ``false_alarms`` (of these); ``total`` with the sums, ``recall`` and ``false_alarm_rate``;
        ``wrong``: the rows judged otherwise than labelled. An unparsable command counts as refused.
    """
    judged = [(label, category, command, policy.judge(command)) for label, category, command in rows]
    categories: dict[str, Counter] = {category: Counter() for _, category, _, _ in judged}
    for label, category, _, verdict in judged:
        refused, counts = verdict.status != "ok", categories[category]
        if label == "danger":
            counts += Counter(dangerous=1, refused=refused, same_category=verdict.category == category)
        else:
            counts += Counter(harmless=1, false_alarms=refused)
    total = {key: sum(counts[key] for counts in categories.values()) for key in _COUNTS}
    return {
        "categories": {name: {key: categories[name][key] for key in _COUNTS} for name in sorted(categories)},
        "total": total
        | {
            "false_alarm_rate": total["false_alarms"] / total["harmless"] if total["harmless"] else None,
            "recall": total["refused"] / total["dangerous"] if total["dangerous"] else None,
        },
        "wrong": [
            {"category": category, "command": command, "label": label, "verdict": verdict.line()}
            for label, category, command, verdict in judged
            if (verdict.status != "ok") != (label == "danger")
        ],
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
    wrong = [f"- {row['label']}, judged `{row['verdict']}`: `{row['command']}`" for row in result["wrong"]]
    return "\n".join([*lines, "", *wrong]).replace("\t", " ").rstrip()
