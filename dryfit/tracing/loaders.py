"""How programs bring a model to the device: what differs between libraries' versions, and the order of its tensors."""

from __future__ import annotations

import heapq
import importlib.metadata
import random
from dataclasses import dataclass

from torch import nn

from dryfit.scenario.scenario import Scenario

_WORKERS = 4  # transformers core_model_loading.GLOBAL_WORKERS
# How fast the parts of a threaded load are on the machine that feeds the card. Round figures, none fitted: a cast from
# bf16 to fp16 out of a mapped file ran at 2 GB/s in all, whether one thread or four did it (torch 2.13, two cores);
# memory that isn't pinned crosses PCIe 3.0 x16 (15.8 GB/s) at less than half its rate.
_CAST_BYTES_PER_SECOND = 2e9 / _WORKERS  # of each thread
_COPY_BYTES_PER_SECOND = 6e9  # one copy at a time
_OVERHEAD_SECONDS = 2e-4  # of a thread for each tensor
_TURN_SECONDS = 2e-3  # of the main thread for each tensor: quantizing it, setting it in the model, the progress bar
_VARIATION = 0.3  # standard deviation of the logarithm of each of these times


@dataclass(frozen=True)
class WeightLoader:
    """How a program brings its model to the device.

    Attributes
    ----------
    loaded_on_cpu_first
        The model is loaded on the CPU and then moved (``model.to``), as scripts without ``device_map`` do.
    warmup
        Whether a block of the model's size is allocated and freed first (from transformers 4.50 on).
    workers
        Threads that load: 1, one tensor after the other, or 4 that run ahead of the quantization. Then the order
        differs from run to run, and with it the blocks that remain: up to 8 MiB for one model in the published
        measurements.
    dense_workers
        The same for a model that is not quantized on the way.
    seed
        Which of the orders that several threads can come to.
    empties_cache
        Whether PEFT's k-bit preparation ends with ``torch.cuda.empty_cache()``.
    centres_in_place
        Whether quantizing subtracts the mean of the statistics in place, and one map of 8-bit values serves all layers
        (bitsandbytes before 0.46).
    """

    loaded_on_cpu_first: bool = False
    warmup: bool = True
    workers: int = 1
    dense_workers: int = 1
    empties_cache: bool = True
    centres_in_place: bool = False
    seed: int = 0

    def order_is_random(self, model: nn.Module, scenario: Scenario) -> bool:
        """Whether the order of loading, and with it what blocks remain, differs from run to run.

        Threads take the tensors in order; where nothing is freed on the way, all orders come to the same.
        """
        if scenario.method == "qlora":
            return self.workers > 1
        experts = any(tensor.dim() == 3 and ".experts." in name for name, tensor in model.named_parameters())
        return self.dense_workers > 1 and not self.loaded_on_cpu_first and experts

    @classmethod
    def of(
        cls, *, transformers: str, peft: str, bitsandbytes: str = "0.50", loaded_on_cpu_first: bool = False
    ) -> WeightLoader:
        """Return how these versions load."""
        return cls(
            loaded_on_cpu_first=loaded_on_cpu_first,
            warmup=_version(transformers) >= (4, 50),
            workers=_WORKERS if (5, 0) <= _version(transformers) < (5, 4) else 1,
            dense_workers=_WORKERS if _version(transformers) >= (5, 0) else 1,
            empties_cache=_version(peft) >= (0, 20),
            centres_in_place=_version(bitsandbytes) < (0, 46),
        )

    @classmethod
    def installed(cls) -> WeightLoader:
        """Return how the installed versions load."""
        return cls.of(
            transformers=importlib.metadata.version("transformers"),
            peft=importlib.metadata.version("peft"),
            bitsandbytes=importlib.metadata.version("bitsandbytes"),
        )


def turns(sizes: list[int], workers: int, seed: int) -> list[tuple[int, bool]]:
    """Return in which order tensors arrive on the device (True) and are quantized or set in the model (False).

    Several threads take the tensors in order. A thread allocates the tensor on the device (ATen ``_to_copy`` does so
    before it copies), casts it on the CPU, waits until the way to the device is free, and copies. The main thread sets
    each tensor in the model once it and those before it are there.
    """
    if workers == 1:
        return [(position, arrives) for position in range(len(sizes)) for arrives in (True, False)]
    draw = random.Random(seed)

    def vary(seconds: float) -> float:
        return seconds * draw.lognormvariate(0.0, _VARIATION)

    moments: list[tuple[float, int, bool]] = []
    cast: list[tuple[float, int]] = []  # when each thread has cast its tensor, and which
    loaded = [0.0] * len(sizes)
    waiting = iter(enumerate(sizes))

    def take(now: float) -> None:
        for position, size in waiting:
            moments.append((now, position, True))
            heapq.heappush(cast, (now + vary(_OVERHEAD_SECONDS + size / _CAST_BYTES_PER_SECOND), position))
            return

    for _ in range(workers):
        take(0.0)
    free = 0.0  # when the last copy ends
    while cast:
        now, position = heapq.heappop(cast)
        free = loaded[position] = max(now, free) + sizes[position] / _COPY_BYTES_PER_SECOND
        take(free)
    now = 0.0
    for position, moment in enumerate(loaded):
        now = max(now, moment) + vary(_TURN_SECONDS)
        moments.append((now, position, False))
    return [(position, arrives) for _, position, arrives in sorted(moments)]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
