"""Rule ``split_dataset``: training, validation and test rows, by group, so that nothing leaks.

Rows that share a normalized request, a normalized answer (where the task says that equal answers are one thing), or
what their source names as one (``family``, else ``intent``: what is asked for) belong together, and so do rows that
are connected through others. A group goes into one split as a whole. Which one depends on its content and the seed
alone, never on the order of the rows. A source may name the split ``train`` of a row, which is then not held out. It
may name ``known`` for a row in words and values of its own: that row is held out, although its intent is trained. So
there are two tests, and each held-out row says which it is of: ``known`` kinds in new words and values, or ``new``
kinds. Rows that an external test set contains, or that ask for nearly the same, are taken out before. The finished
files are checked last (:mod:`scripts.dataset.check_splits`): nothing is trained or asked on splits that leak.
"""

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_jsonl, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.dataset import check_splits
from scripts.dataset.clean import shingles
from scripts.dataset.rows import (
    KNOWN,
    SPLITS,
    TEST,
    Rows,
    count,
    families_of,
    must_keep_some,
    read_rows,
    to_lines,
    write_rows,
)
from scripts.tasks.support import registry
from scripts.tasks.support.keys import key_number
from scripts.tasks.text import Task

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

NEW = "new"  # the test beside KNOWN
HALVES = {"train": 0.0, "validation": 0.5, "test": 0.5}  # of the rows of known kinds
RESEMBLES = 0.7  # Jaccard similarity of two requests' character trigrams, from which a row is too near a test set's


def keys_of(task: Task, rows: Rows) -> Rows:
    """64-bit numbers of each row's normalized ``request`` and ``command`` (never equal to each other).

    An answer that the task's rows may share without asking for the same holds none of them together.
    """
    import pandas as pd

    keys = {"request": task.request_key, "command": task.answer_key}
    numbers = {
        name: [key_number(name, key(text)) for text in rows[name]] for name, key in keys.items()
    }
    found = pd.DataFrame(numbers, index=rows.index, dtype="uint64")
    own = rows["command"].map(task.holds_together).astype(bool)
    return found.assign(command=found["command"].where(own, found["request"]))


def group(keys: Rows, families: "pd.Series | None" = None) -> "np.ndarray":
    """Each row's group, of shape (rows,), numbered from 0: rows connected by equal requests, commands or families."""
    import numpy as np
    import pandas as pd
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Requests, commands and families are the nodes of a graph; each row joins its own to its request.
    columns = [pd.factorize(keys[column])[0] for column in ("request", "command")]
    if families is not None:
        named = pd.factorize(families)[0]
        columns.append(np.where(named < 0, columns[0], named + 2 * len(keys)))
    columns[1] = columns[1] + len(keys)
    requests = np.tile(columns[0], len(columns) - 1)
    edges = (requests, np.concatenate(columns[1:]))
    nodes = len(columns) * len(keys)
    graph = coo_array((np.ones(len(requests), bool), edges), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][columns[0]]


def resembling(task: Task, requests: "pd.Series", others: "pd.Series") -> "pd.Series":
    """Whether each request is nearly the same as one of the others: :data:`RESEMBLES` of their trigrams are shared."""
    sets = [shingles(task.request_key(text)) for text in others.unique()]
    of_run: dict[str, set[int]] = {}
    for number, one in enumerate(sets):
        for run in one:
            of_run.setdefault(run, set()).add(number)

    def resembles(text: str) -> bool:
        own = shingles(task.request_key(text))
        shared = Counter(number for run in own for number in of_run.get(run, ()))
        return any(
            count >= RESEMBLES * (len(own) + len(sets[number]) - count)
            for number, count in shared.items()
        )

    return requests.map(resembles)


def known_rows(rows: Rows) -> "np.ndarray":
    """Which rows ask anew for an intent or a family that other rows train, of shape (rows,)."""
    import numpy as np

    if "split" not in rows or (families := families_of(rows)) is None:
        return np.zeros(len(rows), bool)
    trained = families[rows["split"] == SPLITS[0]]
    return ((rows["split"] == KNOWN) & families.isin(trained)).to_numpy()


def targets(rows: int, shares: dict[str, float]) -> dict[str, int]:
    """Rows of each split: shares rounded so that they add up, each off by less than one row."""
    exact = {name: rows * shares[name] for name in SPLITS}
    sizes = {name: int(exact[name]) for name in SPLITS}
    for name in sorted(SPLITS, key=lambda name: sizes[name] - exact[name])[
        : rows - sum(sizes.values())
    ]:
        sizes[name] += 1
    return sizes


