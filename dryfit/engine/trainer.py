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
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from . import known_values
from .costs import MEMORY, Operator, launch, touched_bytes
from .errors import TraceError
from .patching import device_lists, patched
from .report import Report
from .trace import Options, measure_step, trace_step

MOST_UPDATES = 64
MOST_SCORED = 2**24  # elements of a mask whose values are carried: 128 MiB on the host
SCALARS = 1.0  # what a trainer reads to log it
# What trainers ask before they go on, and a real batch answers in one way:
ANSWERS = {
    "transformers.generation.stopping_criteria:__call__": False,  # no text ends before the longest that is allowed
    "trl.trainer.dpo_trainer:_compute_loss": True,
    "trl.trainer.grpo_trainer:_generate_single_turn": True,  # every token belongs to its completion
    "trl.trainer.grpo_trainer:_generate_and_score_completions": True,  # each has a probability by vLLM
    "trl.trainer.grpo_trainer:_calculate_rewards": False,  # every text has a reward
    "trl.trainer.rloo_trainer:_generate_single_turn": True,
    "trl.trainer.rloo_trainer:_calculate_rewards": False,
    "trl.trainer.distillation_trainer:_generate_single_turn": True,
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
        As :func:`~dryfit.engine.trace.trace_step` has them; ``steps`` is 1, the whole of ``train()``.
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
        # Triton, which PyTorch brings along on Linux alone, decides how TRL computes log-probabilities.
        on_card = options.target == "cuda" and options.platform == "linux"
        with patched(_fused_head() if on_card else []), _cycle(trainer) as phase_of:
            return trace_step(
                trainer.model, None, trainer.train, options=replace(own, phase_of=phase_of)
            )


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
        with _cycle(trainer) as phase_of:
            own = replace(options, steps=1, phase_of=phase_of)
            return measure_step(trainer.model, None, trainer.train, options=own)


# Methods of TRL's trainers that generate, and the phase of what they call. A forward pass without gradients within the
# third is the policy's before the update, or the reference's.
_METHODS = {
    "_generate_single_turn": "generation",
    "_generate": "generation",
    "_calculate_rewards": "rewards",
    "_calculate_rewards_from_functions": "rewards",
}
_LOG_PROBABILITIES = ("_get_per_token_logps_and_entropies", "_forward")
_TEACHER = "_get_last_hidden_state"  # of the teacher where there are no gradients


@contextmanager
def _cycle(trainer: Any) -> Iterator[Callable[[Any], str | None]]:
    """Hear which part of a reinforcement step a module's call belongs to; None: the update's forward pass."""
    inside: list[str] = []
    kind = type(trainer)

    def within(phase: Callable[[tuple], str | None], function: Callable) -> Callable:
        @wraps(function)
        def heard(*args: Any, **kwargs: Any) -> Any:
            name = phase(args)
            if name is None:
                return function(*args, **kwargs)
            inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return heard

    def of_log_probabilities(args: tuple) -> str | None:
        if torch.is_grad_enabled():
            return None
        model = args[1]
        layers = (
            module for module in model.modules() if getattr(module, "_disable_adapters", False)
        )
        frozen = model is getattr(trainer, "ref_model", None) or next(layers, None) is not None
        return "reference_log_probabilities" if frozen else "old_log_probabilities"

    places = [(name, lambda _, phase=phase: phase) for name, phase in _METHODS.items()]
    places += [(name, of_log_probabilities) for name in _LOG_PROBABILITIES]
    places.append((_TEACHER, lambda _: None if torch.is_grad_enabled() else "teacher"))
    known = [
        (kind, name, within(phase, getattr(kind, name)))
        for name, phase in places
        if hasattr(kind, name)
    ]
    with patched(known):
        yield lambda module: inside[-1] if inside else None


def _fused_head() -> list[tuple[Any, str, Any]]:
    """What to exchange so that TRL's fused output head takes the branch of a GPU, whose Triton kernels do nothing here.

    ``trl/kernels/chunked_logprob.py`` asks a tensor's device for it. The kernels work in place, on a tile of logits and
    on numbers a token: they allocate nothing. On other devices TRL takes fp32 copies of each tile, and scores the
    prompt's tokens as well.
    """
    if find_spec("trl") is None or find_spec("trl.kernels") is None:  # TRL before its fused head
        return []
    kernels = import_module("trl.kernels.chunked_logprob")

    class InPlace:
        """A kernel that is launched over a grid, and allocates nothing; it reads its first tensor, or writes it too."""

        def __init__(self, name: str, passes: int) -> None:
            self._name, self._passes = name, passes

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launched(tile: torch.Tensor, *args: Any, **kwargs: Any) -> None:
                launch(Operator(self._name, MEMORY, "", 0, self._passes * touched_bytes((tile,))))

            return launched

    def add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """``into += left @ right``, where cuBLAS adds products of 16-bit numbers to fp32 without a copy of them."""
        if left.dtype in (torch.float16, torch.bfloat16):
            torch.addmm(into, left, right, out_dtype=torch.float32, out=into)
        else:
            into.addmm_(left, right)

    passes = {"_forward_kernel": 1, "_backward_kernel": 2}
    places = [(kernels, name, InPlace(name, count)) for name, count in passes.items()]
    places += [(kernels, "triton", SimpleNamespace(cdiv=lambda count, size: -(-count // size)))]
    places += [(kernels, "_addmm_fp32", add_product)]
    # Which tokens are scored decides shapes, of batches of any size.
    places += [(known_values, "LIMIT", MOST_SCORED)]
    users = (
        kernels,
        *map(import_module, ("trl.trainer.utils", "trl.trainer.distillation_trainer")),
    )
    return places + [(module, "_use_triton", lambda device: True) for module in users]


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
    places += [
        (Accelerator, "device", property(lambda _: device)),
        (Accelerator, "__init__", _halves(Accelerator)),
    ]
    forget()
    try:
        with patched(places):
            yield
    finally:
        forget()


def _halves(kind: type) -> Callable[..., None]:
    """``Accelerator.__init__``, which refuses fp16 on a device that it doesn't know, such as ``meta``.

    So it is made for bf16, which it takes on any device, and set to fp16 afterwards. Its gradient scaler is off: it
    holds two scalars, and the update unscales gradients in place.
    """
    original = kind.__init__

    @wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        fp16 = kwargs.get("mixed_precision") == "fp16"
        original(self, *args, **kwargs | ({"mixed_precision": "bf16"} if fp16 else {}))
        if fp16:
            self.state._mixed_precision = "fp16"
            self.scaler = torch.amp.GradScaler("cuda", enabled=False)

    return made


def _refuse_more_than_training(trainer: Any) -> None:
    arguments = trainer.args
    updates = arguments.max_steps
    if not 0 < updates <= MOST_UPDATES:
        raise TraceError(
            f"The trainer's train() would take {'all of its epochs' if updates < 1 else f'{updates} updates'}.",
            "Write max_steps=2 in its arguments: the second update is like all that follow.",
        )
    refused = {
        "eval_strategy": str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
        != "no",
        "save_strategy": str(getattr(arguments.save_strategy, "value", arguments.save_strategy))
        != "no",
        "use_vllm": bool(getattr(arguments, "use_vllm", False)),
    }
    for name, wrong in refused.items():
        if wrong:
            value = False if name == "use_vllm" else "no"
            raise TraceError(
                f"The trainer does more than train: {name} is {getattr(arguments, name)!r}.",
                f"Write {name}={value!r} in its arguments; evaluation and generation are steps of their own.",
            )
