"""How long a run's steps take on its GPU, by the lengths that its batches really have.

A batch's time depends on its tokens. Of the batches' shapes the smallest, the middle and the largest are traced; the
others lie between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dryfit.hours.step_time import Speed
from dryfit.scenario.scenario import Scenario
from scripts.common.resource_table import Stage

# For each step of a training and each share of its rows: rows (or packs) of each micro-batch, tokens of the longest.
Shapes = Sequence[Sequence[Sequence[tuple[int, int]]]]


def batch_shapes(train: str, scenario: Scenario, loop: Mapping[str, Any]) -> Shapes:
    """The shapes of the micro-batches of a whole training, from its encoded rows.

    Parameters
    ----------
    train
        The encoded training split.
    loop
        ``rows_per_step``, ``epochs``, ``max_steps`` and ``seed``, which decide which rows meet.

    Raises
    ------
    UserError
        If the rows of a step need more micro-batches than it was predicted with.
    """
    from dryfit.step.batches import padded_length, read_rows
    from dryfit.step.packing import common_prefix
    from scripts.training.loop import planned_steps, refuse_more_batches

    rows = read_rows(train)
    prefix = common_prefix(rows) if scenario.packing == "shared_prefix" else 0
    parts = scenario.parallel.parts_of_a_row

    def shape(packs: Sequence[Any]) -> tuple[int, int]:
        lengths = (prefix + sum(len(row.input_ids) - prefix for row in pack) for pack in packs)
        return len(packs), padded_length(lengths, parts)

    shapes = [
        [[shape(packs) for packs in share] for share in shares]
        for shares in planned_steps(rows, scenario, dict(loop), loop["seed"], prefix)
    ]
    refuse_more_batches(max(len(share) for shares in shapes for share in shares), scenario, loop)
    return shapes


def longest_batch(shapes: Shapes, scenario: Scenario) -> Scenario:
    """The step at the longest micro-batch of the whole training: as many rows or packs, as many tokens."""
    counts, lengths = zip(
        *(shape for shares in shapes for share in shares for shape in share), strict=True
    )
    return replace(scenario, micro_batch=max(counts), sequence_length=max(lengths))


def training_seconds(
    shapes: Shapes,
    scenario: Scenario,
    speed: Speed,
    target: str = "cuda",
    capability: tuple[int, int] | None = None,
) -> float:
    """Seconds of all steps of a training. A step ends when the GPU with the most to do has done it."""
    from numpy import interp

    from dryfit.tracing.trace import trace

    by_tokens = {
        rows * tokens: (rows, tokens)
        for shares in shapes
        for share in shares
        for rows, tokens in share
    }
    sizes = sorted(by_tokens)
    known, update = {}, 0.0
    for size in {sizes[0], sizes[len(sizes) // 2], sizes[-1]}:
        rows, tokens = by_tokens[size]
        step = replace(scenario, micro_batch=rows, sequence_length=tokens)
        time = trace(step, target, capability=capability, timeline=False, timed_on={"": speed})[
            "times"
        ][""]
        known[size] = time["seconds_per_micro_batch"]
        if size == sizes[-1]:
            update = time["seconds_per_step"] - scenario.gradient_accumulation * known[size]
    points = sorted(known)
    seconds = dict(
        zip(sizes, interp(sizes, points, [known[size] for size in points]).tolist(), strict=True)
    )
    return sum(
        max(sum(seconds[rows * tokens] for rows, tokens in share) for share in shares)
        + max(update, 0.0)
        for shares in shapes
    )


def evaluation_seconds(stages: Sequence[Stage]) -> float | None:
    """Of all evaluations of a run; None where one is not known."""
    seconds = [
        stage.seconds_at_most
        for stage in stages
        if stage.stage.startswith("evaluation") and stage.place != "disk"
    ]
    return None if not seconds or None in seconds else sum(seconds)
