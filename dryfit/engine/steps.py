"""Takes the steps of whatever loop, and hears when their phases begin."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from .components import COLLECTIVES, GRADIENTS, OPTIMIZER_STATES, WORKSPACES
from .errors import CompiledError, TraceError, step_error
from .fake_device import FakeDevice, active
from .known_values import carried
from .patching import patched
from .record import Record
from .tracker import Tracker

LEAST_GROWTH = 64 * 1024  # bytes a step that are worth a warning: losses that are logged are fewer
STEPS = 2  # the first makes the optimizer's states
Step = Callable[..., Any]


def take_steps(
    tracker: Tracker,
    model: nn.Module,
    step: Step,
    batch: Any,
    previous_batch: Any,
    steps: int = STEPS,
    begin: Callable[[], Step] | None = None,
    enough: Callable[[Record], bool] | None = None,
) -> None:
    """Take some steps under the tracker, which gets a mark for each phase.

    The garbage collector is off: cycles of objects would hold tensors until it happens to run. What is there before the
    steps is left out of collections: libraries and the model are many objects, and hold no tensor of a step.
    """
    number, device = 0, active()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = [
        batch if previous_batch is None or number else previous_batch for number in range(steps)
    ]

    def label_gradients(of: Iterable[nn.Parameter]) -> None:
        for parameter in of:
            if parameter.grad is not None:
                tracker.label(parameter.grad, GRADIENTS)

    def enter(phase: str) -> None:
        label_gradients(parameters)
        tracker.mark(phase, number)

    def updating(optimizer: torch.optim.Optimizer) -> None:
        tracker.updated_in.add(number)
        label_gradients(
            parameter for group in optimizer.param_groups for parameter in group["params"]
        )

    copy, enabled = partial(_copy, tracker), gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        with ExitStack() as stack:
            if tracker.origins is not None:
                stack.enter_context(tracker.origins.following())
            if device is not None:
                stack.enter_context(listening(tracker, device))
            hooks = phases(enter, partial(_label_states, tracker), updating, tracker.phase_of)
            new_step = stack.enter_context(hooks)
            stack.enter_context(patched(past_operators(tracker), hidden=True))
            stack.enter_context(tracker)
            if begin is not None:
                tracker.mark("load", -1)
                with device.allocating(COLLECTIVES) if device is not None else nullcontext():
                    step = begin()
            modules = len(sys.modules)
            for number in range(steps):
                modules = _collected_after_imports(modules)
                tracker.waited()  # who reads the loss waits for it
                new_step()
                tracker.expecting = False
                given = [
                    tree_map_only(torch.Tensor, copy, batches[number])
                ]  # nobody but the step holds it
                tracker.expecting = number == 0
                if batch is None:
                    step()
                else:
                    step(given.pop())
                if enough is not None and number + 1 < steps and enough(tracker):
                    break
            tracker.mark("end", steps)
    except Exception as error:
        if not isinstance(error, CompiledError) and (
            isinstance(error, TraceError) or not tracker.on_meta
        ):
            raise
        raise step_error(error) from error
    finally:
        tracker.close()
        gc.unfreeze()
        if enabled:
            gc.enable()


def check_updates(
    tracker: Tracker, optimizer: torch.optim.Optimizer | None, steps: int, *, compiled: bool = False
) -> None:
    """Say that an optimizer was given and took no step, or none in the step that is reported.

    ``compiled``: an update that is compiled calls no hooks.

    Raises :class:`TraceError` if it took none at all.
    """
    if optimizer is None or compiled or not isinstance(optimizer, torch.optim.Optimizer):
        return
    if not tracker.updated_in and not any(optimizer.state.values()):
        calls = f"{steps} calls" if steps > 1 else "its one call"
        raise TraceError(
            f"An optimizer was given, and the step took no update in {calls}.",
            "Let one call of the step do what leads to one update, such as all micro-batches of a gradient"
            " accumulation; or write `steps=` for as many calls as an update takes, or None for the optimizer.",
        )
    if tracker.updated_in and steps - 1 not in tracker.updated_in and tracker.marks[-1][1] == steps:
        tracker.warn(
            "the last call of the step took no update, and it is the one that is reported; let one call do what leads"
            " to an update"
        )


def warn_of_growth(tracker: Tracker) -> None:
    """Say that the last step has left more than it found, so that each further one needs more.

    Of a trace whose first step was enough nothing is said: one step does not show that memory grows.
    """
    last = max(
        (number for _, number, _ in tracker.marks[:-1]), default=0
    )  # the last mark is the end of all steps
    grown = grown_bytes(tracker, last) if last > 0 else 0
    if grown >= LEAST_GROWTH:
        size = f"{grown / 2**20:.1f} MiB"
        tracker.warn(
            f"the step keeps {size} more each time it is taken, as a list does that holds tensors: the peak is that of"
            f" step {last + 1}, and it grows by {size} with every step"
        )


def grown_bytes(record: Record, step: int) -> int:
    """Bytes that a step has allocated and left, less what it has freed of earlier ones; without workspaces."""
    sizes: dict[int, int] = {}
    first, grown = record.start(step), 0
    for index, (identity, count) in enumerate(record.events[: record.marks[-1][2]]):
        if identity > 0:
            sizes[identity] = count
        if index >= first and record.components.get(abs(identity)) != WORKSPACES:
            grown += count if identity > 0 else -sizes.get(-identity, 0)
    return grown


def _label_states(tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
    for value in (item for state in optimizer.state.values() for item in state.values()):
        if isinstance(value, torch.Tensor):
            if not hasattr(
                value, "outside_the_allocator"
            ):  # Dynamo makes states while it compiles, unseen
                tracker.add(value, OPTIMIZER_STATES)
            tracker.label(value, OPTIMIZER_STATES)


def _collected_after_imports(known: int) -> int:
    """How many modules there are; after an import, cycles that hold a step's tensors are collected."""
    if len(sys.modules) != known:
        gc.collect()
    return len(sys.modules)


