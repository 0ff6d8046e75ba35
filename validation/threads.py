"""What people wrote about trainings of images, videos, speech and encoders, asked of ``dryfit`` by name or by file.

    python -m validation.threads draw            which threads were drawn for the first asking: the draw, again
    python -m validation.threads ask [ID ...]    ask (without ids: what was not asked yet), and keep the verdicts
    python -m validation.threads table           the counts and the wrong ones, as docs/evidence.md has them

``validation/data/threads.csv`` has a row for each question: what was stated, what we assumed, and what came of the run.
The files that a question names lie in ``validation/data/threads``. It needs the packages of ``dryfit[recipes]``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from dryfit.common.text import GIB
from validation.reports import AGREEMENTS, NOT_ASKED, agreement
from validation.tables import FOLDER, markdown, rows_of

TABLE = FOLDER / "threads.csv"
FILES = FOLDER / "threads"
SEED, DRAWN = 51, 46  # threads of the first asking; four older ones stand in docs/evidence.md
LATER_DRAWN = 16  # questions of the fourth asking, and of the fifth
LATER = {
    "fourth": ("fk-24", 52),
    "fifth": ("df-10994-1", 53),
}  # the first question of each collection, and its seed
_ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 600  # of one question, before it counts as not answered
_START = [sys.executable, "-P", "-m", "dryfit.ask.command"]


@dataclass(frozen=True)
class Thread:
    """One question and what came of the run that it asks about.

    ``settings`` were stated by the author, ``assumed`` was not. ``question``: the words behind ``dryfit``, asked in
    ``validation/data/threads``. ``outcome``: ``ran`` or ``ran_out`` (of memory), ``where`` it ran out. ``peak_gib``,
    ``peak_is``: what was stated of the memory. ``drawn``: ``first`` for threads of the first draw, ``second`` for the
    others, which were asked when the causes of its wrong answers had been mended; ``third`` for ten that were collected
    and asked when the files of four more tools could be read; ``fourth`` for 16 questions that were drawn of 22,
    ``fifth`` for 16 of 43, and ``later`` for those that nobody asked yet. The columns ``first_...`` hold the verdict at
    the first asking, the others the present one; ``cpu_seconds`` what the answer took.
    """

    id: str
    link: str
    date: str
    tool: str
    model: str
    card: str
    settings: str
    assumed: str
    question: str
    outcome: str
    where: str
    peak_gib: str
    peak_is: str
    drawn: str = ""
    first_verdict: str = ""
    first_required_gib: str = ""
    first_usable_gib: str = ""
    first_cpu_seconds: str = ""
    first_why: str = ""
    verdict: str = ""
    required_gib: str = ""
    usable_gib: str = ""
    cpu_seconds: str = ""
    why: str = ""

    decidable: ClassVar[str] = (
        "yes"  # as a report has it; threads that say too little were not taken
    )


def read() -> list[Thread]:
    """All questions, in the order of the file."""
    return [Thread(**row) for row in rows_of(TABLE)]


def write(threads: Iterable[Thread]) -> None:
    with open(TABLE, "w", encoding="utf-8", newline="") as handle:
        table = csv.DictWriter(
            handle, [field.name for field in fields(Thread)], lineterminator="\n"
        )
        table.writeheader()
        table.writerows(asdict(thread) for thread in threads)


def draw(threads: Sequence[Thread]) -> set[str]:
    """The links of the threads of the first asking."""
    links = sorted({thread.link for thread in threads if thread.drawn in ("first", "second")})
    return set(random.Random(SEED).sample(links, DRAWN))


def later_draw(threads: Sequence[Thread], draw: str) -> set[str]:
    """The ids of the questions of the ``fourth`` asking, or of the ``fifth``.

    The fourth drew single questions. The fifth takes whole threads in a drawn order, each that still has room.
    """
    starts = {first: name for name, (first, _) in LATER.items()}
    of, collected = "", []
    for thread in threads:
        of = starts.get(thread.id, of)
        if of == draw:
            collected.append(thread)
    chosen = random.Random(LATER[draw][1])
    if draw == "fourth":
        return set(chosen.sample(sorted(thread.id for thread in collected), LATER_DRAWN))
    links = sorted({thread.link for thread in collected})
    drawn: set[str] = set()
    for link in chosen.sample(links, len(links)):
        ids = {thread.id for thread in collected if thread.link == link}
        drawn |= ids if len(drawn | ids) <= LATER_DRAWN else set()
    return drawn


def ask(thread: Thread) -> Thread:
    """The question with what is answered now; at the first asking that is kept as the first verdict too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "DRYFIT_CACHE": "", "HF_HUB_OFFLINE": "1"}
    words = [*_START, *shlex.split(thread.question), "--json"]
    done = subprocess.run(
        words, cwd=FILES, env=environment, capture_output=True, text=True, timeout=_SECONDS
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f}"
    errors = [
        line for line in done.stderr.splitlines() if line and not line.startswith("dryfit: ")
    ]  # no progress
    said, required, usable, why = "no_answer", "", "", next(iter(errors), "")
    if done.returncode in (0, 1) and done.stdout.startswith("{"):
        answer = json.loads(done.stdout)
        size = answer["gpu"]["usable_bytes"]
        said, why = answer["verdict"], thread.why if answer["verdict"] == thread.verdict else ""
        required, usable = f"{(size - answer['headroom_bytes']) / GIB:.2f}", f"{size / GIB:.2f}"
    now = {
        "verdict": said,
        "required_gib": required,
        "usable_gib": usable,
        "cpu_seconds": cpu,
        "why": why,
    }
    first = {} if thread.first_verdict else {f"first_{name}": value for name, value in now.items()}
    return replace(thread, **now, **first)


