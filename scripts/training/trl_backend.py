"""``training.backend: trl``: TRL's SFTTrainer takes the steps, in place of :mod:`scripts.training.loop`.

It gets the model, the optimizer, the rows of each step and the learning rate that the project's own loop would have.
What is TRL's own is the step (loss, accumulation, mixed precision, clipping) and the checkpoint. The validation, the
best adapter and early stopping are the project's, between two steps.

TRL's loop ends each epoch with the step of fewer rows, where there is one; the project's own has it anywhere.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from dryfit.common.files import read_json, write_json
from dryfit.common.terminal import log
from dryfit.scenario.scenario import rows_in_a_step
from scripts.common.tokenizer import read_tokenizer
from scripts.training.loop import Fit, Fitted, not_finite, plan_steps, planned_steps
from scripts.training.loop_state import put_back
from scripts.training.schedules import learning_rate_at
from scripts.training.validation import ValidationHistory, is_due

Report = Callable[[int, Mapping[str, Any]], None]
CURVE, PROGRESS = "curve.json", "progress.pt"  # of the project, in TRL's checkpoint


@dataclass
class TrlFit(Fit):
    """The steps of a training, taken by TRL's SFTTrainer. ``base``: the folder of the model, with its tokenizer."""

    base: Path = field(default=Path(), kw_only=True)

    def run(self, report: Report = lambda step, figures: None) -> Fitted:
        """Take the steps, from TRL's last checkpoint on; ``report`` is told each step's row of the curve.

        Afterwards the model is the one to keep: with ``keep: best`` that of the best validation.
        """
        for library in ("accelerate", "transformers", "trl"):
            logging.getLogger(library).setLevel(logging.ERROR)
        epochs = self._epochs()
        curve = _Curve(self, [step for epoch in epochs for step in epoch], report)
        resumed = _last_checkpoint(self.checkpoint.folder)
        if resumed is not None:
            curve.take_up(resumed)
            log.info("Resuming from TRL's checkpoint after step %d", curve.start)
        trainer = self._trainer(epochs, curve)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed is not None else None)
        # Without TRL's and accelerate's wrappers around its forward pass.
        trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        progress = curve.progress
        if progress.best_tensors and progress.best_step != len(curve.rows):
            log.info("keeping the adapter of step %d", progress.best_step)
            put_back(self.model, progress.best_tensors)
        stopped_early = len(curve.rows) < curve.total
        return Fitted(curve.rows, curve.start, curve.seconds, progress, stopped_early)

    def validate(self, step: int, progress: ValidationHistory) -> float:
        """The validation loss after a step, noted in ``progress``."""
        return self._validate(step, progress)

    def _epochs(self) -> list[list[list]]:
        """The rows of each step, epoch by epoch; the step of fewer rows last, since TRL counts whole ones before it."""
        per_step = rows_in_a_step(self.scenario, self.loop)
        whole = {**self.loop, "max_steps": None}  # TRL ends within an epoch by itself
        per_epoch, total = plan_steps(len(self.rows), per_step, self.loop["epochs"], None)
        steps = []
        for (micros,) in planned_steps(self.rows, self.scenario, whole, self.seed, prefix=0):
            steps.append([row for packs in micros for pack in packs for row in pack])
        epochs = [steps[first : first + per_epoch] for first in range(0, total, per_epoch)]
        return [sorted(epoch, key=lambda step: len(step) < per_step) for epoch in epochs]

    def _trainer(self, epochs: list[list[list]], curve: _Curve) -> Any:
        """TRL's trainer over the project's model, optimizer and rows."""
        from torch.optim.lr_scheduler import LambdaLR
        from transformers import PrinterCallback, ProgressCallback
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        datasets = import_module("datasets")  # TRL brings it
        datasets.disable_progress_bars()
        places = {id(row): place for place, row in enumerate(self.rows)}
        orders = [[places[id(row)] for step in epoch for row in step] for epoch in epochs]
        columns = {
            "input_ids": [row.input_ids for row in self.rows],
            "labels": [row.labels for row in self.rows],
        }

        def share_of_peak(step: int) -> float:
            # The scheduler asks for the rate behind the last step, too.
            step = min(step, curve.total - 1)
            return learning_rate_at(step, curve.total, self.loop) / self.loop["learning_rate"]

        trainer = _in_order(orders, len(epochs[0]), curve)(
            model=self.model,
            args=self._arguments(curve.total),
            train_dataset=datasets.Dataset.from_dict(columns),
            data_collator=DataCollatorForLanguageModeling(self.pad_token_id),
            processing_class=read_tokenizer(self.base),
            optimizers=(self.optimizer, LambdaLR(self.optimizer, share_of_peak)),
            callbacks=[_callback(curve)],
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        return trainer

    def _arguments(self, total: int) -> Any:
        """TRL's settings: those of the step, and none that would prepare rows, pack them or change the model."""
        from trl import SFTConfig

        scenario, loop = self.scenario, self.loop
        return SFTConfig(
            output_dir=str(self.checkpoint.folder),
            per_device_train_batch_size=scenario.micro_batch,
            gradient_accumulation_steps=scenario.gradient_accumulation,
            num_train_epochs=loop["epochs"],
            max_steps=total,
            max_grad_norm=loop["max_grad_norm"],
            bf16=scenario.autocast_precision == "bf16",
            fp16=scenario.autocast_precision == "fp16",
            gradient_checkpointing=False,  # the model was built with it, where it is asked for
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=False,
            seed=self.seed,
            use_cpu=self.device.type == "cpu",
            save_strategy="steps",
            save_steps=loop["save_every_steps"],
            save_total_limit=1,
            logging_strategy="steps",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )


class _Curve:
    """The row of each step, and the validations between them."""

    def __init__(self, fit: TrlFit, steps: list[list], report: Report) -> None:
        per_step = rows_in_a_step(fit.scenario, fit.loop)
        _, self.total = plan_steps(
            len(fit.rows), per_step, fit.loop["epochs"], fit.loop["max_steps"]
        )
        self.fit, self.steps, self.report = fit, steps, report
        self.rows: list[dict[str, Any]] = []
        self.start, self.progress = 0, ValidationHistory()
        self._before, self._begun = 0.0, time.monotonic()
        self.loss, self.computed = 0.0, 0  # of the step that is being taken

    @property
    def seconds(self) -> float:
        """That all steps took, those before a checkpoint included."""
        return self._before + time.monotonic() - self._begun

    def add(self, norm: float | None) -> bool:
        """Note the step that was taken; returns whether the training is over."""
        from dryfit.step.batches import answer_tokens

        step, rows, fit = len(self.rows), self.steps[len(self.rows)], self.fit
        if not math.isfinite(self.loss):
            raise not_finite("loss", self.loss, step, fit.checkpoint)
        tokens = sum(len(row.input_ids) for row in rows)
        row = {
            "answer_tokens": answer_tokens(rows),
            "computed_tokens": self.computed,
            "gradient_norm": norm if norm is not None and math.isfinite(norm) else None,
            "learning_rate": learning_rate_at(step, self.total, fit.loop),
            "loss": self.loss,
            "micro_batch": fit.scenario.micro_batch,
            "padding_tokens": self.computed - tokens,
            "rows": len(rows),
            "shared_tokens": 0,
            "step": step + 1,
            "tokens": tokens,
        }
        self.loss, self.computed = 0.0, 0
        if fit.held_out is not None and is_due(step + 1, self.total, fit.loop):
            row["validation_loss"] = fit.validate(step + 1, self.progress)
        self.rows.append(row)
        self.report(step + 1, row)
        log.info("step %d of %d  loss %.3f", step + 1, self.total, row["loss"])
        return self.progress.is_over(fit.loop)

    def keep(self, folder: Path) -> None:
        """Write what TRL's checkpoint lacks into it."""
        import torch

        torch.save(self.progress.to_mapping(), folder / PROGRESS)
        # Last: a checkpoint without it is not whole.
        write_json(folder / CURVE, {"rows": self.rows, "seconds": self.seconds})

    def take_up(self, folder: Path) -> None:
        """Go on behind a checkpoint's last step."""
        import torch

        kept = read_json(folder / CURVE)
        self.rows, self._before = list(kept["rows"]), kept["seconds"]
        self.start = len(self.rows)
        saved = torch.load(folder / PROGRESS, map_location="cpu", weights_only=True)
        self.progress = ValidationHistory(**saved)


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of TRL's in a folder; None without one."""
    found = [path for path in folder.glob("checkpoint-*") if (path / CURVE).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _in_order(orders: list[list[int]], steps_per_epoch: int, curve: _Curve) -> type:
    """TRL's trainer, which takes each epoch's rows in the order that is given, and tells each micro-batch's loss."""
    from torch.utils.data import Sampler
    from trl import SFTTrainer

    class InOrder(Sampler):
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def __len__(self) -> int:
            return len(orders[0])

        def __iter__(self) -> Iterator[int]:
            epoch = self.trainer.state.global_step // steps_per_epoch
            return iter(orders[min(epoch, len(orders) - 1)])

    class InOrderTrainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
            return InOrder(self)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            curve.computed += inputs["input_ids"].numel()
            # Divided by the answer tokens of the whole step, so that the losses of its micro-batches add up.
            loss = super().training_step(model, inputs, *args, **kwargs)
            curve.loss += float(loss)
            return loss

    return InOrderTrainer


def _callback(curve: _Curve) -> Any:
    """Tells the curve of each step, and ends the training when it says so."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any
        ) -> None:
            if "loss" not in logs:  # the summary at the end
                return
            if curve.add(logs.get("grad_norm")):
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            curve.keep(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    return Callback()
