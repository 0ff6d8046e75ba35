"""The validation of a training: its loss, which step was the best, and whether it is time to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dryfit.scenario.scenario import Scenario
from scripts.training.processes import ALONE, ProcessGroup

if TYPE_CHECKING:
    from dryfit.step.batches import Row


@dataclass(frozen=True)
class ValidationRows:
    """Rows of the validation split, in the micro-batches that the training's step has room for.

    A batch of validation is never larger than one of the training, so its forward pass needs less memory than the
    step that was gated.
    """

    rows: Sequence[Row]
    pad_token_id: int
    prefix: int  # tokens that these rows share in a pack; 0 without ``packing: shared_prefix``

    @classmethod
    def of(cls, rows: Sequence[Row], scenario: Scenario, pad_token_id: int) -> ValidationRows:
        """Rows with what they begin with in common, which need not be what the training rows begin with."""
        from dryfit.step.packing import common_prefix

        shared = common_prefix(rows) if scenario.packing == "shared_prefix" else 0
        return cls(rows, pad_token_id, shared)

    def batches(self, scenario: Scenario) -> list[list]:
        """All rows once, as micro-batches of packs; a row of its own is a pack, too."""
        from dryfit.step.batches import epoch_batches
        from dryfit.step.packing import micro_batches

        if scenario.packing != "none":
            return micro_batches(self.rows, scenario, self.prefix)
        batches = epoch_batches(self.rows, scenario.micro_batch, seed=0, epoch=0)
        return [[[row] for row in batch] for batch in batches]


def validation_loss(
    model: Any,
    held_out: ValidationRows,
    scenario: Scenario,
    group: ProcessGroup = ALONE,
) -> float:
    """Mean negative log-likelihood of an answer token over the rows, in nats.

    Each process takes its share of the batches. A divided model has its weights only in a forward pass that all
    processes run at once, so a process without a batch computes another's, for nothing.
    """
    from dryfit.step.batches import answer_tokens
    from dryfit.step.packing import collate_packs
    from dryfit.step.parallel import bare
    from dryfit.step.step import divided_rows, evaluating, forward_loss

    device, total, tokens = next(model.parameters()).device, 0.0, 0.0
    parallel = scenario.parallel
    shares, share = parallel.rows_at_once, parallel.rows_of(group.rank)
    batches = held_out.batches(scenario)
    config = bare(model).config
    with evaluating(model):
        for first in range(0, len(batches), shares):
            own = first + share < len(batches)
            packs = batches[first + share if own else first]
            learned = answer_tokens([row for pack in packs for row in pack])
            tensors = collate_packs(
                packs, scenario, held_out.prefix, held_out.pad_token_id, config, device
            )
            with divided_rows(model, tensors, scenario, learned):
                loss = float(forward_loss(model, tensors, scenario))
            if own:
                total += loss * learned
                tokens += learned
    total, tokens = group.sums(total, tokens)
    # The losses of those that share a row's tokens add up to its own.
    return total * parallel.context / tokens


@dataclass
class ValidationHistory:
    """What a training knows of its validations so far. A checkpoint keeps it.

    Attributes
    ----------
    best_step, best_loss
        The validation with the lowest loss, the earliest of equal ones; None before the first.
    best_tensors
        The trained tensors of that step by name, on the CPU; empty unless ``keep`` is ``best``.
    since_best
        Validations since then.
    seconds
        That all validations took.
    """

    best_step: int | None = None
    best_loss: float | None = None
    best_tensors: dict[str, Any] = field(default_factory=dict)
    since_best: int = 0
    seconds: float = 0.0

    def note(self, step: int, loss: float) -> bool:
        """Take a validation up; returns whether it is the best so far."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss, self.since_best = step, loss, 0
            return True
        self.since_best += 1
        return False

    def is_over(self, loop: Mapping[str, Any]) -> bool:
        """Whether so many validations in a row were no better that the training stops."""
        patience = loop["early_stopping_patience"]
        return patience is not None and self.since_best >= patience

    def to_mapping(self) -> dict[str, Any]:
        """For a checkpoint."""
        return vars(self).copy()


def is_due(step: int, total: int, loop: Mapping[str, Any]) -> bool:
    """Whether a validation follows a step, which counts from 1. The last step always has one."""
    every = loop["validate_every_steps"]
    return step == total or (every is not None and step % every == 0)
