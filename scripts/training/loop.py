"""The loop of a training: which rows meet in a step, the steps themselves, the validations between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.terminal import log
from dryfit.scenario.scenario import Scenario, rows_in_a_step
from scripts.training.averaging import AVERAGED, WeightAverage, first_averaged_step
from scripts.training.loop_state import LoopState, copied, put_back
from scripts.training.schedules import learning_rate_at
from scripts.training.validation import ValidationHistory, ValidationRows, is_due, validation_loss

if TYPE_CHECKING:
    from dryfit.step.batches import Row


def plan_steps(
    rows: int, rows_per_step: int, epochs: int, max_steps: int | None
) -> tuple[int, int]:
    """Optimizer steps in an epoch, and in the whole run."""
    per_epoch = math.ceil(rows / rows_per_step)
    total = per_epoch * epochs
    return per_epoch, total if max_steps is None else min(total, max_steps)


def planned_steps(
    rows: list[Row], scenario: Scenario, loop: dict, seed: int, prefix: int
) -> Iterator[list[list]]:
    """For each step of a run, in order, the micro-batches of each share of its rows.

    :func:`dryfit.step.packing.micro_batches` makes them. A GPU's share is :meth:`Parallel.rows_of`; those of a
    tensor or context group take the same one. A step's rows are dealt out like cards: rows of like length lie beside
    each other, so that all shares have as much to do.
    """
    from dryfit.step.batches import epoch_batches
    from dryfit.step.packing import micro_batches

    count, number = rows_in_a_step(scenario, loop), scenario.parallel.rows_at_once
    per_epoch, total = plan_steps(len(rows), count, loop["epochs"], loop["max_steps"])
    steps: list[list[Row]] = []
    for step in range(total):
        if step % per_epoch == 0:
            steps = epoch_batches(
                rows, count, seed, step // per_epoch, by_length=scenario.packing == "none"
            )
        dealt = [steps[step % per_epoch][share::number] for share in range(number)]
        yield [micro_batches(share, scenario, prefix) if share else [] for share in dealt]


def check_rows(
    rows: list[Row], held_out: list[Row], scenario: Scenario, loop: dict, seed: int, prefix: int
) -> None:
    """Refuse, before the first step, what would go wrong later.

    UserError: Without rows, or with one that teaches nothing; or when a step's rows need more packs than were gated.
    """
    from dryfit.step.batches import answer_tokens

    for name, split in (("train", rows), ("validation", held_out)):
        if not split:
            raise UserError(
                f"The {name} split has no rows.",
                where="dataset.split in the configuration",
                allowed="a larger dataset, or a larger share for this split",
                write=f"dataset:\n  split: {{{name}: 0.2, ...}}",
            )
        if silent := sum(not answer_tokens([row]) for row in split):
            raise UserError(
                f"{silent} rows of the {name} split have no token to learn.",
                where="training",
                allowed="rows with an answer; encode_dataset makes no others",
            )
    most = max(
        len(micros)
        for shares in planned_steps(rows, scenario, loop, seed, prefix)
        for micros in shares
    )
    refuse_more_batches(most, scenario, loop)


def refuse_more_batches(most: int, scenario: Scenario, loop: Mapping[str, Any]) -> None:
    """Refuse packed rows of a step that need more micro-batches than the step was predicted with.

    UserError: if ``most``, the micro-batches of the longest step, is more than ``gradient_accumulation``.
    """
    if scenario.packing != "none" and most > scenario.gradient_accumulation:
        raise UserError(
            f"A step's rows need {most} micro-batches, but gradient_accumulation allows"
            f" {scenario.gradient_accumulation}.",
            where="training",
            found=f"gradient_accumulation: {scenario.gradient_accumulation}, rows_per_step: {loop['rows_per_step']}",
            allowed="more micro-batches, longer packs (sequence_length), or fewer rows in a step",
            write=f"gradient_accumulation: {most}",
        )


class Fitted(NamedTuple):
    """What a loop leaves behind."""

    curve: list[dict]  # a row for each step
    start: int  # the step that it was resumed from
    seconds: float  # that all steps took, validations included
    progress: ValidationHistory  # of the validations
    stopped_early: bool


class _Messages:
    """Says every few seconds how far a training is."""

    def __init__(self, start: int, total: int) -> None:
        self._start, self._total, self._tokens = start, total, 0
        self._begun = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the loop began, in this process."""
        return time.monotonic() - self._begun

    def step(self, row: Mapping[str, Any], *, last: bool) -> None:
        """Count a step by its row of the curve; say it where the last message is some time ago."""
        self._tokens += row["tokens"]  # of the rows, as the card counts them
        now = time.monotonic()
        if now - self._last < 5 and not last:
            return
        self._last, seconds = now, now - self._begun
        log.info(
            "step %d of %d  loss %.3f  %.0f tokens/s  %.0f s left",
            row["step"],
            self._total,
            row["loss"],
            self._tokens / seconds,
            (self._total - row["step"]) * seconds / (row["step"] - self._start),
        )


