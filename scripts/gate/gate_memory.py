"""The gate between planning and training: stop before it costs anything when the step does not fit the GPU.

What counts is the memory that is free, not what the card says in its name. The step is judged as the configuration
allows it at most; where that does not fit, at the longest batch that the data really have. Nothing is changed in
silence: a step that does not fit fails the rule with the numbers, the GPU and what would fit; an explicit override
lets it through and is recorded, so that the model card says so. The stages beside the step:
:mod:`scripts.gate.price_run`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from scripts.common.errors import UserError
from scripts.common.files import read_report, write_report
from scripts.common.job import job, log
from scripts.memory.gpus import GIB, Gpu, Verdict, find, from_device, holders, tightest, verdict
from scripts.memory.trace_step import Traced
from scripts.settings.scenario import Scenario

if TYPE_CHECKING:
    from scripts.planner.search import Suggestion

NOTHING_TO_GATE = "no GPU found or named: nothing to gate"


def found_in_machine(gpus: int = 1) -> list[Gpu]:
    """The first CUDA devices of this machine, in CUDA_VISIBLE_DEVICES's order, with what is free of each now.

    Those are what as many processes use, the process of rank 0 the first. Fewer, or none, where there are no more.
    """
    import torch

    found = []
    for index in range(min(gpus, torch.cuda.device_count() if torch.cuda.is_available() else 0)):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)  # makes this process's context, which is then not free
        capability, held_by = (properties.major, properties.minor), holders(str(properties.uuid), os.getpid())
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
        return tightest(found, lambda gpu: traced.on(gpu)["required_bytes"]) if found else None
    gpus = sorted((find(gpu, "cluster.gpus") for gpu in cluster), key=lambda gpu: gpu.usable_bytes)
    return next((gpu for gpu in gpus if gpu.usable_bytes >= required_bytes), gpus[-1])


def longest_batch(train: str, scenario: Scenario, loop: Mapping[str, Any], seed: int) -> Scenario:
    """The step at the longest micro-batch of the whole training: as many rows or packs, as many tokens.

    Parameters
    ----------
    train
        The encoded training split.
    loop
        ``rows_per_step``, ``epochs``, ``max_steps``, which with the seed decide which rows meet.
    """
    from scripts.training.batches import read_rows
    from scripts.training.loop import planned_steps
    from scripts.training.packing import common_prefix

    rows = read_rows(train)
    prefix = common_prefix(rows) if scenario.packing == "shared_prefix" else 0
    count = longest = 0
    for shares in planned_steps(rows, scenario, dict(loop), seed, prefix):
        for packs in chain.from_iterable(shares):
            count = max(count, len(packs))
            longest = max(longest, *(prefix + sum(len(row.input_ids) - prefix for row in pack) for pack in packs))
    return replace(scenario, micro_batch=count, sequence_length=longest)


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
    """

    gpu: Gpu | None
    verdict: Verdict
    reason: str
    effective_batch: int
    step: Mapping[str, Any]
    configured: Mapping[str, Any]
    override: bool
    suggestions: "Sequence[Suggestion]" = ()

    @property
    def overridden(self) -> bool:
        """Whether the step does not fit, and runs."""
        return self.override and self.verdict.fits is False

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sizes = ("peak_allocated_bytes", "required_bytes")
        return {
            **self.verdict._asdict(),
            **{key: self.step[key] for key in sizes},
            "configured": {key: self.configured[key] for key in sizes},
            "effective_batch": self.effective_batch,
            "gpu": self.gpu.to_mapping() if self.gpu else None,
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
        reason = f"the step needs {step['required_bytes'] / GIB:.2f} GiB{how}; {gpu.room}"
        fits = verdict(step["required_bytes"], gpu).fits
        if not fits and longest is not None and longest != scenario:
            from scripts.memory.trace import trace

            real = trace(longest, capability=gpu.capability, timeline=False)
            if verdict(real["required_bytes"], gpu).fits:
                reason = (
                    f"at the longest batch of the data, {longest.micro_batch} x {longest.sequence_length} tokens, the"
                    f" step needs {real['required_bytes'] / GIB:.2f} GiB ({step['required_bytes'] / GIB:.2f} as"
                    f" configured); {gpu.room}"
                )
                fits, step = True, real
        if not fits:
            from scripts.planner.search import suggest

            suggestions = [*_processes_to_end(traced, gpu), *suggest(scenario, gpu, step)]
    effective_batch = scenario.micro_batch * scenario.gradient_accumulation * scenario.parallel.gpus
    judged = verdict(step["required_bytes"], gpu)
    return Decision(gpu, judged, reason, effective_batch, step, configured, override, suggestions)


def _processes_to_end(traced: Traced, gpu: Gpu) -> "list[Suggestion]":
    """To end the processes that hold memory on this machine's GPUs, where that alone is enough."""
    from scripts.planner.search import Suggestion

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
            headroom_bytes=verdict(step["required_bytes"], gpu).headroom_bytes + gpu.held_bytes,
        )
    ]


def refusal(decision: Decision) -> UserError:
    """The message of a step that does not fit."""
    options = [f"{item.write}   # {item.cost}" for item in decision.suggestions]
    missing = -decision.verdict.headroom_bytes
    return UserError(
        f"The training step does not fit: {decision.reason}, {missing / GIB:.2f} GiB too few.",
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
    longest = None
    if encoded is not None:
        read_report(encoded, train)
        if gpu is not None and gpu.usable_bytes < required:
            longest = longest_batch(train, traced.scenario, loop, loop["seed"])
    decision = decide(traced, gpu, settings["override"], longest)
    if decision.verdict.fits is False and not decision.override:
        raise refusal(decision)
    write_report(output, decision.to_mapping())
    if decision.overridden:
        log.warning("OVERRIDDEN: %s", decision.reason)
    else:
        log.info("%s", decision.reason)


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
