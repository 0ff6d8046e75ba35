"""What people reported about runs of theirs, asked of ``dryfit``, and whether the verdict was right.

    python -m validation.reports draw            which reports stayed unread at first: the draw, again
    python -m validation.reports add FILE        add the rows of another table as the newest set that stays unread
    python -m validation.reports ask [ID ...]    ask again (all of them without ids), and keep the verdicts
    python -m validation.reports page            write docs/reports.md and README's lines from what is kept

``validation/data/reports.csv`` has a row for each question: what was stated, what we assumed, and what came of the run.
The files that a question names lie in ``validation/data/reports``. A row of a set that was drawn stays unread until it
is asked. Its first verdict is kept beside the present one, since the row helps to develop the verdict from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import multiprocessing
import multiprocessing.connection
import random
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.terminal import command
from dryfit.common.text import GIB
from validation.rows import FOLDER

TABLE = FOLDER / "reports.csv"
FILES = FOLDER / "reports"
UNREAD = 40  # rows of a draw
SEEDS = {"first": 45, "second": 46, "third": 47, "fourth": 48, "fifth": 49}
BESIDE = {
    "first": "",
    "second": "rehearsal",
    "third": "left over",
    "fourth": "not drawn",
    "fifth": "spare",
}  # `drawn` of the rows that were collected with a draw and not drawn
VERDICTS = ("fits", "too_close", "does_not_fit", "no_answer")
DRAWN = (  # the sets, the newest first
    *("fifth", "spare", "fourth", "not drawn"),
    *("third", "left over", "second", "rehearsal", "first", ""),
)
FIRST_ASKED = {  # the commit at which each set was asked first
    "": "commit 75c96db0 of 2026-11-30",
    "first": "commits fdc3f1c2 to a2c8f298 of 2026-12-01 (19 of them were asked twice, with three mends between)",
    "rehearsal": "commit 4e04f64c of 2026-12-01",
    "second": "commit 57d9f232 of 2026-12-01",
    "fifth": "commit 1b6b5838 of 2026-12-02",
    "spare": "commit d1225941 of 2026-12-02",
    "fourth": "commit 565a3f00 of 2026-12-02",
    "not drawn": "commit 565a3f00 of 2026-12-02",
    "third": "commit eec7c233 of 2026-12-01",
    "left over": "commit c0475232 of 2026-12-01",
}
NOT_ASKED = "not_asked"  # at the first asking, for want of time
AGREEMENTS = ("right", "unsafe", "wrong_on_the_safe_side", "no_answer", "undecidable")
_CLOSE = (
    0.97  # of the card: as near to its border as that, too close to call is the right thing to say
)
_ROOT = Path(__file__).resolve().parent.parent
_HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "dryfit.ask.answer")
_SECONDS = 1500  # of one question, before it counts as not answered


@dataclass(frozen=True)
class PublicReport:
    """One question and what came of the run that it asks about.

    ``settings`` were stated by the author, ``assumed`` was not. ``question``: the words behind ``dryfit``, asked
    in ``validation/data/reports``. ``decidable``: yes, or no and why. ``outcome``: ``ran`` or ``ran_out`` (of memory),
    ``where`` it ran out. ``peak_gib``, ``peak_is``: what was stated of the memory. ``drawn``: ``first`` to ``fifth``,
    the set in which the row stayed unread until it was asked; ``rehearsal`` for rows that were collected with the
    second set and asked before it; ``left over``, ``not drawn`` and ``spare`` for those that were collected with the
    third, the fourth and the fifth and not drawn; empty for development from the start. ``found_undecidable``: why the
    row decides nothing, where that was found after it was asked; its first verdict counts all the same. The columns
    ``first_...`` hold the verdict at the first asking (:data:`FIRST_ASKED`), the others the present one.
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
    drawn: str = ""
    found_undecidable: str = ""
    first_verdict: str = ""
    first_required_gib: str = ""
    first_usable_gib: str = ""
    first_why: str = ""
    verdict: str = ""
    required_gib: str = ""
    usable_gib: str = ""
    why: str = ""


COLUMNS = tuple(field.name for field in fields(PublicReport))


def read(table: Path = TABLE) -> list[PublicReport]:
    """All reports, in the order of the file; columns that a :class:`PublicReport` doesn't have are left out."""
    with open(table, encoding="utf-8", newline="") as handle:
        return [
            PublicReport(**{name: value for name, value in row.items() if name in COLUMNS})
            for row in csv.DictReader(handle)
        ]


