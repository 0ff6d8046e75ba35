"""Takes the steps of whatever loop, and hears when their phases begin."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from .components import COLLECTIVES, GRADIENTS, OPTIMIZER_STATES
from .errors import CompiledError, TraceError, step_error
from .fake_group import FakeDevice, active
from .known_values import carried
from .patching import patched
from .tracker import Tracker

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
) -> None:
    """Take some steps under the tracker, which gets a mark for each phase.

    The garbage collector is off: cycles of objects would hold tensors until it happens to run.
    """
    number, device = 0, active()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = [batch if previous_batch is None or number else previous_batch for number in range(steps)]

    def label_gradients(of: Iterable[nn.Parameter]) -> None:
        for parameter in of:
            if parameter.grad is not None:
                tracker.label(parameter.grad, GRADIENTS)

    def enter(phase: str) -> None:
        label_gradients(parameters)
        tracker.mark(phase, number)

    def updating(optimizer: torch.optim.Optimizer) -> None:
        label_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])

    def updated(optimizer: torch.optim.Optimizer) -> None:
        for value in (item for state in optimizer.state.values() for item in state.values()):
            if isinstance(value, torch.Tensor):
                if not hasattr(value, "outside_the_allocator"):  # Dynamo makes states while it compiles, unseen
                    tracker.add(value, OPTIMIZER_STATES)
                tracker.label(value, OPTIMIZER_STATES)

    copy, enabled = partial(_copy, tracker), gc.isenabled()
    gc.disable()
    try:
        with ExitStack() as stack:
            if tracker.origins is not None:
                stack.enter_context(tracker.origins.following())
            if device is not None:
                stack.enter_context(listening(tracker, device))
            new_step = stack.enter_context(phases(enter, updated, updating))
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
                given = [tree_map_only(torch.Tensor, copy, batches[number])]  # nobody but the step holds it
                tracker.expecting = number == 0
                if batch is None:
                    step()
                else:
                    step(given.pop())
            tracker.mark("end", steps)
    except Exception as error:
        if not isinstance(error, CompiledError) and (isinstance(error, TraceError) or not tracker.on_meta):
            raise
        raise step_error(error) from error
    finally:
        tracker.close()
        if enabled:
            gc.enable()


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

    def one(tensor: torch.Tensor) -> bool:  # packages with kernels of their own ask whether a gradient is 1
        return tracker.on_card is not None and tensor.numel() == 1

    def made(function: Callable) -> Callable:
        def make(data: Any, *args: Any, **kwargs: Any) -> Any:
            tensor = function(data, *args, **kwargs)
            tracker.see(tensor)
            if tensor.is_meta and not isinstance(data, torch.Tensor) and (carried(tensor) or one(tensor)):
                with _disable_current_modes():
                    tracker.values.remember(tensor, function(data, dtype=tensor.dtype, device="cpu"))
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

    def in_thread(thread: threading.Thread) -> None:  # a mode belongs to a thread, and weights are loaded by some
        with tracker:
            run(thread)

    found: list = [(torch.UntypedStorage, "resize_", resize_), (threading.Thread, "run", in_thread)]
    found += [(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())]
    if tracker.on_meta:
        found += [(torch, name, made(getattr(torch, name))) for name in ("tensor", "as_tensor")]
        found += [(torch.Tensor, name, reading(getattr(torch.Tensor, name))) for name in ("tolist", "numpy")]
    return found


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
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "clip_grad_norm_"),
)


@contextmanager
def phases(
    enter: Callable[[str], None],
    updated: Callable[[torch.optim.Optimizer], None] | None = None,
    updating: Callable[[torch.optim.Optimizer], None] | None = None,
) -> Iterator[Callable[[], None]]:
    """Hear when the phases of a step begin, whatever loop takes it.

    Parameters
    ----------
    enter
        Called with ``inputs`` when a step begins, ``forward`` when a module is called, ``backward`` when the autograd
        engine starts, ``between`` when it has ended, ``optimizer`` when gradients are clipped or an optimizer steps.
    updated, updating
        Called with each optimizer after its step, and before it.

    Yields what is to be called at the beginning of each step.
    """
    current, engine = "", torch.autograd._engine_run_backward
    depth = 0  # of backward passes: reentrant checkpointing runs one inside another
    inside = False  # an optimizer's step: what is compiled there is no forward pass

    def go(phase: str) -> None:
        nonlocal current
        if phase != current and not depth:
            current = phase
            enter(phase)

    def begin() -> None:
        nonlocal current
        current = ""  # a step may begin in the phase in which the one before ended
        go("inputs")

    def backward(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        go("backward")
        depth += 1
        try:
            return engine(*args, **kwargs)
        finally:
            depth -= 1
            go("between")

    def first_of_update(function: Callable) -> Callable:
        def heard(*args: Any, **kwargs: Any) -> Any:
            go("optimizer")
            return function(*args, **kwargs)

        return heard

    clip = first_of_update(nn.utils.clip_grad_norm_)
    places = [(torch.autograd, "_engine_run_backward", backward)]
    places += [(place, "clip_grad_norm_", clip) for place in (nn.utils, nn.utils.clip_grad)]
    for module, owner, name in _UPDATES:  # of what is imported already
        if module in sys.modules:
            place = getattr(sys.modules[module], owner)
            places.append((place, name, first_of_update(getattr(place, name))))

    def forward(module: nn.Module | None, *_: Any) -> None:  # None: a function that is compiled
        if module is not None or not inside:
            go("forward")

    def step_begins(*_: Any) -> None:
        nonlocal inside
        go("optimizer")
        inside = True

    def step_ends(*_: Any) -> None:
        nonlocal inside
        inside = False

    handles = [
        register_module_forward_pre_hook(forward),
        register_optimizer_step_pre_hook(step_begins),
        register_optimizer_step_post_hook(step_ends),
    ]
    for hook, register in ((updating, register_optimizer_step_pre_hook), (updated, register_optimizer_step_post_hook)):
        if hook is not None:
            handles.append(register(lambda optimizer, *_, hook=hook: hook(optimizer)))
    try:
        with patched(places):
            yield begin
    finally:
        for handle in handles:
            handle.remove()
