"""Rule ``split_dataset``: training, validation and test rows, by group, so that nothing leaks.

Rows that share a normalized request or a normalized command belong together, and so do rows that are
connected through others. A group goes into one split as a whole. Which one depends on its content and the
seed alone, never on the order of the rows. Rows that an external test set contains are taken out before.
"""

import array
import hashlib
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import atomic_open, read_jsonl, write_json
from scripts.common.job import job, log
from scripts.dataset.rows import must_keep_some, write_row
from scripts.dataset.text import command_key, key_number, request_key

SPLITS = ("train", "validation", "test")


def keys_of(row: dict) -> tuple[int, int]:
    """Numbers of a row's normalized request and normalized command (never equal to each other)."""
    return key_number("request", request_key(row["request"])), key_number("command", command_key(row["command"]))


def group(requests: array.array, commands: array.array) -> Any:
    """Number each row's group: the rows connected by equal requests or equal commands.

    Parameters
    ----------
    requests, commands
        64-bit numbers of each row's request and command.

    Returns
    -------
    numpy.ndarray
        Of shape (rows,): the index of the group's first row.
    """
    import numpy as np

    rows = len(requests)
    parent = np.arange(rows, dtype=np.int64)

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for numbers in (np.frombuffer(requests, np.uint64), np.frombuffer(commands, np.uint64)):
        order = np.argsort(numbers, kind="stable")
        equal = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
        for left, right in zip(order[equal], order[equal + 1], strict=True):
            first, second = sorted((root(left), root(right)))
            parent[second] = first
    for row in range(rows):  # parents come before their children
        parent[row] = parent[parent[row]]
    return parent


def targets(rows: int, shares: dict[str, float]) -> dict[str, int]:
    """Rows of each split: shares rounded so that they add up, each off by less than one row."""
    exact = {name: rows * shares[name] for name in SPLITS}
    sizes = {name: int(exact[name]) for name in SPLITS}
    for name in sorted(SPLITS, key=lambda name: sizes[name] - exact[name])[: rows - sum(sizes.values())]:
        sizes[name] += 1
    return sizes


def assign(groups: Any, requests: array.array, commands: array.array, shares: dict[str, float], seed: int) -> tuple:
    """Give each group a split.

    A group's place in line, and the split it asks for, come from a hash of its smallest key and the seed.
    It gets that split while there is room, else the one with the most room left: sizes come out exact
    wherever small groups are left to fill up with.

    Returns
    -------
    tuple
        The split's index for each row (array of shape (rows,)), and each row's rank in a shuffled order that
        does not depend on the order of rows.
    """
    import numpy as np

    wanted = targets(len(groups), shares)
    room = [wanted[name] for name in SPLITS]
    edges = np.cumsum([shares[name] for name in SPLITS])
    smallest = np.full(len(groups), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, groups, np.frombuffer(requests, np.uint64))
    np.minimum.at(smallest, groups, np.frombuffer(commands, np.uint64))
    sizes = np.bincount(groups, minlength=len(groups))

    def shuffled(numbers: Any) -> Any:
        """Numbers mixed with the seed."""
        hashes = (hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in numbers)
        return np.fromiter((int.from_bytes(digest, "big") for digest in hashes), np.uint64, len(numbers))

    firsts = np.flatnonzero(sizes)
    places = shuffled(smallest[firsts])
    chosen = np.zeros(len(groups), dtype=np.int8)
    # Large groups first: what is left of the room is then filled with small ones.
    for index in np.lexsort((places, -sizes[firsts])):
        size = int(sizes[firsts[index]])
        asked = min(int(np.searchsorted(edges, float(places[index]) / 2.0**64, side="right")), len(SPLITS) - 1)
        if room[asked] < size:
            asked = max(range(len(SPLITS)), key=lambda split: room[split])
        room[asked] -= size
        chosen[firsts[index]] = asked
    ranks = shuffled(np.frombuffer(requests, np.uint64) ^ np.frombuffer(commands, np.uint64))
    return chosen[groups], ranks