def added(reports: Sequence[PublicReport], others: Iterable[PublicReport]) -> list[PublicReport]:
    """``reports`` with those of ``others`` that they lack: the newest draw, and beside it those that were not drawn.

    Raises:
        UserError: A thread of the new rows is in another set too, so that it was not unread.
    """
    ids = {report.id for report in reports}
    name = next(reversed(SEEDS))
    links = {report.link for report in reports if report.drawn not in (name, BESIDE[name])}
    new = [replace(report, drawn=BESIDE[name]) for report in others if report.id not in ids]
    if read_before := sorted(report.id for report in new if report.link in links):
        raise UserError(
            f"These reports are from threads that were read before: {', '.join(read_before)}."
        )
    drawn = draw(new, name)
    links = {report.link for report in new if report.id in drawn}
    return [
        *reports,
        *(replace(report, drawn=name) if report.link in links else report for report in new),
    ]


def write(reports: Iterable[PublicReport]) -> None:
    with open(TABLE, "w", encoding="utf-8", newline="") as handle:
        table = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(report) for report in reports)


def draw(reports: Sequence[PublicReport], name: str) -> set[str]:
    """The ids of the decidable reports of a draw: whole threads, shuffled, until there are :data:`UNREAD` rows.

    A thread goes in whole or not at all, so that no other row tells about an unread one.
    """
    threads: dict[str, list[str]] = {}
    for report in reports:
        if report.decidable == "yes" and report.drawn in (name, BESIDE[name]):
            threads.setdefault(report.link, []).append(report.id)
    links = sorted(threads)
    random.Random(SEEDS[name]).shuffle(links)
    drawn: list[str] = []
    for link in links:
        if len(drawn) + len(threads[link]) <= UNREAD:
            drawn += threads[link]
    return set(drawn)


def ask(report: PublicReport) -> dict[str, Any]:
    """What the command answers: the object of ``--json`` without suggestions, or ``{"error": ...}`` where it refuses.

    The question is asked in ``validation/data/reports``, where the files that it names lie.
    """
    from dryfit.ask.answer import traced
    from dryfit.ask.command import read as read_line

    try:
        with contextlib.chdir(FILES):
            return traced(read_line(shlex.split(report.question)).question, suggested=False)
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def ask_all(
    reports: Sequence[PublicReport], jobs: int
) -> Iterator[tuple[PublicReport, dict[str, Any]]]:
    """Each report with its answer, as they come; each in a process of its own, which ends after :data:`_SECONDS`."""
    for name in _HEAVY:  # once, before the processes fork
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    waiting, running = list(reports), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            report = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(there, report))
            process.start()
            there.close()
            running[here] = (report, process, time.monotonic() + _SECONDS)
        for here in multiprocessing.connection.wait(list(running), timeout=1):
            report, process, _ = running.pop(here)
            try:
                answer = here.recv()
            except EOFError:
                answer = {"error": "the process died"}
            process.join()
            yield report, answer
        for here, (report, process, end) in list(running.items()):
            if time.monotonic() > end:
                process.kill()
                process.join()
                del running[here]
                yield report, {"error": f"no answer within {_SECONDS} s"}


def _send(connection: Any, report: PublicReport) -> None:
    answer = ask(report)
    connection.send(json.loads(json.dumps(answer, default=str)))
    connection.close()


def verdict(answer: dict[str, Any]) -> str:
    """One of :data:`VERDICTS`."""
    if "error" in answer:
        return "no_answer"
    if said := answer.get("verdict"):
        return str(said)
    return {True: "fits", False: "does_not_fit", None: "no_answer"}[answer.get("fits")]


def agreement(report: PublicReport, said: str, usable_gib: str) -> str:
    """One of :data:`AGREEMENTS`: whether a verdict agrees with what came of the run; empty for a question not asked.

    Too close to call is right where the run ended out of memory, or took 97 % of the card and more.
    """
    if said in ("", NOT_ASKED):
        return ""
    if report.decidable != "yes":
        return "undecidable"
    if said == "no_answer":
        return "no_answer"
    ran_out = report.outcome == "ran_out"
    if said == "too_close":
        close = bool(report.peak_gib and usable_gib) and float(report.peak_gib) >= _CLOSE * float(
            usable_gib
        )
        return "right" if ran_out or close else "wrong_on_the_safe_side"
    if said == "fits":
        return "unsafe" if ran_out else "right"
    return "right" if ran_out else "wrong_on_the_safe_side"


