"""``torch.compile`` under a tracker: never its eager figure in silence.

Dynamo skips every frame while a dispatch mode is on, so that a compiled function runs as if it were not compiled, with
tensors that the compiler would have fused away or computed again. Here it says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .allocator import EMPTY_CACHE
from .errors import CompiledError
from .patching import patched
from .tracker import Tracker


@contextmanager
def compiled_functions(tracker: Tracker, policy: str) -> Iterator[None]:
    """Refuse what is compiled (``policy`` ``refuse``), or run it without the compiler and warn.

    ``eager``: all tensors that it makes are counted. ``fused``: as if it were one kernel, which is the least that a
    compiler can make of it; of what was compiled before the step all are counted.
    """

    def met(function: Any, fused: bool = False) -> None:
        name = getattr(function, "__qualname__", None) or type(function).__name__
        name = f"{getattr(function, '__module__', '')}.{name}".lstrip(".")
        if fused:
            tracker.warn(
                f"{name} is compiled by torch.compile and counted as one kernel; what its kernels hand to each"
                " other comes on top"
            )
            return
        if policy == "refuse":
            raise CompiledError(
                f"The step runs {name}, which torch.compile has compiled, and what the compiler fuses, keeps and"
                " computes again is not known here.",
                "Leave torch.compile out of the traced step; or write compiled='eager' for the figure without the"
                " compiler, which is mostly higher.",
            )
        tracker.warn(
            f"{name} is compiled by torch.compile; the figures are those without the compiler, mostly higher"
        )

    @contextmanager
    def run_fused(function: Any) -> Iterator[None]:
        met(function, fused=True)
        first = len(tracker.events)
        yield
        own = tracker.events[first:]
        ids = {identity for identity, _ in own} - {EMPTY_CACHE[0]}
        gone = {identity for identity in ids if -identity in ids}
        tracker.events[first:] = [event for event in own if event[0] not in gone]

    def run_eager(function: Any) -> AbstractContextManager:
        met(function)
        return nullcontext()

    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing has been compiled yet, and importing the compiler takes seconds
        with patched(
            [(torch, "compile", _without_compiler(run_fused if policy == "fused" else run_eager))]
        ):
            yield
        return
    original = dynamo._callback_from_stance

    def from_stance(callback: Any) -> Any:
        if callback is not None and callback is not False:
            met(sys._getframe(1).f_locals.get("fn"))
        return original(callback)

    eager = dynamo.DynamoStance("force_eager")
    replaced = [(dynamo, "_callback_from_stance", from_stance), (dynamo, "_stance", eager)]
    with patched(
        replaced + [(torch, "compile", _without_compiler(run_fused))] * (policy == "fused")
    ):
        yield


def _without_compiler(running: Callable[[Any], AbstractContextManager]) -> Callable[..., Any]:
    def compile(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda function: compile(function, **options)

        def run(*args: Any, **kwargs: Any) -> Any:
            with running(model):
                return model(*args, **kwargs)

        return run

    return compile
