"""The memory of any PyTorch training step, known before any weight exists: see :mod:`.trace`.

As a distribution of its own this package is called ``step_memory``. Names are imported when they are asked for: what
only wants the names of components needs no torch.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "measure_step": "trace",
    "trace_step": "trace",
    "Options": "trace",
    "Report": "report",
    "History": "report",
    "Card": "card",
    "simulated": "simulation",
    "on_meta": "patching",
    "quantize_4bit": "bitsandbytes_layers",
    "quantize_8bit": "bitsandbytes_layers",
    "keep_paged_states_outside": "bitsandbytes_layers",
    "measure_trainer": "trainer",
    "trace_trainer": "trainer",
    "CompiledError": "errors",
    "StepError": "errors",
    "TraceError": "errors",
    "ValuesNeeded": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_WHERE)
