"""The memory of anybody's training step, known before any weight exists: the step itself, run on ``meta``.

A model, an optimizer and a step go in, a report comes out. Nothing is stored and nothing is computed; the same library
code decides which tensor lives when, so the bytes are a GPU's::

    with on_meta():
        model = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 10))
        batch = torch.empty(64, 4096), torch.empty(64, dtype=torch.long)
        optimizer = torch.optim.AdamW(model.parameters())

    def step(batch):
        inputs, labels = batch
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    report = trace_step(model, optimizer, step, batch, Options(capability=(8, 9)))
    report.peak_allocated_bytes, report.components, report.warnings

This folder needs PyTorch and nothing else of the project; bitsandbytes and transformers are helped where a program has
imported them.

Inside :func:`dryfit.engine.fake_group.fake_group` the step may be one of several GPUs, wrapped by DDP or FSDP;
the figures are those of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from . import recurrent
from .autocast import emulated
from .bitsandbytes_layers import layers_of
from .card import active_simulation
from .compiled import compiled_functions
from .components import HOST, LOADING, OPTIMIZER_STATES, QUANTIZATION_STATE, WEIGHT_CASTS
from .costs import CostRecorder, recording
from .cuda_graphs import cuda_graphs
from .cuda_rules import PLATFORMS, older_than_the_rules
from .custom import on_card
from .errors import TraceError
from .fake_device import active
from .kernels import CudaKernels, cpu_outputs, device_outputs, dispatch
from .known_values import Values
from .model_tensors import Label, component_of, parts, quantization_state, vocabulary, weights_with
from .origins import Origins
from .patching import device_lists, patched, sorted_sets
from .record import Record
from .report import History, Report, make_report
from .steps import STEPS, Step, check_updates, listening, past_operators, take_steps, warn_of_growth
from .tracker import Tracker

T = TypeVar("T")
TARGETS = ("cuda", "cpu")
COMPILED = ("refuse", "eager", "fused", "follow")


@dataclass(frozen=True)
class Options:
    """What a trace is asked; a measurement heeds what is not about a device.

    Attributes
    ----------
    target
        ``cuda``: as PyTorch's CUDA allocator counts. ``cpu``: bytes of live tensors, as
        :func:`~dryfit.engine.trace.measure_step`.
    capability
        Compute capability of the GPU, such as ``(8, 0)``; decides kernels and the size of workspaces.
    torch_version
        Whose CUDA kernels are meant, such as ``2.4.1``; the installed PyTorch's by default. One that is older than the
        rules (:data:`~dryfit.engine.cuda_rules.READ_IN`) is a warning.
    platform
        ``linux`` or ``windows``, whose PyTorch is built without FlashAttention.
    bitsandbytes_version
        Whose 4-bit layers are meant, such as ``0.42.0``; None: the installed one's.
    capacity_bytes
        The GPU's memory without the CUDA context: reserved memory is then that of a GPU which gives cached segments
        back when it is full. None: memory is plentiful.
    cudnn_workspace_bytes
        What ``CUDNN_CONV_WSCAP_DBG`` allows a workspace of cuDNN to take; None: nothing is set.
    expandable_segments
        Whether the allocator runs with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.
    steps
        How many to take; the last is reported. One is enough where there is no optimizer.
    enough
        Called with the record after each step but the last: whether those that were taken are enough. None: never.
    outputs
        What traces with the same target and kernels know of operators' outputs together; None: this one begins anew.
    previous_batch
        The first step's batch where it differs: outputs that a loop keeps until the next step have its length.
    histories
        What happened before the first step, see :class:`~dryfit.engine.report.History`; several where chance
        decides, and reserved memory is a range. None: the model's tensors are allocated one after the other.
    begin
        Called before the first step, with the model on its device, where memory is followed already: for what wraps it
        there, such as DDP. Returns the step to take instead of ``step``.
    beside
        Models that lie on the device too and are not trained, such as a reference.
    label
        Called with the name of each parameter or buffer and the tensor: what it is for, or None for the default,
        ``adapters`` for what is trained in a model that is frozen in part, and ``weights_<dtype>``. ``host``: it is in
        the host's memory, as what FSDP offloads.
    scalars
        What ``.item()``, ``.tolist()`` and ``if tensor`` give where a value is not known, for steps that read numbers
        to log them or to give them back. None: such a step is refused.
    answers
        What ``if tensor`` gives in a function of a library, by ``module:function`` or ``module``, where the value
        decides about what is allocated: beside :data:`~dryfit.engine.known_values.ANSWERS`.
    chosen_share
        Of a router's experts on several GPUs, from the first on, which part gets all tokens: 1 is an even choice, and
        one through the number of GPUs sends all tokens to the first of them.
    compiled
        How functions that ``torch.compile`` has compiled are taken: refused; followed through the compiler, ``follow``,
        for a GPU where its card is simulated (:func:`~dryfit.engine.simulation.simulated`); or with a warning,
        as they would run without the compiler, ``eager``, or without the tensors that it makes and drops, ``fused``.
    timeline
        Whether the report has a timeline.
    origins
        Whether the report has the tensors that are alive at the peak, with the module and line that made them.
    costs
        Whether the report has what each operator of the step costs.
    phase_of
        Called with each module before its call: the phase that this belongs to. None, or None returned: ``forward``.
    report
        What makes the answer of the record; :func:`~dryfit.engine.report.recording` gives the events alone.
    """

    target: str = "cuda"
    capability: tuple[int, int] | None = None
    torch_version: str = torch.__version__
    platform: str = "linux"
    bitsandbytes_version: str | None = None
    capacity_bytes: int | None = None
    cudnn_workspace_bytes: int | None = None
    expandable_segments: bool = False
    steps: int = STEPS
    enough: Callable[[Record], bool] | None = None
    outputs: dict[tuple, Any] | None = None
    previous_batch: Any = None
    histories: Sequence[History] = ()
    begin: Callable[[], Step] | None = None
    beside: Sequence[nn.Module] = ()
    label: Label | None = None
    scalars: float | None = None
    answers: Mapping[str, bool] = field(default_factory=dict)
    chosen_share: float = 1.0
    compiled: str = "refuse"
    timeline: bool = False
    origins: bool = False
    costs: bool = False
    phase_of: Callable[[nn.Module], str | None] | None = None
    report: Callable[..., Any] = make_report

    def __post_init__(self) -> None:
        choices = (("target", self.target, TARGETS), ("compiled", self.compiled, COMPILED))
        for name, value, allowed in (*choices, ("platform", self.platform, tuple(PLATFORMS))):
            if value not in allowed:
                words = " or ".join(f"{name}={word!r}" for word in allowed)
                raise TraceError(f"Unknown {name} of the trace: {value!r}.", f"Write {words}.")
        if self.steps < 1:
            raise TraceError(
                f"A trace takes at least one step, not {self.steps}.", f"Write steps={STEPS}."
            )


def trace_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: Step | None,
    batch: Any = None,
    options: Options | None = None,
) -> Report:
    """Predict the memory of a training step.

    Two steps are taken, since the optimizer's states exist only from the first update on; the second is reported. A
    forward pass alone, in evaluation or generation, is such a step too:
    ``trace_step(model, None, answer, options=Options(steps=1))``.

    Parameters
    ----------
    model
        On ``meta``. Parameters, buffers and what bitsandbytes hangs on a parameter are counted.
    optimizer
        Over the model's parameters; its states are counted. None where the step updates nothing, or makes its own.
    step
        One training step: forward, backward, update, as the training loop does it, by whatever library. Called with
        the batch, or with nothing where none is given. It should drop the batch when its loop would.
    batch
        Tensors in any nest. The step gets copies on ``meta`` that count as inputs; of small integer and boolean ones on
        the CPU it may read the values, of all others only shapes and dtypes are there.
    options
        What is asked, :class:`Options`; None: its defaults.

    Raises
    ------
    ValuesNeeded
        If the step reads the value of a tensor; names the line.
    StepError
        If it fails for another reason; names the line.
    TraceError
        If the model isn't on ``meta``, the step runs what ``torch.compile`` has compiled, or the optimizer never steps.
    """
    options = options or Options()
    if simulation := active_simulation():
        simulation.forget_choices()
        options = replace(options, capability=options.capability or simulation.card.capability)
    _refuse_values(model, optimizer)
    on_gpu = options.target == "cuda"
    tracker, seen = make_tracker(model, options, on_gpu)
    _follow_model(tracker, model, seen.ids, options.label)
    for other in options.beside:
        _follow_model(tracker, other)
    _follow_states(tracker, optimizer)
    with surroundings(tracker, model, options):
        take_steps(
            tracker,
            model,
            step,
            batch,
            options.previous_batch,
            options.steps,
            options.begin,
            options.enough,
        )
    check_updates(tracker, optimizer, options.steps, compiled=options.compiled == "follow")
    if options.previous_batch is None:
        warn_of_growth(tracker)
    return options.report(
        tracker,
        options.histories,
        on_gpu=on_gpu,
        timeline=options.timeline,
        capacity_bytes=options.capacity_bytes,
        expandable_segments=options.expandable_segments,
    )


@contextmanager
def surroundings(tracker: Tracker, model: nn.Module, options: Options) -> Iterator[None]:
    """All that is exchanged while a tracker follows steps of a model on ``meta``."""
    on_gpu = options.target == "cuda"
    with ExitStack() as stack:
        stack.enter_context(
            dispatch(options.target, options.capability, options.torch_version, options.platform)
        )
        noted = lambda: tracker.workspaces.note_recurrent(tracker.now())  # noqa: E731
        stack.enter_context(patched(recurrent.places(options.target, noted), hidden=True))
        stack.enter_context(recording(tracker.costs))
        stack.enter_context(patched(device_lists(options.target), hidden=True))
        stack.enter_context(patched(sorted_sets(model)))
        stack.enter_context(layers_of(options.bitsandbytes_version))
        if options.compiled != "follow":
            stack.enter_context(compiled_functions(tracker, options.compiled))
        if on_gpu:
            stack.enter_context(patched([(torch.cuda, "empty_cache", tracker.empty_cache)]))
        if on_gpu and active_simulation() is not None:
            tracker.graphs = stack.enter_context(cuda_graphs(tracker))
        stack.enter_context(
            emulated(options.target, lambda copy: tracker.label(copy, WEIGHT_CASTS))
        )
        if options.compiled == "follow":
            stack.enter_context(_through_the_compiler(tracker, options))
        yield
    if simulation := active_simulation():
        for name in simulation.missing:
            tracker.warn(
                f"the C extension {name} has no entry in the table, and its package went on without it"
            )


def _through_the_compiler(tracker: Tracker, options: Options) -> AbstractContextManager[Any]:
    from .inductor import followed  # the compiler takes seconds to import

    if options.torch_version != torch.__version__:
        tracker.warn(f"what the compiler makes is the installed PyTorch's, {torch.__version__}")
    return followed(tracker, options.target)


def make_tracker(model: nn.Module, options: Options, on_gpu: bool) -> tuple[Tracker, History]:
    """A tracker that has seen what happened before the first step, and what that was."""
    seen = options.histories[0] if options.histories else History()
    tracker = Tracker(
        ("meta",) if on_gpu else ("meta", "cpu"),
        vocabulary=vocabulary(model),
        kernels=CudaKernels(options.capability, options.torch_version) if on_gpu else None,
        first_id=max((identity for identity, _ in seen.events), default=0) + 1,
        outputs=device_outputs if on_gpu else cpu_outputs,
        device=active(),
        known_outputs=options.outputs,
    )
    tracker.values = Values(options.scalars, options.answers, host_is_device=not on_gpu)
    tracker.values.counts_evenly = active() is not None  # experts on several GPUs
    tracker.values.chosen_share = options.chosen_share
    if active_simulation() is not None:
        tracker.on_card, tracker.values.carrying = (
            on_card,
            True,
        )  # packages ask whether a gradient is 1
    tracker.phase_of = options.phase_of
    tracker.workspaces.cudnn_bytes = options.cudnn_workspace_bytes
    if on_gpu and (warning := older_than_the_rules(options.torch_version)):
        tracker.warn(warning)
    if options.origins:
        tracker.origins = Origins(model)
    if options.costs:
        tracker.costs = CostRecorder(options.steps - 1, active().gpus if active() else 1)
        tracker.costs.module_now = tracker.origins and tracker.origins.module
    tracker.events += seen.events
    tracker.components.update({identity: LOADING for identity, _ in seen.events if identity > 0})
    tracker.components.update(seen.components)
    return tracker, seen


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: Step | None,
    batch: Any = None,
    options: Options | None = None,
) -> Report:
    """Measure on the CPU what :func:`trace_step` with ``target="cpu"`` predicts: the same tracker over real tensors.

    The parameters are those of :func:`trace_step`; the model holds data, and so does the batch. What
    ``torch.compile`` has compiled is refused or runs without the compiler here too: under a tracker it can't compile.
    """
    options = options or Options()
    tracker = Tracker(("cpu",), vocabulary=vocabulary(model))
    tracker.origins = Origins(model) if options.origins else None
    tracker.phase_of = options.phase_of
    for followed in (model, *options.beside):
        _follow_model(tracker, followed, label=options.label)
    _follow_states(tracker, optimizer)
    with (
        compiled_functions(tracker, options.compiled),
        layers_of(options.bitsandbytes_version),
        patched(sorted_sets(model)),
    ):
        take_steps(
            tracker, model, step, batch, options.previous_batch, options.steps, options.begin
        )
    check_updates(tracker, optimizer, options.steps)
    if options.previous_batch is None:
        warn_of_growth(tracker)
    return make_report(tracker, on_gpu=False, timeline=options.timeline)


def _follow_model(
    tracker: Tracker, model: nn.Module, ids: Any = None, label: Label | None = None
) -> None:
    """Begin to follow a model's parameters, buffers and quantization states; ``ids``: of those already recorded."""
    ids, component = ids or {}, component_of(model, label)

    def add(tensor: torch.Tensor, component: str) -> None:
        if component == HOST:
            tracker.leave_on_host(tensor)
            return
        for part in parts(tensor):
            tracker.add(part, component, identity=ids.get(part.untyped_storage()._cdata))

    for name, parameter in model.named_parameters():
        add(parameter, component(name, parameter))
        for tensor in quantization_state(parameter).values():
            add(tensor, QUANTIZATION_STATE)
    for name, buffer in model.named_buffers():
        add(buffer, component(name, buffer))
    for name, module in model.named_modules():  # whatever hangs on a module and is neither
        states = quantization_state(module)
        for tensor in (
            states.values()
        ):  # FSDP leaves of a 4-bit weight a plain one, and its states with the module
            add(tensor, QUANTIZATION_STATE)
        if states and hasattr(module, "weight"):  # a parametrization has states alone
            tracker.label(module.weight, weights_with(states))
        for key, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else (value,)
            for tensor in held:
                if isinstance(tensor, torch.Tensor):
                    add(tensor, component(f"{name}.{key}", tensor))


