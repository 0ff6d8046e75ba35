"""The memory of a training step, known before any weight exists: the step itself, run on ``meta``.

The model and the step are the ones that training uses. Two steps are taken, since optimizer states exist only from
the first update on; the second one is what is reported. Every storage is followed (:mod:`scripts.memory.core.tracker`),
what CUDA's kernels need beyond that comes from :mod:`scripts.memory.core.kernels`, the model's way onto the device from
:mod:`scripts.memory.loading`, and all of it runs through the allocator (:mod:`scripts.memory.core.allocator`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import transformers
import transformers.masking_utils
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from scripts.common.errors import UserError
from scripts.memory.core.allocator import Event, replay, required_bytes
from scripts.memory.core.autocast import MetaAutocast
from scripts.memory.core.components import (
    ADAPTERS,
    GRADIENTS,
    INPUTS,
    LOADING,
    OPTIMIZER_STATES,
    QUANTIZATION_STATE,
    ROUNDING,
    WEIGHT_CASTS,
    WEIGHTS_4BIT,
    weights,
)
from scripts.memory.core.kernels import CudaKernels, cpu_outputs, dispatch, flash_attention_package
from scripts.memory.core.tracker import Tracker
from scripts.memory.loading import Loader, loading_events
from scripts.scenario.scenario import Scenario
from scripts.training.model import (
    assert_quantized,
    attention_kernel,
    attention_name,
    autocast_dtype,
    build_model,
    build_optimizer,
    parameter_count,
    quantization_state,
)
from scripts.training.step import forward_backward, optimizer_step, random_batch

STEPS = 2  # the first makes the optimizer's states
MICRO_BATCHES = 2  # of an accumulated step: from the second on gradients are alive, and all are alike
PHASES = ("load", "forward", "backward", "optimizer")
TIMELINE_POINTS = 2000
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def trace(
    scenario: Scenario,
    target: str = "cuda",
    *,
    capability: tuple[int, int] | None = None,
    loader: Loader | None = None,
    max_grad_norm: float | None = 1.0,
    timeline: bool = True,
    orders: int = 1,
    capacity_bytes: int | None = None,
    steps: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Predict the memory of a scenario's training step.

    Parameters
    ----------
    scenario
        The step.
    target
        ``cuda``: as PyTorch's CUDA allocator would count it. ``cpu``: bytes of live tensors, as
        :func:`scripts.memory.measure.measure` counts them on the CPU.
    capability
        Compute capability of the card, such as (8, 0); decides kernels and the size of workspaces.
    loader
        How the model comes to the device; the installed versions' way when None.
    max_grad_norm
        As in training; None where a measured loop did not clip.
    timeline
        Whether to return the timeline of the step.
    orders
        How many orders of loading to replay where several threads load and chance decides; over 1 the result has
        ``orders``, a list of :func:`peaks`.
    capacity_bytes
        The card's memory without the CUDA context: then ``peak_reserved_bytes`` is that of a card which gives cached
        segments back when it is full. None: memory is plentiful.
    steps
        What takes the steps, called as :func:`take_steps` is (the default): for a published measurement the loop that
        was measured.

    Returns
    -------
    dict
        See :func:`summarize`; also ``attention``, the kernel that runs (eager where the architecture knows no other),
        ``parameters`` of the base model, ``trainable_parameters`` and ``target``.

    Raises
    ------
    UserError
        If the model can't be built or its step can't be traced.
    """
    if target not in ("cuda", "cpu"):
        raise UserError("Unknown target of the trace.", found=target, allowed="cuda, cpu", write="target: cuda")
    on_card = target == "cuda"
    if scenario.method == "qlora" or "8bit" in scenario.optimizer:
        _import_bitsandbytes()
    model = build_model(scenario, "meta", attention_implementation=_attention(scenario, target))
    if scenario.method == "qlora":
        assert_quantized(model, scenario)
    optimizer = build_optimizer(model, scenario, learning_rate=1e-4, foreach=None if on_card else False)
    vocabulary = model.config.get_text_config().vocab_size

    loading: list[Event] = []
    ids: dict[int, int] = {}
    others: list[tuple[list[Event], dict[int, int]]] = []  # the same in other orders
    if on_card:
        loader = loader or Loader.installed()
        loading, ids = loading_events(model, scenario, 1, loader)
        if orders > 1:
            seeds = range(loader.seed, loader.seed + orders)
            others = [loading_events(model, scenario, 1, replace(loader, seed=seed)) for seed in seeds]
    tracker = Tracker(
        ("meta",) if on_card else ("meta", "cpu"),
        vocabulary=vocabulary,
        kernels=CudaKernels(capability) if on_card else None,
        first_id=max((identity for identity, _ in loading), default=0) + 1,
        outputs=None if on_card else cpu_outputs,
    )
    tracker.events += loading
    tracker.components.update({identity: LOADING for identity, _ in loading if identity > 0})
    follow_model(tracker, model, ids)
    for identity in leftovers(loading) - set(ids.values()):  # bitsandbytes keeps its map of 8-bit values
        tracker.components[identity] = QUANTIZATION_STATE
    try:
        with _as_on_device(scenario, target, capability, model, tracker) as hook:
            (steps or take_steps)(
                model,
                optimizer,
                scenario,
                tracker,
                lambda: random_batch(scenario, "meta", vocabulary),
                max_grad_norm=max_grad_norm,
                hook=hook,
            )
    except UserError:
        raise
    except Exception as error:  # an architecture may ask for values, which meta tensors don't have
        raise UserError(
            f"The step of this architecture can't be traced: {type(error).__name__}: {str(error)[:500]}",
            where=f"model (model_type {scenario.model['model_type']})",
            allowed="a decoder whose forward pass doesn't depend on the values of its tensors",
        ) from error
    result = summarize(tracker, on_card=on_card, timeline=timeline, capacity_bytes=capacity_bytes)
    if others:
        step = tracker.events[len(loading) :]
        result["orders"] = [peaks(tracker, _after(other, ids, step), capacity_bytes) for other in others]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return result | {
        "attention": attention_kernel(scenario),
        "parameters": parameter_count(model),
        "target": target,
        "trainable_parameters": trainable,
    }


