"""A whole ``train()`` of transformers' Trainer, or of one of TRL's trainers, as the step.

``train()`` does more than ``training_step``: it turns checkpointing on, wraps the model, accumulates, clips, steps and
logs. Run on ``meta`` with ``max_steps=2`` its second update is a training step as it will be. Nothing is subclassed:
two properties that name the device say ``meta``.

transformers and accelerate are imported here only when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .errors import TraceError
from .patching import device_lists, patched
from .report import Report
from .trace import Options, measure_step, trace_step

SCALARS = 1.0  # what a trainer reads to log it
# What trainers ask before they go on, and a real batch answers in one way:
ANSWERS = {
    "transformers.generation.stopping_criteria:__call__": False,  # no text ends before the longest that is allowed
    "trl.trainer.dpo_trainer:_compute_loss": True,
    "trl.trainer.grpo_trainer:_generate_single_turn": True,  # every token belongs to its completion
    "trl.trainer.grpo_trainer:_calculate_rewards": False,  # every text has a reward
}


def trace_trainer(
    make: Callable[[], Any],
    options: Options | None = None,
    complete: Callable[[Any, Options], Options] | None = None,
) -> Report:
    """Predict the memory of a trainer's ``train()``.

    Parameters
    ----------
    make
        Makes the trainer, with a model on ``meta`` (``with torch.device("meta"):``); called where the devices are
        exchanged. Its arguments should say ``max_steps=2``: the optimizer's states exist from the first update on.
    options
        As :func:`~will_it_fit.engine.trace.trace_step` has them; ``steps`` is 1, the whole of ``train()``.
    complete
        Called with the trainer and the options: these with what follows from the trainer, such as its history.

    Returns
    -------
    Report
        Phases are over all that ``train()`` does.

    Raises
    ------
    TraceError
        If the trainer evaluates, saves or generates by vLLM in between, besides what a step may raise.
    """
    options = options or Options()
    with _device("meta"):
        with patched(device_lists(options.target)):
            trainer = make()
        _refuse_more_than_training(trainer)
        scalars = SCALARS if options.scalars is None else options.scalars
        answers = {**ANSWERS, **options.answers}
        options = options if complete is None else complete(trainer, options)
        own = replace(options, steps=1, scalars=scalars, answers=answers)
        return trace_step(trainer.model, None, trainer.train, options=own)


def measure_trainer(
    make: Callable[[], Any],
    options: Options | None = None,
    complete: Callable[[Any, Options], Options] | None = None,
) -> Report:
    """Measure on the CPU what :func:`trace_trainer` with ``target="cpu"`` predicts; ``make``'s model holds data."""
    with _device("cpu"):
        trainer = make()
        _refuse_more_than_training(trainer)
        options = options or Options()
        options = options if complete is None else complete(trainer, options)
        return measure_step(trainer.model, None, trainer.train, options=replace(options, steps=1))


@contextmanager
def _device(name: str) -> Iterator[None]:
    """Let trainers that are made here believe that their device is ``name``."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainingArguments

    device = torch.device(name)

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def of_arguments(arguments: Any) -> torch.device:
        arguments._setup_devices  # noqa: B018 - it is made there
        return device

    places = [(TrainingArguments, "device", property(of_arguments))]
    places += [(Accelerator, "device", property(lambda _: device))]
    forget()
    try:
        with patched(places):
            yield
    finally:
        forget()


def _refuse_more_than_training(trainer: Any) -> None:
    arguments = trainer.args
    updates = arguments.max_steps
    if not 0 < updates <= 4:
        raise TraceError(
            f"The trainer's train() would take {'all of its epochs' if updates < 1 else f'{updates} updates'}.",
            "Write max_steps=2 in its arguments: the second update is like all that follow.",
        )
    refused = {
        "eval_strategy": str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no",
        "save_strategy": str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) != "no",
        "use_vllm": bool(getattr(arguments, "use_vllm", False)),
    }
    for name, wrong in refused.items():
        if wrong:
            value = False if name == "use_vllm" else "no"
            raise TraceError(
                f"The trainer does more than train: {name} is {getattr(arguments, name)!r}.",
                f"Write {name}={value!r} in its arguments; evaluation and generation are steps of their own.",
            )
