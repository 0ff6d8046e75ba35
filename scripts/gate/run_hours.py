"""How long a run takes on its card: the training by the lengths that its batches really have, and its evaluations.

A batch's time depends on its tokens. Of the batches' shapes the smallest, the middle and the largest are traced; the
others lie between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scripts.common.errors import UserError
from scripts.common.resource_table import Stage
from scripts.memory.step_time import Speed
from scripts.settings.scenario import Scenario

# For each step of a training and each GPU: rows (or packs) and tokens of the longest, of each micro-batch.
Shapes = Sequence[Sequence[Sequence[tuple[int, int]]]]
NOT_COUNTED = "fetching, loading, saving, merging"


@dataclass(frozen=True)
class RunHours:
    """How long a run takes.

    Attributes
    ----------
    training_seconds
        Of all steps.
    evaluation_seconds
        At most, as if each answer went to the last token; None: not known.
    hours, hours_range
        Of both; the range as far as steps of the card's kind were off, None where none was measured.
    basis
        Where the card's constants come from, in words.
    kwh_at_most
        As if the boards took all that they can, all the time; None where their power is not known.
    """

    steps: int
    training_seconds: float
    evaluation_seconds: float | None
    hours: float
    hours_range: tuple[float, float] | None
    basis: str
    not_counted: str
    kwh_at_most: float | None

    @classmethod
    def of(cls, steps: int, training: float, evaluation: float | None, speed: Speed, gpus: int) -> RunHours:
        """From the seconds of its parts; training takes so many GPUs, evaluation one."""
        hours, error = (training + (evaluation or 0.0)) / 3600, speed.error
        ends = None if error is None else (hours * (1 - error), hours * (1 + error))
        left_out = NOT_COUNTED if evaluation is not None else f"evaluation, {NOT_COUNTED}"
        watts = speed.board_watts
        kwh = (gpus * training + (evaluation or 0.0)) * watts / 3.6e6 if watts else None
        return cls(steps, training, evaluation, hours, ends, speed.basis, left_out, kwh)

    def to_mapping(self) -> dict[str, Any]:
        return {**asdict(self), "line": self.line}

    @property
    def line(self) -> str:
        """For a terminal."""
        between = f" ({spoken(self.hours_range[0])} to {spoken(self.hours_range[1])})" if self.hours_range else ""
        evaluation = self.evaluation_seconds
        parts = f"{self.steps:,} training steps in {spoken(self.training_seconds / 3600)}"
        if evaluation is not None:
            parts += f", evaluation in at most {spoken(evaluation / 3600)}"
        guess = "" if self.hours_range else "; nothing was measured on this card, so don't plan by it"
        return f"takes {spoken(self.hours)}{between}: {parts}; not counted: {self.not_counted}{guess}"


def spoken(hours: float) -> str:
    """Hours for people."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"


def batch_shapes(train: str, scenario: Scenario, loop: Mapping[str, Any]) -> Shapes:
    """The shapes of the micro-batches of a whole training, from its encoded rows.

    Parameters
    ----------
    train
        The encoded training split.
    loop
        ``rows_per_step``, ``epochs``, ``max_steps`` and ``seed``, which decide which rows meet.
    """
    from scripts.training.batches import read_rows
    from scripts.training.loop import planned_steps
    from scripts.training.packing import common_prefix

    rows = read_rows(train)
    prefix = common_prefix(rows) if scenario.packing == "shared_prefix" else 0

    def shape(packs: Sequence[Any]) -> tuple[int, int]:
        return len(packs), max(prefix + sum(len(row.input_ids) - prefix for row in pack) for pack in packs)

    return [
        [[shape(packs) for packs in share] for share in shares]
        for shares in planned_steps(rows, scenario, dict(loop), loop["seed"], prefix)
    ]


def training_seconds(
    shapes: Shapes, scenario: Scenario, speed: Speed, target: str = "cuda", capability: tuple[int, int] | None = None
) -> float:
    """Seconds of all steps of a training. A step ends when the GPU with the most to do has done it."""
    from numpy import interp

    from scripts.memory.trace import trace

    by_tokens = {rows * tokens: (rows, tokens) for shares in shapes for share in shares for rows, tokens in share}
    sizes = sorted(by_tokens)
    known, update = {}, 0.0
    for size in {sizes[0], sizes[len(sizes) // 2], sizes[-1]}:
        rows, tokens = by_tokens[size]
        step = replace(scenario, micro_batch=rows, sequence_length=tokens)
        found = trace(step, target, capability=capability, timeline=False, timed_on={"": speed})["times"][""]
        known[size] = found["seconds_per_micro_batch"]
        if size == sizes[-1]:
            update = found["seconds_per_step"] - scenario.gradient_accumulation * known[size]
    points = sorted(known)
    seconds = dict(zip(sizes, interp(sizes, points, [known[size] for size in points]).tolist(), strict=True))
    return sum(
        max(sum(seconds[rows * tokens] for rows, tokens in share) for share in shares) + max(update, 0.0)
        for shares in shapes
    )


def too_long(hours: RunHours | None, limit: float | None) -> bool:
    """Whether a run takes longer than ``memory.gate.hours``; False where nobody knows or nobody asks."""
    return hours is not None and limit is not None and hours.hours > limit


def refusal_of_hours(hours: RunHours, limit: float) -> UserError:
    """The message of a run that takes too long."""
    return UserError(
        "This run takes too long: it ends here, before it trains.",
        where="memory.gate.hours",
        found=f"{limit:g} hours; the run {hours.line}",
        allowed="fewer epochs, training.max_steps, another card; or memory.gate.override: true, which the model card"
        " will mention",
        write=f"memory: {{gate: {{hours: {max(1, -(-hours.hours // 1)):g}}}}}",
    )


def evaluation_seconds(stages: Sequence[Stage]) -> float | None:
    """Of all evaluations of a run; None where one is not known."""
    found = [
        stage.seconds_at_most for stage in stages if stage.stage.startswith("evaluation") and stage.place != "disk"
    ]
    return None if not found or None in found else sum(found)
