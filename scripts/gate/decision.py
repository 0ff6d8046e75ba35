"""Whether a run may start: whether its stages fit the memory and disk that are free, and how long it takes.

Two rules ask. ``gate_memory`` judges the training step, before a weight is downloaded; ``check_resources`` judges every
stage. Both choose the GPU, judge the step and count the hours here. ``memory.gate.override`` lets both through. It is
recorded, and the model card says so.

Free memory counts, not the size in a GPU's name. The step is judged at the longest batch that the configuration allows.
If that does not fit, the longest batch of the data decides. No setting is changed: the message says what to write.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from dryfit.cards import sentences
from dryfit.cards.beside import Process
from dryfit.cards.gpus import GIB, Gpu, find, from_device, least_free, processes_on
from dryfit.cards.verdict import Verdict, Word, verdict
from dryfit.common.errors import UserError
from dryfit.common.terminal import log
from dryfit.common.text import gib
from dryfit.hours.run_time import RunHours
from dryfit.hours.step_time import Speed
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.scenario_trace import Traced
from scripts.common.resource_table import Stage, refused
from scripts.gate.batch_times import Shapes, training_seconds

if TYPE_CHECKING:
    from dryfit.planner.suggestions import Suggestion

NOTHING_TO_GATE = "no GPU was found, and none was named"
OVERRIDE = "memory.gate.override: true, which the model card will mention"


def found_in_machine(gpus: int = 1) -> list[Gpu]:
    """The first CUDA devices of this machine, in CUDA_VISIBLE_DEVICES's order, with what is free of each now.

    As many processes would use them, rank 0 the first one. The list is shorter where the machine has fewer.
    """
    import torch

    gpus_found = []
    for index in range(min(gpus, torch.cuda.device_count() if torch.cuda.is_available() else 0)):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(
            index
        )  # makes this process's context, which is then not free
        capability, held_by = (
            (properties.major, properties.minor),
            processes_on(str(properties.uuid), os.getpid()),
        )
        gpus_found.append(
            from_device(properties.name, total_bytes, capability, free_bytes, held_by)
        )
    return gpus_found


def chosen_gpu(
    setting: Any, cluster: Sequence[Any] = (), required_bytes: int = 0, traced: Traced | None = None
) -> Gpu | None:
    """The GPU to fit: the one that ``setting`` names, or for ``auto`` the one that the job will get.

    A cluster's job asks for the smallest GPU that holds ``required_bytes``, or for the largest where all are smaller.
    Without a cluster it is the machine's first GPU, or None. If ``traced`` takes several GPUs, it is the one of them
    that has the least left beside the step.
    """
    if setting != "auto":
        return find(setting, "memory.gate.gpu")
    if not cluster:
        in_machine = found_in_machine(traced.scenario.parallel.gpus if traced else 1)
        return (
            least_free(in_machine, lambda gpu: traced.on(gpu)["required_bytes"])
            if in_machine
            else None
        )
    gpus = sorted((find(gpu, "cluster.gpus") for gpu in cluster), key=lambda gpu: gpu.usable_bytes)
    return next((gpu for gpu in gpus if gpu.usable_bytes >= required_bytes), gpus[-1])


@dataclass(frozen=True)
class StepDecision:
    """Whether a training step fits a GPU."""

    # The GPU, and whether the step fits it, with the bytes to spare. Without a GPU nothing is checked: ``Verdict()``.
    gpu: Gpu | None
    verdict: Verdict
    reason: str  # the verdict in words, with sizes
    effective_batch: int  # rows of an update of the weights
    # The traces of the step that decided, and of the configured one
    step: Mapping[str, Any]
    configured: Mapping[str, Any]
    suggestions: "Sequence[Suggestion]" = ()  # changes that would fit, where the step does not

    def refusal(self) -> UserError:
        """The message of a step that does not fit."""
        options = [f"{item.write}   # {item.cost}" for item in self.suggestions]
        return UserError(
            f"The training step does not fit: {self.reason}; {self.verdict.reason}.",
            where="training (and memory.gate.gpu) in the configuration",
            allowed="one of these, the cheapest first (the effective batch stays"
            f" {self.effective_batch}); or {OVERRIDE}",
            write="\n".join(options) or "memory: {gate: {override: true}}",
        )


def decide_step(traced: Traced, gpu: Gpu | None, longest: Scenario | None = None) -> StepDecision:
    """Judge a traced step.

    ``longest``: the step at the longest batch of the data, if it is known. It decides where the configured one does not
    fit, since training takes no longer one.
    """
    scenario, configured = traced.scenario, traced.on(gpu)
    step, suggestions, reason, process = configured, [], NOTHING_TO_GATE, Process.of(scenario)
    if gpu is not None:
        how = (
            " with expandable segments, which training sets"
            if scenario.allocator.expandable_segments
            else ""
        )
        reason = f"the step needs {step['required_bytes'] / GIB:.2f} GiB{how}; {gpu.capacity_line}"
        judged = verdict(step, gpu, process)
        if not judged.fits and longest is not None and longest != scenario:
            from dryfit.tracing.trace import trace

            real = trace(
                longest, capability=gpu.capability, timeline=False, sizes=[gpu.usable_bytes]
            )
            if (real_verdict := verdict(real, gpu, process)).fits is not False:
                reason = (
                    f"at the longest batch of the data, {longest.micro_batch} x {longest.sequence_length} tokens, the"
                    f" step needs {real['required_bytes'] / GIB:.2f} GiB ({step['required_bytes'] / GIB:.2f} as"
                    f" configured); {gpu.capacity_line}"
                )
                judged, step = real_verdict, real
        if judged.word is Word.TOO_CLOSE:
            log.warning(
                "The training step %s: %s; %s",
                sentences.said(judged.word.value),
                reason,
                judged.reason,
            )
        if judged.fits is False:
            from dryfit.planner.suggestions import suggest
            from dryfit.scenario.contradictions import TRAINING, contradictions

            def trains(division: Scenario) -> bool:
                return not any(contradictions(division, "training", TRAINING))

            suggestions = [
                *_processes_to_end(traced, gpu),
                *suggest(scenario, gpu, step, allowed=trains),
            ]
    effective_batch = (
        scenario.micro_batch * scenario.gradient_accumulation * scenario.parallel.rows_at_once
    )
    return StepDecision(
        gpu, verdict(step, gpu, process), reason, effective_batch, step, configured, suggestions
    )


def _processes_to_end(traced: Traced, gpu: Gpu) -> "list[Suggestion]":
    """The suggestion to end the processes that hold memory on this machine's GPUs, where that alone is enough."""
    from dryfit.planner.suggestions import Suggestion

    step = traced.on(gpu)
    missing = {
        one: traced.on(one)["required_bytes"] - one.usable_bytes for one in (gpu, *gpu.others)
    }
    short = [one for one in missing if missing[one] > 0]
    if any(one.held_bytes < missing[one] for one in short):
        return []
    ended = [
        name for one in short for name in one.holders or (f"the other processes on {one.label}",)
    ]
    return [
        Suggestion(
            move="end_processes",
            changes={},
            write=f"# end {', '.join(dict.fromkeys(ended))}",
            cost="nothing of this run",
            peak_allocated_bytes=step["peak_allocated_bytes"],
            required_bytes=step["required_bytes"],
            headroom_bytes=(verdict(step, gpu).headroom_bytes or 0) + gpu.held_bytes,
        )
    ]