def follow_model(tracker: Tracker, model: nn.Module, ids: dict[int, int] | None = None) -> None:
    """Begin to follow a model's parameters, buffers and quantization states; ``ids``: of those already recorded."""
    ids = ids or {}

    def add(tensor: torch.Tensor, component: str) -> None:
        tracker.add(tensor, component, identity=ids.get(tensor.untyped_storage()._cdata))

    for name, parameter in model.named_parameters():
        state = quantization_state(parameter)
        if state:
            component = WEIGHTS_4BIT
        elif ".lora_" in name:
            component = ADAPTERS
        else:
            component = weights(_NAMES.get(parameter.dtype, ""))
        add(parameter.data, component)
        for tensor in state.values():
            add(tensor, QUANTIZATION_STATE)
    for buffer in model.buffers():
        add(buffer, weights(_NAMES.get(buffer.dtype, "")))


def take_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scenario: Scenario,
    tracker: Tracker,
    batch: Callable[[], dict[str, torch.Tensor]],
    *,
    max_grad_norm: float | None,
    hook: Callable[[str], None] | None = None,
) -> int:
    """Take :data:`STEPS` steps under the tracker, which gets a mark for each phase; returns how many."""
    number = 0

    def mark(phase: str) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                tracker.label(parameter.grad, GRADIENTS)
        if hook is not None:
            hook(phase)
        tracker.mark(phase, number)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with following(tracker):
        for number in range(STEPS):  # noqa: B007, mark() reads it
            for _ in range(min(scenario.gradient_accumulation, MICRO_BATCHES)):
                mark("inputs")
                inputs = batch()
                for tensor in tree_leaves(inputs):  # packs may have a mask for each kind of layer
                    tracker.add(tensor, INPUTS)
                    tracker.label(tensor, INPUTS)
                forward_backward(model, inputs, scenario, loss_scale=1 / scenario.gradient_accumulation, hook=mark)
                del inputs, tensor
            optimizer_step(model, optimizer, scenario, max_grad_norm=max_grad_norm, hook=mark)
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        tracker.label(value, OPTIMIZER_STATES)
    return STEPS


