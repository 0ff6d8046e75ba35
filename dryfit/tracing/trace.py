"""The memory of a scenario's training step, known before any weight exists.

:mod:`dryfit.tracing.prepare` builds what training builds, on ``meta``, with the history of its loading. The core
takes the step that training takes (:mod:`dryfit.engine.trace`), on one GPU of each kind
(:mod:`dryfit.tracing.ranks`). Whoever traces another step of the same model takes what ``prepare`` gives and calls
the core.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dryfit.cards.gpus import usable_sizes
from dryfit.common.text import gib
from dryfit.engine.card import active_simulation
from dryfit.engine.costs import CostRecorder
from dryfit.engine.fake_deepspeed import fake_deepspeed
from dryfit.engine.fake_device import FakeDevice
from dryfit.engine.fake_group import fake_group
from dryfit.engine.interpolate import Asked, Recording
from dryfit.engine.periods import Unlike
from dryfit.engine.record import Record
from dryfit.engine.report import History, Report, make_report, recording
from dryfit.engine.trace import Options, trace_step
from dryfit.engine.zero_gathered import zero_in_place
from dryfit.hours.cpu import one_thread
from dryfit.hours.step_time import Speed, step_time
from dryfit.scenario.fields import MICRO_BATCHES
from dryfit.scenario.model import LIGER_WRITTEN_OUT, LOOP
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario
from dryfit.step.liger import keep_little, rotating
from dryfit.step.model import attention_kernel, notes, parameter_count
from dryfit.step.quantized import assert_quantized
from dryfit.step.step import random_step
from dryfit.tracing.layers import SHALLOW, Composed, Plans, Traced, size_apart
from dryfit.tracing.loading import host_copy_bytes, loading_history
from dryfit.tracing.pairs import as_rows, reference_beside
from dryfit.tracing.pairs import notes as pair_notes
from dryfit.tracing.prepare import EVEN, Prepared, labels, prepare, speaking_of, traced_attention
from dryfit.tracing.ranks import RankKind, add_ranks, answers_for, kinds_of_ranks
from dryfit.tracing.simulated_card import add_kernels, machine_in_place, ways


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
    stages: MutableMapping[Hashable, tuple[Report, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Predict the memory of a scenario's training step.

    Parameters
    ----------
    scenario
        The step.
    target
        ``cuda``: as PyTorch's CUDA allocator would count it. ``cpu``: bytes of live tensors, as
        :func:`dryfit.tracing.measure.measure` counts them on the CPU.
    capability
        Compute capability of the GPU, such as (8, 0); decides kernels and the size of workspaces.
    timeline, origins
        Whether to return the timeline of the step, and the tensors at its peak.
    both_allocators
        Whether to say what a GPU must have with expandable segments and without them.
    timed_on
        The speeds by name (:func:`dryfit.hours.step_time.speeds`) for which the step's time is asked as well.
    sizes
        Usable bytes of GPUs that are asked about, beside those of the catalogue with the same kernels: the replay says
        of each whether it suffices (:func:`dryfit.cards.verdict.verdict`).

    Returns
    -------
    dict
        See :class:`~dryfit.engine.report.Report`; also ``attention``, the kernel that runs (eager where the
        architecture knows no other), ``notes`` for people, ``parameters`` of the base model, ``trainable_parameters``,
        ``host_copy_bytes`` while it loads (for one GPU) and ``target``; with ``timed_on`` also ``times``, by name a
        :class:`~dryfit.hours.step_time.StepTime` or None where the card's speed is not known. A step that
        generates has ``phase_seconds`` instead, by name what :func:`dryfit.tracing.cycle_time.trainer_seconds`
        gives.

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
        "report": partial(
            make_report, asked=Asked({*sizes, *usable_sizes(capability)}, both_allocators)
        ),
    }
    with (
        one_thread()
    ):  # nothing is computed, and on a busy machine threads that wait for others take more
        if not scenario.pairs_by_rules:
            return _traced(scenario, target, timed_on, stages, settings)
        settings["beside"] = reference_beside(scenario)
        answer = _traced(as_rows(scenario), target, timed_on, stages, settings)
    return answer | {"notes": [*answer["notes"], *pair_notes(scenario)]}


def _traced(
    scenario: Scenario,
    target: str,
    timed_on: Mapping[str, Speed | None] | None,
    stages: MutableMapping[Hashable, tuple[Report, dict[str, Any]]] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    capability = settings["capability"]
    followed: list[tuple[RankKind, Report]] = []
    for kind, templates in product(kinds_of_ranks(scenario), ways(scenario, target)):
        with machine_in_place(scenario, target, capability, templates) as kernels:
            key = _stage_key(scenario, kind, templates)
            known = stages.get(key) if stages is not None else None
            own, about = known or _followed(
                scenario,
                target,
                partial(prepare, target=target),
                Composed(place=kind.stage),
                kind,
                **settings,
            )
        if stages is not None and scenario.parallel.pipeline > 1:
            stages[key] = own, about
        followed.append((kind, own))
    most, report = max(followed, key=lambda each: _needs(each[1]))
    answer = (
        report.to_mapping() | about | {"attention": attention_kernel(scenario), "target": target}
    )
    if scenario.parallel.meshed:
        add_ranks(answer, followed)
        peaks = [report.peak_allocated_bytes]
    else:
        peaks = [each.peak_allocated_bytes for _, each in followed]
    if (
        kernels.differing
    ):  # the machine has another version, with whose kernels the step would need less
        with machine_in_place(scenario, target, capability, False, unlike=kernels.differing):
            own = partial(prepare, target=target)
            least, _ = _followed(
                scenario, target, own, Composed(place=most.stage), most, **settings
            )
        peaks.append(least.peak_allocated_bytes)
    if scenario.kernels == "unsloth" and scenario.model["model_type"] in LIGER_WRITTEN_OUT:
        peaks.append(_least_of_unsloth(scenario, target, most, settings))
    add_kernels(answer, scenario, kernels, capability, peaks)
    if scenario.parallel.expert > 1:
        _add_unlucky(answer, scenario, target, most, settings)
    if timed_on:
        answer["times"] = _times(scenario, [each.costs for _, each in followed], timed_on)
    if timed_on and scenario.aim.generates and report.costs:
        answer["phase_seconds"] = _phase_seconds(scenario, report.costs, timed_on)
    return answer


def _stage_key(scenario: Scenario, kind: RankKind, templates: bool) -> Hashable:
    """What the step of one of a pipeline's GPUs depends on: the layers of its own stages alone."""
    parallel, own = scenario.parallel, ()
    if parallel.pipeline > 1:
        own = parallel.layers_of_stages(scenario.size("num_hidden_layers"))[
            kind.stage :: parallel.pipeline
        ]
    alike = replace(scenario, parallel=replace(parallel, stage_layers=None))
    return json.dumps(alike.to_mapping(), sort_keys=True), kind.stage, own, templates