def external_keys(rows: Iterable[dict]) -> tuple[set[int], set[int]]:
    """Numbers of the requests and of the commands in an external test set."""
    requests, commands = set(), set()
    for row in rows:
        request, command = keys_of(row)
        requests.add(request)
        commands.add(command)
    return requests, commands


def main(pairs: str, external: str, outputs: dict[str, str], settings: dict) -> None:
    """Split ``pairs``; write each split in an order of its own, shuffled by the seed, and a report."""
    import numpy as np

    shares = {name: settings[name] for name in SPLITS}
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise UserError(
            "The shares of the splits do not add up to 1.",
            where="dataset.split",
            found=shares,
            allowed="three shares of at least 0 that add up to 1",
            write="split: {train: 0.8, validation: 0.1, test: 0.1, seed: 42}",
        )
    known_requests, known_commands = external_keys(read_jsonl(external))
    requests, commands, offsets = array.array("Q"), array.array("Q"), array.array("Q")
    reasons: Counter = Counter()
    with atomic_open(outputs["rejected"]) as refuse, open(pairs, "rb") as source:
        offset = rows = 0
        for line, row in zip(source, read_jsonl(pairs), strict=True):
            rows += 1
            request, command = keys_of(row)
            known = [
                name
                for name, number, numbers in (
                    ("request", request, known_requests),
                    ("command", command, known_commands),
                )
                if number in numbers
            ]
            if known:
                reason = f"{' and '.join(known)} in the external test set"
                reasons[reason] += 1
                write_row(refuse, {**row, "reason": reason, "stage": "decontaminate"})
            else:
                requests.append(request)
                commands.append(command)
                offsets.append(offset)
            offset += len(line)
        must_keep_some("decontaminate", len(requests), reasons, pairs)
        groups = group(requests, commands)
        chosen, ranks = assign(groups, requests, commands, shares, settings["seed"])
        with ExitStack() as stack:
            files = [stack.enter_context(atomic_open(outputs[name], "wb")) for name in SPLITS]
            # Equal ranks are equal keys; then the text decides, whatever order the rows came in.
            for split, file in enumerate(files):
                members = np.flatnonzero(chosen == split)
                members = members[np.argsort(ranks[members], kind="stable")]
                start = 0
                while start < len(members):
                    end = start + 1
                    while end < len(members) and ranks[members[end]] == ranks[members[start]]:
                        end += 1
                    lines = []
                    for member in members[start:end]:
                        source.seek(offsets[member])
                        lines.append(source.readline())
                    file.writelines(sorted(lines))
                    start = end
    sizes = np.bincount(groups, minlength=1)
    sizes = sizes[sizes > 0]
    wanted = targets(len(groups), shares)
    got = {name: int(np.count_nonzero(chosen == split)) for split, name in enumerate(SPLITS)}
    assert rows == sum(got.values()) + sum(reasons.values())
    for name in SPLITS:
        if abs(got[name] - wanted[name]) > 0.01 * len(groups):
            log.warning("%s has %d rows instead of %d: groups are too large to divide.", name, got[name], wanted[name])
        if wanted[name] and not got[name]:
            raise UserError(
                f"The {name} split is empty: the rows form too few groups to divide.",
                where=pairs,
                found=f"{len(groups)} rows in {len(sizes)} groups, the largest of {int(sizes.max())}",
                allowed="more rows that share neither request nor command; or a share of 0",
            )
    write_json(
        outputs["report"],
        {
            "decontaminated": sum(reasons.values()),
            "external_rows": {"commands": len(known_commands), "requests": len(known_requests)},
            "groups": len(sizes),
            "kept": len(groups),
            "largest_group": int(sizes.max()),
            "reasons": dict(reasons),
            "rows": rows,
            "seed": settings["seed"],
            "shares": shares,
            "sizes": got,
            "wanted": wanted,
        },
    )
    log.info("%d rows in %d groups: %s", len(groups), len(sizes), ", ".join(f"{name} {got[name]}" for name in SPLITS))


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.pairs, snakemake.input.external, dict(snakemake.output.items()), snakemake.params.split)
