"""The largest batch that a program's loader can make, where its data tells how long the rows are.

Two updates see two batches, and a longer row may come later. So from the second update on a loader whose rows differ
gives its largest batch: the one of its order that is largest, or, where rows are drawn at random, the longest rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import RandomSampler, TensorDataset, dataloader

MOST_ROWS = 1_000  # that are read to learn their sizes; columns of Arrow are read whole
MOST_BATCHES = 100_000  # of a sampler's order
MOST_SECONDS = 3.0
_COLUMNS = ("input_ids", "length", "lengths", "tokens", "prompt_input_ids", "text")


@dataclass
class LoaderRows:
    """What is known of the rows of a data set."""

    sizes: list[
        int
    ]  # elements of each row that was looked at: tokens, samples, or characters of a text
    of: int  # how many rows the data set has

    @property
    def differ(self) -> bool:
        return len(set(self.sizes)) > 1

    @property
    def is_whole(self) -> bool:
        return len(self.sizes) == self.of


def rows_of(data: Any) -> LoaderRows | None:
    """The sizes of a data set's rows; None: they can't be told, as of a stream."""
    try:
        count = len(data)
        if isinstance(data, TensorDataset):
            return LoaderRows(
                [sum(tensor[0].numel() for tensor in data.tensors)], 1
            )  # all are alike
        columns = getattr(data, "column_names", None) or ()
        column = next((name for name in _COLUMNS if name in columns), None)
        if column is not None:
            values = data.with_format(None)[column][:]
            return LoaderRows(
                [each if isinstance(each, int) else len(each) for each in values], count
            )
        sizes, ends = [], time.monotonic() + MOST_SECONDS
        for at in range(min(count, MOST_ROWS)):
            sizes.append(_elements(data[at]))
            if time.monotonic() > ends:
                break
        return LoaderRows(sizes, count) if sizes and None not in sizes else None
    except Exception:  # somebody's own data set: it may do anything
        return None


def _elements(row: Any) -> int | None:
    """The elements of the largest part of a row; None: it has no size."""
    if isinstance(row, torch.Tensor):
        return row.numel()
    if hasattr(row, "size") and isinstance(row.size, int):  # an array of NumPy
        return row.size
    if isinstance(row, str):
        return len(row)
    if isinstance(row, Mapping):
        row = list(row.values())
    elif isinstance(row, Sequence) and row and all(isinstance(each, (int, float)) for each in row):
        return len(row)
    if isinstance(row, Sequence):
        return max((size for each in row if (size := _elements(each)) is not None), default=None)
    return None


def largest_batch(loader: Any, rows: LoaderRows) -> list[int] | None:
    """The indices of the largest batch; None: the loader does not make batches of rows.

    ``loader``: an iterator of a ``DataLoader``, which has its samplers.
    """
    sampler = loader._index_sampler
    if not loader._auto_collation:
        return None
    known = range(len(rows.sizes))
    if _is_random(sampler):
        return sorted(known, key=lambda at: -rows.sizes[at])[
            : getattr(sampler, "batch_size", None) or 1
        ]
    batches = [list(batch) for batch in islice(iter(sampler), MOST_BATCHES)]
    whole = [batch for batch in batches if all(at in known for at in batch)]
    return max(
        whole, key=lambda batch: len(batch) * max(rows.sizes[at] for at in batch), default=None
    )


def _is_random(sampler: Any) -> bool:
    for name in ("batch_sampler", "sampler"):
        inner = getattr(sampler, name, None)
        if inner is not None:
            return _is_random(inner)
    return isinstance(sampler, RandomSampler) or bool(getattr(sampler, "shuffle", False))


class Batches:
    """What loaders give a program that trains."""

    def __init__(self) -> None:
        # Data sets whose rows went into an update, by id; they are kept, so that an id stays theirs.
        self.trained_on: dict[int, Any] = {}
        # How many updates were taken when the first largest batch was given; None: none was.
        self.largest_at: int | None = None
        self._last: Any = None
        self._rows: dict[int, LoaderRows | None] = {}
        self._largest: dict[int, list[int] | None] = {}

    def updated(self) -> None:
        """The program has taken an update, with what it was given last."""
        data = self._last
        if data is not None and id(data) not in self.trained_on:
            self.trained_on[id(data)] = data
            self._rows[id(data)] = rows_of(data)

    @property
    def are_missing(self) -> bool:
        """Whether rows differ, and no largest batch was given yet."""
        return self.largest_at is None and any(
            rows.differ for rows in self._rows.values() if rows is not None
        )

    def is_training(self, iterator: Any) -> bool:
        return id(iterator._dataset) in self.trained_on

    def given(self, iterator: Any) -> None:
        """A loader is about to give a batch."""
        self._last = iterator._dataset

    def index(self, iterator: Any, index: Any, updates: int, *, validates: bool) -> Any:
        """What a loader reads next: the rows of its own order, or those of its largest batch."""
        trains = bool(updates) and self.is_training(iterator)
        if not (trains or validates) or iterator._dataset_kind != dataloader._DatasetKind.Map:
            return index
        key = id(iterator._dataset)
        if key not in self._rows:
            self._rows[key] = rows_of(iterator._dataset)
        rows = self._rows[key]
        if rows is None or not rows.differ:
            return index
        if key not in self._largest:
            try:
                self._largest[key] = largest_batch(iterator, rows)
            except Exception:  # somebody's own sampler
                self._largest[key] = None
        if self._largest[key] is None:
            return index
        if self.largest_at is None and trains:
            self.largest_at = updates
        return list(self._largest[key])

    def not_seen(self) -> str | None:
        """Which batches may be larger than those that were followed; None: none."""
        known = [self._rows[key] for key in self.trained_on]
        if not known or None in known or self.are_missing:
            return "later batches"
        if any(not rows.is_whole for rows in known):
            read = sum(len(rows.sizes) for rows in known)
            return f"batches of rows behind the first {read:,}"
        return None