def shuffled(numbers: Any, seed: int) -> "np.ndarray":
    """Numbers mixed with the seed: as if drawn, and always the same for one number."""
    import numpy as np

    hashes = (
        hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in numbers
    )
    return np.fromiter(
        (int.from_bytes(digest, "big") for digest in hashes), np.uint64, len(numbers)
    )


def assign(
    keys: Rows,
    groups: "np.ndarray",
    shares: dict[str, float],
    seed: int,
    only_train: "np.ndarray | None" = None,
) -> "np.ndarray":
    """Give each group a split; returns the index of each row's split, of shape (rows,).

    A group's place in line, and the split it asks for, come from a hash of its smallest key and the seed.
    It gets that split while there is room, else the one with the most room left: sizes come out exact
    wherever small groups are left to fill up with. ``only_train``, of shape (rows,), says which rows are not held out;
    their groups come first.
    """
    import numpy as np

    table = keys.min(axis=1).groupby(groups).agg(["min", "size"])
    places = shuffled(table["min"], seed)
    edges = np.cumsum([shares[name] for name in SPLITS])
    asked = np.searchsorted(edges, places.astype(float) / 2.0**64, side="right").clip(
        max=len(SPLITS) - 1
    )
    wanted = targets(len(groups), shares)
    room = [wanted[name] for name in SPLITS]
    chosen = np.zeros(len(table), dtype=np.int8)
    sizes = table["size"].to_numpy()
    bound = np.zeros(len(table), dtype=bool)
    if only_train is not None:
        np.logical_or.at(bound, groups, only_train)
    # Large groups first: what is left of the room is then filled with small ones.
    for index in np.lexsort((places, -sizes, ~bound)):
        split = 0 if bound[index] else asked[index]
        if room[split] < sizes[index] and not bound[index]:
            split = int(np.argmax(room))
        room[split] -= sizes[index]
        chosen[index] = split
    return chosen[groups]


def because_of(
    task: Task, rows: Rows, keys: Rows, others: Rows, their_keys: Rows, where: str
) -> "pd.Series":
    """Why each row may not be learned beside other rows, in words; empty where it may."""
    import pandas as pd

    known = pd.DataFrame(
        {name: keys[name].isin(their_keys[name]) for name in ("request", "command")}
    )
    known["command"] &= rows["command"].map(task.holds_together).astype(bool)
    near = resembling(task, rows["request"], others["request"])
    known["nearly its request"] = near & ~known["request"]
    known = known.rename(columns={"command": task.answer})
    reasons = known.dot(known.columns + " and ").str.removesuffix(" and ") + f" in {where}"
    return reasons.where(known.any(axis=1), "")


def must_hold_rows(
    got: dict[str, int], shares: dict[str, float], groups: "np.ndarray", where: object
) -> None:
    """Raise when a split is empty: there would be nothing to train on, to watch, or to compare on."""
    import numpy as np

    empty = [name for name in SPLITS if not got[name]]
    if empty:
        sizes = np.bincount(groups)
        least = math.ceil(1 / min(share for share in shares.values() if share))
        raise UserError(
            f"The {' and the '.join(empty)} split would be empty: the rows form too few groups to divide.",
            where=where,
            found=f"{len(groups)} rows in {len(sizes)} groups, the largest of {sizes.max()}",
            allowed=f"with these shares at least {least} rows that share neither request nor command; or larger shares",
            write="dataset:\n  split: {train: 0.5, validation: 0.25, test: 0.25}"
            if len(sizes) > 2
            else None,
        )


