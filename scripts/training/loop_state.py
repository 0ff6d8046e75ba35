"""The state of a training between two steps: what a killed run goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_folder, read_jsonl, read_report, write_jsonl, write_report
from dryfit.common.terminal import log
from scripts.training.processes import ALONE, ProcessGroup, sharded_like
from scripts.training.validation import ValidationHistory


class Resumed(NamedTuple):
    """What a checkpoint says of the steps before it."""

    step: int = 0  # how many were taken
    curve: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0  # that they took
    progress: Mapping[str, Any] = {}  # of the validations, as ValidationHistory.to_mapping gives it
    average: Mapping[str, Any] = {}  # of the weights, as WeightAverage.to_mapping gives it


class LoopState:
    """The state of a run between two steps, in one folder that appears whole or not at all."""

    def __init__(self, folder: Path, group: ProcessGroup = ALONE) -> None:
        self.folder, self.group = folder, group

    def save(
        self,
        step: int,
        model: Any,
        optimizer: Any,
        curve: list[dict],
        seconds: float,
        scaler: Any = None,
        progress: ValidationHistory | None = None,
        average: Mapping[str, Any] | None = None,
    ) -> None:
        """``step``: how many have been taken, in ``seconds``. Tensors are saved whole, random states one a process."""
        import torch
        from torch.utils._pytree import tree_map

        from dryfit.step.parallel import full_tensor

        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():  # a training on the CPU makes no CUDA context for it
            random["cuda"] = torch.cuda.get_rng_state()
        state = {
            "average": average or {},
            "optimizer": tree_map(full_tensor, optimizer.state_dict()),
            "progress": progress.to_mapping() if progress else {},
            "random": self.group.collected(random),
            "scaler": scaler.state_dict() if scaler else None,
            "seconds": seconds,
            "step": step,
            "trained": {name: full_tensor(p.detach()).cpu() for name, p in _trained(model)},
        }
        if self.group.rank == 0:
            with atomic_folder(self.folder) as partial:
                torch.save(state, partial / "state.pt")
                write_jsonl(partial / "curve.jsonl", curve)
                write_report(
                    partial / "checkpoint.json",
                    {"step": step},
                    partial / "state.pt",
                    partial / "curve.jsonl",
                )

    def load(self, model: Any, optimizer: Any, scaler: Any = None) -> Resumed:
        """Take up the saved state; an empty one without a checkpoint that is whole."""
        import torch

        report, saved, curve = (
            self.folder / name for name in ("checkpoint.json", "state.pt", "curve.jsonl")
        )
        if not self.folder.is_dir():
            return Resumed()
        try:
            read_report(report, saved, curve)
        except UserError as error:
            log.warning(
                "The checkpoint in %s is not used, so training starts from the beginning: %s",
                self.folder,
                error.problem,
            )
            return Resumed()
        state = torch.load(saved, map_location="cpu", weights_only=True)
        put_back(model, state["trained"])
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for index, moments in state["optimizer"]["state"].items():
            for name, value in moments.items():
                moments[name] = sharded_like(value, parameters[index])
        optimizer.load_state_dict(state["optimizer"])
        if scaler:
            scaler.load_state_dict(state["scaler"])
        random = state["random"][self.group.rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(random["cuda"])
        return Resumed(
            state["step"],
            tuple(read_jsonl(curve)),
            state["seconds"],
            state["progress"],
            state["average"],
        )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def copied(model: Any) -> dict[str, Any]:
    """A copy of the trained tensors by name, each whole and on the CPU; in all processes at once."""
    from dryfit.step.parallel import full_tensor

    return {
        name: full_tensor(parameter.detach()).to("cpu", copy=True)
        for name, parameter in _trained(model)
    }


def put_back(model: Any, tensors: Mapping[str, Any]) -> None:
    """Give the trained tensors these values; a sharded one takes its part."""
    import torch

    with torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(sharded_like(tensors[name], parameter))


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    from dryfit.step.parallel import bare

    return (
        (name, parameter)
        for name, parameter in bare(model).named_parameters()
        if parameter.requires_grad
    )
