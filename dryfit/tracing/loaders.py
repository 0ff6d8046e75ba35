"""How programs bring a model to the device: what differs between libraries' versions, and the order of its tensors."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from torch import nn

from dryfit.engine.loading_rules import WORKERS
from dryfit.scenario.scenario import Scenario


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
            workers=WORKERS if (5, 0) <= _version(transformers) < (5, 4) else 1,
            dense_workers=WORKERS if _version(transformers) >= (5, 0) else 1,
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


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
