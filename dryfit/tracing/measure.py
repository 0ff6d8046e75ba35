"""Rule ``measure_memory``: take the training step on this machine and measure what the trace predicts.

On CUDA the caching allocator's own statistics answer; on the CPU, which has none, the trace's tracker follows real
tensors. Weights are random: their values don't matter to memory.
"""

import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.versions import versions
from dryfit.hours.cpu import Probes, one_thread
from dryfit.scenario.scenario import Scenario, check_packages

TOO_SMALL = (
    "The card is too small for this step"  # begins the error of a step that the card can't hold
)
MOST_TIMED, ENOUGH_SECONDS = (
    3,
    5.0,
)  # steps that are timed: so many, and fewer once they took so long


def measure(
    scenario: Scenario,
    device: str,
    *,
    timeline: bool = True,
    timed: bool = False,
) -> dict[str, Any]:
    """Take a scenario's step twice on a device and measure the second.

    ``timeline``: CPU only: whether to return the timeline of the step. ``timed``: CPU only: whether to time steps on
    one thread, between probes and without the tracker, which slows them.

    Returns
    -------
    dict
        With ``timed`` also ``processor``, what the probes found, and of each step ``taken_seconds``, the process's own,
        and ``clock_seconds``, in which others used the CPU too.
        ``peak_allocated_bytes``, ``peak_phase``, ``phases`` and ``resident_bytes`` as the trace has them. On the CPU
        also ``components``, ``timeline`` and ``peak_resident_set_bytes`` of the process; on CUDA also
        ``peak_reserved_bytes`` and ``context_bytes``. ``device`` describes the machine, ``wall_seconds`` is one step.

    Raises :class:`UserError` if the device is not there or too small.
    """
    if scenario.parallel.strategy != "none" or scenario.parallel.meshed:
        raise UserError(
            "A step on several GPUs can't be measured by one process.",
            where="parallel",
            found=asdict(scenario.parallel),
            allowed="strategy: none; the trace predicts the others",
            write="parallel: {strategy: none, gpus: 1}",
        )
    if scenario.aim.trainer and device == "cuda":
        raise UserError(
            "A step of TRL's trainers is measured on the CPU alone.",
            where="device",
            found=device,
            allowed="cpu; or objective sft",
            write="device: cpu",
        )
    if scenario.compile != "none":
        raise UserError(
            "A compiled step isn't measured here: the measurement hears operators, and compiled code has none.",
            where="compile",
            found=scenario.compile,
            allowed="none; the trace predicts the others",
            write="compile: none",
        )
    if scenario.kernels in ("packages", "unsloth") or (
        scenario.kernels != "transformers" and device == "cuda"
    ):
        raise UserError(
            "A step with kernels of packages isn't measured here; Liger's are written out for the CPU alone.",
            where="kernels",
            found=scenario.kernels,
            allowed="transformers; liger with device cpu; the trace predicts the others",
            write="kernels: transformers",
        )
    if scenario.qat == "nvfp4" and device == "cpu":
        raise UserError(
            "torchao's NVFP4 layers multiply with scales that PyTorch knows on GPUs alone.",
            where="qat",
            found=scenario.qat,
            allowed="none, mxfp4; the trace predicts nvfp4",
            write="qat: none",
        )
    check_packages(scenario)
    result = _on_cuda(scenario) if device == "cuda" else _on_cpu(scenario, timeline, timed)
    from dryfit.step.model import attention_kernel

    return result | {
        "attention": attention_kernel(scenario),
        "target": device,
        "versions": versions(),
    }


def _on_cpu(scenario: Scenario, timeline: bool, timed: bool) -> dict[str, Any]:
    if scenario.aim.trainer:
        return _objective_on_cpu(scenario, timeline)
    from dryfit.engine.steps import STEPS
    from dryfit.engine.trace import Options, measure_step
    from dryfit.step.kernel_packages import kernels_in_place, ways_of
    from dryfit.step.liger import rotating
    from dryfit.step.model import build_model, parameter_count
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.step import random_step
    from dryfit.tracing.prepare import labels
    from dryfit.tracing.trace import compiled_steps

    functions = ways_of(scenario, "cpu")
    model = build_model(scenario, "cpu")
    optimizer = build_optimizer(model, scenario)
    step = random_step(model, optimizer, scenario, "cpu", max_grad_norm=1.0)
    options = Options(
        label=labels(model),
        timeline=timeline,
        bitsandbytes_version=scenario.versions.bitsandbytes,
        compiled=compiled_steps(scenario, "cpu"),
    )
    started = time.monotonic()
    with rotating(model), kernels_in_place(scenario, functions):
        report = measure_step(model, optimizer, step, options=options)
    answer = report.to_mapping() | _of_this_cpu(
        (time.monotonic() - started) / STEPS, parameter_count(model)
    )
    return answer | (_timed(scenario, step) if timed else {})