def counts(threads: Iterable[Thread], first: bool) -> dict[str, int]:
    """How many answers of each agreement, at the first asking or now."""
    told = dict.fromkeys((*AGREEMENTS, NOT_ASKED, "all"), 0)
    for thread in threads:
        verdict, usable = (
            (thread.first_verdict, thread.first_usable_gib)
            if first
            else (thread.verdict, thread.usable_gib)
        )
        told[agreement(thread, verdict, usable) or NOT_ASKED] += 1
        told["all"] += 1
    return told


def table(threads: Sequence[Thread]) -> str:
    """Counts by draw, and a line for each answer that is wrong now, in Markdown."""
    columns = {
        f"{draw} draw, {'once' if first else 'now'}": counts(
            [one for one in threads if one.drawn == draw], first
        )
        for draw in ("first", "second", "third", "fourth", "fifth")
        for first in (True, False)
    }
    outcomes = ("right", "unsafe", "wrong_on_the_safe_side", "no_answer", NOT_ASKED, "all")
    numbers = [
        [name.replace("_", " "), *(told[name] for told in columns.values())] for name in outcomes
    ]
    wrong = []
    for thread in threads:
        if (agrees := agreement(thread, thread.verdict, thread.usable_gib)) in (
            "unsafe",
            "wrong_on_the_safe_side",
        ):
            what = f"{thread.tool}, {thread.model}, {thread.card}: {thread.settings}"
            outcome = f"ran, {thread.peak_gib} GiB" if thread.peak_gib else "ran"
            outcome = "ran out of memory" if thread.outcome == "ran_out" else outcome
            verdict = (
                f"{thread.required_gib} of {thread.usable_gib} GiB, {agrees.replace('_', ' ')}"
            )
            wrong.append((f"[{thread.id}]({thread.link})", what, outcome, verdict, thread.why))
    by_draw = markdown(["", *(f"{name}:" for name in columns)], numbers)
    return f"{by_draw}\n\n{markdown(('thread', 'what ran', 'the outcome', 'the verdict', 'why'), wrong)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("draw", "ask", "table"))
    parser.add_argument("ids", nargs="*")
    options = parser.parse_args(arguments)
    threads = read()
    if options.what == "draw":
        chosen = draw(threads)
        print("\n".join(thread.id for thread in threads if thread.link in chosen))
    elif options.what == "table":
        print(table(threads))
    else:
        for place, thread in enumerate(threads):
            if thread.id in options.ids or not (
                options.ids or thread.verdict or thread.drawn == "later"
            ):
                threads[place] = ask(thread)
                write(threads)
                now = threads[place]
                print(
                    now.id,
                    now.verdict,
                    now.required_gib,
                    now.usable_gib,
                    now.cpu_seconds,
                    now.why,
                    flush=True,
                )


if __name__ == "__main__":
    main()
