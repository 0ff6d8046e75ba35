"""The learning rate of each step: a linear warm-up to the peak, then one of four schedules.

Each schedule is a function of ``done``, the share of the steps after the warm-up that have been taken, from 0 to just
below 1. It gives the share of the peak. Their names are the ones that ``config/schema.yaml`` allows.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any


def _cosine(done: float, decay_ratio: float) -> float:
    """Half a cosine down to zero (SGDR without restarts, arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(done: float, decay_ratio: float) -> float:
    """A straight line down to zero."""
    return 1 - done


def _constant(done: float, decay_ratio: float) -> float:
    """The peak to the end."""
    return 1.0


def _warmup_stable_decay(done: float, decay_ratio: float) -> float:
    """The peak, then over the last ``decay_ratio`` of the steps down to zero by ``1 - sqrt``.

    arXiv:2405.18392, section 3.2, found this form better than a straight line.
    """
    begin = 1 - decay_ratio
    if done <= begin:
        return 1.0
    return 1 - math.sqrt((done - begin) / decay_ratio)


SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _warmup_stable_decay,
}


def learning_rate_at(step: int, total: int, loop: Mapping[str, Any]) -> float:
    """The learning rate of a step.

    Parameters
    ----------
    step
        Counts from 0.
    total
        Steps of the whole training, whether or not it stops early.
    loop
        ``learning_rate``, the peak; ``schedule``; ``warmup_ratio``, the share of the steps in which the rate rises;
        ``decay_ratio``, the share of the steps after the warm-up in which ``wsd`` falls.
    """
    peak = loop["learning_rate"]
    warmup = math.ceil(total * loop["warmup_ratio"])
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * SCHEDULES[loop["schedule"]](done, loop["decay_ratio"])