def _add_unlucky(
    answer: dict[str, Any],
    scenario: Scenario,
    target: str,
    kind: RankKind,
    settings: Mapping[str, Any],
) -> None:
    """Say what a GPU takes whose experts get all tokens: ``bounds``, and the note that says what is assumed."""
    share = 1 / scenario.parallel.expert
    asked = {**settings, "timeline": False, "origins": False, "costs": False, "chosen_share": share}
    with machine_in_place(scenario, target, asked["capability"], False):
        unlucky, _ = _followed(
            scenario, target, partial(prepare, target=target), Composed(), kind, **asked
        )
    even, whole = answer["peak_allocated_bytes"], unlucky.peak_allocated_bytes
    missing = f"{EVEN}: {gib(max(even, whole))} where one GPU's experts get all tokens, and {gib(even)} here"
    worst = {
        "lowest_bytes": even,
        "highest_bytes": max(even, whole),
        "missing": missing,
        "is_worst_case": True,
    }
    answer.setdefault("bounds", worst)
    answer["notes"] = [missing if note == EVEN else note for note in answer["notes"]]


def _least_of_unsloth(
    scenario: Scenario, target: str, kind: RankKind, settings: Mapping[str, Any]
) -> int:
    """The peak of Unsloth's step with norms, MLPs and rotation that keep what its kernels keep.

    Its products with adapters keep their input in the step's dtype (``fast_lora.py``, ``matmul_lora``), where PEFT's
    keep a copy in the adapters'.
    """

    def prepared(scenario: Scenario) -> Prepared:
        ready = prepare(scenario, target=target)
        keep_little(ready.model)
        return ready

    step = scenario if scenario.method == "full" else scenario.changed(adapter_precision="base")
    asked = {**settings, "timeline": False, "origins": False, "costs": False}
    with machine_in_place(step, target, asked["capability"], False):
        least, _ = _followed(step, target, prepared, Composed(place=kind.stage), kind, **asked)
    return least.peak_allocated_bytes


def _needs(report: Report) -> tuple[int, int]:
    return report.required_bytes or 0, report.peak_allocated_bytes


