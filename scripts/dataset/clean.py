"""Rule ``clean_dataset``: normalize, validate, remove exact duplicates, ask the task's checks, remove near duplicates.

Every row that does not pass is in the rejected file with stage and reason.
"""

from typing import Any

from dryfit.common.files import read_report, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.dataset.rows import (
    Rows,
    count,
    must_keep_some,
    must_not_drop_many,
    read_rows,
    write_rows,
)
from scripts.tasks.support import registry
from scripts.tasks.text import Task

_FEW = (
    64  # so many requests are compared with each other; for more, MinHash says which are worth it
)


def shingles(text: str) -> set[str]:
    """The runs of three characters in a text."""
    text = f" {text} "
    return {text[start : start + 3] for start in range(len(text) - 2)}


def similarity(left: set[str], right: set[str]) -> float:
    """Jaccard similarity of two sets."""
    return len(left & right) / len(left | right)


def near_duplicates(texts: list[str], threshold: float) -> list[bool]:
    """Whether each text is at least as similar as the threshold to an earlier text that is kept.

    Similarity is the Jaccard similarity of their character trigrams.
    """
    from datasketch import MinHash, MinHashLSH

    sets = [shingles(text) for text in texts]
    kept: list[int] = []
    result: list[bool] = []
    index = (
        MinHashLSH(threshold=threshold, num_perm=128, weights=(0.1, 0.9))
        if len(texts) > _FEW
        else None
    )
    for number, found in enumerate(sets):
        candidates = kept
        if index is not None:
            sketch = MinHash(num_perm=128)
            sketch.update_batch([shingle.encode() for shingle in sorted(found)])
            candidates = index.query(sketch)
        result.append(any(similarity(found, sets[other]) >= threshold for other in candidates))
        if not result[-1]:
            kept.append(number)
            if index is not None:
                index.insert(number, sketch)
    return result


def stages(task: Task) -> tuple[str, ...]:
    return ("validate", "exact_duplicates", task.check_stage, "near_duplicates")


def clean(task: Task, rows: Rows, threshold: float | None) -> Rows:
    """Normalize acquired rows and judge them; ``stage``, ``reason`` and ``detail`` stay null in those that pass.

    ``threshold`` is the similarity from which a request repeats an earlier one with the same answer; None: none does.
    """
    import pandas as pd

    rows = rows.assign(
        request=rows["request"].map(task.clean_request),
        command=rows["command"].map(task.clean_answer),
    )
    rows = rows.assign(
        **{name: pd.Series(None, rows.index, dtype=object) for name in ("stage", "reason")}
    )

    def left() -> Rows:
        return rows[rows["stage"].isna()]

    def reject(stage: str, reasons: pd.Series) -> None:
        rows["stage"] = rows["stage"].fillna(pd.Series(stage, reasons.index, dtype=object))
        rows["reason"] = rows["reason"].fillna(reasons)

    def because(reason: str, index: Any) -> pd.Series:
        return pd.Series(reason, index, dtype=object)

    some = left()
    reasons = pd.Series(
        map(task.defect, some["request"], some["command"]), some.index, dtype=object
    )
    reject("validate", reasons.dropna())

    some = left()
    again = some.index[some.duplicated(["request", "command"])]
    reject("exact_duplicates", because(f"the same request and {task.answer} came before", again))

    some = left()
    said = task.check(list(zip(some["request"], some["command"], strict=True)))
    judged = pd.DataFrame(said, some.index, columns=["reason", "detail"], dtype=object)
    rows["detail"] = judged["detail"].reindex(rows.index)
    reject(task.check_stage, judged["reason"].dropna())

    # A request that is nearly the same but has another answer is not a duplicate.
    some = left() if threshold is not None else rows[:0]
    keys = some["command"].map(task.answer_key)
    near: list[int] = []
    for _, requests in some["request"][keys.duplicated(keep=False)].groupby(keys, sort=False):
        near += requests.index[
            near_duplicates([task.request_key(request) for request in requests], threshold)
        ].tolist()
    reject(
        "near_duplicates",
        because(f"nearly the same request with the same {task.answer} came before", near),
    )
    return rows


def main(
    task: Task,
    inputs: dict[str, str],
    outputs: dict[str, str],
    settings: dict,
    most_dropped: float = 1.0,
) -> None:
    """Clean the acquired pairs; write those that pass, the rejected ones and the counts of each stage."""
    read_report(inputs["acquire"], inputs["pairs"])
    threshold = settings["near_duplicates"]
    rows = clean(task, read_rows(inputs["pairs"]), threshold)
    names = stages(task)
    unusable = rows["reason"].where(rows["stage"].isin(("validate", task.check_stage)))
    must_not_drop_many("cleaning", rows.assign(reason=unusable), most_dropped)
    rejected = rows[rows["stage"].notna()]
    kept = rows[rows["stage"].isna()].drop(columns=["stage", "reason", "detail"])
    must_keep_some(
        "clean", len(kept), count(rejected["stage"] + ": " + rejected["reason"]), inputs["pairs"]
    )
    write_rows(outputs["pairs"], kept)
    write_rows(outputs["rejected"], rejected)
    reasons = {stage: count(rejected["reason"][rejected["stage"] == stage]) for stage in names}
    removed = {stage: sum(reasons[stage].values()) for stage in names}
    write_report(
        outputs["report"],
        {
            "kept": len(kept),
            "near_duplicate_threshold": threshold,
            "reasons": reasons,
            "removed": removed,
            "rows": len(rows),
            "stages": list(names),
        },
        *(outputs["pairs"], outputs["rejected"]),
    )
    log.info(
        "%d rows: %s; %d kept",
        len(rows),
        ", ".join(f"{stage} -{removed[stage]}" for stage in names),
        len(kept),
    )


if __name__ == "__main__":
    with job(snakemake):
        main(
            registry.of_job(snakemake.params.task),
            dict(snakemake.input.items()),
            dict(snakemake.output.items()),
            snakemake.params.clean,
            snakemake.params.most_dropped,
        )
