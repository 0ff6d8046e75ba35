"""The memory of a scenario's training step, known before any weight exists.

:func:`prepare` builds what training builds, on ``meta``, with the history of its loading; the core takes the step that
training takes (:mod:`will_it_fit.engine.trace`). Whoever traces another step of the same model takes what
:func:`prepare` gives and calls the core.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from will_it_fit.cards.gpus import usable_sizes
from will_it_fit.common.errors import UserError
from will_it_fit.engine.attention import flash_attention_package
from will_it_fit.engine.components import ADAPTERS, HOST
from will_it_fit.engine.costs import CostRecorder
from will_it_fit.engine.fake_deepspeed import fake_deepspeed, name_states
from will_it_fit.engine.fake_device import active
from will_it_fit.engine.fake_group import fake_group
from will_it_fit.engine.interpolate import Asked, Recording
from will_it_fit.engine.model_tensors import Label, component_of, quantization_state
from will_it_fit.engine.periods import Unlike
from will_it_fit.engine.record import Record
from will_it_fit.engine.report import History, make_report, recording
from will_it_fit.engine.trace import Options, recorded, trace_step
from will_it_fit.hours.step_time import Speed, step_time
from will_it_fit.scenario.model import LOOP
from will_it_fit.scenario.optimizers import OPTIMIZERS
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.step.adapters import adapter_names
from will_it_fit.step.experts import on_host
from will_it_fit.step.liger import rotating
from will_it_fit.step.model import attention_kernel, attention_name, build_model, notes, parameter_count
from will_it_fit.step.optimizers import build_optimizer
from will_it_fit.step.parallel import parallelize, zero_notes
from will_it_fit.step.quantized import assert_quantized
from will_it_fit.step.step import MICRO_BATCHES, random_step
from will_it_fit.tracing.imports import import_libraries
from will_it_fit.tracing.layers import SHALLOW, Composed, Traced, size_apart
from will_it_fit.tracing.loading import Loader, host_copy_bytes, loading_history
from will_it_fit.tracing.simulated_card import add_kernels, compile_parts, machine_in_place, ways
from will_it_fit.tracing.step_errors import speaking_of

ORDERS = 5  # of a loading that chance orders


@dataclass(frozen=True)
class Prepared:
    """A scenario on ``meta``, ready for its first step: arguments of :func:`~will_it_fit.engine.trace.trace_step`.

    Attributes
    ----------
    model, optimizer, histories, label
        FSDP's model is divided already; the history says how its parts came to the device.
    wrap
        For DDP and DeepSpeed, which wrap the model on its device: gives the wrapped model, and allocates. None: nothing
        to do.
    about
        ``parameters`` of the base model, ``trainable_parameters``, and ``notes`` for people.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    histories: Sequence[History]
    label: Label
    wrap: Callable[[], nn.Module] | None
    about: dict[str, Any]


