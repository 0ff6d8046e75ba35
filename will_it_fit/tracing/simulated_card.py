"""The card of a scenario as the engine simulates it: from config/gpus.yaml, where speeds have its processors."""

from __future__ import annotations

from will_it_fit.cards.gpus import Gpu, find
from will_it_fit.common.errors import UserError
from will_it_fit.engine.allocator import MIB
from will_it_fit.engine.card import Card
from will_it_fit.hours.step_time import speed_of

UNNAMED = "a100-80gb"  # the card of a scenario that names none: of the capability that the engine assumes then


def card_of(gpu: Gpu | None = None) -> Card:
    """What the engine answers about a GPU; None: about the one that it assumes.

    Raises
    ------
    UserError
        If config/gpus.yaml has no processors of it, or it is no card of NVIDIA's.
    """
    gpu = gpu or find(UNNAMED)
    speed = speed_of(gpu.name)
    if speed is None or gpu.capability is None:
        raise UserError(
            f"{gpu.title} can't be simulated: config/gpus.yaml doesn't say how many processors it has.",
            where="gpu",
            found=gpu.name,
            allowed="a card of NVIDIA's with a line under `speeds` of config/gpus.yaml",
            write=f"gpu: {UNNAMED}",
        )
    cache = round(speed.cache_bytes / 1e6) * MIB  # datasheets write MB, and the driver says MiB
    return Card(gpu.title, gpu.capability, speed.multiprocessors, gpu.total_bytes, cache)
