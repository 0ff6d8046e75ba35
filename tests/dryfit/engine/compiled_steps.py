"""A compiled step, followed on ``meta`` and really run: what each allocates, in order."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from dryfit.engine.patching import on_meta
from dryfit.engine.report import Report, make_report
from dryfit.engine.trace import Options, trace_step

Build = Callable[[], tuple[torch.nn.Module, Any, Callable, Any]]  # model, optimizer, step, batch
SCALARS_BYTES = 16  # numbers that an operator makes of Python's, which no operator tells


def followed(build: Build) -> tuple[list[int], Report]:
    """Bytes that the third step allocates (+) and frees (-) on a CPU, as the trace says, and the report."""
    kept = {}

    def report(tracker: Any, *args: Any, **options: Any) -> Report:
        kept["tracker"] = tracker
        return make_report(tracker, *args, on_gpu=False)

    with on_meta("cpu"):
        model, optimizer, step, batch = build()
    options = Options(target="cpu", steps=3, compiled="follow", report=report)
    result = trace_step(model, optimizer, step, batch, options)
    tracker = kept["tracker"]
    sizes = dict(tracker.events)
    step_events = tracker.events[tracker.start(2) :]
    return [count if identity > 0 else -sizes[-identity] for identity, count in step_events], result


def measured(build: Build) -> list[int]:
    """The same, of PyTorch's profiler, when Inductor's C++ really runs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    _, _, step, batch = build()
    for _ in range(3):
        step(tree_map_only(torch.Tensor, torch.clone, batch))
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            given = [tree_map_only(torch.Tensor, torch.clone, batch)]
            step(given.pop())
    finally:
        gc.enable()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def without_scratch(events: list[int]) -> list[int]:
    """Without numbers, and without what an operator of ATen makes and drops at once, which depends on threads."""
    kept: list[int] = []
    for count in events:
        if abs(count) <= SCALARS_BYTES:
            continue
        if kept and count == -kept[-1] and count < 0:
            kept.pop()
        else:
            kept.append(count)
    return kept


def peak(events: list[int]) -> int:
    """The most that is alive at once beside what was there before."""
    highest = alive = 0
    for count in events:
        alive += count
        highest = max(highest, alive)
    return highest