def prepare(
    scenario: Scenario,
    target: str = "cuda",
    *,
    loader: Loader | None = None,
    orders: int | None = None,
    attention_implementation: str | None = None,
) -> Prepared:
    """Build a scenario's model and optimizer on ``meta``, and what happens on the device until they are there.

    Parameters
    ----------
    loader
        How the model comes to the device; the installed versions' way when None.
    orders
        How many orders of loading to replay. None: several where threads load and chance decides, else one.
    attention_implementation
        What transformers calls the attention function that a program took; None: the scenario's.

    For several GPUs the process has to belong to a group of as many (:mod:`will_it_fit.engine.fake_group`), for ZeRO
    within :mod:`will_it_fit.engine.fake_deepspeed`.

    Raises
    ------
    UserError
        If the model can't be built.
    """
    if target not in ("cuda", "cpu"):
        raise UserError("Unknown target of the trace.", found=target, allowed="cuda, cpu", write="target: cuda")
    import_libraries(scenario)
    name = attention_implementation or traced_attention(scenario, target)
    model = build_model(scenario, "meta", attention_implementation=name)
    if scenario.method == "qlora":
        assert_quantized(model, scenario)
    about = {
        "notes": notes(model, scenario) + (zero_notes(scenario) if scenario.parallel.zero_stage else []),
        "parameters": parameter_count(model),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    label = labels(model)
    histories: list[History] = []
    parallel = scenario.parallel
    if target == "cuda" and parallel.gpus == 1:
        about["host_copy_bytes"] = host_copy_bytes(model, scenario)
    if parallel.sharded:
        with speaking_of(scenario):
            model, history = recorded(lambda: _divided(model, scenario))
        histories = [history] if target == "cuda" else []
        if parallel.offload == "cpu":
            label = _offloaded(label)
    compile_parts(model, scenario.compile, scenario.compile_mode)
    optimizer = build_optimizer(model, scenario)
    if target == "cuda" and not parallel.divided:
        loader = loader or Loader.installed()
        orders = orders or (ORDERS if loader.order_is_random(model, scenario) else 1)
        seeds = range(loader.seed, loader.seed + orders)
        histories = [loading_history(model, scenario, 1, replace(loader, seed=seed)) for seed in seeds]
    wrap = partial(parallelize, model, scenario, "meta") if parallel.kind.replicates else None
    if parallel.zero_stage:
        wrap = partial(_engine, model, scenario, optimizer, component_of(model, label))
        if target == "cuda":
            label = _on_host
    return Prepared(model, optimizer, histories, label, wrap, about)


def traced_attention(scenario: Scenario, target: str) -> str:
    """What transformers calls the attention function that runs on a device."""
    name = attention_name(scenario, torch.device(target))
    return flash_attention_package() if name == "flash_attention_2" else name


def labels(model: nn.Module) -> Label:
    """What a scenario's model's parameters and buffers are for, as the core asks: PEFT's additions are adapters."""
    added, away = adapter_names(model), {id(tensor) for tensor in on_host(model)}

    def label(name: str, tensor: torch.Tensor) -> str | None:
        if id(tensor) in away:
            return HOST
        return ADAPTERS if name.replace("_fsdp_wrapped_module.", "") in added else None

    return label


def _divided(model: nn.Module, scenario: Scenario) -> nn.Module:
    """FSDP's model; the statistics of 4-bit weights come to the GPU first."""
    states = [quantization_state(module) for module in model.modules()]
    active().arrived(tensor for state in states for tensor in state.values())
    return parallelize(model, scenario, "meta")


def traced_rank(scenario: Scenario) -> int:
    """Which process is followed: with ZeRO-2 the last, whose gradients come first in backward; else all are alike."""
    return scenario.parallel.gpus - 1 if scenario.parallel.zero_stage == 2 else 0


def _engine(
    model: nn.Module,
    scenario: Scenario,
    optimizer: torch.optim.Optimizer,
    component: Callable[[str, torch.Tensor], str],
) -> nn.Module:
    engine = parallelize(model, scenario, "meta", optimizer)
    name_states(active(), engine, component)
    return engine


def _on_host(name: str, tensor: torch.Tensor) -> str:
    """DeepSpeed brings the model to the GPU itself."""
    return HOST


def _offloaded(label: Label) -> Label:
    """What FSDP has divided lies on the host; what it leaves whole, such as packed bytes, on the GPU."""
    return lambda name, tensor: HOST if hasattr(tensor, "device_mesh") else label(name, tensor)


def trace(
    scenario: Scenario,
    target: str = "cuda",
    *,
    capability: tuple[int, int] | None = None,
    timeline: bool = True,
    origins: bool = False,
    both_allocators: bool = False,
    timed_on: Mapping[str, Speed | None] | None = None,
    sizes: Collection[int] = (),
) -> dict[str, Any]:
    """Predict the memory of a scenario's training step.

    Parameters
    ----------
    scenario
        The step.
    target
        ``cuda``: as PyTorch's CUDA allocator would count it. ``cpu``: bytes of live tensors, as
        :func:`will_it_fit.tracing.measure.measure` counts them on the CPU.
    capability
        Compute capability of the GPU, such as (8, 0); decides kernels and the size of workspaces.
    timeline, origins
        Whether to return the timeline of the step, and the tensors at its peak.
    both_allocators
        Whether to say what a GPU must have with expandable segments and without them.
    timed_on
        The speeds by name (:func:`will_it_fit.hours.step_time.speeds`) for which the step's time is asked as well.
    sizes
        Usable bytes of GPUs that are asked about, beside those of the catalogue with the same kernels: the replay says
        of each whether it suffices (:func:`will_it_fit.cards.gpus.verdict`).

    Returns
    -------
    dict
        See :class:`~will_it_fit.engine.report.Report`; also ``attention``, the kernel that runs (eager where the
        architecture knows no other), ``notes`` for people, ``parameters`` of the base model, ``trainable_parameters``,
        ``host_copy_bytes`` while it loads (for one GPU) and ``target``; with ``timed_on`` also ``times``, by name a
        :class:`~will_it_fit.hours.step_time.StepTime` or None where the card's speed is not known.

    Raises
    ------
    UserError
        If the model can't be built or its step can't be traced.
    """
    settings = {
        "capability": capability,
        "timeline": timeline,
        "origins": origins,
        "costs": bool(timed_on) and any(timed_on.values()),
        "report": partial(make_report, asked=Asked({*sizes, *usable_sizes(capability)}, both_allocators)),
    }
    reports = []
    for templates in ways(scenario, target):
        with machine_in_place(scenario, target, capability, templates) as kernels:
            own, about = _followed(scenario, target, lambda each: prepare(each, target), Composed(), **settings)
        reports.append(own)
    report = max(reports, key=lambda each: (each.required_bytes or 0, each.peak_allocated_bytes))
    answer = report.to_mapping() | about | {"attention": attention_kernel(scenario), "target": target}
    peaks = [each.peak_allocated_bytes for each in reports]
    if kernels.differing:  # the machine has another version, with whose kernels the step would need less
        with machine_in_place(scenario, target, capability, False, unlike=kernels.differing):
            least, _ = _followed(scenario, target, lambda each: prepare(each, target), Composed(), **settings)
        peaks.append(least.peak_allocated_bytes)
    add_kernels(answer, scenario, kernels, capability, peaks)
    if timed_on:
        answer["times"] = _times(scenario, report.costs, timed_on)
    return answer


def _times(
    scenario: Scenario, costs: CostRecorder | None, timed_on: Mapping[str, Speed | None]
) -> dict[str, dict[str, Any] | None]:
    """What the step takes on cards, by their names; None where a card's speed is not known."""
    if scenario.aim.trainer:  # two updates together
        return dict.fromkeys(timed_on)
    rows = scenario.micro_batch * scenario.gradient_accumulation * scenario.parallel.gpus
    left_out = max(scenario.gradient_accumulation - MICRO_BATCHES, 0)
    tokens = rows * scenario.sequence_length
    step_times = {
        name: step_time(costs, speed, tokens=tokens, micro_batches_left_out=left_out)
        for name, speed in timed_on.items()
    }
    times = {name: time.to_mapping() if time else None for name, time in step_times.items()}
    if scenario.compile != "none":  # the shares were fitted on steps without the compiler
        for time in filter(None, times.values()):
            time |= {"basis": f"{time['basis']}; without the compiler"}
    return times


class Recorder:
    """Records training steps on a GPU, loading included: the events that :func:`trace` replays.

    Where a benchmark on the GPU decides, of the ways that it may go the one that needs more. In the place of a package
    that the target has and this machine doesn't, transformers' own loop runs, which needs more too. Steps that differ
    in their length or rows alone take the model that was built for the first.
    """

    def __init__(self) -> None:
        self._prepared: list[tuple[Scenario, Prepared]] = []
        self._composed: dict[bool, Composed] = {}

    def __call__(self, scenario: Scenario, capability: tuple[int, int] | None = None) -> Recording:
        settings = {"capability": capability, "costs": False, "report": recording}
        recordings = []
        for way in ways(scenario, "cuda"):
            composed = self._composed.setdefault(way, Composed(often=True))
            with machine_in_place(scenario, "cuda", capability, way, missing=LOOP):
                recordings.append(_followed(scenario, "cuda", self._prepare, composed, **settings)[0])
        return max(recordings, key=Recording.peak_bytes) if len(recordings) > 1 else recordings[0]

    def _prepare(self, scenario: Scenario) -> Prepared:
        if scenario.parallel.gpus > 1:  # the model is divided within the group that it steps in
            return prepare(scenario)
        like = size_apart(scenario)
        ready = next((ready for known, ready in self._prepared if known == like), None)
        if ready is None:
            ready = prepare(scenario)
            self._prepared = [*self._prepared, (like, ready)][-len(SHALLOW) :]
        ready.optimizer.zero_grad(set_to_none=True)
        ready.optimizer.state.clear()
        return ready


def record(scenario: Scenario, capability: tuple[int, int] | None = None) -> Recording:
    """The events of one training step, recorded anew."""
    return Recorder()(scenario, capability)


def step_record(scenario: Scenario, capability: tuple[int, int] | None = None) -> Record:
    """What a step did, allocation by allocation; :class:`Unlike` where chance decides about the loading."""
    return _followed(scenario, "cuda", prepare, Composed(), capability=capability, costs=False, report=_as_record)[0]


def _followed(
    scenario: Scenario,
    target: str,
    prepared: Callable[[Scenario], Prepared],
    composed: Composed,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """The core's answer for a step, with ``settings`` of its own, and what :class:`Prepared` says about the model.

    A deep model's step is composed from shallow models' where its layers repeat (:mod:`will_it_fit.tracing.layers`).
    """
    if scenario.aim.trainer:
        return _followed_trainer(scenario, target, **settings)
    of_shallow = settings | {"report": _as_record}

    def stepped(shallow: Scenario, enough: Callable[[Record], bool] | None) -> Traced:
        known = {"enough": enough, "outputs": composed.outputs}
        return _stepped(shallow, target, prepared, **known, **of_shallow)

    composed_step = None if settings.get("origins") else composed.record(scenario, stepped)
    if composed_step is None:
        return _stepped(scenario, target, prepared, **settings)
    answer = settings["report"](
        composed_step[0],
        on_gpu=target == "cuda",
        timeline=settings.get("timeline", False),
        expandable_segments=scenario.allocator.expandable_segments,
    )
    return answer, composed_step[1]


def _as_record(tracker: Record, histories: Sequence[History] = (), **_: Any) -> Record:
    """The record itself."""
    if len(histories) > 1:
        raise Unlike("chance decides about the order of loading")
    return tracker


def _stepped(
    scenario: Scenario, target: str, prepared: Callable[[Scenario], Prepared], **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """The same of a step that is taken layer by layer."""
    gpus, zero = scenario.parallel.gpus, scenario.parallel.zero_stage
    make_step = partial(random_step, device="meta", max_grad_norm=1.0)
    with (
        fake_group(gpus, traced_rank(scenario)) if gpus > 1 else nullcontext() as device,
        fake_deepspeed(device, target) if zero else nullcontext(),
    ):
        ready = prepared(scenario)
        wrap, optimizer = ready.wrap, ready.optimizer
        with speaking_of(scenario), rotating(ready.model):
            answer = trace_step(
                ready.model,
                optimizer,
                make_step(ready.model, optimizer, scenario) if wrap is None else None,
                options=Options(
                    target=target,
                    histories=ready.histories,
                    label=ready.label,
                    expandable_segments=scenario.allocator.expandable_segments,
                    bitsandbytes_version=scenario.versions.bitsandbytes,
                    platform=scenario.platform,
                    compiled=compiled_steps(scenario, target),
                    begin=None if wrap is None else lambda: make_step(wrap(), optimizer, scenario),
                    scalars=1.0 if scenario.loss == "liger" else None,  # Liger counts the tokens with a label
                    **settings,
                ),
            )
    return answer, ready.about


def _followed_trainer(scenario: Scenario, target: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The core's answer for a whole ``train()`` of TRL's trainer, and what is known of its model."""
    from will_it_fit.engine.trainer import trace_trainer
    from will_it_fit.step.objectives import build_trainer

    about: dict[str, Any] = {}
    settings |= {"costs": False}  # of two updates, which a time of one can't be made of
    options = Options(
        target=target,
        expandable_segments=scenario.allocator.expandable_segments,
        bitsandbytes_version=scenario.versions.bitsandbytes,
        platform=scenario.platform,
        **settings,
    )

    def complete(trainer: Any, options: Options) -> Options:
        model = trainer.model
        if scenario.method == "qlora":
            assert_quantized(model, scenario)
        about["notes"] = [*notes(model, scenario), f"the step is one of trl's {type(trainer).__name__}"]
        about["parameters"] = parameter_count(model)
        about["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        histories = [loading_history(model, scenario)] if target == "cuda" else []
        if target == "cuda":
            about["host_copy_bytes"] = host_copy_bytes(model, scenario)
        return replace(options, histories=histories, label=labels(model), beside=trainer.beside)

    with speaking_of(scenario), TemporaryDirectory() as folder:
        answer = trace_trainer(
            lambda: build_trainer(
                scenario, "meta", Path(folder), attention_implementation=traced_attention(scenario, target)
            ),
            options,
            complete,
        )
    return answer, about


def compiled_steps(scenario: Scenario, target: str) -> str:
    """How compiled functions are taken: followed where the scenario says so. torchao's optimizers have some too, and a
    CPU under the tracker can't compile."""
    if scenario.compile != "none":
        return "follow"
    if OPTIMIZERS[scenario.optimizer].package != "torchao":
        return "refuse"
    return "fused" if target == "cuda" else "eager"
