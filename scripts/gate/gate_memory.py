"""The gate between planning and training: stop before it costs anything when the step does not fit the GPU.

What counts is the memory that is free, not what the card says in its name. The step is judged as the configuration
allows it at most; where that does not fit, at the longest batch that the data really have. Nothing is changed in
silence: a step that does not fit fails the rule with the numbers, the GPU and what would fit; an explicit override
lets it through and is recorded, so that the model card says so. The stages beside the step:
:mod:`scripts.gate.check_resources`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from scripts.common.job import job
from scripts.gate.batch_times import Shapes, batch_shapes, refusal_of_hours, too_long, training_seconds
from will_it_fit.cards.gpus import GIB, Gpu, Verdict, find, from_device, least_free, processes_on, verdict
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_report, write_report
from will_it_fit.common.terminal import log
from will_it_fit.hours.run_time import RunHours
from will_it_fit.hours.step_time import speed_of
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.tracing.scenario_trace import Traced

if TYPE_CHECKING:
    from will_it_fit.planner.suggestions import Suggestion

NOTHING_TO_GATE = "no GPU was found, and none was named"


def found_in_machine(gpus: int = 1) -> list[Gpu]:
    """The first CUDA devices of this machine, in CUDA_VISIBLE_DEVICES's order, with what is free of each now.

    Those are what as many processes use, the process of rank 0 the first. Fewer, or none, where there are no more.
    """
    import torch

    found = []
    for index in range(min(gpus, torch.cuda.device_count() if torch.cuda.is_available() else 0)):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)  # makes this process's context, which is then not free
        capability, held_by = (properties.major, properties.minor), processes_on(str(properties.uuid), os.getpid())
        found.append(from_device(properties.name, total_bytes, capability, free_bytes, held_by))
    return found


def chosen_gpu(
    setting: Any, cluster: Sequence[Any] = (), required_bytes: int = 0, traced: Traced | None = None
) -> Gpu | None:
    """The GPU to fit: the one that is named, or for ``auto`` where the job will run.

    That is, of a cluster's, the smallest that holds ``required_bytes``, for which its job asks; the largest where none
    does. Without a cluster it is the first one found in the machine (None without one); for a traced step over several
    GPUs, the one of them that has the least left beside the step.
    """
    if setting != "auto":
        return find(setting, "memory.gate.gpu")
    if not cluster:
        found = found_in_machine(traced.scenario.parallel.gpus if traced else 1)
        return least_free(found, lambda gpu: traced.on(gpu)["required_bytes"]) if found else None
    gpus = sorted((find(gpu, "cluster.gpus") for gpu in cluster), key=lambda gpu: gpu.usable_bytes)
    return next((gpu for gpu in gpus if gpu.usable_bytes >= required_bytes), gpus[-1])


def longest_batch(shapes: Shapes, scenario: Scenario) -> Scenario:
    """The step at the longest micro-batch of the whole training: as many rows or packs, as many tokens."""
    counts, lengths = zip(*(shape for shares in shapes for share in shares for shape in share), strict=True)
    return replace(scenario, micro_batch=max(counts), sequence_length=max(lengths))


@dataclass(frozen=True)
class Decision:
    """What the gate says of a training step.

    Attributes
    ----------
    gpu, verdict
        The GPU to fit, and whether the step does; ``Verdict(None, None)`` without a GPU: nothing was checked.
    step, configured
        The traces of the step that decided, and of the configured one.
    override
        As configured: a step that does not fit runs all the same.
    suggestions
        What would fit, where the step does not.
    hours, limit_hours
        How long the training takes, where it was asked for and is known, and how long it may.
    """

    gpu: Gpu | None
    verdict: Verdict
    reason: str
    effective_batch: int
    step: Mapping[str, Any]
    configured: Mapping[str, Any]
    override: bool
    suggestions: "Sequence[Suggestion]" = ()
    hours: RunHours | None = None
    limit_hours: float | None = None

    @property
    def refused(self) -> bool:
        """Whether the step does not fit, or the training takes too long."""
        return self.verdict.fits is False or too_long(self.hours, self.limit_hours)

    @property
    def overridden(self) -> bool:
        """Whether what is refused runs all the same."""
        return self.override and self.refused

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sizes = ("peak_allocated_bytes", "required_bytes")
        return {
            **self.verdict._asdict(),
            **{key: self.step[key] for key in sizes},
            "configured": {key: self.configured[key] for key in sizes},
            "effective_batch": self.effective_batch,
            "gpu": self.gpu.to_mapping() if self.gpu else None,
            "hours": self.hours.to_mapping() if self.hours else None,
            "overridden": self.overridden,
            "override": self.override,
            "reason": self.reason,
            "suggestions": [asdict(item) for item in self.suggestions],
        }


def decide(traced: Traced, gpu: Gpu | None, override: bool, longest: Scenario | None = None) -> Decision:
    """Judge a traced step.

    Parameters
    ----------
    longest
        The step at the longest batch of the data, if it is known: where the configuration's own does not fit, that one
        decides, since no other will be taken.
    """
    scenario, configured = traced.scenario, traced.on(gpu)
    step, suggestions, reason = configured, [], NOTHING_TO_GATE
    if gpu is not None:
        how = " with expandable segments, which training sets" if scenario.allocator.expandable_segments else ""
        reason = f"the step needs {step['required_bytes'] / GIB:.2f} GiB{how}; {gpu.capacity_line}"
        fits = verdict(step, gpu).fits
        if not fits and longest is not None and longest != scenario:
            from will_it_fit.tracing.trace import trace

            real = trace(longest, capability=gpu.capability, timeline=False, sizes=[gpu.usable_bytes])
            if verdict(real, gpu).fits:
                reason = (
                    f"at the longest batch of the data, {longest.micro_batch} x {longest.sequence_length} tokens, the"
                    f" step needs {real['required_bytes'] / GIB:.2f} GiB ({step['required_bytes'] / GIB:.2f} as"
                    f" configured); {gpu.capacity_line}"
                )
                fits, step = True, real
        if not fits:
            from will_it_fit.planner.suggestions import suggest

            suggestions = [*_processes_to_end(traced, gpu), *suggest(scenario, gpu, step)]
    effective_batch = scenario.micro_batch * scenario.gradient_accumulation * scenario.parallel.gpus
    judged = verdict(step, gpu)
    return Decision(gpu, judged, reason, effective_batch, step, configured, override, suggestions)


def _processes_to_end(traced: Traced, gpu: Gpu) -> "list[Suggestion]":
    """To end the processes that hold memory on this machine's GPUs, where that alone is enough."""
    from will_it_fit.planner.suggestions import Suggestion

    step = traced.on(gpu)
    missing = {one: traced.on(one)["required_bytes"] - one.usable_bytes for one in (gpu, *gpu.others)}
    short = [one for one in missing if missing[one] > 0]
    if any(one.held_bytes < missing[one] for one in short):
        return []
    ended = [name for one in short for name in one.holders or (f"the other processes on {one.label}",)]
    return [
        Suggestion(
            move="end_processes",
            changes={},
            write=f"# end {', '.join(dict.fromkeys(ended))}",
            cost="nothing of this run",
            peak_allocated_bytes=step["peak_allocated_bytes"],
            required_bytes=step["required_bytes"],
            headroom_bytes=verdict(step, gpu).headroom_bytes + gpu.held_bytes,
        )
    ]


