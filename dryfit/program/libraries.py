"""What libraries do for programs that needs another way here: workers that load data, files for the card, scalers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch.serialization import safe_globals
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, dataloader

from dryfit.engine.known_values import ANSWERS
from dryfit.engine.patching import as_it_was

# What libraries ask of values before they go on, and real ones answer in one way; by module and function.
QUESTIONS = ANSWERS | {
    "transformers.trainer:_maybe_log_save_evaluate": False,
    "transformers.trainer:_inner_training_loop": False,
    "transformers.trainer:training_step": False,
    "accelerate.optimizer:step": False,
}


def library_places() -> list[tuple[Any, str, Any]]:
    """Patches for the time of the program."""
    load, iterate = torch.load, DataLoader._get_iterator
    return [
        (torch, "load", _loading(load)),
        (torch.jit, "script", _unaware(torch.jit.script)),
        (DataLoader, "_get_iterator", _without_workers(iterate)),
        (torch.amp.GradScaler, "_maybe_opt_step", _steps_always),
        (torch.nn.init, "_no_grad_trunc_normal_", _drawn_between),
    ]


def _drawn_between(
    tensor: torch.Tensor,
    mean: float,
    std: float,
    lowest: float,
    highest: float,
    generator: Any = None,
) -> torch.Tensor:
    """In the place of ``trunc_normal_``'s rounds, which end when no value lies outside: PyTorch 2.13 asks the values.

    What lies outside is drawn again, as often as it takes on average until less than half a value is left.
    """
    normal = NormalDist(mean, std)
    outside = 1 - normal.cdf(highest) + normal.cdf(lowest)
    with torch.no_grad():
        drawn, left = tensor.normal_(mean, std, generator=generator), tensor.numel() * outside
        mask = (drawn < lowest) | (drawn > highest)
        while left >= 0.5 and outside < 1:
            drawn = torch.where(
                mask, torch.empty_like(drawn).normal_(mean, std, generator=generator), drawn
            )
            mask = (drawn < lowest) | (drawn > highest)
            left *= outside
        return tensor if drawn is tensor else tensor.copy_(drawn)


def _unaware(function: Callable[..., Any]) -> Callable[..., Any]:
    """TorchScript compiles PyTorch's own functions, not those that stand in for them."""

    def as_ever(*args: Any, _frames_up: int = 0, **options: Any) -> Any:
        with as_it_was():
            return function(
                *args, _frames_up=_frames_up + 1, **options
            )  # it looks up names in its caller's frame

    return as_ever


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """A file is read on the host; what was to come to the card comes there after that, each tensor once."""

    def loaded(file: Any, map_location: Any = None, *args: Any, **options: Any) -> Any:
        target = map_location
        with safe_globals(
            [float]
        ):  # a number that nobody knows was written as one, with a name for its kind
            if callable(target) or isinstance(target, dict):
                return load(file, lambda storage, _: storage, *args, **options)
            if target is None or torch.device(target).type != "cuda":
                return load(file, target or "cpu", *args, **options)
            read = load(file, "cpu", *args, **options)
        moved: dict[int, torch.Tensor] = {}
        return tree_map_only(
            torch.Tensor, lambda each: moved.setdefault(id(each), each.to("cuda")), read
        )

    return loaded


def _without_workers(iterate: Callable[..., Any]) -> Callable[..., Any]:
    """Batches are made in this process, however many workers the program asks for: none of them touches the card."""

    def in_this_process(loader: DataLoader) -> Any:
        if not loader.num_workers:
            return iterate(loader)
        asked = {
            name: getattr(loader, name) for name in ("num_workers", "timeout", "prefetch_factor")
        }
        persistent = loader.persistent_workers
        object.__setattr__(loader, "persistent_workers", False)
        try:
            loader.num_workers, loader.timeout, loader.prefetch_factor = 0, 0, None
            return dataloader._SingleProcessDataLoaderIter(loader)
        finally:
            for name, value in asked.items():
                setattr(loader, name, value)
            object.__setattr__(loader, "persistent_workers", persistent)

    return in_this_process


def _steps_always(scaler: Any, optimizer: Any, state: Any, *args: Any, **options: Any) -> Any:
    """In the place of ``GradScaler``'s question whether a gradient is infinite, which skips an update."""
    return optimizer.step(*args, **options)
