"""How programs bring a model to the device: what differs between libraries' versions, and the order of its tensors."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from torch import nn

from dryfit.engine.cuda_rules import minor_version
from dryfit.engine.loading_rules import WORKERS
from dryfit.scenario.scenario import Scenario


@dataclass(frozen=True)
class WeightLoader:
    """How a program brings its model to the device."""

    # The model is loaded on the CPU and then moved (`model.to`), as scripts without `device_map` do.
    loaded_on_cpu_first: bool = False
    warmup: bool = True  # whether a block of the model's size is allocated and freed first (from transformers 4.50 on)
    # Threads that load: 1, one tensor after the other, or 4 that run ahead of the quantization. Then the order differs
    # from run to run, and with it the blocks that remain: up to 8 MiB for one model in the published measurements.
    workers: int = 1
    dense_workers: int = 1  # the same for a model that is not quantized on the way
    empties_cache: bool = (
        True  # whether PEFT's k-bit preparation ends with `torch.cuda.empty_cache()`
    )
    # Whether quantizing subtracts the mean of the statistics in place, and one map of 8-bit values serves all layers
    # (bitsandbytes before 0.46).
    centres_in_place: bool = False
    seed: int = 0  # which of the orders that several threads can come to

    def order_is_random(self, model: nn.Module, scenario: Scenario) -> bool:
        """Whether the order of loading, and with it what blocks remain, differs from run to run.

        Threads take the tensors in order; where nothing is freed on the way, all orders come to the same.
        """
        if scenario.method == "qlora":
            return self.workers > 1
        experts = any(
            tensor.dim() == 3 and ".experts." in name for name, tensor in model.named_parameters()
        )
        return self.dense_workers > 1 and not self.loaded_on_cpu_first and experts

    @classmethod
    def of(
        cls,
        *,
        transformers: str,
        peft: str,
        bitsandbytes: str = "0.50",
        loaded_on_cpu_first: bool = False,
    ) -> WeightLoader:
        """Return how these versions load."""
        return cls(
            loaded_on_cpu_first=loaded_on_cpu_first,
            warmup=minor_version(transformers) >= (4, 50),
            workers=WORKERS if (5, 0) <= minor_version(transformers) < (5, 4) else 1,
            dense_workers=WORKERS if minor_version(transformers) >= (5, 0) else 1,
            empties_cache=minor_version(peft) >= (0, 20),
            centres_in_place=minor_version(bitsandbytes) < (0, 46),
        )

    @classmethod
    def installed(cls) -> WeightLoader:
        """Return how the installed versions load."""
        return cls.of(
            transformers=importlib.metadata.version("transformers"),
            peft=importlib.metadata.version("peft"),
            bitsandbytes=importlib.metadata.version("bitsandbytes"),
        )
