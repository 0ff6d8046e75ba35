"""The gate between planning and training: stop before it costs anything when the step does not fit the GPU.

What counts is the memory that is free, not what the card says in its name. The step is judged as the configuration
allows it at most; where that does not fit, at the longest batch that the data really have. Nothing is changed in
silence: a step that does not fit fails the rule with the numbers, the GPU and what would fit; an explicit override
lets it through and is recorded, so that the model card says so. The stages beside the step:
:mod:`scripts.memory.price_run`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_report, write_report
from scripts.common.job import job, log
from scripts.engine.cuda_rules import DEFAULT_CAPABILITY
from scripts.memory.gpus import GIB, Gpu, find, from_device, holders, tightest, verdict
from scripts.settings.scenario import Scenario

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
    setting: Any, cluster: Sequence[Any] = (), required_bytes: int = 0, traced: Mapping[str, Any] | None = None
) -> Gpu | None:
    """The GPU to fit: the one that is named, or for ``auto`` where the job will run.

    That is, of a cluster's, the smallest that holds ``required_bytes``, for which its job asks; the largest where none
    does. Without a cluster it is the first one found in the machine (None without one); for a traced step over several
    GPUs, the one of them that has the least left beside the step.
    """
    if setting != "auto":
        return find(setting, "memory.gate.gpu")
    if not cluster:
        found = found_in_machine(scenario_of(traced).parallel.gpus if traced else 1)
        return tightest(found, lambda gpu: traced_on(traced, gpu)["required_bytes"]) if found else None
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
    from scripts.training.packing import common_prefix
    from scripts.training.train import planned_steps

    rows = read_rows(train)
    prefix = common_prefix(rows) if scenario.packing == "shared_prefix" else 0
    count = longest = 0
    for shares in planned_steps(rows, scenario, dict(loop), seed, prefix):
        for packs in chain.from_iterable(shares):
            count = max(count, len(packs))
            longest = max(longest, *(prefix + sum(len(row.input_ids) - prefix for row in pack) for pack in packs))
    return replace(scenario, micro_batch=count, sequence_length=longest)


def traced_on(traced: Mapping[str, Any], gpu: Gpu | None) -> Mapping[str, Any]:
    """The trace of the step for a GPU: what is there, or anew for one that runs other kernels."""
    if gpu is None or (gpu.capability or DEFAULT_CAPABILITY) == tuple(traced["capability"] or DEFAULT_CAPABILITY):
        return traced["trace"]
    from scripts.memory.trace import trace

    return trace(scenario_of(traced), capability=gpu.capability, timeline=False)


def scenario_of(traced: Mapping[str, Any]) -> Scenario:
    """The scenario of a trace's file."""
    return Scenario.from_mapping(traced["scenario"], defaults={}, where="the configuration")


def decide(
    traced: Mapping[str, Any], gpu: Gpu | None, override: bool, longest: Scenario | None = None
) -> dict[str, Any]:
    """Judge a traced step.

    Parameters
    ----------
    longest
        The step at the longest batch of the data, if it is known: where the configuration's own does not fit, that one
        decides, since no other will be taken.

    Returns
    -------
    dict
        ``gpu``, ``fits`` and ``headroom_bytes`` (None when nothing was checked), ``required_bytes`` and
        ``peak_allocated_bytes`` of the step that decided, ``configured`` (those of the configured one), ``override``
        (as configured), ``overridden`` (it was needed), ``reason``, ``suggestions`` (what would fit, if it does not),
        ``effective_batch``.
    """
    scenario, configured = scenario_of(traced), traced_on(traced, gpu)
    step = configured
    suggestions: list[dict[str, Any]] = []
    answer: dict[str, Any] = {"fits": None, "headroom_bytes": None}
    reason = NOTHING_TO_GATE
    if gpu is not None:
        answer = verdict(step["required_bytes"], gpu)
        reason = f"the step needs {step['required_bytes'] / GIB:.2f} GiB; {gpu.room}"
        if not answer["fits"] and longest is not None and longest != scenario:
            from scripts.memory.trace import trace

            real = trace(longest, capability=gpu.capability, timeline=False)
            size = f"{longest.micro_batch} x {longest.sequence_length} tokens"
            if verdict(real["required_bytes"], gpu)["fits"]:
                reason = (
                    f"at the longest batch of the data, {size}, the step needs {real['required_bytes'] / GIB:.2f} GiB"
                    f" ({step['required_bytes'] / GIB:.2f} as configured); {gpu.room}"
                )
                answer, step = verdict(real["required_bytes"], gpu), real
        if not answer["fits"]:
            from scripts.planner.search import suggest

            suggestions = suggest(scenario, gpu, step)
            missing = {one: traced_on(traced, one)["required_bytes"] - one.usable_bytes for one in (gpu, *gpu.others)}
            short = [one for one in missing if missing[one] > 0]
            if all(one.held_bytes >= missing[one] for one in short):
                ended = [name for one in short for name in one.holders or (f"the other processes on {one.label}",)]
                freed = {
                    "changes": {},
                    "cost": "nothing of this run",
                    "headroom_bytes": answer["headroom_bytes"] + gpu.held_bytes,
                    "peak_allocated_bytes": step["peak_allocated_bytes"],
                    "required_bytes": step["required_bytes"],
                    "write": f"# end {', '.join(dict.fromkeys(ended))}",
                }
                suggestions.insert(0, freed)
    return {
        **answer,
        "configured": {key: configured[key] for key in ("peak_allocated_bytes", "required_bytes")},
        "effective_batch": scenario.micro_batch * scenario.gradient_accumulation * scenario.parallel.gpus,
        "gpu": gpu.to_mapping() if gpu else None,
        "overridden": override and answer["fits"] is False,
        "override": override,
        "peak_allocated_bytes": step["peak_allocated_bytes"],
        "reason": reason,
        "required_bytes": step["required_bytes"],
        "suggestions": suggestions,
    }


def refusal(decision: Mapping[str, Any]) -> UserError:
    """The message of a step that does not fit."""
    options = [f"{item['write']}   # {item['cost']}" for item in decision["suggestions"]]
    return UserError(
        f"The training step does not fit: {decision['reason']}, {-decision['headroom_bytes'] / GIB:.2f} GiB too few.",
        where="training (and memory.gate.gpu) in the configuration",
        allowed="one of these, the cheapest first (the effective batch stays"
        f" {decision['effective_batch']}); or memory.gate.override: true, which the model card will mention",
        write="\n".join(options) or "memory: {gate: {override: true}}",
    )


def main(
    traced: str,
    settings: Mapping[str, Any],
    output: str,
    *,
    encoded: str | None = None,
    train: str = "",
    loop: Mapping[str, Any] | None = None,
    cluster: Sequence[Any] = (),
) -> None:
    """Judge the step; with the encoded rows (and ``loop``, the seed in it) also at their longest batch."""
    known = read_report(traced)
    gpu = chosen_gpu(settings["gpu"], cluster, known["trace"]["required_bytes"], known)
    longest = None
    if encoded is not None:
        read_report(encoded, train)
    if encoded is not None and gpu is not None and gpu.usable_bytes < known["trace"]["required_bytes"]:
        longest = longest_batch(train, scenario_of(known), loop, loop["seed"])
    decision = decide(known, gpu, settings["override"], longest)
    if decision["fits"] is False and not decision["override"]:
        raise refusal(decision)
    write_report(output, decision)
    if decision["overridden"]:
        log.warning("OVERRIDDEN: %s", decision["reason"])
    else:
        log.info("%s", decision["reason"])


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