@dataclass
class Fit:
    """The steps of a training, to be taken by :meth:`run`."""

    model: Any
    optimizer: Any
    rows: list[Row]
    scenario: Scenario
    loop: Mapping[str, Any]
    seed: int
    pad_token_id: int
    checkpoint: LoopState
    prefix: int = 0  # how many tokens rows share in a pack
    predicted: Mapping[str, Any] | None = (
        None  # the gate's report, whose figures explain an out-of-memory error
    )
    held_out: ValidationRows | None = None  # None: no validation
    # The micro-batch after the device could not hold a larger one; None: the scenario's
    half: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        import torch

        self.device, self.group = next(self.model.parameters()).device, self.checkpoint.group
        # fp16 gradients under autocast underflow without a scale; bf16 has fp32's range.
        needs_scale = self.scenario.autocast_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type) if needs_scale else None

    def run(
        self, report: Callable[[int, Mapping[str, Any]], None] = lambda step, figures: None
    ) -> Fitted:
        """Take the steps, from the last checkpoint on; ``report`` is told each step's row of the curve.

        Afterwards the model is the one to keep: with ``keep: best`` that of the best validation, with
        ``keep: averaged`` the mean of the last steps, which the last validation is about.
        """
        loop = self.loop
        per_step = rows_in_a_step(self.scenario, loop)
        _, total = plan_steps(len(self.rows), per_step, loop["epochs"], loop["max_steps"])
        resumed = self.checkpoint.load(self.model, self.optimizer, self.scaler)
        start, curve, progress = (
            resumed.step,
            [*resumed.curve],
            ValidationHistory(**resumed.progress),
        )
        if start:
            log.info("Resuming from the checkpoint after step %d", start)
        average = WeightAverage(**resumed.average)
        messages = _Messages(start, total)
        for step, shares in enumerate(
            planned_steps(self.rows, self.scenario, loop, self.seed, self.prefix)
        ):
            if progress.is_over(loop):
                break
            if step < start:
                continue
            row = self._step(step, total, shares)
            self._average(step + 1, total, average)
            if self.held_out is not None and is_due(step + 1, total, loop):
                row["validation_loss"] = self._validate(step + 1, progress)
            curve.append(row)
            report(step + 1, row)
            last = step + 1 == total or progress.is_over(loop)
            if last or (step + 1) % loop["save_every_steps"] == 0:
                self.checkpoint.save(
                    step + 1,
                    self.model,
                    self.optimizer,
                    curve,
                    resumed.seconds + messages.seconds,
                    self.scaler,
                    progress,
                    average.to_mapping(),
                )
            messages.step(row, last=last)
        if progress.best_tensors and progress.best_step != len(curve):
            log.info("keeping the adapter of step %d", progress.best_step)
            put_back(self.model, progress.best_tensors)
        return Fitted(
            curve, start, resumed.seconds + messages.seconds, progress, len(curve) < total
        )

    def _step(self, step: int, total: int, shares: list[list]) -> dict[str, Any]:
        """One optimizer step; returns its row of the curve."""
        from dryfit.step.optimizers import set_learning_rate

        rate = learning_rate_at(step, total, self.loop)
        set_learning_rate(self.optimizer, rate)
        own_loss, own_tokens = self._gradients(step, shares)
        sums = self.group.sums(own_loss, own_tokens)
        loss, computed = (value / self.scenario.parallel.tensor for value in sums)
        if not math.isfinite(loss):  # before it can spoil the weights
            raise not_finite("loss", loss, step, self.checkpoint)
        norm = self._update(step)
        return {
            **self._tokens(shares, int(computed)),
            "gradient_norm": norm,
            "learning_rate": rate,
            "loss": loss,
            "micro_batch": self.half or self.scenario.micro_batch,
            "step": step + 1,
        }

    def _average(self, step: int, total: int, average: WeightAverage) -> None:
        """With ``keep: averaged``: note the weights of one of the last steps; after the last one keep their mean."""
        if self.loop["keep"] != AVERAGED or step < first_averaged_step(total, self.loop):
            return
        average.add(self.model)
        if step == total:
            average.put_into(self.model)
            log.info("keeping the mean of the adapters after the last %d steps", average.steps)

    def _validate(self, step: int, progress: ValidationHistory) -> float:
        """The validation loss after a step, noted in ``progress``."""
        import torch

        began, scenario = time.monotonic(), self.scenario
        if self.half:
            scenario = replace(scenario, micro_batch=self.half)
        try:
            loss = validation_loss(self.model, self.held_out, scenario, self.group)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, self.scenario, self.predicted) from None
        if not math.isfinite(loss):
            raise not_finite("validation loss", loss, step - 1, self.checkpoint)
        best = progress.note(step, loss)
        if best and self.loop["keep"] == "best":
            progress.best_tensors = copied(self.model)
        progress.seconds += time.monotonic() - began
        log.info(
            "step %d: validation loss %.4f over %d rows%s",
            step,
            loss,
            len(self.held_out.rows),
            "" if best else f", the best was {progress.best_loss:.4f} at step {progress.best_step}",
        )
        if progress.is_over(self.loop):
            log.info(
                "%d validations in a row were no better: the training stops early",
                progress.since_best,
            )
        return loss

    def _gradients(self, step: int, shares: list[list]) -> tuple[float, int]:
        """Forward and backward passes of a step: this process's part of the loss, and the tokens that it computed.

        With ``on_out_of_memory: halve`` a step that the device can't hold is taken again, and the later ones are taken,
        in micro-batches of half the size: as many rows, the same gradient.
        """
        import torch

        micros, rounds = (
            shares[self.scenario.parallel.rows_of(self.group.rank)],
            max(map(len, shares)),
        )
        batch = _rows(shares)
        while True:
            if self.half:  # what was found too large for the device is not tried again
                micros = _split(micros, self.half)
                rounds = len(micros)
            try:
                return self._accumulate(batch, micros, rounds)
            except torch.OutOfMemoryError as error:
                largest = max(map(len, micros))
                if self.loop.get("on_out_of_memory") != "halve" or largest == 1:
                    raise _out_of_memory(error, self.scenario, self.predicted) from None
                # The same rows, so the same step: no weight has changed yet.
                self.half = largest // 2
                log.warning(
                    "Out of memory at step %d: micro-batches of %d from here on, as many rows",
                    step + 1,
                    self.half,
                )
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def _accumulate(self, batch: list[Row], micros: list, rounds: int) -> tuple[float, int]:
        """Forward and backward over a step's micro-batches.

        In as many rounds as the GPU takes that has most, since they meet in each: one that has no more rows takes one
        that counts for nothing.
        """
        import torch

        from dryfit.step.batches import answer_tokens
        from dryfit.step.packing import collate_packs
        from dryfit.step.parallel import bare, exchanging
        from dryfit.step.step import divided_rows, forward_backward

        model, scaler = self.model, self.scaler
        learned, loss, computed = answer_tokens(batch), 0.0, 0
        for number in range(rounds):
            own = number < len(micros)
            packs = micros[number] if own else [[min(batch, key=lambda row: len(row.input_ids))]]
            # Each micro-batch counts by its answer tokens: accumulation gives the gradient of the whole batch.
            answers = answer_tokens([row for pack in packs for row in pack])
            share = answers / learned if own else 0.0
            weight = (
                share * self.scenario.parallel.averaged
            )  # DDP and FSDP take the mean of the GPUs' gradients
            scale = (
                weight if scaler is None else scaler.scale(torch.tensor(weight, device=self.device))
            )
            config = bare(model).config
            tensors = collate_packs(
                packs, self.scenario, self.prefix, self.pad_token_id, config, self.device
            )
            last = number == rounds - 1
            with exchanging(model, last=last), divided_rows(model, tensors, self.scenario, answers):
                loss += share * float(
                    forward_backward(model, tensors, self.scenario, loss_scale=scale)
                )
            computed += tensors["input_ids"].numel()
        return loss, computed

    def _update(self, step: int) -> float | None:
        """The optimizer's step; returns the gradients' norm, None for a step that the scaler leaves out."""
        from dryfit.step.step import optimizer_step

        settings = {"max_grad_norm": self.loop["max_grad_norm"], "scaler": self.scaler}
        norm = float(optimizer_step(self.model, self.optimizer, self.scenario, **settings))
        if math.isfinite(norm):
            return norm
        if self.scaler is None:
            raise not_finite("gradients' norm", norm, step, self.checkpoint)
        return None

    def _tokens(self, shares: list[list], computed: int) -> dict[str, int]:
        from dryfit.step.batches import answer_tokens

        batch = _rows(shares)
        tokens = sum(len(row.input_ids) for row in batch)
        packs = sum(len(packs) for micros in shares for packs in micros)
        saved = self.prefix * (len(batch) - packs)  # prefixes that were not computed again
        return {
            "answer_tokens": answer_tokens(batch),
            "computed_tokens": computed,
            "padding_tokens": computed - tokens + saved,
            "rows": len(batch),
            "shared_tokens": saved,
            "tokens": tokens,
        }


