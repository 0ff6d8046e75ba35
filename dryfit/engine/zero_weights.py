"""The weights that ZeRO-3 divides: each GPU's part, and what gathering them takes (``partition_parameters.py``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from .components import UNSHARDED
from .fake_device import FakeDevice
from .zero import ZeroSettings

AWAY, ON_ITS_WAY, HERE = "away", "on its way", "here"


class Divided:
    """A weight of which this GPU has a part."""

    def __init__(self, parameter: nn.Parameter, number: int, world: int, on_host: bool) -> None:
        self.parameter, self.number = parameter, number
        self.shape, self.elements = parameter.shape, parameter.numel()
        self.state = HERE  # whether it is gathered: `AWAY`, `ON_ITS_WAY`, `HERE`
        self.stays = False  # it is small, and given back before the update alone
        self.users: set[int] = set()  # modules that run with it
        size = -(-self.elements // world)
        self.on_host = on_host
        # What this GPU has, padded.
        self.part = torch.empty(0 if on_host else size, dtype=parameter.dtype, device="meta")
        self.size, self.whole = size, size * world

    def holds_data(self, rank: int) -> bool:
        """Whether this GPU's part is more than padding."""
        return self.size * rank < self.elements


class Weights:
    """All divided weights of a model, and how they are gathered."""

    def __init__(self, device: FakeDevice, settings: ZeroSettings) -> None:
        self.device, self.settings = device, settings
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.by_parameter: dict[int, Divided] = {}

    def __getitem__(self, parameter: nn.Parameter) -> Divided:
        return self.by_parameter[id(parameter)]

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """``Init``: each weight is brought to the GPU and given back but for a part, one after the other."""
        for parameter in parameters:
            if id(parameter) not in self.by_parameter:
                self.device.arrived([parameter])
                dist.broadcast(parameter.data.view(torch.uint8), 0)
                weight = Divided(
                    parameter,
                    len(self.by_parameter),
                    self.world,
                    self.settings.offload_param == "cpu",
                )
                self.by_parameter[id(parameter)] = weight
                self.give_back(weight)

    def give_back(self, weight: Divided) -> None:
        """``free_param``."""
        self.device.used_on(weight.parameter.data, self.device.current_stream())
        weight.parameter.data = torch.empty(0, dtype=weight.parameter.dtype, device="meta")
        weight.state = AWAY

    def part_of(self, weight: Divided) -> torch.Tensor:
        """A weight's part on the GPU; offloaded ones are copied there."""
        return (
            torch.empty(weight.size, dtype=weight.part.dtype, device="meta")
            if weight.on_host
            else weight.part
        )

    def fill(self, weight: Divided, gathered: torch.Tensor) -> None:
        weight.parameter.data = gathered.narrow(0, 0, weight.elements).view(weight.shape)
        self.device.named(weight.parameter.data, UNSHARDED)

    def gather_now(self, weights: Sequence[Divided]) -> None:
        """``Init._all_gather``: what is asked for past the coordinator comes at once."""
        weights = [weight for weight in weights if weight.state == AWAY]
        if not weights:
            return
        if len(weights) == 1:
            gathered = [torch.empty(weights[0].whole, dtype=weights[0].part.dtype, device="meta")]
            dist.all_gather_into_tensor(gathered[0], self.part_of(weights[0]))
        else:
            parts = [self.part_of(weight) for weight in weights]
            gathered = [
                torch.empty(one.whole, dtype=one.part.dtype, device="meta") for one in weights
            ]
            works = [
                dist.all_gather_into_tensor(whole, part, async_op=True)
                for whole, part in zip(gathered, parts, strict=True)
            ]
            for work in works:
                work.wait()
        for weight, whole in zip(weights, gathered, strict=True):
            self.fill(weight, whole)
        self.device.synchronize()
        for weight in weights:
            weight.state = HERE

    def begin_to_gather(self, weights: Iterable[Divided]) -> Gathering:
        """``all_gather_coalesced``: one weight into a tensor of its own, several into one for all and then apart."""
        weights = sorted(weights, key=lambda weight: weight.number)
        for weight in weights:
            weight.state = ON_ITS_WAY
        if len(weights) == 1:
            (weight,) = weights
            buffer = torch.empty(weight.whole, dtype=weight.part.dtype, device="meta")
            work = dist.all_gather_into_tensor(buffer, self.part_of(weight), async_op=True)
            weight.parameter.data = buffer.narrow(0, 0, weight.elements).view(weight.shape)
            return Gathering(self, weights, [(work, weights, None)])
        by_dtype = defaultdict(list)
        for weight in weights:
            by_dtype[weight.part.dtype].append(weight)
        together = []
        for dtype in sorted(by_dtype, key=str):
            some = by_dtype[dtype]
            size = sum(weight.size for weight in some)
            flat = torch.empty(size * self.world, dtype=dtype, device="meta")
            rows = [flat.narrow(0, size * rank, size) for rank in range(self.world)]
            torch.cat([self.part_of(weight) for weight in some], out=rows[self.rank])
            together.append(
                (dist.all_gather_into_tensor(flat, rows[self.rank], async_op=True), some, rows)
            )
        return Gathering(self, weights, together)


class Gathering:
    """Weights on their way, together (``AllGatherHandle``, ``AllGatherCoalescedHandle``)."""

    def __init__(
        self, weights: Weights, some: Sequence[Divided], together: Sequence[tuple]
    ) -> None:
        self.weights, self.some, self.together, self.done = weights, some, together, False

    def wait(self) -> None:
        if self.done:
            return
        device = self.weights.device
        for work, some, rows in self.together:
            work.wait()
            start = 0
            for weight in some:
                if rows is not None:
                    used = [
                        row.narrow(0, start, min(weight.size, weight.elements - rank * weight.size))
                        for rank, row in enumerate(rows)
                        if rank * weight.size < weight.elements
                    ]
                    weight.parameter.data = torch.cat(used).view(weight.shape)
                    for row in used:
                        device.used_on(row, device.current_stream())
                    start += weight.size
                device.named(weight.parameter.data, UNSHARDED)
                weight.state = HERE
        self.done = True
