"""Rule ``screen_dataset``: keep the rows whose command the safety screen lets pass.

Dangerous commands and those that it can't parse go to the rejected file, with the rule that matched.
"""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from scripts.common.files import atomic_open, read_jsonl, write_json
from scripts.common.job import job, log
from scripts.dataset.rows import chunks, must_keep_some, write_row
from scripts.dataset.screen import screen


def verdicts(commands: list[str]) -> list[tuple[str, str | None, str | None]]:
    """Status, category and rule of each command."""
    found = (screen(command) for command in commands)
    return [(verdict.status, verdict.category, verdict.rule) for verdict in found]


def main(pairs: str, safe: str, rejected: str, report: str, threads: int) -> None:
    """Screen the commands of ``pairs`` in ``threads`` processes, order kept."""
    rows = 0
    categories: Counter = Counter()
    rules: Counter = Counter()
    unparsable = 0
    with (
        atomic_open(safe) as keep,
        atomic_open(rejected) as refuse,
        ProcessPoolExecutor(max_workers=threads) as pool,
    ):
        # A few chunks are on their way at once, never the whole input.
        for batch in chunks(chunks(read_jsonl(pairs), 500), 4 * threads):
            results = pool.map(verdicts, [[row["command"] for row in chunk] for chunk in batch])
            for chunk, found in zip(batch, results, strict=True):
                for row, (status, category, rule) in zip(chunk, found, strict=True):
                    rows += 1
                    if status == "ok":
                        write_row(keep, row)
                        continue
                    if status == "danger":
                        categories[category] += 1
                        rules[rule] += 1
                        reason, detail = f"danger: {category}", rule
                    else:
                        unparsable += 1
                        reason, detail = "the screen can't parse the command", None
                    write_row(refuse, {**row, "detail": detail, "reason": reason, "stage": "screen"})
        removed = unparsable + sum(categories.values())
        reasons = Counter({f"danger: {name}": count for name, count in categories.items()})
        reasons["unparsable"] = unparsable
        must_keep_some("screen", rows - removed, reasons, pairs)
    write_json(
        report,
        {
            "categories": dict(categories),
            "danger": sum(categories.values()),
            "kept": rows - removed,
            "rows": rows,
            "rules": dict(rules),
            "unparsable": unparsable,
        },
    )
    log.info(
        "%d rows: %d dangerous, %d unparsable; %d kept", rows, sum(categories.values()), unparsable, rows - removed
    )


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.input.pairs,
            snakemake.output.pairs,
            snakemake.output.rejected,
            snakemake.output.report,
            snakemake.threads,
        )
