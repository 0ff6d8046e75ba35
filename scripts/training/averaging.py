"""The mean of the trained tensors over the last steps of a training.

A run at a high learning rate ends near a minimum and not in it: where it ends depends on the last bits of a sum. The
mean of the weights of many late steps lies nearer to the minimum, and two runs' means nearer to each other
(stochastic weight averaging, arXiv:1803.05407; for the last part of a schedule: arXiv:2306.03241). The sum is kept on
the CPU, so the step on the GPU needs no more memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.training.loop_state import copied, put_back

AVERAGED = "averaged"  # the value of ``training.keep``


def first_averaged_step(total: int, loop: Mapping[str, Any]) -> int:
    """The first step, counted from 1, whose weights count; at least the last one of ``total`` steps does."""
    share = loop["average_ratio"]
    return min(total, math.floor(total * (1 - share)) + 1)


@dataclass
class WeightAverage:
    """The sum of the trained tensors after so many steps.

    Attributes
    ----------
    steps
        How many steps are in the sum.
    sums
        The sum of each trained tensor by name, whole, on the CPU, in fp32.
    """

    steps: int = 0
    sums: dict[str, Any] = field(default_factory=dict)

    def add(self, model: Any) -> None:
        """Take up the model's trained tensors after a step; in all processes at once."""
        for name, tensor in copied(model).items():
            value = tensor.float()
            if name in self.sums:
                self.sums[name].add_(value)
            else:
                self.sums[name] = value
        self.steps += 1

    def put_into(self, model: Any) -> None:
        """Give the model the mean."""
        put_back(model, {name: total / self.steps for name, total in self.sums.items()})

    def to_mapping(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self.steps, "sums": self.sums}
