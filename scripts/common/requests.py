"""What the models are asked: the requests of each test, and the training rows that the untrained model is shown.

Requests are compared by their runs of two to four characters, weighted by how few training rows have them (TF-IDF).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

# The tests, apart: held-out requests of intents that training has, of others, of data that names none, and strangers'.
BENCHMARK, HELD_OUT = "benchmark", "held_out"
TESTS = ("known", "new", HELD_OUT, BENCHMARK)
BASELINES = ("nearest_row", "few_shot")  # what training has to beat, beside the base alone
SHOTS = 4  # training rows that the untrained model is shown, the nearest one last
_RUNS = (2, 3, 4)  # characters


def by_test(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of each test that there is, in the order of :data:`TESTS`."""
    return {name: some for name in TESTS if (some := [row for row in rows if row["test"] == name])}


def requests_of(
    split: Sequence[dict], tasks: Sequence[dict], settings: Mapping[str, Any]
) -> list[dict]:
    """What is asked: the first held-out rows of each test, in the order of the split, then those of the benchmark.

    ``settings`` has ``requests``, how many of each test, and ``benchmark``, how many of its tasks; None: all.
    """
    named = [{**row, "test": row.get("kinds") or HELD_OUT} for row in split]
    chosen = {id(row) for rows in by_test(named).values() for row in rows[: settings["requests"]]}
    of_benchmark = [{**task, "test": BENCHMARK} for task in tasks[: settings["benchmark"]]]
    return [row for row in named if id(row) in chosen] + of_benchmark


def asked(
    rows: Sequence[Mapping[str, Any]], shots: Sequence[Sequence[tuple[str, str]]] | None = None
) -> tuple[list[tuple[str, str]], list[list[tuple[str, str]]]]:
    """Each row's request with its answer, and the turns before it: ``shots``, then the row's own conversation."""
    pairs, before = [], []
    for number, row in enumerate(rows):
        turns = row.get("turns")
        turns = turns if isinstance(turns, list) else [{"content": row["request"]}]
        texts = [turn["content"] for turn in turns]
        pairs.append((texts[-1], row["command"]))
        own = list(zip(texts[:-1:2], texts[1::2], strict=True))
        before.append([*(shots[number] if shots else ()), *own])
    return pairs, before


def shots_of(
    near: Sequence[Sequence[int]], trained: Sequence[Mapping[str, str]]
) -> list[list[tuple[str, str]]]:
    """The nearest rows of each request as turns to be shown before it, the nearest one last."""
    return [
        [(trained[row]["request"], trained[row]["command"]) for row in reversed(rows)]
        for rows in near
    ]


def nearest_rows(requests: Sequence[str], rows: Sequence[str], count: int) -> list[list[int]]:
    """For each request, the indices of the ``count`` training rows whose requests are most like it.

    The nearest one stands first; of equally near ones the earlier.
    """
    import numpy as np

    standing: dict[
        str, list[tuple[int, float]]
    ] = {}  # by run: rows that have it, and 1 + log of how often
    for number, row in enumerate(rows):
        for run, times in _runs(row).items():
            standing.setdefault(run, []).append((number, 1 + math.log(times)))
    lengths, weighted = np.zeros(len(rows)), {}
    for run, found in standing.items():
        having, weights = (
            np.array([number for number, _ in found]),
            np.array([weight for _, weight in found]),
        )
        rarity = math.log((1 + len(rows)) / (1 + len(found))) + 1
        weighted[run] = rarity, having, weights * rarity
        lengths[having] += (weights * rarity) ** 2
    near = []
    for request in requests:
        likeness = np.zeros(len(rows))
        for run, times in _runs(request).items():
            if run in weighted:
                rarity, having, weights = weighted[run]
                likeness[having] += (1 + math.log(times)) * rarity * weights
        near.append(np.argsort(-likeness / np.sqrt(lengths), kind="stable")[:count].tolist())
    return near


def _runs(text: str) -> Counter[str]:
    text = f" {' '.join(text.casefold().split())} "
    return Counter(
        text[begin : begin + size] for size in _RUNS for begin in range(len(text) - size + 1)
    )