def _timed(scenario: Scenario, step: Callable[[], None]) -> dict[str, Any]:
    """Seconds of steps, and between them what the CPU does in short probes."""
    taken, clock = [], []
    with one_thread() as own_seconds:
        probes = Probes.of(scenario)
        probes.run()
        while not taken or (len(taken) < MOST_TIMED and sum(taken) < ENOUGH_SECONDS):
            started, on_clock = own_seconds(), time.monotonic()
            step()
            taken.append(own_seconds() - started)
            clock.append(time.monotonic() - on_clock)
            probes.run()
    return {
        "processor": probes.found().to_mapping(),
        "taken_seconds": taken,
        "clock_seconds": clock,
    }


def _of_this_cpu(wall_seconds: float, parameters: int) -> dict[str, Any]:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    return {
        "device": {"name": platform.processor() or platform.machine(), "type": "cpu"},
        "parameters": parameters,
        "peak_resident_set_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "wall_seconds": wall_seconds,
    }


def _objective_on_cpu(scenario: Scenario, timeline: bool) -> dict[str, Any]:
    """A whole ``train()`` of TRL's trainer."""
    from dryfit.engine.trace import Options
    from dryfit.engine.trainer import measure_trainer
    from dryfit.step.model import parameter_count
    from dryfit.step.objectives import UPDATES, build_trainer
    from dryfit.tracing.prepare import labels

    counts: dict[str, int] = {}

    def complete(trainer: Any, options: Options) -> Options:
        counts["parameters"] = parameter_count(trainer.model)
        return replace(options, label=labels(trainer.model), beside=trainer.beside)

    started = time.monotonic()
    with TemporaryDirectory() as folder:
        options = Options(timeline=timeline)
        report = measure_trainer(
            lambda: build_trainer(scenario, "cpu", Path(folder)), options, complete
        )
    return report.to_mapping() | _of_this_cpu(
        (time.monotonic() - started) / UPDATES, counts["parameters"]
    )


def _on_cuda(scenario: Scenario) -> dict[str, Any]:
    import torch

    from dryfit.engine.steps import STEPS, phases
    from dryfit.step.model import build_model, parameter_count
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.step import random_step

    if not torch.cuda.is_available():
        raise UserError(
            "No CUDA device was found.",
            where="device",
            found="cuda",
            allowed="cpu, auto",
            write="device: auto",
        )
    torch.zeros(1, device="cuda")  # makes the context
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    used_by_all = total - free - torch.cuda.memory_reserved()
    peaks: dict[str, int] = {}
    reserved = 0
    phase = "load"

    def enter(upcoming: str) -> None:
        """Close the books on a phase; peaks of earlier steps are forgotten."""
        nonlocal phase, reserved
        torch.cuda.synchronize()
        peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated())
        reserved = max(reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        phase = upcoming

    torch.cuda.reset_peak_memory_stats()
    try:
        model = build_model(scenario, "cuda")
        optimizer = build_optimizer(model, scenario)
        step = random_step(model, optimizer, scenario, "cuda", max_grad_norm=1.0)
        enter("inputs")
        load = peaks["load"]
        resident = torch.cuda.memory_allocated()
        with phases(enter) as begin:
            for _ in range(STEPS):
                peaks.clear()
                started = time.monotonic()
                begin()
                step()
                enter("end")
                wall_seconds = time.monotonic() - started
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{TOO_SMALL}: {str(error).splitlines()[0]}",
            where=torch.cuda.get_device_name(),
            found=f"{torch.cuda.max_memory_reserved()} bytes reserved of {total}",
            allowed="a smaller scenario; `python -m dryfit.ask.predict` says what fits",
        ) from None
    by_phase = {name: peaks[name] for name in ("forward", "backward", "optimizer")}
    peak_phase = max(by_phase, key=lambda name: by_phase[name])
    return {
        "context_bytes": used_by_all,  # of every process on the card
        "device": {
            "capability": list(torch.cuda.get_device_capability()),
            "name": torch.cuda.get_device_name(),
            "total_bytes": total,
            "type": "cuda",
        },
        "parameters": parameter_count(model),
        "peak_allocated_bytes": by_phase[peak_phase],
        "peak_phase": peak_phase,
        "peak_reserved_bytes": reserved,
        "phases": {"load": load} | by_phase,
        "resident_bytes": resident,
        "wall_seconds": wall_seconds,
    }


def time_difference(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step, predicted and taken, and the share by which the prediction is off."""
    taken = fmean(measured["taken_seconds"])
    return {
        "clock_seconds": fmean(measured["clock_seconds"]),
        "difference": predicted["seconds_per_step"] / taken - 1,
        "limited_by": predicted["limited_by"],
        "predicted_seconds": predicted["seconds_per_step"],
        "shares": predicted["shares"],
        "steps": len(measured["taken_seconds"]),
        "taken_seconds": taken,
    }


def time_line(timed: Mapping[str, Any]) -> str:
    """For a terminal."""
    return (
        f"a step takes {timed['taken_seconds']:.2f} s of one thread; {timed['predicted_seconds']:.2f} s were predicted"
        f" ({100 * timed['difference']:+.0f} %) from probes of this CPU"
    )
