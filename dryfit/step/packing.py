"""Several rows in one sequence, each computed as if it were alone; what they all begin with can be computed once.

    packing: none            packing: rows             packing: shared_prefix
    [prefix a1 a2 . . . ]    [prefix a1 a2 prefix b1   [prefix a1 a2 b1 b2 b3 c1 c2]
    [prefix b1 b2 b3 . .]     b2 b3]
    [prefix c1 c2 . . . ]

A token attends to the tokens of its own row before it and, where it is shared, to the prefix: a mask says so, and
position ids go on after the prefix for each row. What the model computes for the prefix depends on the prefix alone, so
loss and gradients are those of the rows apart, up to rounding. That holds only where attention is all that carries
something from token to token, and where it takes positions and mask as given:
:func:`dryfit.step.packing_self_test.self_test` makes sure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.batches import IGNORED, Row, collate
from dryfit.step.model import autocast_dtype, configuration, weight_dtype

Pack = list[Row]
_LAYERS = ("full_attention", "sliding_attention")  # kinds of layers whose mask this module can make


def common_prefix(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with and that are not learned, but for one that stays in each row.

    The last token before an answer predicts the answer's first, so it has to be the row's own.
    """
    if not rows:
        return 0
    texts = [
        row.input_ids[: next((i for i, label in enumerate(row.labels) if label != IGNORED), None)]
        for row in rows
    ]
    alike = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    return max(0, min(sum(takewhile(bool, alike)), min(map(len, texts)) - 1))


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the indices of each pack, whose lengths add up to ``capacity`` at most.

    The longest row comes first, each into the fullest pack that still has room for it. Equal lengths keep their order,
    so that equal rows make equal packs.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(free, (lengths[index], -1))
        room, number = free.pop(place) if place < len(free) else (capacity, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(index)
        insort(free, (room - lengths[index], number))
    return packs


def micro_batches(rows: Sequence[Row], scenario: Scenario, prefix: int) -> list[list[Pack]]:
    """The rows of one step as micro-batches of at most ``micro_batch`` packs of at most ``sequence_length`` tokens.

    ``prefix`` is the number of tokens that are shared. Without packing each row is a pack of its own.
    """
    if scenario.packing == "none":
        packs = [[row] for row in rows]
    else:
        lengths = [len(row.input_ids) - prefix for row in rows]
        if prefix + max(lengths) > scenario.sequence_length:
            raise UserError(
                "A row is longer than a pack.",
                where="training.sequence_length",
                found=prefix + max(lengths),
                allowed=f"rows of at most {scenario.sequence_length} tokens",
                write=f"sequence_length: {prefix + max(lengths)}",
            )
        members = pack_lengths(lengths, scenario.sequence_length - prefix)
        packs = [[rows[index] for index in chosen] for chosen in members]
    return [
        packs[start : start + scenario.micro_batch]
        for start in range(0, len(packs), scenario.micro_batch)
    ]


def collate_packs(
    packs: Sequence[Pack],
    scenario: Scenario,
    prefix: int,
    pad_token_id: int,
    config: Any,
    device: torch.device | str,
) -> dict[str, Any]:
    """A batch of packs, padded on the right to the longest; without packing :func:`batches.collate` makes it.

    Parameters
    ----------
    packs
        Rows that share a sequence; each begins with the same ``prefix`` tokens.
    scenario
        Its ``packing``, and the dtype that its attention computes in.
    config
        The model's transformers configuration: whether layers have a sliding window.

    Returns
    -------
    dict
        ``input_ids``, ``position_ids`` and ``labels`` of shape (packs, longest) and dtype int64, and
        ``attention_mask`` as :func:`attention_masks` makes it.
    """
    if scenario.packing == "none":
        rows = [row for pack in packs for row in pack]
        masked, parts = scenario.attention_mask == "padding", scenario.parallel.parts_of_a_row
        return collate(rows, pad_token_id, device, mask=masked, parts=parts)
    longest = max(prefix + sum(len(row.input_ids) - prefix for row in pack) for pack in packs)
    shape = (len(packs), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    positions = torch.full(shape, prefix, dtype=torch.long)  # of padding: any that the model has
    segments = torch.full(
        shape, -1, dtype=torch.long
    )  # 0: the prefix; -1: padding, which sees itself
    for number, pack in enumerate(packs):
        input_ids[number, :prefix] = torch.tensor(pack[0].input_ids[:prefix], dtype=torch.long)
        positions[number, :prefix] = torch.arange(prefix)
        segments[number, :prefix] = 0
        begin = prefix
        for segment, row in enumerate(pack, 1):
            end = begin + len(row.input_ids) - prefix
            input_ids[number, begin:end] = torch.tensor(row.input_ids[prefix:])
            labels[number, begin:end] = torch.tensor(row.labels[prefix:])
            labels[number, begin] = (
                IGNORED  # what stands before it is another row's last token, or the prefix
            )
            positions[number, begin:end] = torch.arange(prefix, len(row.input_ids))
            segments[number, begin:end] = segment
            begin = end
    query, key = segments[:, :, None], segments[:, None, :]
    seen = ((query == key) | (key == 0)).tril_()
    distance = positions[:, :, None] - positions[:, None, :]
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
    batch["attention_mask"] = attention_masks(seen, distance, config, mask_dtype(scenario))
    return tree_map(lambda tensor: tensor.to(device), batch)


def is_of_the_device(error: Exception) -> bool:
    """Whether an error is one of the device or of where tensors lie, which no other way of computing mends."""
    kinds = (
        torch.OutOfMemoryError,
        getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
    )  # since PyTorch 2.8
    return isinstance(error, kinds) or "same device" in str(error) or "device type" in str(error)


def attention_masks(
    seen: torch.Tensor, distance: torch.Tensor, config: Any, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks: 0 where a token may look, the dtype's least number elsewhere.

    One additive mask in the dtype that attention computes in serves eager attention and scaled-dot-product attention
    alike, and all layers. (A boolean one would be added as 0 and 1 by eager attention, and copied by each layer.)
    A sliding window counts positions, for rows that share a prefix are not beside it.

    ``seen``: where a token may look, without regard to windows: bool (rows, queries, keys). ``distance``: position of
    the query less position of the key, of the same shape.

    Their shape is (rows, 1, queries, keys); where layers differ, there is one for each kind, as transformers takes it.
    """
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if unknown := sorted(set(kinds) - set(_LAYERS)):
        raise refusal(config.model_type, f"it has layers of {' and '.join(unknown)}")

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    if "sliding_attention" in kinds:
        return {
            kind: additive(seen if kind == "full_attention" else seen & (distance < window))
            for kind in kinds
        }
    return additive(seen if window is None or kinds else seen & (distance < window))


def mask_dtype(scenario: Scenario) -> torch.dtype:
    """Dtype that queries have, and so the additive mask: PEFT's preparation has fp32 norms, whose dtype goes on."""
    if scenario.kbit_preparation == "peft" and autocast_dtype(scenario) is None:
        return torch.float32
    return autocast_dtype(scenario) or weight_dtype(scenario)


def full_packs(scenario: Scenario, device: torch.device | str) -> dict[str, Any]:
    """``position_ids`` and ``attention_mask`` of packs without room to spare: for memory, where values don't matter.

    On ``meta`` nothing but shapes and dtypes is made.
    """
    rows, tokens = scenario.micro_batch, scenario.sequence_length
    positions = torch.arange(tokens).repeat(rows, 1)
    if torch.device(device).type == "meta":
        positions = positions[:1, :1]
    distance = positions[:, :, None] - positions[:, None, :]
    masks = attention_masks(distance >= 0, distance, configuration(scenario), mask_dtype(scenario))
    batch = {"attention_mask": masks, "position_ids": positions}
    if torch.device(device).type != "meta":
        return tree_map(lambda tensor: tensor.to(device), batch)
    shapes = {2: (rows, tokens), 4: (rows, 1, tokens, tokens)}
    return tree_map(
        lambda tensor: torch.empty(shapes[tensor.ndim], dtype=tensor.dtype, device="meta"), batch
    )


def refusal(architecture: str, reason: str) -> UserError:
    """What a person reads when rows can't be packed for this model."""
    return UserError(
        f"Rows can't be packed for this model: {reason}.",
        where=f"training.packing (model_type {architecture})",
        allowed="none: each row in a line of its own, padded",
        change={"packing": "none"},
    )
