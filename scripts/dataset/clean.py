"""Rule ``clean_dataset``: normalize, validate, remove exact duplicates, check the syntax, remove near duplicates.

Every row that does not pass is in the rejected file with stage and reason. Rows pass through a few thousand
at a time; what stays in memory is one number a row.
"""

import array
import json
from collections import Counter
from pathlib import Path

from scripts.common.files import atomic_open, read_jsonl, write_json
from scripts.common.job import job, log
from scripts.common.syntax import check_syntax
from scripts.dataset.rows import chunks, must_keep_some, to_line, write_row
from scripts.dataset.text import clean_command, clean_request, command_key, defect, key_number, request_key

STAGES = ("validate", "exact_duplicates", "syntax", "near_duplicates")
_FEW = 64  # so many requests are compared with each other; for more, MinHash says which are worth it
_PERMUTATIONS = 128


def shingles(text: str) -> set[str]:
    """The runs of three characters in a text."""
    text = f" {text} "
    return {text[start : start + 3] for start in range(len(text) - 2)}


def similarity(left: set[str], right: set[str]) -> float:
    """Jaccard similarity of two sets."""
    return len(left & right) / len(left | right)


def near_duplicates(texts: list[str], threshold: float) -> list[int | None]:
    """For each text the index of the first kept one that is at least as similar as the threshold, or None.

    Similarity is the Jaccard similarity of their character trigrams. Texts are kept in order; what is near a
    kept one is not kept itself.
    """
    sets = [shingles(text) for text in texts]
    kept: list[int] = []
    result: list[int | None] = []
    index = None
    if len(texts) > _FEW:
        from datasketch import MinHash, MinHashLSH

        index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    for number, found in enumerate(sets):
        candidates = kept
        if index is not None:
            sketch = MinHash(num_perm=_PERMUTATIONS)
            sketch.update_batch([shingle.encode() for shingle in sorted(found)])
            candidates = sorted(index.query(sketch))
        # Sets of very different size can't be similar: most comparisons end here.
        near = next(
            (
                other
                for other in candidates
                if min(len(found), len(sets[other])) >= threshold * max(len(found), len(sets[other]))
                and similarity(found, sets[other]) >= threshold
            ),
            None,
        )
        result.append(near)
        if near is None:
            kept.append(number)
            if index is not None:
                index.insert(number, sketch)
    return result


def only_comments(canonical: str) -> bool:
    """Whether a command in canonical form does nothing."""
    return all(not line or line.lstrip().startswith("#") for line in canonical.splitlines())


class Seen:
    """Numbers that came before, sorted in 8 bytes each: a set of Python would take ten times that."""

    def __init__(self) -> None:
        import numpy as np

        self._numbers = np.array([], dtype=np.uint64)

    def first(self, numbers: list[int]) -> list[bool]:
        """Whether each number is new; all of them are remembered."""
        import numpy as np

        found = np.array(numbers, dtype=np.uint64)
        new = np.zeros(len(found), dtype=bool)
        new[np.unique(found, return_index=True)[1]] = True
        new &= ~np.isin(found, self._numbers, assume_unique=False)
        self._numbers = np.union1d(self._numbers, found[new])
        return new.tolist()


def judge(rows: list[dict], seen: Seen) -> list[tuple[dict, str | None, str]]:
    """Normalize rows and name the stage and reason of those that are rejected.

    Parameters
    ----------
    rows
        As they were acquired.
    seen
        Numbers of the pairs so far; renewed.

    Returns
    -------
    list of (row, stage, reason)
        In order; stage None for rows that pass.
    """
    judged: list[tuple[dict, str | None, str]] = []
    for row in rows:
        row = {**row, "request": clean_request(row["request"]), "command": clean_command(row["command"])}
        if reason := defect(row["request"], row["command"]):
            judged.append((row, "validate", reason))
        else:
            judged.append((row, None, ""))
    passed = [index for index, (_, stage, _) in enumerate(judged) if stage is None]
    new = seen.first([key_number(judged[index][0]["request"], judged[index][0]["command"]) for index in passed])
    for index, first in zip(passed, new, strict=True):
        if not first:
            judged[index] = (judged[index][0], "exact_duplicates", "the same request and command came before")
    passed = [index for index, (_, stage, _) in enumerate(judged) if stage is None]
    syntax = check_syntax([judged[index][0]["command"] for index in passed])
    for index, (canonical, error) in zip(passed, syntax, strict=True):
        row = judged[index][0]
        if canonical is None:
            judged[index] = ({**row, "detail": error}, "syntax", "command is not Bash")
        elif only_comments(canonical):
            judged[index] = (row, "syntax", "command does nothing")
    return judged


