"""Rule ``screen_dataset``: keep the rows whose command the safety screen lets pass.

Dangerous commands and those that it can't parse go to the rejected file, with the rule that matched.
"""

from collections import Counter

from scripts.common.files import atomic_open, read_jsonl, write_json
from scripts.common.job import job, log
from scripts.dataset.rows import must_keep_some, write_row
from scripts.dataset.screen import screen


def main(pairs: str, safe: str, rejected: str, report: str) -> None:
    """Screen the commands of ``pairs``; write the rows that pass, the others, and the counts."""
    rows = kept = 0
    categories: Counter = Counter()
    rules: Counter = Counter()
    reasons: Counter = Counter()
    with atomic_open(safe) as keep, atomic_open(rejected) as refuse:
        for row in read_jsonl(pairs):
            rows += 1
            verdict = screen(row["command"])
            if verdict.status == "ok":
                kept += 1
                write_row(keep, row)
                continue
            if verdict.status == "danger":
                categories[verdict.category] += 1
                rules[verdict.rule] += 1
                reason = f"danger: {verdict.category}"
            else:
                reason = "the screen can't parse the command"
            reasons[reason] += 1
            write_row(refuse, {**row, "detail": verdict.rule, "reason": reason, "stage": "screen"})
        must_keep_some("screen", kept, reasons, pairs)
    danger = sum(categories.values())
    unparsable = rows - kept - danger
    assert kept + sum(reasons.values()) == rows
    write_json(
        report,
        {
            "categories": dict(categories),
            "danger": danger,
            "kept": kept,
            "reasons": dict(reasons),
            "removed": danger + unparsable,
            "rows": rows,
            "rules": dict(rules),
            "unparsable": unparsable,
        },
    )
    log.info("%d rows: %d dangerous, %d unparsable; %d kept", rows, danger, unparsable, kept)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.pairs, snakemake.output.pairs, snakemake.output.rejected, snakemake.output.report)
