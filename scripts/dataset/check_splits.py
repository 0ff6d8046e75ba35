"""The end of rule ``split_dataset``: no request and no command, as written or normalized, is in two splits; else fail.

It reads the finished files and trusts nothing that the splitting did: each screened row is in exactly one split,
or was taken out for the external test set, and each row of a split has passed the screen. It also adds
up the reports of all steps: each row that was read is in a split, or in a rejected file with its stage and reason.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from dryfit.common.terminal import log
from scripts.common.reports import CARRIED, carry
from scripts.dataset.rows import KNOWN, SPLITS, TEST, Rows, families_of, read_rows, to_lines
from scripts.tasks.text import Task

if TYPE_CHECKING:
    import pandas as pd


TRIED = 20  # rows of the test split that own metrics are asked about
ADDED = ("kinds", "reason", "stage")  # what splitting adds to rows


def _answers(task: Task, rows: Rows) -> "pd.Series":
    return rows["command"][rows["command"].map(task.holds_together).astype(bool)]


def _kinds(rows: Rows) -> "pd.Series | tuple":
    """Families and intents, but for those of rows that ask anew for a trained one."""
    if (found := families_of(rows)) is None:
        return ()
    return (found[rows["kinds"] != KNOWN] if "kinds" in rows else found).dropna()


def _forms(task: Task) -> "dict[str, Callable[[Rows], Iterable]]":
    return {
        "request": lambda rows: rows["request"],
        task.answer: lambda rows: _answers(task, rows),
        "normalized request": lambda rows: rows["request"].map(task.request_key),
        f"normalized {task.answer}": lambda rows: _answers(task, rows).map(task.answer_key),
        "family or intent": _kinds,
    }


def overlaps(task: Task, splits: Mapping[str, Rows]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """How many texts two splits share, by form and by pair of splits; and up to ten examples."""
    counts: dict[str, dict[str, int]] = {}
    examples: list[str] = []
    for form, texts_of in _forms(task).items():
        texts = {name: set(texts_of(rows)) for name, rows in splits.items()}
        counts[form] = {}
        for first, second in combinations(splits, 2):
            shared = texts[first] & texts[second]
            counts[form][f"{first} and {second}"] = len(shared)
            examples += [f"{form} in {first} and {second}: {text}" for text in sorted(shared)]
    return counts, examples[:10]


def stages(acquire: dict, clean: dict, screen: dict, split: dict) -> list[dict]:
    """How many rows came to each stage and were removed there, from the steps' reports.

    UserError: when a stage did not begin with what the one before it left.
    """
    rows = acquire["rows"] + acquire["rejected"]
    removed = {
        "acquire": acquire["rejected"],
        **{stage: clean["removed"][stage] for stage in clean["stages"]},
    }
    removed |= {"screen": screen["removed"], "decontaminate": split["decontaminated"]}
    left = {
        "acquire": acquire["rows"],
        clean["stages"][-1]: clean["kept"],
        "screen": screen["kept"],
    }
    left["decontaminate"] = sum(split["sizes"].values())
    table = []
    for stage, count in removed.items():
        table.append({"kept": rows - count, "removed": count, "rows": rows, "stage": stage})
        rows -= count
        if left.get(stage, rows) != rows:
            raise UserError(
                f"The counts of the stages do not add up at {stage!r}.",
                where="the reports of the dataset's steps",
                found=left[stage],
                allowed=f"{rows}: what the stages before it left",
            )
    return table


def known_kinds_must_be_trained(splits: Mapping[str, Rows], where: str) -> None:
    """Raise unless training has the intent of each held-out row that is said to be of a known kind."""
    trained = set(_kinds(splits["train"]))
    for name in SPLITS[1:]:
        if "kinds" in splits[name]:
            known = splits[name][splits[name]["kinds"] == KNOWN]
            if unknown := sorted({*(families_of(known) if len(known) else ())} - trained):
                problem = "A row is said to ask for a known kind of thing, but no training row asks for it."
                raise UserError(problem, where=f"{where}, {name}", found=unknown[0])


def must_be_the_screened_rows(safe: Rows, found: Rows, where: str) -> None:
    """Raise unless what was found in splits and taken out is, row by row, what the screen let pass."""
    passed, there = (
        Counter(to_lines(safe)),
        Counter(to_lines(found.drop(columns=[*ADDED], errors="ignore"))),
    )
    for problem, rows in (
        ("A split has a row that did not pass the screen.", there - passed),
        ("A row that the screen let pass is in no split.", passed - there),
    ):
        if rows:
            raise UserError(
                problem,
                where=where,
                found=next(iter(rows)).strip()[:400],
                allowed="the rows of safe.jsonl, each once",
                write=f"rm {where}    # then the same command again: the splits are made again",
            )


def try_metrics(scores: Task, rows: Rows) -> None:
    """Ask a user's own metrics about expected answers and about none, so that one that fails does so here."""
    some = rows.head(TRIED).to_dict("records")
    for answers in (
        [row["command"] for row in some],
        [row["request"] for row in some],
        [""] * len(some),
    ):
        scores.score(answers, some)


def main(task: Task, inputs: dict[str, str], report: str, scores: Task | None = None) -> None:
    """Check the files of the splits; write the counts of each stage and the overlaps, all zero."""
    import pandas as pd

    read_report(inputs["screen"], inputs["safe"])
    read_report(inputs["split"], *(inputs[name] for name in (*SPLITS, "rejected")))
    carried = carry(**{stage: inputs[stage] for stage in ("acquire", "screen", "split")})
    table = stages(**{stage: one["content"] for stage, one in carried.items()})
    splits = {name: read_rows(inputs[name]) for name in SPLITS}
    found = pd.concat([*splits.values(), read_rows(inputs["rejected"])])
    must_be_the_screened_rows(read_rows(inputs["safe"]), found, inputs["split"])
    known_kinds_must_be_trained(splits, inputs["split"])
    counts, examples = overlaps(task, splits)
    total = sum(sum(pairs.values()) for pairs in counts.values())
    if total:
        raise UserError(
            f"The splits leak: {total} overlaps.",
            where=", ".join(inputs[name] for name in SPLITS),
            found={form: sum(pairs.values()) for form, pairs in counts.items()},
            allowed="no request and no command in two splits. The first ones:\n             "
            + "\n             ".join(examples),
        )
    if scores is not None:
        try_metrics(scores, splits[TEST])
    rows = {name: len(split) for name, split in splits.items()}
    write_report(
        report,
        {CARRIED: carried, "overlaps": counts, "rows": rows, "stages": table, "total": total},
    )
    for row in table:
        log.info(
            "%-16s %8d rows, %6d removed, %8d kept",
            *(row[key] for key in ("stage", "rows", "removed", "kept")),
        )
    log.info("no overlap: %s", ", ".join(f"{name} {count}" for name, count in rows.items()))
