"""The memory of anybody's training step, known before any weight exists: the step itself, run on ``meta``.

A model, an optimizer and a step go in, a report comes out. Nothing is stored and nothing is computed; the same library
code decides which tensor lives when, so the bytes are a GPU's::

    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 10))
        batch = torch.empty(64, 4096), torch.empty(64, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # what PyTorch takes on CUDA

    def step(batch):
        inputs, labels = batch
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    report = trace_step(model, optimizer, step, batch, capability=(8, 9))
    report.peak_allocated_bytes, report.components

This folder needs PyTorch and nothing else of the project; bitsandbytes and transformers are helped where a program has
imported them.

Inside :func:`scripts.engine.fake_group.fake_group` the step may be one of several GPUs, wrapped by DDP or FSDP;
the figures are those of one of them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from .autocast import emulated
from .components import (
    ADAPTERS,
    COLLECTIVES,
    GRADIENTS,
    HOST,
    LOADING,
    OPTIMIZER_STATES,
    QUANTIZATION_STATE,
    WEIGHT_CASTS,
    WEIGHTS_4BIT,
    weights,
)
from .errors import TraceError, step_error
from .fake_group import FakeDevice, active
from .kernels import CudaKernels, cpu_outputs, dispatch
from .patching import patched
from .report import History, Report, make_report
from .tracker import Origins, Tracker, local

STEPS = 2  # the first makes the optimizer's states
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
Step = Callable[..., Any]
Label = Callable[[str, torch.Tensor], str | None]
T = TypeVar("T")


def trace_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: Step,
    batch: Any = None,
    *,
    previous_batch: Any = None,
    steps: int = STEPS,
    target: str = "cuda",
    capability: tuple[int, int] | None = None,
    torch_version: str = torch.__version__,
    histories: Sequence[History] = (),
    label: Label | None = None,
    scalars: float | None = None,
    capacity_bytes: int | None = None,
    expandable_segments: bool = False,
    timeline: bool = False,
    origins: bool = False,
    begin: Callable[[], Step] | None = None,
    report: Callable[..., T] = make_report,
    **options: Any,
) -> T:
    """Predict the memory of a training step.

    Two steps are taken, since the optimizer's states exist only from the first update on; the second is reported. A
    forward pass alone, in evaluation or generation, is such a step too: ``trace_step(model, None, answer, steps=1)``.

    Parameters
    ----------
    model
        On ``meta``. Parameters, buffers and what bitsandbytes hangs on a parameter are counted.
    optimizer
        Over the model's parameters; its states are found. None where the step updates nothing. On ``meta`` PyTorch
        chooses ``foreach=False``; a GPU's choice is ``foreach=True``.
    step
        One training step: forward, backward, update, as the training loop does it, by whatever library. Called with
        the batch, or with nothing where none is given. It should drop the batch when its loop would.
    batch
        Tensors in any nest; only shapes and dtypes matter. The step gets copies on ``meta`` that count as inputs.
    previous_batch
        The first step's batch where it differs: outputs that a loop keeps until the next step have its length.
    steps
        How many to take; the last is reported. One is enough where there is no optimizer.
    target
        ``cuda``: as PyTorch's CUDA allocator counts. ``cpu``: bytes of live tensors, as :func:`measure_step`.
    capability
        Compute capability of the GPU, such as ``(8, 0)``; decides kernels and the size of workspaces.
    torch_version
        Whose CUDA kernels are meant, such as ``2.4.1``; the installed PyTorch's by default.
    histories
        What happened before the first step, see :class:`~scripts.engine.report.History`; several where chance
        decides, and reserved memory is a range. None: the model's tensors are allocated one after the other.
    label
        Called with the name of each parameter or buffer and the tensor: what it is for, or None for the default,
        ``adapters`` for what is trained in a model that is frozen in part, and ``weights_<dtype>``. ``host``: it is in
        the host's memory, as what FSDP offloads.
    scalars
        What ``.item()``, ``.tolist()``, ``.cpu()`` and ``if tensor`` give, for steps that read numbers to log them or
        to give them back. None: such a step is refused, since a traced tensor has no value.
    capacity_bytes
        The GPU's memory without the CUDA context: reserved memory is then that of a GPU which gives cached segments
        back when it is full. None: memory is plentiful.
    expandable_segments
        Whether the allocator runs with ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
    timeline
        Whether the report has a timeline.
    origins
        Whether the report has the tensors that are alive at the peak, with the module and line that made them.
    begin
        Called before the first step, with the model on its device, where memory is followed already: for what wraps it
        there, such as DDP. Returns the step to take instead of ``step``.
    report, options
        What to make of the record, and what else that is to know: :func:`~scripts.engine.report.make_report`, or
        :func:`~scripts.engine.report.recording` for the events alone.

    Returns
    -------
    Report

    Raises
    ------
    ValuesNeeded
        If the step reads the value of a tensor; names the line.
    StepError
        If it fails for another reason; names the line.
    TraceError
        If the target is unknown or the model isn't on ``meta``.
    """
    if target not in ("cuda", "cpu"):
        raise TraceError(f"Unknown target of the trace: {target!r}.", "Write target='cuda' or target='cpu'.")
    real = [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    if real:
        raise TraceError(
            f"The parameter {real[0]} lies on the device {model.get_parameter(real[0]).device}, not on meta.",
            "Build the model inside `with torch.device('meta'):`, or call `model.to('meta')`.",
        )
    on_gpu = target == "cuda"
    seen = histories[0] if histories else History()
    tracker = Tracker(
        ("meta",) if on_gpu else ("meta", "cpu"),
        vocabulary=_vocabulary(model),
        kernels=CudaKernels(capability, torch_version) if on_gpu else None,
        first_id=max((identity for identity, _ in seen.events), default=0) + 1,
        outputs=None if on_gpu else cpu_outputs,
        scalars=scalars,
        origins=Origins(model) if origins else None,
        device=active(),
    )
    tracker.events += seen.events
    tracker.components.update({identity: LOADING for identity, _ in seen.events if identity > 0})
    tracker.components.update(seen.components)
    follow_model(tracker, model, seen.ids, label)
    with ExitStack() as stack:
        stack.enter_context(dispatch(target, capability))
        if on_gpu:
            stack.enter_context(patched([(torch.cuda, "empty_cache", tracker.empty_cache)]))
        stack.enter_context(emulated(target, lambda copy: tracker.label(copy, WEIGHT_CASTS)))
        take_steps(tracker, model, step, batch, previous_batch, steps, begin)
    return report(
        tracker,
        histories,
        on_gpu=on_gpu,
        timeline=timeline,
        capacity_bytes=capacity_bytes,
        expandable_segments=expandable_segments,
        **options,
    )


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: Step,
    batch: Any = None,
    *,
    previous_batch: Any = None,
    steps: int = STEPS,
    label: Label | None = None,
    timeline: bool = False,
    origins: bool = False,
    begin: Callable[[], Step] | None = None,
) -> Report:
    """Measure on the CPU what :func:`trace_step` with ``target="cpu"`` predicts: the same tracker over real tensors.

    The parameters are those of :func:`trace_step`; the model holds data, and so does the batch.
    """
    tracker = Tracker(("cpu",), vocabulary=_vocabulary(model), origins=Origins(model) if origins else None)
    follow_model(tracker, model, label=label)
    take_steps(tracker, model, step, batch, previous_batch, steps, begin)
    return make_report(tracker, on_gpu=False, timeline=timeline)


def recorded(act: Callable[[], T]) -> tuple[T, History]:
    """Run what allocates on ``meta`` before the first step, such as dividing a model; returns the history of it too.

    It has to leave nothing on the device but what the model holds.
    """
    device = active()
    tracker = Tracker(("meta",), device=device)
    with ExitStack() as stack:
        if device is not None:
            stack.enter_context(_listening(tracker, device))
        stack.enter_context(patched(_seen_whole(tracker)))
        stack.enter_context(tracker)
        result = act()
    history = History(list(tracker.events), tracker.ids)
    tracker.close()
    return result, history


def follow_model(tracker: Tracker, model: nn.Module, ids: Any = None, label: Label | None = None) -> None:
    """Begin to follow a model's parameters, buffers and quantization states; ``ids``: of those already recorded."""
    ids, component = ids or {}, component_of(model, label)

    def add(tensor: torch.Tensor, component: str) -> None:
        if component == HOST:
            tracker.leave_on_host(tensor)
            return
        tracker.add(tensor, component, identity=ids.get(local(tensor).untyped_storage()._cdata))

    for name, parameter in model.named_parameters():
        add(parameter.data, component(name, parameter))
        for tensor in quantization_state(parameter).values():
            add(tensor, QUANTIZATION_STATE)
    for name, buffer in model.named_buffers():
        add(buffer, component(name, buffer))
    for name, module in model.named_modules():  # whatever hangs on a module and is neither
        states = quantization_state(module)
        for tensor in states.values():  # FSDP leaves of a 4-bit weight a plain one, and its states with the module
            add(tensor, QUANTIZATION_STATE)
        if states:
            tracker.label(module.weight, WEIGHTS_4BIT)
        for key, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else (value,)
            for tensor in held:
                if isinstance(tensor, torch.Tensor):
                    add(tensor, component(f"{name}.{key}", tensor))