def refusal(decision: Decision) -> UserError:
    """The message of a step that does not fit."""
    options = [f"{item.write}   # {item.cost}" for item in decision.suggestions]
    missing = -decision.verdict.headroom_bytes
    return UserError(
        f"The training step does not fit: {decision.reason}, short by {missing / GIB:.2f} GiB.",
        where="training (and memory.gate.gpu) in the configuration",
        allowed="one of these, the cheapest first (the effective batch stays"
        f" {decision.effective_batch}); or memory.gate.override: true, which the model card will mention",
        write="\n".join(options) or "memory: {gate: {override: true}}",
    )


def main(
    trace: str,
    settings: Mapping[str, Any],
    output: str,
    *,
    encoded: str | None = None,
    train: str = "",
    loop: Mapping[str, Any] | None = None,
    cluster: Sequence[Any] = (),
) -> None:
    """Judge the step; with the encoded rows (and ``loop``, the seed in it) also at their longest batch."""
    traced = Traced.read(trace)
    required = traced.trace["required_bytes"]
    gpu = chosen_gpu(settings["gpu"], cluster, required, traced)
    longest = hours = None
    limit, speed = settings["hours"], gpu and speed_of(gpu.name)
    if encoded is not None:
        read_report(encoded, train)  # without a GPU too: an edited file is named by whoever reads it
    if encoded is not None and gpu is not None:
        shapes = batch_shapes(train, traced.scenario, loop)
        if gpu.usable_bytes < required:
            longest = longest_batch(shapes, traced.scenario)
        if speed and (limit or cluster):  # a cluster's job asks for so much time
            seconds = training_seconds(shapes, traced.scenario, speed, capability=gpu.capability)
            hours = RunHours.of(len(shapes), seconds, None, speed, traced.scenario.parallel.gpus)
    decision = replace(decide(traced, gpu, settings["override"], longest), hours=hours, limit_hours=limit)
    if decision.verdict.fits is False and not decision.override:
        raise refusal(decision)
    if decision.refused and not decision.override:
        raise refusal_of_hours(hours, limit)
    write_report(output, decision.to_mapping())
    if decision.overridden:
        log.warning("OVERRIDDEN: %s", decision.reason)
    else:
        log.info("%s", decision.reason)
    if hours:
        log.info("the training %s", hours.line)
    elif limit and encoded is not None:
        log.warning(
            "memory.gate.hours was not checked: the speed of this %s is not known", "GPU" if gpu else "processor"
        )


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.input.trace,
            snakemake.params.gate,
            snakemake.output.gate,
            encoded=snakemake.input.encoded,
            train=snakemake.input.train,
            loop=snakemake.params.loop,
            cluster=snakemake.params.cluster,
        )