@dataclass(frozen=True)
class Decision:
    """Whether a run may start."""

    step: StepDecision  # the training step
    override: bool  # ``memory.gate.override``: the run starts although something is refused
    # Every stage, the training step among them; empty where the step alone was asked about
    stages: Sequence[Stage] = ()
    # How long the run takes, or None where that is not known; and ``memory.gate.hours``
    hours: RunHours | None = None
    limit_hours: float | None = None

    @property
    def too_large(self) -> list[str]:
        """Names of what does not fit."""
        if self.stages:
            return [stage.stage for stage in refused(self.stages)]
        return ["the training step"] if self.step.verdict.fits is False else []

    @property
    def too_long(self) -> bool:
        """Whether the run may take longer than ``memory.gate.hours``; False without hours, or without a limit."""
        return (
            self.hours is not None
            and self.limit_hours is not None
            and self.hours.hours_at_most > self.limit_hours
        )

    @property
    def fits(self) -> bool:
        """Whether nothing is refused."""
        return not self.too_large and not self.too_long

    @property
    def overridden(self) -> list[str]:
        """Names of what is refused, where ``override`` lets it run."""
        names = self.too_large + (
            [f"the run within {self.limit_hours:g} hours"] if self.too_long else []
        )
        return names if self.override else []

    def enforce(self) -> None:
        """Stop what is refused; an override is logged instead.

        UserError: with the changes that would fit.
        """
        if not self.fits and not self.override:
            raise self.refusal()
        for name in self.overridden:
            log.warning("OVERRIDDEN: %s does not fit", name)

    def refusal(self) -> UserError:
        """The message of what is refused; a run's table stands above it."""
        if not self.too_large:
            return self._refusal_of_hours()
        return self._refusal_of_stages() if self.stages else self.step.refusal()

    def _refusal_of_stages(self) -> UserError:
        short, gpu = refused(self.stages), self.step.gpu
        sizes = [
            f"{one.stage}: {gib(one.needs_bytes)} of {gib(one.has_bytes)} ({one.place})"
            for one in short
        ]
        for one in (gpu, *gpu.others) if gpu else ():
            if one.held_bytes:
                sizes.append(
                    f"{gib(one.held_bytes)} of {one.label} are held by {', '.join(one.holders) or 'other processes'}"
                )
        changes: dict[str, list[str]] = {}
        for stage in short:
            if stage.change:
                changes.setdefault(stage.change, []).append(stage.stage)
        return UserError(
            "This run does not fit: it ends here, before it trains.",
            where="the stages that say so above",
            found="; ".join(sizes),
            allowed=f"the smallest changes that fit; or {OVERRIDE}",
            write="\n".join(f"{change}   # {', '.join(names)}" for change, names in changes.items())
            or "memory: {gate: {override: true}}",
        )

    def _refusal_of_hours(self) -> UserError:
        return UserError(
            "This run takes too long: it ends here, before it trains.",
            where="memory.gate.hours",
            found=f"{self.limit_hours:g} hours; the run {self.hours.line}",
            allowed=f"fewer epochs, training.max_steps, another GPU; or {OVERRIDE}",
            write=f"memory: {{gate: {{hours: {max(1, ceil(self.hours.hours_at_most)):g}}}}}",
        )


def hours_of(
    shapes: Shapes,
    scenario: Scenario,
    speed: Speed | None,
    gpu: Gpu | None,
    evaluation_seconds: float | None = None,
) -> RunHours | None:
    """How long a training takes with the batches that its data make; None where the speed is not known.

    ``gpu``: None on the CPU. ``evaluation_seconds`` are added, where they are known.
    """
    if speed is None:
        return None
    where = ("cuda", gpu.capability) if gpu else ("cpu", None)
    seconds = training_seconds(shapes, scenario, speed, *where)
    return RunHours.of(len(shapes), seconds, evaluation_seconds, speed, scenario.parallel.gpus)
