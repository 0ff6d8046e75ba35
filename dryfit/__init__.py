"""Will this fine-tuning fit this GPU? The memory of the very training step, before a weight is downloaded.

    import dryfit

    answer = dryfit.fit("Qwen/Qwen3-8B", gpu="4090", sequence_length=2048)
    answer.fits, answer.required_bytes, answer.suggestions

Names are imported when they are asked for, so that ``import dryfit`` loads no torch. ``__init__.pyi`` gives their
types.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "Answer": "ask",
    "Gpu": "cards.gpus",
    "History": "engine.report",
    "MeasureSteps": "ask.trainer",
    "Options": "engine.trace",
    "Report": "engine.report",
    "Run": "hours.run_time",
    "Scenario": "scenario.scenario",
    "StopIfItWontFit": "ask.trainer",
    "UserError": "common.errors",
    "WontFit": "ask.trainer",
    "estimate": "analytic.estimate",
    "measure": "tracing.measure",
    "measure_step": "engine.trace",
    "on_meta": "engine.patching",
    "trace": "tracing.trace",
    "trace_step": "engine.trace",
    "trace_trainer": "engine.trainer",
    "fit": "ask",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