def _rows(shares: list[list]) -> list[Row]:
    """All rows of a step, those of every GPU."""
    return [row for micros in shares for packs in micros for pack in packs for row in pack]


def _split(micros: list, size: int) -> list:
    """The same packs in micro-batches of at most ``size``."""
    return [packs[first : first + size] for packs in micros for first in range(0, len(packs), size)]


def _out_of_memory(
    error: Exception, scenario: Scenario, predicted: Mapping[str, Any] | None
) -> UserError:
    """The allocator's figures beside the trace's, and what to change."""
    import torch

    lines = [str(error).splitlines()[0]]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        lines.append(
            f"the allocator had {torch.cuda.max_memory_allocated()} bytes in use and {torch.cuda.max_memory_reserved()}"
            f" reserved at most; {free} of the device's {total} are free, the rest is this process's and others'"
        )
    if predicted:
        lines.append(
            f"the trace said {predicted['peak_allocated_bytes']} in use, and a device with"
            f" {predicted['required_bytes']} free"
        )
    half, twice = scenario.micro_batch // 2, scenario.gradient_accumulation * 2
    smaller = (
        f"micro_batch: {half}\n  gradient_accumulation: {twice}"
        if half
        else "gradient_checkpointing: true"
    )
    return UserError(
        "The training step does not fit the device's memory.",
        where="training; `nvidia-smi` names the other processes on the device",
        found="; ".join(lines),
        allowed="a smaller micro-batch (on_out_of_memory: halve does it by itself), or what `python -m"
        " dryfit.ask.predict` says fits; with more required than allocated, allocator.expandable_segments",
        write=f"training:\n  {smaller}",
    )


def not_finite(what: str, value: float, step: int, checkpoint: LoopState) -> UserError:
    kept = (
        f"; the state before it is kept in {checkpoint.folder}"
        if checkpoint.folder.is_dir()
        else ""
    )
    return UserError(
        f"The {what} is {value} at step {step + 1}{kept}.",
        where="training",
        allowed="a smaller learning_rate, or another precision (fp16 overflows where bf16 does not)",
        write="learning_rate: 2.0e-4",
    )


def token_shares(curve: list[dict], prefix: int) -> dict[str, dict[str, float]]:
    """What the computed tokens were: ``count`` and ``share`` of answers, requests, prefix and padding.

    ``prefix`` is the number of tokens that all rows begin with, computed once for each row or, shared, for each pack.
    """
    total = {
        key: sum(row[key] for row in curve)
        for key in curve[0]
        if key.endswith("tokens") or key == "rows"
    }
    counts = {
        "answers": total["answer_tokens"],
        "padding": total["padding_tokens"],
        "prefix": prefix * total["rows"] - total["shared_tokens"],
    }
    counts["requests"] = total["computed_tokens"] - sum(counts.values())
    return {
        kind: {"count": count, "share": count / total["computed_tokens"]}
        for kind, count in counts.items()
    }
