"""Rule ``check_splits``: no request and no command, as written or normalized, is in two splits; else fail.

It reads the finished files and trusts nothing that the splitting did. It also adds up the reports of all steps:
each row that was read is in a split, or in a rejected file with its stage and reason.
"""

import array
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_json, read_jsonl, write_json
from scripts.common.job import job, log
from scripts.dataset.text import command_key, key_number, request_key

_FORMS = {
    "request": lambda row: row["request"],
    "command": lambda row: row["command"],
    "normalized request": lambda row: request_key(row["request"]),
    "normalized command": lambda row: command_key(row["command"]),
}


def overlaps(splits: Mapping[str, str]) -> tuple[dict[str, int], dict[str, dict[str, int]], list[str]]:
    """Count what several splits share.

    Parameters
    ----------
    splits
        The file of each split.

    Returns
    -------
    tuple
        The rows of each split; for each form (request, command, and each normalized) the number of texts that two
        splits share, by pair of splits; and up to ten examples.
    """
    import numpy as np

    rows = {name: 0 for name in splits}
    numbers: dict[tuple[str, str], Any] = {(form, name): array.array("Q") for form in _FORMS for name in splits}
    for name, path in splits.items():
        for row in read_jsonl(path):
            rows[name] += 1
            for form, text_of in _FORMS.items():
                numbers[form, name].append(key_number(text_of(row)))
    counts: dict[str, dict[str, int]] = {form: {} for form in _FORMS}
    examples: list[str] = []
    for form, text_of in _FORMS.items():
        for first, second in combinations(splits, 2):
            left, right = (np.frombuffer(numbers[form, name], np.uint64) for name in (first, second))
            shared = set(np.intersect1d(left, right).tolist())
            counts[form][f"{first} and {second}"] = len(shared)
            for row in read_jsonl(splits[second]) if shared else ():
                text = text_of(row)
                if key_number(text) in shared and len(examples) < 10:
                    examples.append(f"{form} in {first} and {second}: {text}")
    return rows, counts, examples


def stages(acquire: dict, clean: dict, screen: dict, split: dict) -> list[dict]:
    """How many rows came to each stage and were removed there, from the steps' reports.

    Raises
    ------
    UserError
        When a stage did not begin with what the one before it left.
    """
    rows = acquire["rows"] + acquire["rejected"]
    removed = [("acquire", acquire["rejected"]), *((stage, clean["removed"][stage]) for stage in clean["stages"])]
    removed += [("screen", screen["removed"]), ("decontaminate", split["decontaminated"])]
    table = []
    for stage, count in removed:
        table.append({"kept": rows - count, "removed": count, "rows": rows, "stage": stage})
        rows -= count
    begins = {"acquire": acquire["rows"], "near_duplicates": clean["kept"], "screen": screen["kept"]}
    begins["decontaminate"] = sum(split["sizes"].values())
    for row in table:
        if begins.get(row["stage"], row["kept"]) != row["kept"]:
            raise UserError(
                f"The counts of the stages do not add up at {row['stage']!r}.",
                where="the reports of the dataset's steps",
                found=begins[row["stage"]],
                allowed=f"{row['kept']}: what the stages before it left",
            )
    return table


def main(splits: dict[str, str], reports: dict[str, str], report: str) -> None:
    """Check the files of the splits; write the counts of each stage and the overlaps, all zero."""
    table = stages(**{name: read_json(path) for name, path in reports.items()})
    rows, counts, examples = overlaps(splits)
    total = sum(sum(pairs.values()) for pairs in counts.values())
    if total:
        raise UserError(
            f"The splits leak: {total} overlaps.",
            where=", ".join(splits.values()),
            found={form: sum(pairs.values()) for form, pairs in counts.items()},
            allowed="no request and no command in two splits. The first ones:\n             "
            + "\n             ".join(examples),
        )
    if sum(rows.values()) != table[-1]["kept"]:
        raise UserError(
            "The splits do not hold what the stages left.",
            where=", ".join(splits.values()),
            found=rows,
            allowed=f"{table[-1]['kept']} rows in all",
        )
    write_json(report, {"overlaps": counts, "rows": rows, "stages": table, "total": total})
    for row in table:
        log.info("%-16s %8d rows, %6d removed, %8d kept", *(row[key] for key in ("stage", "rows", "removed", "kept")))
    log.info("no overlap: %s", ", ".join(f"{name} {count}" for name, count in rows.items()))


if __name__ == "__main__":
    with job(snakemake):
        files = dict(snakemake.input.items())
        splits = {name: files.pop(name) for name in ("train", "validation", "test")}
        main(splits, files, snakemake.output.report)