def _times(
    scenario: Scenario, costs: Sequence[CostRecorder | None], timed_on: Mapping[str, Speed | None]
) -> dict[str, dict[str, Any] | None]:
    """What the step takes on cards, by their names, of the slowest of the GPUs; None where a speed is not known."""
    if scenario.aim.trainer:  # two updates together
        return dict.fromkeys(timed_on)
    rows = scenario.micro_batch * scenario.gradient_accumulation * scenario.parallel.rows_at_once
    parallel = scenario.parallel
    left_out = (
        max(scenario.gradient_accumulation - MICRO_BATCHES, 0) if parallel.pipeline == 1 else 0
    )
    tokens = rows * scenario.sequence_length
    times: dict[str, dict[str, Any] | None] = {}
    for name, speed in timed_on.items():
        of_each = [
            step_time(one, speed, tokens=tokens, micro_batches_left_out=left_out) for one in costs
        ]
        slowest = max(filter(None, of_each), key=lambda time: time.seconds_per_step, default=None)
        if slowest and parallel.pipeline > 1:
            slowest = slowest.in_pipeline(
                parallel.pipeline, parallel.stages, scenario.gradient_accumulation
            )
        times[name] = slowest.to_mapping() if slowest else None
    if scenario.compile != "none":  # the shares were fitted on steps without the compiler
        for time in filter(None, times.values()):
            time |= {"basis": f"{time['basis']}; without the compiler"}
    return times


def _phase_seconds(
    scenario: Scenario, costs: CostRecorder, timed_on: Mapping[str, Speed | None]
) -> dict[str, dict[str, float]]:
    """What the phases of a trainer that generates take on the cards whose speed is known, by their names."""
    from dryfit.step.reinforcement import CycleSteps
    from dryfit.tracing.cycle_time import trainer_seconds

    taken = CycleSteps.of(scenario, whole=False)
    return {
        name: trainer_seconds(costs, speed, scenario, taken)
        for name, speed in timed_on.items()
        if speed
    }


class Recorder:
    """Records training steps on a GPU, loading included: the events that :func:`trace` replays.

    Where a benchmark on the GPU decides, of the ways that it may go the one that needs more. In the place of a package
    that the target has and this machine doesn't, transformers' own loop runs, which needs more too. Steps that differ
    in their length or rows alone take the model that was built for the first.

    ``beside``: another recorder, for GPUs with other kernels: where no card is simulated, models are built alike for
    both.
    """

    def __init__(self, beside: Recorder | None = None) -> None:
        self._prepared: list[tuple[Scenario, Prepared]] = []  # for the card that is simulated
        self._anywhere: list[tuple[Scenario, Prepared]] = (
            beside._anywhere if beside is not None else []
        )
        self._plans: Plans = beside._plans if beside is not None else {}
        self._composed: dict[tuple[bool, int], Composed] = {}

    def __call__(self, scenario: Scenario, capability: tuple[int, int] | None = None) -> Recording:
        settings = {"capability": capability, "costs": False, "report": recording}
        if scenario.pairs_by_rules:
            settings["beside"], scenario = reference_beside(scenario), as_rows(scenario)
        recordings = []
        for kind, way in product(kinds_of_ranks(scenario), ways(scenario, "cuda")):
            new = Composed(often=True, place=kind.stage, plans=self._plans)
            composed = self._composed.setdefault((way, kind.rank), new)
            with one_thread(), machine_in_place(scenario, "cuda", capability, way, missing=LOOP):
                recordings.append(
                    _followed(scenario, "cuda", self._prepare, composed, kind, **settings)[0]
                )
        return max(recordings, key=Recording.peak_bytes) if len(recordings) > 1 else recordings[0]

    def _prepare(self, scenario: Scenario) -> Prepared:
        if scenario.parallel.gpus > 1:  # the model is divided within the group that it steps in
            return prepare(scenario)
        like, built = (
            size_apart(scenario),
            self._prepared if active_simulation() else self._anywhere,
        )
        ready = next((ready for known, ready in built if known == like), None)
        if ready is None:
            ready = prepare(scenario)
            built[:] = [*built, (like, ready)][-len(SHALLOW) :]
        ready.optimizer.zero_grad(set_to_none=True)
        ready.optimizer.state.clear()
        return ready


def record(scenario: Scenario, capability: tuple[int, int] | None = None) -> Recording:
    """The events of one training step, recorded anew."""
    return Recorder()(scenario, capability)