def asked(report: PublicReport, answer: dict[str, Any]) -> PublicReport:
    """The report with what was answered now; ``why`` stays, where it explains the same verdict.

    At the first asking the answer is kept as the first one too.
    """
    said = verdict(answer)
    required_gib, usable_gib = "", ""
    if said == "no_answer":
        why = str(answer.get("error", "")).split("\n")[0] or report.why
    else:
        usable = answer["gpu"]["usable_bytes"]
        required_gib, usable_gib = (
            f"{(usable - answer['headroom_bytes']) / GIB:.2f}",
            f"{usable / GIB:.2f}",
        )
        why = report.why if report.verdict == said else ""
    if not report.first_verdict:
        report = replace(
            report, first_verdict=said, first_required_gib=required_gib, first_usable_gib=usable_gib
        )
    return replace(report, verdict=said, required_gib=required_gib, usable_gib=usable_gib, why=why)


# The page and README's lines ---------------------------------------------------------------------------------------

PAGE = _ROOT / "docs" / "reports.md"
README = _ROOT / "README.md"
_SETS = {
    "fifth": "drawn fifth",
    "spare": "spare",
    "fourth": "drawn fourth",
    "not drawn": "not drawn",
    "third": "drawn third",
    "left over": "left over",
    "second": "drawn second",
    "rehearsal": "rehearsal",
    "first": "drawn first",
    "": "development",
}
_WORST_FIRST = ("unsafe", "wrong_on_the_safe_side", "no_answer", "undecidable", "right")
_IN_WORDS = {
    "fits": "FITS",
    "too_close": "TOO CLOSE TO CALL",
    "does_not_fit": "DOES NOT FIT",
    "no_answer": "no answer",
    "ran": "ran",
    "ran_out": "ran out of memory",
    "right": "right",
    "unsafe": "unsafe: it fits, we say, and it ran out",
    "wrong_on_the_safe_side": "wrong on the safe side",
    "undecidable": "undecidable from what is stated",
    NOT_ASKED: "not asked",
}


def now(report: PublicReport) -> str:
    """Whether the present verdict agrees with the report."""
    agrees = agreement(report, report.verdict, report.usable_gib)
    return "undecidable" if agrees and report.found_undecidable else agrees


def then(report: PublicReport) -> str:
    """The same of the verdict at the first asking."""
    return agreement(report, report.first_verdict, report.first_usable_gib)


def counts(reports: Iterable[PublicReport], first: bool = False) -> dict[str, int]:
    """How many reports of each agreement, now or at the first asking; ``too_close``: such verdicts; ``total``: all."""
    told = dict.fromkeys((*AGREEMENTS, NOT_ASKED, "too_close", "total"), 0)
    for report in reports:
        said = report.first_verdict if first else report.verdict
        told["total"] += 1
        told["too_close"] += said == "too_close" and report.decidable == "yes"
        undecidable = "undecidable" if report.decidable != "yes" else ""
        told[(then if first else now)(report) or undecidable or NOT_ASKED] += 1
    return told


def _sets(reports: Sequence[PublicReport]) -> dict[str, list[PublicReport]]:
    """The reports of each set that has any, the newest set first."""
    sets = {drawn: [report for report in reports if report.drawn == drawn] for drawn in DRAWN}
    return {drawn: those for drawn, those in sets.items() if those}


def page(reports: Sequence[PublicReport]) -> str:
    """docs/reports.md."""
    sets = _sets(reports)
    threads = len({report.link for report in reports})
    left_over = len([report for report in reports if report.drawn == BESIDE["third"]])
    parts = [
        _HEAD.format(
            reports=len(reports), threads=threads, unread=UNREAD, left_over=left_over, **SEEDS
        )
    ]
    parts += ["## What came out", _count_table(sets)]
    parts += [_wanted_numbers({drawn: those for drawn, those in sets.items() if drawn in SEEDS})]
    parts += ["## The wrong ones now", _wrong_table(sets)]
    parts += ["## What decides nothing", _undecidable_table(reports)]
    return "\n\n".join(parts) + "\n"


