"""The module ``pynvml`` of a simulated card: what programs ask NVIDIA's management library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

from dryfit.engine.card import Card

from .cuda import DRIVER

_IDLE_CELSIUS = 30


class NVMLError(Exception):
    """A question that the simulated library has no answer to."""


@contextmanager
def nvml(card: Card, gpus: int, memory: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Programs inside import this module, whether theirs is installed or not: that one would ask a driver.

    ``gpus``: how many cards there are; all are alike. ``memory``: free and total bytes of the card.
    """

    def handle(index: int) -> int:
        if not 0 <= index < gpus:
            raise NVMLError(f"there are {gpus} GPUs, and none of the number {index}")
        return index

    def memory_info(device: int) -> SimpleNamespace:
        free, total = memory()
        return SimpleNamespace(free=free, total=total, used=total - free)

    answers: dict[str, Callable[..., object]] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: DRIVER,
        "nvmlDeviceGetCount": lambda: gpus,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetIndex": lambda device: device,
        "nvmlDeviceGetName": lambda device: card.name,
        "nvmlDeviceGetUUID": lambda device: f"GPU-{device:08x}",
        "nvmlDeviceGetMemoryInfo": memory_info,
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=0, memory=0),
        "nvmlDeviceGetTemperature": lambda device, sensor=0: _IDLE_CELSIUS,
        "nvmlDeviceGetPowerUsage": lambda device: 0,
        "nvmlDeviceGetCudaComputeCapability": lambda device: card.capability,
        "nvmlDeviceGetComputeRunningProcesses": lambda device: [],
    }
    module = ModuleType("pynvml", __doc__)
    vars(module).update(answers, NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0)

    def missing(name: str) -> object:
        raise AttributeError(f"the simulated card doesn't answer pynvml.{name}")

    module.__getattr__ = missing
    before = sys.modules.get("pynvml")
    sys.modules["pynvml"] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules["pynvml"]
        else:
            sys.modules["pynvml"] = before