def _copy(tracker: Tracker, tensor: torch.Tensor) -> torch.Tensor:
    """A batch's tensor for one step: on `meta` without values, but for those that the batch carries on the CPU."""
    if not tracker.on_meta:
        return tensor.clone()
    made = torch.empty_like(tensor, device="meta")
    if tensor.device.type == "cpu" and carried(tensor):
        with _disable_current_modes():
            tracker.values.remember(made, tensor.clone())
    return made


def past_operators(tracker: Tracker) -> list[tuple[Any, str, Any]]:
    """Patches for what allocates past the operators that a tracker sees.

    Inference mode hands composite operators over whole, and what they allocate inside would not be seen: without
    gradients is the same memory. FSDP frees and allocates by resizing storages, which no operator tells. On ``meta`` a
    tensor made of Python's numbers is no operator's output, and what Python reads whole has to be on the CPU first.
    """

    def one(
        tensor: torch.Tensor,
    ) -> bool:  # packages with kernels of their own ask whether a gradient is 1
        return tracker.on_card is not None and tensor.numel() == 1

    def made(function: Callable) -> Callable:
        def make(data: Any, *args: Any, **kwargs: Any) -> Any:
            tensor = function(data, *args, **kwargs)
            tracker.see(tensor)
            if (
                tensor.is_meta
                and not isinstance(data, torch.Tensor)
                and (carried(tensor) or one(tensor))
            ):
                with _disable_current_modes():
                    tracker.values.remember(
                        tensor, function(data, dtype=tensor.dtype, device="cpu")
                    )
            return tensor

        return make

    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        tracker.resized(storage, size)
        return resize(storage, size)

    def reading(function: Callable) -> Callable:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not tensor.is_meta:
                return function(tensor, *args, **kwargs)
            tracker.values.reading = True
            try:
                host = tensor.cpu()
            finally:
                tracker.values.reading = False
            return function(host, *args, **kwargs)

        return read

    run = threading.Thread.run

    def in_thread(
        thread: threading.Thread,
    ) -> None:  # a mode belongs to a thread, and weights are loaded by some
        with tracker:
            run(thread)

    patches: list = [
        (torch.UntypedStorage, "resize_", resize_),
        (threading.Thread, "run", in_thread),
    ]
    patches += [(torch, "inference_mode", _inference_mode)]
    if tracker.on_meta:
        patches += [(torch, name, made(getattr(torch, name))) for name in ("tensor", "as_tensor")]
        patches += [
            (torch.Tensor, name, reading(getattr(torch.Tensor, name)))
            for name in ("tolist", "numpy")
        ]
    return patches


