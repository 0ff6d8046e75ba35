"""``torch.cuda`` and its neighbours as programs use them, answered for a simulated card."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dryfit.engine.card import Card
from dryfit.engine.fake_device import DeviceStream, FakeDevice, FakeEvent

MIB = 2**20
DRIVER = "580.82.07"  # what nvidia-smi says; programs print it


def cuda_places(
    card: Card, memory: Mapping[str, Callable[..., Any]], gpus: int, device: FakeDevice | None
) -> list[tuple[Any, str, Any]]:
    """Patches beside :func:`dryfit.engine.card.answers_of`, which answers what packages ask.

    Parameters
    ----------
    memory
        The answers of :class:`~dryfit.program.memory.Memory`.
    gpus
        How many cards there are.
    device
        With its streams, where there are several; None: one card, whose streams cost nothing.
    """
    answers = dict(memory) | {
        name: (lambda *_: gpus) for name in ("device_count", "_device_count_nvml")
    }
    answers["list_gpu_processes"] = lambda *_: "no processes"
    if device is not None:
        answers |= _streams(device)
    owners = (torch.cuda, torch.cuda.memory)
    places = [
        (owner, name, answer)
        for name, answer in answers.items()
        for owner in owners
        if name in vars(owner)
    ]
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    quiet = ("_record_memory_history", "_dump_snapshot", "_set_allocator_settings")
    places += [
        (torch.cuda.memory, name, nothing) for name in quiet if hasattr(torch.cuda.memory, name)
    ]
    places += [(torch.cuda.nvtx, name, nothing) for name in ("range_push", "range_pop", "mark")]
    places += [(torch.cuda.profiler, name, nothing) for name in ("start", "stop")]
    checks = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    places += [
        (torch.optim.Optimizer, name, nothing)
        for name in checks
        if hasattr(torch.optim.Optimizer, name)
    ]
    places += _accelerator(card, memory, gpus)
    return places


def _streams(device: FakeDevice) -> dict[str, Any]:
    """Streams and events that a tracker hears, as several GPUs need them."""

    class Stream(DeviceStream):
        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(device)

        def __enter__(self) -> Stream:
            self._context = device.stream(self)
            self._context.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._context.__exit__(*error)

        def query(self) -> bool:
            return True

    class Event(FakeEvent):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(device)

        def elapsed_time(self, end: Any) -> float:
            return 1.0

    device.first_stream.cuda_stream = 0
    return {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: device.stream(stream) if stream is not None else nullcontext(),
        "current_stream": lambda *_: device.stream_now,
        "default_stream": lambda *_: device.first_stream,
        "synchronize": lambda *_: device.wait(),
    }


def _accelerator(
    card: Card, memory: Mapping[str, Callable[..., Any]], gpus: int
) -> list[tuple[Any, str, Any]]:
    """``torch.accelerator``, which says the same of whatever card there is."""
    answers = dict(memory) | {
        "is_available": lambda *_: True,
        **dict.fromkeys(("current_device_index", "current_device_idx"), torch.cuda.current_device),
        "device_count": lambda *_: gpus,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "synchronize": lambda *_: torch.cuda.synchronize(),
        "get_device_capability": lambda *_: card.capability,
        "get_memory_info": memory["mem_get_info"],
    }
    return [
        (torch.accelerator, name, answer)
        for name, answer in answers.items()
        if hasattr(torch.accelerator, name)
    ]


def nvidia_smi(card: Card, gpus: int) -> list[tuple[Any, str, Any]]:
    """Patches: programs that start ``nvidia-smi`` read about the simulated card."""
    start, system = subprocess.Popen.__init__, os.system

    def popen(process: Any, args: Any, *more: Any, **options: Any) -> None:
        words = shlex.split(args) if isinstance(args, str) else [os.fsdecode(word) for word in args]
        if words and Path(words[0]).name == "nvidia-smi":
            options |= {"shell": False, "executable": None}
            args = [sys.executable, "-S", "-c", f"print({_shown(card, gpus, words[1:])!r})"]
        start(process, args, *more, **options)

    def run(command: str) -> int:
        if command.strip().startswith("nvidia-smi"):
            print(_shown(card, gpus, shlex.split(command)[1:]))
            return 0
        return system(command)

    return [(subprocess.Popen, "__init__", popen), (os, "system", run)]


def _shown(card: Card, gpus: int, options: list[str]) -> str:
    known = {
        "name": card.name,
        "gpu_name": card.name,
        "count": gpus,
        "driver_version": DRIVER,
        "memory.used": 0,
        "memory.total": card.memory_bytes // MIB,
        "memory.free": card.memory_bytes // MIB,
        "utilization.gpu": 0,
        "compute_cap": "{}.{}".format(*card.capability),
    }
    query = next(
        (word.partition("=")[2] for word in options if word.startswith("--query-gpu")), None
    )
    if query is None:
        return "\n".join(f"GPU {index}: {card.name} (simulated)" for index in range(gpus))
    rows = [
        ", ".join(str(known.get(field.strip(), index)) for field in query.split(","))
        for index in range(gpus)
    ]
    return "\n".join(rows)