def _follow_states(tracker: Tracker, optimizer: torch.optim.Optimizer | None) -> None:
    """States that an optimizer has before its first step, as Adagrad's sums."""
    for state in optimizer.state.values() if optimizer is not None else ():
        for value in state.values() if isinstance(state, dict) else ():
            if isinstance(value, torch.Tensor):
                tracker.add(value, OPTIMIZER_STATES)


def _refuse_values(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """A model, or what an optimizer updates, that is not on ``meta``."""
    held = [(f"The parameter {name}", parameter) for name, parameter in model.named_parameters()]
    groups = optimizer.param_groups if optimizer is not None else ()
    held += [
        ("A parameter of the optimizer", parameter)
        for group in groups
        for parameter in group["params"]
    ]
    for name, parameter in held:
        if parameter.device.type != "meta":
            raise TraceError(
                f"{name} lies on the device {parameter.device}, not on meta.",
                "Build the model inside `with on_meta():` or `with torch.device('meta'):`, or call `model.to('meta')`,"
                " and the optimizer after it.",
            )


def recorded(act: Callable[[], T]) -> tuple[T, History]:
    """Run what allocates on ``meta`` before the first step, such as dividing a model; returns the history of it too.

    It has to leave nothing on the device but what the model holds.
    """
    device = active()
    tracker = Tracker(("meta",), device=device)
    with ExitStack() as stack:
        if device is not None:
            stack.enter_context(listening(tracker, device))
        stack.enter_context(patched(past_operators(tracker)))
        stack.enter_context(tracker)
        result = act()
    history = History(list(tracker.events), tracker.ids)
    tracker.close()
    return result, history
