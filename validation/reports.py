"""What people reported about runs of theirs, asked of ``will-it-fit``, and whether the verdict was right.

    python -m validation.reports draw            which reports stayed unread: the draw, again
    python -m validation.reports ask [ID ...]    ask again (all of them without ids), and keep the verdicts
    python -m validation.reports page            write docs/reports.md and README's lines from what is kept

``validation/data/reports.csv`` has a row for each question: what was stated, what we assumed, and what came of the run.
The files that a question names lie in ``validation/data/reports``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from validation.rows import FOLDER
from will_it_fit.common.terminal import command

TABLE = FOLDER / "reports.csv"
FILES = FOLDER / "reports"
SEED, UNREAD = 45, 40
VERDICTS = ("fits", "too_close", "does_not_fit", "no_answer")
AGREEMENTS = ("right", "unsafe", "wrong_on_the_safe_side", "undecidable")
GIB = 2**30
_ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 900  # of one question, before it counts as not answered


@dataclass(frozen=True)
class Report:
    """One question and what came of the run that it asks about.

    ``settings`` were stated by the author, ``assumed`` was not. ``question``: the words behind ``will-it-fit``, asked
    in ``validation/data/reports``. ``decidable``: yes, or no and why. ``outcome``: ``ran`` or ``ran_out`` (of memory),
    ``where`` it ran out. ``peak_gib``, ``peak_is``: what was stated of the memory. ``half``: ``development``, or
    ``unread`` until the end. ``baseline`` is commit 75c96db0; the unread half was not asked then.
    """

    id: str
    link: str
    date: str
    tool: str
    version: str
    model: str
    method: str
    settings: str
    assumed: str
    question: str
    decidable: str
    outcome_seen_before_question: str
    outcome: str
    where: str
    peak_gib: str
    peak_is: str
    half: str
    baseline_verdict: str = ""
    baseline_required_gib: str = ""
    baseline_usable_gib: str = ""
    baseline_why: str = ""
    verdict: str = ""
    required_gib: str = ""
    usable_gib: str = ""
    why: str = ""


COLUMNS = tuple(field.name for field in fields(Report))


def read() -> list[Report]:
    """All reports, in the order of the file."""
    with open(TABLE, encoding="utf-8", newline="") as handle:
        return [Report(**row) for row in csv.DictReader(handle)]


def write(reports: Iterable[Report]) -> None:
    with open(TABLE, "w", encoding="utf-8", newline="") as handle:
        table = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(report) for report in reports)


def draw(reports: Sequence[Report], seed: int = SEED, wanted: int = UNREAD) -> set[str]:
    """The ids of the decidable reports that stay unread: whole threads, shuffled, until ``wanted`` rows are together.

    A thread goes in whole or not at all, so that no row of the development half tells about an unread one.
    """
    threads: dict[str, list[str]] = {}
    for report in reports:
        if report.decidable == "yes":
            threads.setdefault(report.link, []).append(report.id)
    links = sorted(threads)
    random.Random(seed).shuffle(links)
    drawn: list[str] = []
    for link in links:
        if len(drawn) + len(threads[link]) <= wanted:
            drawn += threads[link]
    return set(drawn)