def main(
    task: Task,
    inputs: dict[str, str],
    outputs: dict[str, str],
    settings: dict,
    harmful: Iterable[dict] = (),
) -> None:
    """Split the screened pairs; write each split in an order of its own, shuffled by the seed, and a report.

    ``harmful``: requests for harm that no row has, which are asked beside the test split.
    """
    import numpy as np
    import pandas as pd

    read_report(inputs["screen"], inputs["pairs"])
    read_report(inputs["acquire"], inputs["external"], inputs["benchmark"])
    shares = {name: settings[name] for name in SPLITS}
    rows, external = read_rows(inputs["pairs"]), read_rows(inputs["external"])
    keys, foreign = keys_of(task, rows), keys_of(task, external)
    own_test = (rows["split"] == TEST) if "split" in rows else pd.Series(False, rows.index)
    reasons = because_of(task, rows, keys, external, foreign, "the external test set")
    if own_test.any():
        tested = because_of(task, rows, keys, rows[own_test], keys[own_test], "the test file")
        reasons = reasons.where(reasons != "", tested.where(~own_test, ""))
    held_out = reasons != ""
    for text, where in zip(rows["request"][held_out][:3], reasons[held_out][:3], strict=True):
        log.warning("taken out of the data, %s: %s", where, " ".join(text.split())[:100])
    must_keep_some(
        "decontaminate", int((~held_out).sum()), count(reasons[held_out]), inputs["pairs"]
    )
    write_rows(
        outputs["rejected"], rows[held_out].assign(reason=reasons[held_out], stage="decontaminate")
    )

    rows, keys, own_test = rows[~held_out], keys[~held_out], own_test[~held_out].to_numpy()
    if own_test.any():  # which is all of that split
        kept = shares["train"] + shares["validation"]
        shares = {
            "train": shares["train"] / kept,
            "validation": shares["validation"] / kept,
            "test": 0.0,
        }
    families, known = families_of(rows), known_rows(rows)
    groups = group(keys, None if families is None else families.mask(known))
    known = known & ~np.isin(
        groups, groups[~known]
    )  # one that shares a request or a command with another row follows it
    bound = (
        (rows["split"] == SPLITS[0]).to_numpy() if "split" in rows else np.zeros(len(rows), bool)
    )
    chosen, wanted = np.zeros(len(rows), np.int8), dict.fromkeys(SPLITS, 0)
    halves = {**HALVES, "validation": 1.0, "test": 0.0} if own_test.any() else HALVES
    for some, parts in ((~known & ~own_test, shares), (known & ~own_test, halves)):
        numbers = np.unique(groups[some], return_inverse=True)[1]
        chosen[some] = assign(keys[some], numbers, parts, settings["seed"], bound[some])
        wanted = {
            name: wanted[name] + number for name, number in targets(int(some.sum()), parts).items()
        }
    chosen[own_test] = SPLITS.index(TEST)
    wanted[TEST] += int(own_test.sum())
    got = {name: int((chosen == split).sum()) for split, name in enumerate(SPLITS)}
    must_hold_rows(got, shares, groups, inputs["pairs"])
    # Equal ranks are equal keys; then the text decides, whatever order the rows came in. A refused row has one key
    # twice, and their exclusive or would give all of them one rank.
    both = (keys["request"] ^ keys["command"]).where(
        keys["request"] != keys["command"], keys["request"]
    )
    order = pd.DataFrame({"rank": shuffled(both, settings["seed"]), "split": chosen})
    if families is not None:
        kinds = pd.Series(np.where(known, KNOWN, NEW), rows.index, dtype=object)
        rows = rows.assign(kinds=kinds.where((chosen > 0) & families.notna(), None))
    order = (
        order.set_index(rows.index).assign(text=list(to_lines(rows))).sort_values(["rank", "text"])
    )
    for split, name in enumerate(SPLITS):
        write_rows(outputs[name], rows.loc[order.index[order["split"] == split]])
    for name in SPLITS:
        if abs(got[name] - wanted[name]) > 0.01 * len(rows):
            log.warning(
                "%s has %d rows instead of %d: groups are too large to divide.",
                name,
                got[name],
                wanted[name],
            )
    sizes = pd.Series(groups).value_counts()
    write_jsonl(outputs["harmful"], harmful)
    shutil.copyfile(inputs["benchmark"], outputs["benchmark"])
    write_report(
        outputs["report"],
        {
            "decontaminated": int(held_out.sum()),
            "external_rows": {
                f"{name}s": foreign[name].nunique() for name in ("request", "command")
            },
            "groups": len(sizes),
            "known": {
                name: int((known & (chosen == split)).sum())
                for split, name in enumerate(SPLITS)
                if split
            },
            "kept": len(rows),
            "largest_group": int(sizes.max()),
            "reasons": count(reasons[held_out]),
            "rows": len(held_out),
            "seed": settings["seed"],
            "shares": shares,
            "sizes": got,
            "wanted": wanted,
        },
        *(outputs[name] for name in (*SPLITS, "rejected", "harmful", "benchmark")),
    )
    log.info(
        "%d rows in %d groups: %s",
        len(rows),
        len(sizes),
        ", ".join(f"{name} {got[name]}" for name in SPLITS),
    )


if __name__ == "__main__":
    with job(snakemake):
        read, made, own = (
            dict(snakemake.input.items()),
            dict(snakemake.output.items()),
            snakemake.params.own_metrics,
        )
        part = registry.of_job(snakemake.params.task)
        harmful = registry.of_job(snakemake.params.harm).harmful()
        main(part, read, {**made, "report": made["split"]}, snakemake.params.split, harmful)
        finished = {**read, **made, "safe": read["pairs"]}
        check_splits.main(part, finished, made["check"], registry.of_job(own) if own else None)
