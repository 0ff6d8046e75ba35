"""Rule ``measure_memory``: a training step on this machine, beside the trace of the same step for the same device."""

from typing import Any

from dryfit.common.device import set_allocator
from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from dryfit.common.terminal import log
from dryfit.hours.cpu import Cpu
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.measure import TOO_SMALL, measure, time_difference, time_line
from scripts.common.job import job


def main(mapping: dict[str, Any], device: str, output: str, threads: int) -> None:
    """Measure, trace the same step for the same device, and write both.

    A step that the card can't hold is written as such: the training may have passed the gate by its longest real batch,
    or have halved its micro-batches, and its documents are due all the same.
    """
    scenario = Scenario.from_mapping(mapping, where="the configuration")
    set_allocator(scenario.allocator.expandable_segments)
    import torch

    from dryfit.tracing.trace import trace

    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        measured = measure(scenario, device, timed=scenario.aim.trainer is None)
    except UserError as error:
        if TOO_SMALL not in error.problem:
            raise
        log.warning("Not measured. %s", error.problem)
        write_report(output, {"not_measured": error.problem})
        return
    capability = tuple(measured["device"]["capability"]) if device == "cuda" else None
    processor = measured.get("processor")
    speed = Cpu(**processor) if processor else None
    predicted = trace(scenario, device, capability=capability, timeline=False, timed_on={"": speed})
    time = predicted.pop("times", {}).get("")
    if time:
        measured["time"] = time_difference(time, measured)
        log.info("%s", time_line(measured["time"]))
    write_report(
        output,
        measured | {"scenario": scenario.to_mapping(), "trace_on_the_same_device": predicted},
    )
    log.info(
        "measured on this %s: %d bytes at the peak; the trace says %d (%+.3f %%)",
        device,
        measured["peak_allocated_bytes"],
        predicted["peak_allocated_bytes"],
        100 * (predicted["peak_allocated_bytes"] / measured["peak_allocated_bytes"] - 1),
    )


if __name__ == "__main__":
    with job(snakemake):
        traced = read_report(snakemake.input.trace)[
            "scenario"
        ]  # on a cluster it has chosen the GPU
        main(
            {**snakemake.params.scenario, **{key: traced[key] for key in ("model", "model_name")}},
            snakemake.params.device["device"],
            snakemake.output.measure,
            snakemake.threads,
        )