@contextmanager
def following(tracker: Tracker) -> Iterator[None]:
    """Follow every storage of the steps inside; afterwards none, so that the model's own end is not recorded.

    The garbage collector is off: cycles of objects would hold tensors until it happens to run.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with tracker:
            yield
            tracker.mark("end", STEPS)
    finally:
        tracker.close()
        if enabled:
            gc.enable()


def summarize(
    tracker: Tracker, *, on_card: bool, timeline: bool = True, capacity_bytes: int | None = None
) -> dict[str, Any]:
    """Turn a tracker's record into figures, all in bytes.

    Returns
    -------
    dict
        ``peak_allocated_bytes``: the largest sum of blocks (``max_memory_allocated``) during the second step.
        ``peak_phase``: where.
        ``components``: what lived at that moment; they add up to the peak exactly.
        ``phases``: the peak in ``load``, ``forward``, ``backward``, ``optimizer``; ``components_by_phase``.
        ``resident_bytes``: before the first step.
        ``peak_reserved_bytes``: the largest sum of segments (``max_memory_reserved``), loading included.
        ``required_bytes``: the least a card must have, without its CUDA context.
        ``timeline``: columns ``event``, ``phase``, ``allocated_bytes`` and one for each component.
    """
    events = tracker.events
    if not on_card:
        events = [event for event in events if event[0]]
    begin = tracker.start(0)
    second = tracker.start(STEPS - 1)
    end = len(events)
    run = replay(events, [("", index) for index in range(begin, end)]) if on_card else None
    allocated = [span.start_allocated_bytes for span in run.spans] if run else _running_sum(events)[begin:]
    allocated.append(run.allocated_bytes if run else 0)
    # allocated[i] is the state before event begin + i, so after event begin + i - 1.
    spans = [span for span in tracker.spans(STEPS - 1) if span[0] in PHASES]
    tops = {}
    for phase, first, last in spans:
        top = max(range(first - begin, last - begin + 1), key=lambda index: (allocated[index], -index))
        if phase not in tops or allocated[top] > allocated[tops[phase]]:
            tops[phase] = top
    phases = {phase: allocated[top] for phase, top in tops.items()}
    peak_phase = max(phases, key=lambda phase: phases[phase])
    snapshots = _components(tracker, events, [begin + top for top in tops.values()])
    by_phase = {}
    for phase, snapshot in zip(tops, snapshots, strict=True):
        rounding = phases[phase] - sum(snapshot.values())
        by_phase[phase] = dict(sorted((snapshot | ({ROUNDING: rounding} if on_card else {})).items()))
    loading = replay(events[:begin]) if on_card else None
    result: dict[str, Any] = {
        "components": by_phase[peak_phase],
        "components_by_phase": by_phase,
        "events": len(events),
        "peak_allocated_bytes": phases[peak_phase],
        "peak_phase": peak_phase,
        "phases": {"load": loading.peak_allocated_bytes if loading else allocated[0]} | phases,
        "resident_bytes": allocated[0],
    }
    if on_card:
        reserved = run.peak_reserved_bytes
        if capacity_bytes is not None and reserved > capacity_bytes:
            reserved = replay(events, capacity_bytes=capacity_bytes, grow=True).peak_reserved_bytes
        result |= {"peak_reserved_bytes": reserved, "required_bytes": required_bytes(events)}
    if timeline:
        result["timeline"] = _timeline(tracker, events, allocated, begin, second, spans, on_card)
    return result


def peaks(tracker: Tracker, events: Sequence[Event], capacity_bytes: int | None = None) -> dict[str, Any]:
    """Figures of a step that follows another order of loading: ``phases`` and totals as in :func:`summarize`, bytes.

    ``events`` are the tracker's but for the order of those before its first mark.
    """
    run = replay(
        events,
        [(phase, index) for phase, _, index in tracker.marks],
        capacity_bytes=capacity_bytes,
        grow=capacity_bytes is not None,
    )
    phases: dict[str, int] = {}
    for span, (phase, step, _) in zip(run.spans, tracker.marks, strict=True):
        if step == STEPS - 1 and phase in PHASES:
            phases[phase] = max(phases.get(phase, 0), span.peak_allocated_bytes)
    return {
        "peak_allocated_bytes": max(phases.values()),
        "peak_reserved_bytes": run.peak_reserved_bytes,
        "phases": phases,
        "resident_bytes": run.spans[0].start_allocated_bytes,
    }


def _after(loading: tuple[list[Event], dict[int, int]], ids: dict[int, int], step: Sequence[Event]) -> list[Event]:
    """The step after another order of loading: where it frees a tensor of the model, the id is that order's."""
    events, others = loading
    known = {-identity: -others[storage] for storage, identity in ids.items()}
    return events + [(known.get(identity, identity), count) for identity, count in step]


def leftovers(events: Sequence[Event]) -> set[int]:
    """Ids that are allocated and not freed."""
    alive: set[int] = set()
    for identity, _ in events:
        if identity > 0:
            alive.add(identity)
        else:
            alive.discard(-identity)
    return alive


def _running_sum(events: Sequence[Event]) -> list[int]:
    """Bytes alive before each event."""
    sizes, total, sums = {}, 0, []
    for identity, count in events:
        sums.append(total)
        if identity > 0:
            sizes[identity] = count
            total += count
        else:
            total -= sizes.pop(-identity, 0)
    sums.append(total)
    return sums


def _components(tracker: Tracker, events: Sequence[Event], moments: Sequence[int]) -> list[dict[str, int]]:
    """Bytes of each component before the events at some indices."""
    wanted = sorted(set(moments))
    found: dict[int, dict[str, int]] = {}
    totals: dict[str, int] = {}
    sizes: dict[int, int] = {}
    position = 0
    for moment in wanted:
        for identity, count in events[position:moment]:
            if identity > 0:
                component = tracker.components[identity]
                sizes[identity] = count
                totals[component] = totals.get(component, 0) + count
            elif identity < 0 and -identity in sizes:
                totals[tracker.components[-identity]] -= sizes.pop(-identity)
        position = moment
        found[moment] = {component: count for component, count in totals.items() if count}
    return [found[moment] for moment in moments]