def readme_lines(reports: Sequence[PublicReport]) -> str:
    """README's "How exact it is": each draw at its one reading; below, the newest's unsafe rows and the oldest draw."""
    lines, worst, first, oldest = [], "", "", next(iter(SEEDS))
    for drawn, those in _sets(reports).items():
        told, since = counts(those, first=True), counts(those)
        if drawn in SEEDS and told[NOT_ASKED] < told["total"]:
            answered = told["total"] - told["undecidable"] - told[NOT_ASKED]
            if drawn == oldest:
                first = f"The {drawn} draw was {told['right']} right and {told['unsafe']} unsafe of {answered}. "
                continue
            cells = (f"{drawn}, unread until {FIRST_ASKED.get(drawn, 'they were asked')}", answered)
            cells += tuple(
                told[name] for name in ("right", "unsafe", "wrong_on_the_safe_side", "no_answer")
            )
            lines.append(_row((*cells, f"{since['right']} right, {since['unsafe']} unsafe")))
            unsafe = ", ".join(report.id for report in those if then(report) == "unsafe")
            ended = sum(report.outcome == "ran_out" for report in those)
            said = f"Of the {drawn} draw {ended} ran out of memory, and of these it said FITS to {unsafe}. "
            worst = worst or (said if unsafe else "")
    told = counts([report for report in reports if report.drawn in ("", "first")])
    head = (
        "draw",
        "asked",
        "right",
        "unsafe",
        "wrong on the safe side",
        "no answer",
        "by the present rules",
    )
    return "\n".join([_row(head), _row(["---"] + ["---:"] * 5 + ["---"]), *lines]) + (
        f"\n\n{worst}Rules were written for what the draws showed, so the last column is no test. {first}Of it and"
        f" {told['total'] - UNREAD} reports beside it, {told['right']} are right by the present rules,"
        f" {told['unsafe']} unsafe, and {told[NOT_ASKED]} were not asked again."
    )


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


_HEAD = """# What people reported, and what the verdict says

<!-- made by `python -m validation.reports page` from validation/data/reports.csv -->

People write in public whether a training ran. {threads} threads and files state model, method, card, settings and
outcome of {reports} runs. We asked `dryfit` about each of them: is the verdict right about other people's lives?

- **The question came first.** `validation/data/reports.csv` says what a report stated and what we assumed, and the
  question lies beside it. A search shows a thread's title, so the outcome was seen before the question was written in
  all rows. No verdict was known then.
- **Five times {unread} reports stayed unread**, drawn by whole threads (`python -m validation.reports draw`, seeds
  {first}, {second}, {third}, {fourth} and {fifth}), and were asked once. Then the causes of wrong verdicts were mended.
  "Once" has the verdicts of that asking; "now" has the present rules, and is no test. A report that was not asked again
  keeps its verdict.
- **Drawn first.** 19 were asked at commit fdc3f1c2: 12 were right, 3 unsafe, one wrong on the safe side, and 3 had no
  answer. Three mends followed. Then the others were asked for the first time, and these again: "once" has that.
- **Drawn second.** The rehearsal, other reports of the same collection, was asked before. One rule was taken back
  afterwards: the defaults of older versions of TRL are a warning now. By that o1-506-b16 became unsafe.
- **Drawn third.** The {left_over} left over were asked after mends, at commit c0475232. Six questions assumed what the
  tool of their day did not do. They were corrected and asked again; their first verdicts stay.
- **Drawn fourth.** Reports of 2025 and 2026 where they could be had, since a verdict is about present versions. Model,
  method, card and number of cards are stated, and the length or the quoted file's own default. Images were left out.
  The smallest common card above a stated memory counts as stated. The 21 not drawn were asked by the same code. Three
  questions were corrected: lf-6752's precision, FSDP1 in acc-3647-hf, and or-1066's rows of log-probabilities.
- **Drawn fifth.** By the same rules, from 44 other threads and files of 2025 and 2026. Of the 40 drawn 23 ran, and 17
  ran out of memory. Nothing was mended between the draw and the asking, and the 21 spare ones were asked by the same
  code. Mended were Unsloth's flex attention for gpt-oss and its vLLM, Llama 4's experts as linear layers, rows that
  Ulysses divides in verl and ms-swift, and LISA. Corrected were hff-oss' checkpointing and the logits of ult-9b and
  ult-8b, which the quoted configuration deletes.
- **The others were for development from the start**, asked at commit 75c96db0 first. Only the causes of wrong answers
  were told to those who changed the verdict.

A question that leaves the length open was tried as too close to call, if rows of 2,048 tokens do not fit. In 35 reports
the length was a script's default of less. 7 of the unsafe verdicts became right by that, and 12 right ones wrong. So a
tool's default counts as stated, and the answer names it.

"Too close to call" counts as right where the run ended out of memory or took 97 % of the card and more. A verdict is
unsafe where it says that the step fits, and the run ended out of memory."""