def component_of(model: nn.Module, label: Label | None = None) -> Callable[[str, torch.Tensor], str]:
    """What a model's parameters and buffers are for, as ``label`` says or by default."""
    partly_frozen = not all(parameter.requires_grad for parameter in model.parameters())

    def component(name: str, tensor: torch.Tensor) -> str:
        known = label(name, tensor) if label is not None else None
        if known is not None:
            return known
        if partly_frozen and tensor.requires_grad:
            return ADAPTERS
        if quantization_state(tensor):
            return WEIGHTS_4BIT
        return weights(_NAMES.get(tensor.dtype, ""))

    return component


def quantization_state(parameter: torch.Tensor | nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes hangs on a 4-bit weight: they are neither parameters nor buffers."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return {}
    tensors = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
    if state.nested:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


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
        return torch.empty_like(tensor, device="meta") if tracker.on_meta else tensor.clone()

    enabled = gc.isenabled()
    gc.disable()
    try:
        with ExitStack() as stack:
            if tracker.origins is not None:
                stack.enter_context(tracker.origins.following())
            if device is not None:
                stack.enter_context(_listening(tracker, device))
            new_step = stack.enter_context(phases(enter, updated, updating))
            stack.enter_context(patched(_seen_whole(tracker)))
            stack.enter_context(tracker)
            if begin is not None:
                tracker.mark("load", -1)
                with device.allocating(COLLECTIVES) if device is not None else nullcontext():
                    step = begin()
            for number in range(steps):
                tracker.waited()  # who reads the loss waits for it
                new_step()
                if batch is None:
                    step()
                else:
                    step(tree_map_only(torch.Tensor, copy, batches[number]))
            tracker.mark("end", steps)
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


def _seen_whole(tracker: Tracker) -> list[tuple[Any, str, Any]]:
    """What is exchanged so that nothing passes a tracker by.

    Inference mode hands composite operators over whole, and what they allocate inside would not be seen: without
    gradients is the same memory. FSDP frees and allocates by resizing storages, which no operator tells. On ``meta`` a
    tensor made of Python's numbers is no operator's output.
    """

    def made(function: Callable) -> Callable:
        def make(*args: Any, **kwargs: Any) -> Any:
            tensor = function(*args, **kwargs)
            tracker.see(tensor)
            return tensor

        return make

    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        tracker.resized(storage, size)
        return resize(storage, size)

    found: list = [(torch.UntypedStorage, "resize_", resize_)]
    found += [(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())]
    return found + [(torch, name, made(getattr(torch, name))) for name in ("tensor", "as_tensor") if tracker.on_meta]


@contextmanager
def _listening(tracker: Tracker, device: FakeDevice) -> Iterator[None]:
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


def _vocabulary(model: nn.Module) -> int:
    """Size of the vocabulary of a model of transformers; 0 for others, whose logits count as activations."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or 0