def step_record(scenario: Scenario, capability: tuple[int, int] | None = None) -> Record:
    """What a step did, allocation by allocation; :class:`Unlike` where chance decides about the loading."""
    settings = {"capability": capability, "costs": False, "report": _as_record}
    if scenario.pairs_by_rules:
        settings["beside"], scenario = reference_beside(scenario), as_rows(scenario)
    kind = kinds_of_ranks(scenario)[0]
    return _followed(scenario, "cuda", prepare, Composed(place=kind.stage), kind, **settings)[0]


def _followed(
    scenario: Scenario,
    target: str,
    prepared: Callable[[Scenario], Prepared],
    composed: Composed,
    kind: RankKind,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """The core's answer for a step, with ``settings`` of its own, and what :class:`Prepared` says about the model.

    A deep model's step is composed from shallow models' where its layers repeat (:mod:`dryfit.tracing.layers`).
    """
    if scenario.aim.trainer:
        return _followed_trainer(scenario, target, **settings)
    of_shallow = settings | {"report": _as_record}

    def stepped(shallow: Scenario, enough: Callable[[Record], bool] | None) -> Traced:
        known = {"enough": enough, "outputs": composed.outputs}
        return _stepped(shallow, target, prepared, kind, **known, **of_shallow)

    composed_step = None if settings.get("origins") else composed.record(scenario, stepped)
    if composed_step is None:
        return _stepped(scenario, target, prepared, kind, **settings)
    answer = settings["report"](
        composed_step[0],
        on_gpu=target == "cuda",
        timeline=settings.get("timeline", False),
        expandable_segments=scenario.allocator.expandable_segments,
    )
    return answer, composed_step[1]


def _as_record(tracker: Record, histories: Sequence[History] = (), **_: Any) -> Record:
    if len(histories) > 1:
        raise Unlike("chance decides about the order of loading")
    return tracker


def _stepped(
    scenario: Scenario,
    target: str,
    prepared: Callable[[Scenario], Prepared],
    kind: RankKind,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """The same of a step that is taken layer by layer."""
    gpus, zero = scenario.parallel.gpus, scenario.parallel.zero_stage
    make_step = partial(random_step, device="meta", max_grad_norm=1.0)
    with (
        fake_group(gpus, kind.rank) if gpus > 1 else nullcontext() as device,
        _deepspeed(device, scenario, target) if zero else nullcontext(),
    ):
        ready = prepared(scenario)
        wrap, optimizer = ready.wrap, ready.optimizer
        on_host = (
            zero and scenario.zero_settings.offload_optimizer != "none"
        )  # which takes the updates then
        with speaking_of(scenario), rotating(ready.model):
            answer = trace_step(
                ready.model,
                None if on_host else optimizer,
                make_step(ready.model, optimizer, scenario) if wrap is None else None,
                options=Options(
                    target=target,
                    histories=ready.histories,
                    label=ready.label,
                    expandable_segments=scenario.allocator.expandable_segments,
                    bitsandbytes_version=scenario.versions.bitsandbytes,
                    platform=scenario.platform,
                    answers=answers_for(kind),
                    compiled=compiled_steps(scenario, target),
                    begin=None if wrap is None else lambda: make_step(wrap(), optimizer, scenario),
                    scalars=1.0
                    if scenario.loss == "liger"
                    else None,  # Liger counts the tokens with a label
                    **settings,
                ),
            )
    return answer, ready.about


def _deepspeed(device: FakeDevice, scenario: Scenario, target: str) -> AbstractContextManager[None]:
    """DeepSpeed's package, or what its rules exchange."""
    if not scenario.zero_by_rules:
        return fake_deepspeed(device, target)
    return zero_in_place(scenario.parallel.zero_stage)


def _followed_trainer(
    scenario: Scenario, target: str, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """The core's answer for a whole ``train()`` of TRL's trainer, and what is known of its model."""
    from dryfit.engine.trainer import trace_trainer
    from dryfit.step.objectives import build_trainer

    about: dict[str, Any] = {}
    if not scenario.aim.generates:  # of two updates, which a time of one can't be made of
        settings |= {"costs": False}
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
        about["notes"] = [
            *notes(model, scenario),
            f"the step is one of trl's {type(trainer).__name__}",
        ]
        about["parameters"] = parameter_count(model)
        about["trainable_parameters"] = sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        histories = [loading_history(model, scenario)] if target == "cuda" else []
        if target == "cuda":
            about["host_copy_bytes"] = host_copy_bytes(model, scenario)
        return replace(options, histories=histories, label=labels(model), beside=trainer.beside)

    with speaking_of(scenario), TemporaryDirectory() as folder:
        answer = trace_trainer(
            lambda: build_trainer(
                scenario,
                "meta",
                Path(folder),
                attention_implementation=traced_attention(scenario, target),
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
