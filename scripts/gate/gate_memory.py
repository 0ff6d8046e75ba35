"""Rule ``gate_memory``: stop a training whose step does not fit its GPU before it costs anything.

:mod:`scripts.gate.decision` decides. The stages beside the step: :mod:`scripts.gate.check_resources`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dryfit.cards.beside import Process
from dryfit.cards.verdict import verdict
from dryfit.common.files import read_report, write_report
from dryfit.common.terminal import log
from dryfit.hours.step_time import speed_of
from dryfit.tracing.scenario_trace import Traced
from scripts.common.job import job
from scripts.gate.batch_times import batch_shapes, longest_batch
from scripts.gate.decision import Decision, chosen_gpu, decide_step, hours_of

SIZES = ("peak_allocated_bytes", "required_bytes")
RANK = ("place", "ranks", *SIZES)  # of each kind of GPU on a mesh


def to_mapping(decision: Decision) -> dict[str, Any]:
    """What gate.json holds of a decision about a training step."""
    step = decision.step
    return {
        **step.verdict.to_mapping(),
        **{key: step.step[key] for key in SIZES},
        "configured": {key: step.configured[key] for key in SIZES},
        "effective_batch": step.effective_batch,
        "gpu": step.gpu.to_mapping() if step.gpu else None,
        "hours": decision.hours.to_mapping() if decision.hours else None,
        "overridden": bool(decision.overridden),
        "override": decision.override,
        "ranks": [{key: row[key] for key in RANK} for row in step.step.get("ranks", ())],
        "reason": step.reason,
        "suggestions": [asdict(item) for item in step.suggestions],
    }


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
    limit = settings["hours"]
    if encoded is not None:
        read_report(
            encoded, train
        )  # without a GPU too: an edited file is named by whoever reads it
    if encoded is not None and gpu is not None:
        shapes = batch_shapes(train, traced.scenario, loop)
        if not verdict(traced.on(gpu), gpu, Process.of(traced.scenario)).fits:
            longest = longest_batch(shapes, traced.scenario)
        if limit or cluster:  # a cluster's job asks for so much time
            hours = hours_of(shapes, traced.scenario, speed_of(gpu.name, traced.scenario), gpu)
    step = decide_step(traced, gpu, longest)
    decision = Decision(step, settings["override"], hours=hours, limit_hours=limit)
    decision.enforce()
    write_report(output, to_mapping(decision))
    log.info("%s", step.reason)
    if hours:
        log.info("the training %s", hours.line)
    elif limit and encoded is not None:
        log.warning(
            "memory.gate.hours was not checked: the speed of this %s is not known",
            "GPU" if gpu else "CPU",
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
