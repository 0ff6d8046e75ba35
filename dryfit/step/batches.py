"""Encoded rows to batches: shuffled from a seed, grouped by length, padded only to the longest of the batch.

Grouping rows of like length is what makes padding cheap: of 128 positions a short request and its command
fill a quarter, and a batch of such rows is padded to its own longest row, not to the sequence length.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

IGNORED = -100  # the label that transformers' loss leaves out
WINDOW_BATCHES = 16  # rows are sorted by length within this many batches: enough to group, few enough to stay random


@dataclass(frozen=True)
class Row:
    """One encoded pair: token ids and the labels of the same length (``IGNORED`` outside the answer)."""

    input_ids: list[int]
    labels: list[int]


def read_rows(path: str) -> list[Row]:
    """Rows of an encoded split."""
    import pyarrow.parquet as pq  # a trace has batches without files

    table = pq.read_table(path, columns=["input_ids", "labels"])
    pairs = zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)
    return [Row(input_ids, labels) for input_ids, labels in pairs]


def answer_tokens(rows: Sequence[Row]) -> int:
    """Labels that the loss counts: the first position predicts nothing before it."""
    return sum(label != IGNORED for row in rows for label in row.labels[1:])


def epoch_batches(
    rows: Sequence[Row], batch_size: int, seed: int, epoch: int, by_length: bool = True
) -> list[list[Row]]:
    """All rows once, in an order that the seed and the epoch decide; ``by_length``: in batches of rows of like length.

    Packs have no padding that rows of like length would save, and fill better with rows of every length.
    """
    order = list(range(len(rows)))
    shuffler = random.Random(f"{seed}-{epoch}")
    shuffler.shuffle(order)
    window = batch_size * WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        if by_length:
            part = sorted(part, key=lambda index: len(rows[index].input_ids))
        batches += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    shuffler.shuffle(batches)
    return [[rows[index] for index in batch] for batch in batches]


def padded_length(lengths: Iterable[int], parts: int = 1) -> int:
    """Tokens of a padded row: the longest, up to the next multiple of ``parts``."""
    return -(-max(lengths) // parts) * parts


def collate(
    rows: Sequence[Row],
    pad_token_id: int,
    device: torch.device | str,
    *,
    mask: bool = False,
    parts: int = 1,
) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row; with ``parts`` to a length that so many parts of a row have in common.

    By default there is no attention mask: a causal model never looks to the right, and without a mask the fused
    attention kernels can be used. ``mask`` adds one, for a step whose memory was predicted with it.

    Returns ``input_ids`` and ``labels`` (and ``attention_mask``), each of shape (rows, longest) and dtype int64.
    """
    longest = padded_length((len(row.input_ids) for row in rows), parts)
    shape = (len(rows), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.tensor(row.input_ids)
        labels[index, :length] = torch.tensor(row.labels)
    batch = {"input_ids": input_ids, "labels": labels}
    if mask:
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {name: tensor.to(device) for name, tensor in batch.items()}