def _timeline(
    tracker: Tracker,
    events: Sequence[Event],
    allocated: Sequence[int],
    begin: int,
    second: int,
    spans: Sequence[tuple[str, int, int]],
    on_card: bool,
) -> dict[str, Any]:
    """The second step, thinned out: of each stretch of events the moment with the most memory."""
    count = len(events) - second
    width = max(1, -(-count // TIMELINE_POINTS))
    moments = [
        max(range(first, min(first + width, len(events) + 1)), key=lambda index: allocated[index - begin])
        for first in range(second, len(events) + 1, width)
    ]
    columns: dict[str, list[int]] = {}
    snapshots = _components(tracker, events, moments)
    names = sorted({name for snapshot in snapshots for name in snapshot})
    for name in names:
        columns[name] = [snapshot.get(name, 0) for snapshot in snapshots]
    totals = [allocated[moment - begin] for moment in moments]
    if on_card:
        columns[ROUNDING] = [total - sum(snapshot.values()) for total, snapshot in zip(totals, snapshots, strict=True)]
    starts = [(first, phase) for phase, first, _ in spans]
    phase_of = []
    for moment in moments:
        past = [phase for first, phase in starts if first < moment]
        phase_of.append(past[-1] if past else "forward")
    return {
        "allocated_bytes": totals,
        "components": columns,
        "event": [moment - second for moment in moments],
        "phase": phase_of,
    }


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without the compiler, which it would load (1 to 2 s) to decorate kernels unused here."""
    compile_function = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_function


# --- the device that is not there -----------------------------------------------------------------------------------


def _attention(scenario: Scenario, target: str) -> str:
    """Name of the attention function that training runs on the target."""
    name = attention_name(scenario, torch.device(target))
    return flash_attention_package() if name == "flash_attention_2" else name


@contextmanager
def _as_on_device(
    scenario: Scenario, target: str, capability: tuple[int, int] | None, model: nn.Module, tracker: Tracker
) -> Iterator[Callable[[str], None] | None]:
    """Make ``meta`` behave as the target does; yields what to call at the beginning of each phase."""
    with ExitStack() as stack:
        stack.enter_context(_without_values())
        stack.enter_context(dispatch(target, capability))
        dtype = autocast_dtype(scenario)
        if dtype is None:
            stack.enter_context(_autocast_accepts_meta(None))
            stack.enter_context(_ModesInBackward())
            yield None
            return
        autocast = MetaAutocast(dtype, target, lambda copy: tracker.label(copy, WEIGHT_CASTS))
        stack.enter_context(_autocast_accepts_meta(autocast))
        for module in model.modules():  # transformers computes rotary embeddings outside autocast
            if "RotaryEmbedding" in type(module).__name__:
                for handle in autocast.disable_in(module):
                    stack.callback(handle.remove)

        def hook(phase: str) -> None:
            autocast.caching = phase == "forward"
            autocast.clear()

        stack.enter_context(autocast)
        stack.enter_context(_ModesInBackward())
        yield hook


class _ModesInBackward(TorchFunctionMode):
    """Lets the function modes below act on blocks that are recomputed in the backward pass.

    PyTorch turns a mode off while it handles a call, and ``backward`` is such a call.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.Tensor.backward:
            return func(*args, **(kwargs or {}))
        loss = args[0]
        gradient = torch.ones_like(loss, memory_format=torch.preserve_format)
        return _engine_run_backward(
            (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


@contextmanager
def _autocast_accepts_meta(emulation: MetaAutocast | None) -> Iterator[None]:
    """Libraries turn autocast off for the device of a tensor; PyTorch refuses to for ``meta``, where it never is on."""
    original = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type != "meta":
            return original(device_type, *args, **kwargs)
        return emulation.disabled() if emulation is not None and not kwargs.get("enabled", True) else nullcontext()

    torch.autocast = autocast
    try:
        yield
    finally:
        torch.autocast = original


@contextmanager
def _without_values() -> Iterator[None]:
    """Spare transformers the questions about values that ``meta`` can't answer.

    They are whether several texts share a row, when it makes masks, and whether to warn of padding.
    """

    def one_text_in_a_row(position_ids: torch.Tensor) -> None:
        first = position_ids[:, :1] - 1
        (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)

    exchanged = [
        (transformers.masking_utils, "find_packed_sequence_indices", one_text_in_a_row),
        (transformers.PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None),
    ]
    originals = [(place, name, getattr(place, name, None)) for place, name, _ in exchanged]
    for place, name, replacement in exchanged:
        if hasattr(place, name):  # the first came with transformers 4.53
            setattr(place, name, replacement)
    try:
        yield
    finally:
        for place, name, original in originals:
            if original is not None:
                setattr(place, name, original)