def _count_table(sets: dict[str, list[PublicReport]]) -> str:
    columns = {}
    for drawn, those in sets.items():
        columns[f"{_SETS[drawn]}, {'once' if drawn else 'first asking'}"] = counts(
            those, first=True
        )
        columns[f"{_SETS[drawn]}, now"] = counts(those)
    names = {
        **{name: _IN_WORDS[name] for name in ("right", *_WORST_FIRST[:-1], NOT_ASKED)},
        "total": "all",
        "too_close": "of these too close to call",
    }
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, title in names.items():
        lines.append(
            f"| {title} | " + " | ".join(str(told[name]) for told in columns.values()) + " |"
        )
    return "\n".join(lines)


def _wanted_numbers(draws: dict[str, list[PublicReport]]) -> str:
    """Whether each draw reached, at its one reading, the numbers that were set before."""
    said = [
        f"We wanted {_WANTED_RIGHT} of {UNREAD} right at the one reading of a draw, none unsafe, and at most"
        f" {_MOST_CLOSE_PERCENT} % too close to call."
    ]
    for drawn, reports in draws.items():
        told = counts(reports, first=True)
        share = 100 * told["too_close"] / max(told["total"], 1)
        reached = (
            told["right"] >= _WANTED_RIGHT and not told["unsafe"] and share <= _MOST_CLOSE_PERCENT
        )
        said.append(f"The {drawn} draw {'reached' if reached else 'did not reach'} these numbers.")
        said += [f"{told[NOT_ASKED]} were not asked for want of time."] if told[NOT_ASKED] else []
    return " ".join(said)


_WANTED_RIGHT, _MOST_CLOSE_PERCENT = 36, 15


def _wrong_table(sets: dict[str, list[PublicReport]]) -> str:
    lines = [
        "| report | set | what ran | the outcome | the verdict | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for drawn, reports in sets.items():
        wrong = [report for report in reports if now(report) in _WORST_FIRST[:3]]
        for report in sorted(wrong, key=lambda one: (_WORST_FIRST.index(now(one)), one.id)):
            cells = [f"[{report.id}]({report.link})", _SETS[drawn]]
            cells += [_run(report), _outcome(report), _verdict(report), report.why]
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _undecidable_table(reports: Sequence[PublicReport]) -> str:
    lines = [
        "| report | what ran | the outcome | why it decides nothing |",
        "| --- | --- | --- | --- |",
    ]
    for report in reports:
        if why := report.found_undecidable or report.decidable.partition("no: ")[2]:
            cells = [f"[{report.id}]({report.link})", _run(report), _outcome(report), why]
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _run(report: PublicReport) -> str:
    return f"{report.tool}, {report.model}, {report.method}: {report.settings}"


def _outcome(report: PublicReport) -> str:
    where = f" ({report.where})" if report.where else ""
    peak = f"; {report.peak_gib} GiB: {report.peak_is}" if report.peak_gib else ""
    return f"{_IN_WORDS[report.outcome]}{where}{peak}"


def _verdict(report: PublicReport) -> str:
    needs = f": {report.required_gib} of {report.usable_gib} GiB" if report.required_gib else ""
    return f"{_IN_WORDS.get(report.verdict, 'not asked')}{needs}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_BEGIN, _END = "<!-- reports: begin -->", "<!-- reports: end -->"


def write_pages(reports: Sequence[PublicReport]) -> None:
    """Write docs/reports.md and README's lines."""
    PAGE.write_text(page(reports), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    README.write_text(
        f"{before}{_BEGIN}\n{readme_lines(reports)}\n{_END}{rest.partition(_END)[2]}",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("draw", "add", "ask", "page"))
    parser.add_argument("ids", nargs="*", metavar="ID or FILE")
    parser.add_argument("--jobs", type=int, default=1, help="questions at once")
    options = parser.parse_args()
    reports = read()
    if options.what == "draw":
        for name in SEEDS:
            print(f"{name}: {' '.join(sorted(draw(reports, name)))}")
    elif options.what == "add":
        for name in options.ids:
            reports = added(reports, read(Path(name)))
        write(reports)
    elif options.what == "ask":
        order = [report.id for report in reports]
        wanted = [report for report in reports if not options.ids or report.id in options.ids]
        for report, answer in ask_all(wanted, options.jobs):
            said = asked(report, answer)
            reports[order.index(said.id)] = said
            write(reports)
            print(f"{said.id}: {_verdict(said)}; {_outcome(said)}: {now(said)}", flush=True)
    else:
        write_pages(reports)


if __name__ == "__main__":
    command(main)
