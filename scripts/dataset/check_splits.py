"""Rule ``check_splits``: no request and no command, as written or normalized, is in two splits; else fail.

It reads the finished files and trusts nothing that the splitting did.
"""

from collections.abc import Iterable, Mapping

from scripts.common.errors import UserError
from scripts.common.files import read_jsonl, write_json
from scripts.common.job import job, log
from scripts.dataset.text import command_key, key_number, request_key

_FORMS = {
    "request": lambda row: row["request"],
    "command": lambda row: row["command"],
    "normalized request": lambda row: request_key(row["request"]),
    "normalized command": lambda row: command_key(row["command"]),
}


def overlaps(splits: Mapping[str, Iterable[dict]]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Count what several splits share.

    Parameters
    ----------
    splits
        Rows of each split.

    Returns
    -------
    tuple
        For each form (request, command, and each normalized) the number of rows whose text is in an earlier
        split too, by pair of splits; and up to ten examples.
    """
    seen: dict[str, dict[int, str]] = {form: {} for form in _FORMS}
    names = list(splits)
    counts = {
        form: {f"{first} and {second}": 0 for index, second in enumerate(names) for first in names[:index]}
        for form in _FORMS
    }
    examples: list[str] = []
    for name, rows in splits.items():
        for row in rows:
            for form, text_of in _FORMS.items():
                text = text_of(row)
                first = seen[form].setdefault(key_number(text), name)
                if first != name:
                    counts[form][f"{first} and {name}"] += 1
                    if len(examples) < 10:
                        examples.append(f"{form} in {first} and {name}: {text}")
    return counts, examples


def main(splits: dict[str, str], report: str) -> None:
    """Check the files of the splits and write the counts, all zero."""
    rows = {name: 0 for name in splits}

    def counted(name: str) -> Iterable[dict]:
        for row in read_jsonl(splits[name]):
            rows[name] += 1
            yield row

    counts, examples = overlaps({name: counted(name) for name in splits})
    total = sum(sum(pairs.values()) for pairs in counts.values())
    if total:
        raise UserError(
            f"The splits leak: {total} overlaps.",
            where=", ".join(splits.values()),
            found={form: sum(pairs.values()) for form, pairs in counts.items()},
            allowed="no request and no command in two splits. The first ones:\n             "
            + "\n             ".join(examples),
        )
    write_json(report, {"overlaps": counts, "rows": rows, "total": total})
    log.info("no overlap: %s", ", ".join(f"{name} {count}" for name, count in rows.items()))


if __name__ == "__main__":
    with job(snakemake):
        main(dict(snakemake.input.items()), snakemake.output.report)
