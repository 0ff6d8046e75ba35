"""The group of processes that a program starts: this process is one of it, and nobody else runs."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed import distributed_c10d
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dryfit.common.errors import UserError
from dryfit.engine.fake_device import FakeDevice
from dryfit.engine.fake_group import BACKEND, fake_gpus
from dryfit.engine.tracker import Tracker

from .places import described, frames_above


class Group:
    """Starts PyTorch's group where the program does, with collectives that do nothing.

    Parameters
    ----------
    gpus, rank
        How many processes there are, and which of them this one is.
    stack
        Keeps what a group needs in place until the program has ended.
    device
        Of the GPUs, where the program runs under ``torchrun``; None: one GPU, and a group only if the program asks.
    """

    def __init__(
        self, tracker: Tracker, stack: ExitStack, gpus: int, rank: int, device: FakeDevice | None
    ) -> None:
        self._tracker, self._stack, self._gpus, self._device = tracker, stack, gpus, device
        self._rank = rank
        # Lines of the program that received an object from another process: they went on with what they had.
        self.received: list[str] = []
        self._start = dist.init_process_group

    def start(self, *args: Any, **options: Any) -> None:
        """In the place of ``init_process_group``."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        world = options.get("world_size", -1)
        if world not in (-1, None, self._gpus):
            raise UserError(
                f"The program starts a group of {world} processes, and {self._gpus} are simulated.",
                write=f"dryfit run --gpus {world} ...",
            )
        if self._device is None:
            self._device = self._stack.enter_context(fake_gpus(1))
            self._tracker.take_device(self._device)
        self._tracker.backend = str(args[0] if args else options.get("backend"))
        if options.get("device_id") is not None:
            torch.cuda.set_device(options["device_id"])
        self._start(BACKEND, store=FakeStore(), rank=self._rank, world_size=self._gpus)

    def spawn(self, function: Any, args: tuple = (), nprocs: int = 1, *_: Any, **__: Any) -> None:
        """In the place of ``torch.multiprocessing.spawn``: the part of one process runs here."""
        if nprocs not in (1, self._gpus):
            raise UserError(
                f"The program starts {nprocs} processes of its own, and the number simulated is {self._gpus}.",
                write=f"dryfit run --gpus {nprocs} ...",
            )
        function(self._rank, *args)

    def places(self) -> list[tuple[Any, str, Any]]:
        """Patches for the time of the program."""
        make, new_group = DistributedDataParallel.__init__, dist.new_group

        def ddp(
            model: Any,
            module: Any,
            device_ids: Any = None,
            output_device: Any = None,
            *args: Any,
            **options: Any,
        ):
            make(model, module, None, None, *args, **options)  # what is on meta has no index

        def data_parallel(model: DataParallel, *inputs: Any, **named: Any) -> Any:
            if self._gpus > 1 and len(model.device_ids) != 1:
                raise UserError(
                    "`DataParallel` copies the model to each GPU in every step, which is followed for one GPU alone.",
                    allowed="DistributedDataParallel, which PyTorch advises; or one GPU",
                    write="dryfit run --gpus 1 ...",
                )
            return model.module(
                *inputs, **named
            )  # as PyTorch does on one card, whose name it would ask of tensors

        def subgroup(*args: Any, **options: Any) -> Any:
            return new_group(
                *args, **{name: value for name, value in options.items() if name != "backend"}
            )

        def gathered(found: list, item: Any, *_: Any, **__: Any) -> None:
            found[:] = [item] * len(found)

        def scattered(found: list, items: Any, src: int = 0, *_: Any, **__: Any) -> None:
            if items:
                found[0] = items[self._rank]
            else:
                self._receives()

        def broadcast(items: list, src: int | None = None, *_: Any, **__: Any) -> None:
            if (src or 0) != self._rank:
                self._receives()

        # Old names of collectives warn since PyTorch 2.13, where Dynamo then breaks and can't go on.
        renamed = {
            "all_gather_into_tensor": "all_gather_single",
            "reduce_scatter_tensor": "reduce_scatter_single",
        }
        answers = {
            "init_process_group": self.start,
            "new_group": subgroup,
            "is_nccl_available": lambda: True,
            "get_backend": lambda *_: "nccl",
            "broadcast_object_list": broadcast,
            "all_gather_object": gathered,
            "gather_object": lambda item, found=None, *_, **__: (
                found is not None and gathered(found, item)
            ),
            "scatter_object_list": scattered,
            "monitored_barrier": lambda *_, **__: None,
        }
        answers |= {old: getattr(dist, new) for old, new in renamed.items() if hasattr(dist, new)}
        places = [(at, name, answer) for name, answer in answers.items() for at in _holders(name)]
        places += [(processes, "spawn", self.spawn), (processes.spawn, "spawn", self.spawn)]
        places += [
            (DistributedDataParallel, "__init__", ddp),
            (DataParallel, "forward", data_parallel),
        ]
        return [place for place in places if hasattr(place[0], place[1])]

    def _receives(self) -> None:
        line = described(next(frames_above(3), None))
        if line not in self.received:
            self.received.append(line)

    def end(self) -> None:
        """End the group that the program has left."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _holders(name: str) -> list[ModuleType]:
    """The modules of ``torch.distributed`` that call a function by this name: some took it when they were imported."""
    function = getattr(distributed_c10d, name, None)
    modules = [
        module
        for place, module in list(sys.modules.items())
        if place.startswith("torch.distributed")
    ]
    return [
        module for module in modules if function is not None and vars(module).get(name) is function
    ]