def find_near_duplicates(path: Path, keys: array.array, offsets: array.array, threshold: float) -> dict[int, int]:
    """Near duplicates among rows that share their command: row -> the earlier row that it repeats.

    A request that is nearly the same but has another command is another answer, not a duplicate.
    """
    import numpy as np

    numbers = np.frombuffer(keys, dtype=np.uint64)
    order = np.argsort(numbers, kind="stable")
    edges = np.flatnonzero(np.diff(numbers[order])) + 1
    found: dict[int, int] = {}
    with open(path, "rb") as handle:
        for group in np.split(order, edges):
            if len(group) < 2:
                continue
            texts = []
            for row in group:
                handle.seek(offsets[row])
                texts.append(request_key(json.loads(handle.readline())["request"]))
            for position, near in enumerate(near_duplicates(texts, threshold)):
                if near is not None:
                    found[int(group[position])] = int(group[near])
    return found


def main(raw: str, pairs: str, rejected: str, report: str, settings: dict) -> None:
    """Clean the rows of ``raw``; write those that pass, the rejected ones and the counts of each stage."""
    threshold = settings["near_duplicates"]
    removed: dict[str, Counter] = {stage: Counter() for stage in STAGES}
    seen = Seen()
    keys, offsets = array.array("Q"), array.array("Q")
    rows = offset = 0
    passed = Path(pairs).with_name(f".{Path(pairs).name}.passed")  # before near duplicates are known
    try:
        with atomic_open(rejected) as refuse:
            with open(passed, "wb") as keep:
                for chunk in chunks(read_jsonl(raw)):
                    for row, stage, reason in judge(chunk, seen):
                        rows += 1
                        if stage is None:
                            line = to_line(row).encode()
                            keep.write(line)
                            keys.append(key_number(command_key(row["command"])))
                            offsets.append(offset)
                            offset += len(line)
                        else:
                            removed[stage][reason] += 1
                            write_row(refuse, {**row, "reason": reason, "stage": stage})
            near = {} if threshold is None else find_near_duplicates(passed, keys, offsets, threshold)
            with atomic_open(pairs) as keep_text:
                for number, row in enumerate(read_jsonl(passed)):
                    if number not in near:
                        write_row(keep_text, row)
                        continue
                    reason = "nearly the same request with the same command came before"
                    removed["near_duplicates"][reason] += 1
                    write_row(refuse, {**row, "reason": reason, "stage": "near_duplicates"})
                kept = len(keys) - len(near)
                reasons = Counter({f"{stage}: {r}": n for stage in STAGES for r, n in removed[stage].items()})
                must_keep_some("clean", kept, reasons, raw)
    finally:
        passed.unlink(missing_ok=True)
    counts = {stage: sum(removed[stage].values()) for stage in STAGES}
    assert rows == kept + sum(counts.values()), (rows, kept, counts)
    write_json(
        report,
        {
            "kept": kept,
            "near_duplicate_threshold": threshold,
            "reasons": {stage: dict(removed[stage]) for stage in STAGES},
            "removed": counts,
            "rows": rows,
            "stages": list(STAGES),
        },
    )
    log.info("%d rows: %s; %d kept", rows, ", ".join(f"{stage} -{counts[stage]}" for stage in STAGES), kept)


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.input.pairs,
            snakemake.output.pairs,
            snakemake.output.rejected,
            snakemake.output.report,
            snakemake.params.clean,
        )
