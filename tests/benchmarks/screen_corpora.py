"""How the screen does on corpora of others: ``python -m tests.benchmarks.screen_corpora FOLDER ...``

A folder is a checkout or download that a person has fetched; known files in it are recognized by their paths:

- aegish (``benchmark/data/*.json``): harmless commands, and GTFOBins by class;
- destructive_command_guard (``tests/corpus/``): what must be denied (``true_positives``, ``bypass_attempts``) and
  allowed (``false_positives``);
- the wheel of icalfa (``icalfa/assets/datasets/nl2bash_fs_*.json``): NL2SH-ALFA's references.

Their texts stay there: only counts, and the SHA-256 of each file, are printed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.terminal import command as command_line
from scripts.tasks.shell.screen.policy import screen

Row = tuple[str, bool, str]  # group, whether it has to be refused, command


def aegish(path: Path) -> Iterator[Row]:
    for row in json.loads(path.read_text(encoding="utf-8"))["commands"]:
        if "category" in row:
            yield f"aegish, GTFOBins: {row['category']}", True, row["command"]
        else:
            yield "aegish, harmless", False, row["command"]


def guard(path: Path) -> Iterator[Row]:
    for case in tomllib.loads(path.read_text(encoding="utf-8"))["case"]:
        refused = case["expected"] == "deny"
        yield (
            f"destructive_command_guard, must {'deny' if refused else 'allow'}",
            refused,
            case["command"],
        )


def references(path: Path) -> Iterator[Row]:
    for row in json.loads(path.read_text(encoding="utf-8")):
        for key in ("gold", "gold2"):
            if row.get(key):
                yield "NL2SH-ALFA, references", False, row[key]


KNOWN: dict[str, Callable[[Path], Iterator[Row]]] = {
    "benchmark/data/*_commands.json": aegish,
    "tests/corpus/true_positives/*.toml": guard,
    "tests/corpus/bypass_attempts/*.toml": guard,
    "tests/corpus/false_positives/*.toml": guard,
    "icalfa/assets/datasets/nl2bash_fs_*.json": references,
}


def evaluate(folder: Path) -> tuple[dict[str, Counter], dict[str, str]]:
    """For each group how many there are and how many are refused; and the digest of each file."""
    groups: dict[str, Counter] = {}
    digests = {}
    for pattern, read in KNOWN.items():
        for path in sorted(folder.glob(pattern)):
            digests[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
            for group, expected, text in read(path):
                counts = groups.setdefault(group, Counter(expected=int(expected)))
                counts["rows"] += 1
                counts["refused"] += screen(text).status != "ok"
    if not digests:
        raise UserError(
            "No corpus is known in this folder.", where=folder, allowed=", ".join(KNOWN)
        )
    return groups, digests


def main() -> None:
    """Print a table for each folder."""
    if not sys.argv[1:]:
        raise UserError(
            "No folder is named.", write="python -m tests.benchmarks.screen_corpora FOLDER ..."
        )
    print("| corpus | refused | of | to be refused |\n| --- | ---: | ---: | --- |")
    for folder in map(Path, sys.argv[1:]):
        groups, digests = evaluate(folder)
        for group, counts in sorted(groups.items()):
            print(
                f"| {group} | {counts['refused']} | {counts['rows']} | {'yes' if counts['expected'] else 'no'} |"
            )
        for name, digest in digests.items():
            print(f"  {digest}  {name}", file=sys.stderr)


if __name__ == "__main__":
    command_line(main)
