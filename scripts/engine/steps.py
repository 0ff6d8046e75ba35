"""Takes the steps of whatever loop, and hears when their phases begin."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from .patching import patched
from .tracker import Tracker
from .values import carried

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

    def enter(phase: str) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                tracker.label(parameter.grad, GRADIENTS)
        tracker.mark(phase, number)

    def updating(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    tracker.label(parameter.grad, GRADIENTS)

    def updated(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    tracker.label(value, OPTIMIZER_STATES)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if not tracker.on_meta:
            return tensor.clone()
        made = torch.empty_like(tensor, device="meta")
        if tensor.device.type == "cpu" and carried(tensor):
            with _disable_current_modes():
                tracker.values.remember(made, tensor.clone())
        return made

    enabled = gc.isenabled()
    gc.disable()
    try:
        with ExitStack() as stack:
            if tracker.origins is not None:
                stack.enter_context(tracker.origins.following())
            if device is not None:
                stack.enter_context(listening(tracker, device))
            new_step = stack.enter_context(phases(enter, updated, updating))
            stack.enter_context(patched(seen_whole(tracker)))
            stack.enter_context(tracker)
            if begin is not None:
                tracker.mark("load", -1)
                with device.allocating(COLLECTIVES) if device is not None else nullcontext():
                    step = begin()
            for number in range(steps):
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
    except CompiledError as error:
        raise step_error(error) from error
    except TraceError:
        raise
    except Exception as error:
        if not tracker.on_meta:
            raise
        raise step_error(error) from error
    finally:
        tracker.close()
        if enabled:
            gc.enable()


def seen_whole(tracker: Tracker) -> list[tuple[Any, str, Any]]:
    """What is exchanged so that nothing passes a tracker by.

    Inference mode hands composite operators over whole, and what they allocate inside would not be seen: without
    gradients is the same memory. FSDP frees and allocates by resizing storages, which no operator tells. On ``meta`` a
    tensor made of Python's numbers is no operator's output, and what Python reads whole has to be on the CPU first.
    """

    def made(function: Callable) -> Callable:
        def make(data: Any, *args: Any, **kwargs: Any) -> Any:
            tensor = function(data, *args, **kwargs)
            tracker.see(tensor)
            if tensor.is_meta and not isinstance(data, torch.Tensor) and carried(tensor):
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

    found: list = [(torch.UntypedStorage, "resize_", resize_)]
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

    Yields
    ------
    Callable
        To be called at the beginning of each step.
    """
    current = ""
    depth = 0  # of backward passes: reentrant checkpointing runs one inside another
    engine, clip = torch.autograd._engine_run_backward, nn.utils.clip_grad_norm_

    def go(phase: str) -> None:
        nonlocal current
        if phase != current and not depth:
            current = phase
            enter(phase)

    def begin() -> None:
        nonlocal current
        current = ""
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

    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
        go("optimizer")
        return clip(*args, **kwargs)

    def clip_of_fsdp1(*args: Any, **kwargs: Any) -> Any:
        go("optimizer")
        return original_of_fsdp1(*args, **kwargs)

    def step_of_engine(*args: Any, **kwargs: Any) -> Any:
        go("optimizer")
        return original_of_engine(*args, **kwargs)

    places = [(torch.autograd, "_engine_run_backward", backward)]
    places += [(place, "clip_grad_norm_", clip_grad_norm_) for place in (nn.utils, nn.utils.clip_grad)]
    deepspeed = sys.modules.get("deepspeed.runtime.engine")
    if deepspeed is not None:
        places.append((deepspeed.DeepSpeedEngine, "step", step_of_engine))
        original_of_engine = deepspeed.DeepSpeedEngine.step
    fsdp1 = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp1 is not None:
        original_of_fsdp1 = fsdp1.FullyShardedDataParallel.clip_grad_norm_
        places.append((fsdp1.FullyShardedDataParallel, "clip_grad_norm_", clip_of_fsdp1))
    handles = [
        register_module_forward_pre_hook(lambda *_: go("forward")),
        register_optimizer_step_pre_hook(lambda *_: go("optimizer")),
    ]
    if updating is not None:
        handles.append(register_optimizer_step_pre_hook(lambda optimizer, *_: updating(optimizer)))
    if updated is not None:
        handles.append(register_optimizer_step_post_hook(lambda optimizer, *_: updated(optimizer)))
    try:
        with patched(places):
            yield begin
    finally:
        for handle in handles:
            handle.remove()
