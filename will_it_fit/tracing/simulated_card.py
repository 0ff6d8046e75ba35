"""What a compiled step needs to be traced: the scenario's card, which the engine simulates, and compiled modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from will_it_fit.cards.gpus import Gpu, find
from will_it_fit.common.errors import UserError
from will_it_fit.engine.allocator import MIB
from will_it_fit.engine.card import Card
from will_it_fit.engine.errors import TraceError
from will_it_fit.engine.simulation import simulated
from will_it_fit.hours.step_time import speed_of
from will_it_fit.scenario.scenario import Scenario

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


@contextmanager
def for_compiler(scenario: Scenario, target: str, capability: tuple[int, int] | None) -> Iterator[None]:
    """Simulate the card that a compiled step is for; an eager step needs none.

    A scenario that names no card, or only a size, is compiled for :data:`UNNAMED` with the capability that is asked.

    Raises
    ------
    UserError
        If the card can't be simulated.
    """
    if scenario.compile == "none" or target == "cpu":
        yield
        return
    gpu = None if scenario.gpu is None else find(scenario.gpu)
    card = card_of(gpu if gpu is not None and gpu.capability is not None else None)
    if capability is not None and capability != card.capability:
        card = replace(card, capability=capability, shared_memory_bytes=None)
    try:
        context = simulated(card)
        context.__enter__()
    except TraceError as error:
        raise UserError(error.problem, where="compile", found=scenario.compile, allowed=error.hint) from error
    try:
        yield
    finally:
        context.__exit__(None, None, None)


def compile_parts(model: nn.Module, how: str) -> None:
    """Compile a model in place, as ``model.compile()`` does: the whole, or each of its decoder's layers.

    What a layer is the model itself says, where it tells FSDP and accelerate what not to split.
    """
    if how == "model":
        model.compile()
    elif how == "layers":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = set(base._no_split_modules or ())
        for module in base.modules():
            if type(module).__name__ in names:
                module.compile()