def _inference_mode(mode: Any = True) -> Any:
    """In the place of ``torch.inference_mode``, as a context, a decorator, or a decorator with ``mode``."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else _Nothing()


class _Nothing(ContextDecorator, nullcontext):
    """What does nothing, as a decorator too."""


@contextmanager
def listening(tracker: Tracker, device: FakeDevice) -> Iterator[None]:
    device.listener = tracker
    try:
        yield
    finally:
        device.listener = None


# Methods that begin the update where DeepSpeed's engine or FSDP1 takes the step: module, class, method.
_UPDATES = (
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "step"),
    ("dryfit.engine.zero", "ZeroEngine", "step"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "clip_grad_norm_",
    ),
)


class _Heard:
    """Which phase a step is in, by what is called."""

    def __init__(
        self,
        enter: Callable[[str], None],
        phase_of: Callable[[nn.Module], str | None] | None = None,
    ) -> None:
        self._enter, self._phase, self._engine = enter, "", torch.autograd._engine_run_backward
        self._phase_of = phase_of
        self._depth = 0  # of backward passes: reentrant checkpointing runs one inside another
        self._inside = False  # an optimizer's step: what is compiled there is no forward pass

    def _go(self, phase: str) -> None:
        if phase != self._phase and not self._depth:
            self._phase = phase
            self._enter(phase)

    def begin(self) -> None:
        """A step begins, perhaps in the phase in which the one before ended."""
        self._phase = ""
        self._go("inputs")

    def forward(self, module: nn.Module | None, *_: Any) -> None:
        """A module is called; None: a function that is compiled."""
        own = self._phase_of(module) if module is not None and self._phase_of is not None else None
        if own is not None or module is not None or not self._inside:
            self._go(own or "forward")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the autograd engine."""
        self._go("backward")
        self._depth += 1
        try:
            return self._engine(*args, **kwargs)
        finally:
            self._depth -= 1
            self._go("between")

    def step_begins(self, *_: Any) -> None:
        """An optimizer steps."""
        self._go("optimizer")
        self._inside = True

    def step_ends(self, *_: Any) -> None:
        """It has stepped."""
        self._inside = False

    def _first_of_update(self, function: Callable) -> Callable:
        def heard(*args: Any, **kwargs: Any) -> Any:
            self._go("optimizer")
            return function(*args, **kwargs)

        return heard

    def places(self) -> list[tuple[Any, str, Callable]]:
        """What is exchanged so that backward passes and updates are heard."""
        clip = self._first_of_update(nn.utils.clip_grad_norm_)
        places = [(torch.autograd, "_engine_run_backward", self.backward)]
        places += [(place, "clip_grad_norm_", clip) for place in (nn.utils, nn.utils.clip_grad)]
        for module, owner, name in _UPDATES:  # of what is imported already
            if module in sys.modules:
                place = getattr(sys.modules[module], owner)
                places.append((place, name, self._first_of_update(getattr(place, name))))
        return places


@contextmanager
def phases(
    enter: Callable[[str], None],
    updated: Callable[[torch.optim.Optimizer], None] | None = None,
    updating: Callable[[torch.optim.Optimizer], None] | None = None,
    phase_of: Callable[[nn.Module], str | None] | None = None,
) -> Iterator[Callable[[], None]]:
    """Hear when the phases of a step begin, whatever loop takes it.

    Parameters
    ----------
    enter
        Called with ``inputs`` when a step begins, ``forward`` when a module is called, ``backward`` when the autograd
        engine starts, ``between`` when it has ended, ``optimizer`` when gradients are clipped or an optimizer steps.
    updated, updating
        Called with each optimizer after its step, and before it.
    phase_of
        Called with each module before its call: the phase that this belongs to, such as ``evaluation``; None:
        ``forward``.

    Yields what is to be called at the beginning of each step.
    """
    heard = _Heard(enter, phase_of)
    handles = [
        register_module_forward_pre_hook(heard.forward),
        register_optimizer_step_pre_hook(heard.step_begins),
        register_optimizer_step_post_hook(heard.step_ends),
    ]
    for hook, register in (
        (updating, register_optimizer_step_pre_hook),
        (updated, register_optimizer_step_post_hook),
    ):
        if hook is not None:
            handles.append(register(lambda optimizer, *_, hook=hook: hook(optimizer)))
    try:
        with patched(heard.places()):
            yield heard.begin
    finally:
        for handle in handles:
            handle.remove()
