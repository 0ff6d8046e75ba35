"""ZeRO-1 and ZeRO-2 by rules: weights are whole, states are divided, and with stage 2 gradients too.

As :mod:`dryfit.engine.zero`, after DeepSpeed 0.19.8: ``stage_1_and_2.py``, whose functions are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .components import COLLECTIVES, GRADIENTS, OPTIMIZER_STATES
from .fake_device import FakeDevice
from .zero import NORM_DTYPE, Component, Zero, ZeroSettings, cast

ALIGNED_ELEMENTS = 2  # nccl_start_alignment_factor


@dataclass
class Bucket:
    """Gradients that wait for their exchange (``IPGBucket``, "independent parallel gradients")."""

    buffers: list[torch.Tensor] = field(default_factory=list)
    index: int = 0
    parameters: list[nn.Parameter] = field(default_factory=list)
    elements: int = 0
    too_large: nn.Parameter | None = None  # for the buffer: exchanged where it is

    def clear(self) -> None:
        self.parameters.clear()
        self.elements, self.too_large = 0, None


def trained(group: Mapping[str, Any]) -> list[nn.Parameter]:
    return [
        parameter for parameter in group["params"] if parameter.requires_grad and parameter.numel()
    ]


class FlatPartitions(Zero):
    """Stages 1 and 2 (``stage_1_and_2.py``): weights are whole, and each group of them is one flat tensor.

    A GPU updates its part of that tensor, of which it keeps a copy in fp32, and the states.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: ZeroSettings,
        device: FakeDevice,
        dtype: torch.dtype | None,
        *,
        stage: int,
    ) -> None:
        cast(module.parameters(), dtype)
        device.arrived([*module.parameters(), *module.buffers()])
        super().__init__(optimizer, settings, device, overlaps=False)
        self.module, self.divides_gradients = module, stage == 2
        self.contiguous = settings.contiguous_gradients or self.offloads
        self.groups = [trained(group) for group in optimizer.param_groups]
        self.flat = [self._flattened(number) for number in range(len(self.groups))]
        self.bucket, self.waiting = Bucket(), []  # whose gradients go when the next exchange begins
        self.ready, self.micro_batch = False, -1
        self.own_gradients: torch.Tensor | None = None
        self.filled = 0
        self.kept: list[list[torch.Tensor] | None] = [None] * len(self.groups)
        self.averaged: list[list[torch.Tensor]] = []
        self.norms: list[torch.Tensor] = []
        if self.offloads:
            largest = max(parameter.numel() for group in self.groups for parameter in group)
            self.from_host = torch.zeros(largest, dtype=self.dtype, device="meta")
            device.named(self.from_host, COLLECTIVES)
        else:  # initialize_optimizer_states: a gradient for each group, which goes again
            _ = [torch.zeros(flat.part, device="meta") for flat in self.flat]
            del _
        for flat in self.flat:
            for parameter in flat.parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, flat=flat: self._grown(parameter)
                )

    def name(self, component: Component) -> None:
        for name, parameter in self.module.named_parameters():
            self.device.named(parameter.data, component(name, parameter))

    def _flattened(self, number: int) -> Flat:
        parameters, settings = self.groups[number], self.settings
        torch.cuda.empty_cache()
        if settings.round_robin_gradients:  # _round_robin_reorder
            parameters = [
                parameter
                for first in range(self.world)
                for parameter in parameters[first :: self.world]
            ]
        tensor = _flatten_dense_tensors(aligned(parameters, ALIGNED_ELEMENTS * self.world)).detach()
        flat = Flat(tensor, parameters, self.world, self.rank)
        flat.view_into()
        part = flat.own.detach().clone()
        group = self.own.param_groups[number]
        if self.offloads:  # the copy in fp32 and its states are on the host, which updates it
            group["params"] = []
            return flat
        master = part.to(torch.float32)
        master.requires_grad = True
        self.device.named(master, OPTIMIZER_STATES)
        group["params"] = [master]
        return flat

    def _grown(self, parameter: nn.Parameter) -> None:
        """A gradient is there: ``process_gradients``."""
        if not self.ready:  # setup_buckets
            self.micro_batch += 1
            if self.contiguous:
                count = 2 if self.overlaps else 1
                size = self.settings.reduce_bucket_size
                self.bucket.buffers = [
                    torch.empty(size, dtype=self.dtype, device="meta") for _ in range(count)
                ]
                self.bucket.index = 0
                for buffer in self.bucket.buffers:
                    self.device.named(buffer, COLLECTIVES)
            self.ready = True
        if self.divides_gradients or (self.overlaps and self.is_last):
            self._add(parameter)

    def _add(self, parameter: nn.Parameter) -> None:
        """``reduce_independent_p_g_buckets_and_remove_grads``."""
        bucket, count, gradient = self.bucket, parameter.numel(), parameter.grad
        if bucket.elements + count > self.settings.reduce_bucket_size:
            self._exchange()
            if self.contiguous and self.overlaps:
                bucket.index = 1 - bucket.index
        if self.contiguous:
            if count > self.settings.reduce_bucket_size:
                if self.offloads:
                    gradient.data = gradient.detach().clone(memory_format=torch.contiguous_format)
                bucket.too_large = parameter
            else:
                place = bucket.buffers[bucket.index].narrow(0, bucket.elements, count)
                place.copy_(gradient.view(-1))
                gradient.data = place.data.view_as(gradient)
        bucket.elements += count
        bucket.parameters.append(parameter)

    def _exchange(self) -> None:
        """``reduce_ipg_grads``."""
        bucket = self.bucket
        if self.contiguous:
            if bucket.too_large is not None:
                self._average(bucket.too_large.grad.view(-1))
            else:
                self._average(bucket.buffers[bucket.index].narrow(0, 0, bucket.elements))
        elif bucket.parameters:
            self._average_apart(
                [parameter.grad for parameter in bucket.parameters], bucket.elements
            )
        with self.device.stream(self.exchanging):
            for parameter in bucket.parameters:
                flat, number = self._of(parameter)
                if flat.holds(parameter):
                    if self.contiguous:
                        self._keep(parameter, flat, number)
                elif self.divides_gradients:
                    if self.overlaps and not self.contiguous:
                        self.waiting.append(parameter)
                    else:
                        parameter.grad = None
            bucket.clear()

    def _of(self, parameter: nn.Parameter) -> tuple[Flat, int]:
        return next(
            (flat, number) for number, flat in enumerate(self.flat) if id(parameter) in flat.places
        )

    def _average(self, tensor: torch.Tensor) -> None:
        """``average_tensor``."""
        settings, computing = self.settings, self.device.current_stream()
        if self.overlaps:
            self.exchanging.wait_stream(computing)
            computing.wait_stream(self.exchanging)
        with self.device.stream(self.exchanging):
            if not settings.reduce_scatter:
                dist.all_reduce(tensor)
                tensor.mul_(1.0 / self.world)
                return
            tensor.div_(self.world)
            self._reduce_together(self._slices(tensor))

    def _slices(self, tensor: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """The ranks to which a bucket's parts belong, and the parts; neighbours of one rank are one."""
        found: list[list[int]] = []
        for parameter in self.bucket.parameters:
            flat, _ = self._of(parameter)
            for rank, count in flat.ranks(parameter):
                if found and found[-1][0] == rank:
                    found[-1][1] += count
                else:
                    found.append([rank, count])
        slices, start = [], 0
        for rank, count in found:
            slices.append((rank, tensor.narrow(0, start, count)))
            start += count
        return slices

    def _reduce_together(self, slices: Sequence[tuple[int, torch.Tensor]]) -> None:
        """``allreduce_and_scatter``."""
        for some in in_buckets(
            slices, self.settings.reduce_bucket_size, lambda one: one[1].numel()
        ):
            parts = [part for _, part in some]
            summed = _flatten_dense_tensors(parts)
            dist.all_reduce(summed)
            if self.overlaps:
                self.device.used_on(summed, self.exchanging)
            for (rank, part), synced in zip(
                some, _unflatten_dense_tensors(summed, parts), strict=True
            ):
                if rank == self.rank:
                    part.copy_(synced)
                    if self.overlaps:
                        self.device.used_on(part, self.exchanging)
            del summed

    def _average_apart(self, gradients: Sequence[torch.Tensor], size: int) -> None:
        """``buffered_reduce_fallback``: without a buffer gradients are made one tensor for their exchange."""
        for some in in_buckets(gradients, size, torch.Tensor.numel):
            if self.overlaps:
                self.device.synchronize()
                self._let_go()
            with self.device.stream(self.exchanging):
                summed = _flatten_dense_tensors(some)
                summed.div_(self.world)
                dist.all_reduce(summed)
                if self.overlaps:
                    self.device.used_on(summed, self.exchanging)
                for part, synced in zip(some, _unflatten_dense_tensors(summed, some), strict=True):
                    part.copy_(synced)
                    if self.overlaps:
                        self.device.used_on(part, self.exchanging)
                del summed

    def _let_go(self) -> None:
        """``_clear_previous_reduced_grads``."""
        for parameter in self.waiting:
            parameter.grad = None
        self.waiting.clear()

    def _keep(self, parameter: nn.Parameter, flat: Flat, number: int) -> None:
        """``copy_grads_in_partition``: what a GPU has a part of goes from the bucket to a buffer that lasts."""
        if self.offloads:
            self._to_host(parameter, flat)
            return
        if self.own_gradients is None:
            self.filled = 0
            size = sum(parameter.numel() for one in self.flat for parameter in one.held)
            self.own_gradients = torch.empty(size, dtype=self.dtype, device="meta")
            self.device.named(self.own_gradients, GRADIENTS)
        place = self.own_gradients.narrow(0, self.filled, parameter.numel())
        place.copy_(parameter.grad.view(-1))
        parameter.grad.data = place.data.view_as(parameter.grad)
        self.filled += parameter.numel()

    def _to_host(self, parameter: nn.Parameter, flat: Flat) -> None:
        """``async_accumulate_grad_in_cpu_via_gpu`` and what follows in the last micro-batch."""
        if self.micro_batch > 0:  # the sum so far comes through a buffer
            parameter.grad.data.view(-1).add_(self.from_host.narrow(0, 0, parameter.numel()))
        if not self.is_last:
            return
        start, count = flat.own_part(parameter)
        part = parameter.grad.view(-1).narrow(0, start, count)
        self.norms.append(part.to(NORM_DTYPE).norm(2))
        if part.dtype != torch.float32:
            part.to(torch.float32)
        self.device.used_on(parameter.grad, self.device.current_stream())
        parameter.grad = None

    def backward_ends(self) -> None:
        if self.divides_gradients:
            self._epilogue()
        elif self.is_last:  # reduce_gradients
            if not self.overlaps:
                for group in self.groups:
                    for parameter in group:
                        if parameter.grad is not None:
                            self._add(parameter)
            self._epilogue()

    def _epilogue(self) -> None:
        """``independent_gradient_partition_epilogue``."""
        self._exchange()
        if self.overlaps:
            self.device.synchronize()
            self._let_go()
        if not self.offloads:
            for number, flat in enumerate(self.flat):
                own = [
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    for parameter in flat.held
                ]
                if self.kept[number] is None:
                    self.kept[number] = own
                else:
                    for total, new in zip(self.kept[number], own, strict=True):
                        total.add_(new)
                del own
            if self.is_last:
                self.averaged = [
                    flat.cut(kept, self.dtype)
                    for flat, kept in zip(self.flat, self.kept, strict=True)
                ]
                self.kept = [None] * len(self.groups)
        if self.contiguous:  # _release_ipg_buffers
            self.bucket.buffers = []
            self.own_gradients = None
        self.ready = False
        for group in self.groups:
            for parameter in group:
                parameter.grad = None

    def step(self) -> None:
        self.micro_batch = -1
        if self.dtype != torch.float32:  # in bf16 too
            self._look_for_overflow()
        norm = self._norm()
        self.last_norm = norm / self.loss_scale
        for number, flat in enumerate(self.flat):
            if not self.offloads:
                gradient = _flatten_dense_tensors(self.averaged[number]).to(torch.float32)
                self.averaged[number] = []
                master = self.own.param_groups[number]["params"][0]
                master.grad = gradient
                self.scale(gradient, norm)
                self.update(self.own.param_groups[number])
                master.grad = None
                del gradient
                flat.own.copy_(master.data)
        self.norms = []
        for flat in self.flat:
            dist.all_gather_into_tensor(flat.tensor, flat.own)
            flat.view_into()
        for group in self.groups:
            for parameter in group:
                parameter.grad = None

    def _look_for_overflow(self) -> None:
        """``has_overflow_partitioned_grads_serial``."""
        count = torch.zeros(1, device="meta")
        for gradient in (gradient for own in self.averaged for gradient in own):
            count += (
                torch.isfinite(gradient.amax())
                .logical_and(torch.isfinite(gradient.amin()))
                .logical_not()
            )
        dist.all_reduce(count.bool().byte())

    def _norm(self) -> torch.Tensor:
        """``scaled_global_norm``."""
        norms = []
        for own in self.averaged:
            each = [torch.linalg.vector_norm(gradient.to(NORM_DTYPE), ord=2.0) for gradient in own]
            norms.append(total(each))
        if self.offloads:
            norms.append(torch.zeros((), device="meta"))
        return torch.linalg.vector_norm(torch.stack(norms), ord=2)


def total(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm over all GPUs, of the norms of a group's gradients here (``get_grad_norm_direct``)."""
    summed = (
        torch.stack(list(norms)).pow(2.0).sum().float() if norms else torch.zeros((), device="meta")
    )
    dist.all_reduce(summed)
    return summed.pow(0.5)


def aligned(tensors: Sequence[torch.Tensor], alignment: int) -> list[torch.Tensor]:
    """``utils.py``, ``align_dense_tensors``: with zeros behind, so that the sum is a multiple."""
    rest = -sum(tensor.numel() for tensor in tensors) % alignment
    return (
        [*tensors, torch.zeros(rest, dtype=tensors[0].dtype, device="meta")] if rest else [*tensors]
    )


def in_buckets(items: Sequence[Any], size: int, elements: Callable[[Any], int]) -> list[list[Any]]:
    """Items one after the other, until they have more elements than a bucket."""
    buckets: list[list[Any]] = [[]]
    count = 0
    for item in items:
        buckets[-1].append(item)
        count += elements(item)
        if count > size:
            buckets.append([])
            count = 0
    return [bucket for bucket in buckets if bucket]


class Flat:
    """A group's weights as one tensor, and which part of it is this GPU's."""

    def __init__(
        self, tensor: torch.Tensor, parameters: Sequence[nn.Parameter], world: int, rank: int
    ) -> None:
        self.tensor, self.parameters, self.rank = tensor, list(parameters), rank
        self.part = tensor.numel() // world  # elements of each GPU's part
        self.places: dict[
            int, int
        ] = {}  # where each parameter begins in the tensor, by its identity
        start = 0
        for parameter in parameters:
            self.places[id(parameter)] = start
            start += parameter.numel()
        self.shapes = [parameter.shape for parameter in parameters]
        self.own = tensor.narrow(0, rank * self.part, self.part)
        # The parameters that have elements in this GPU's part, in order.
        self.held = [parameter for parameter in parameters if self.holds(parameter)]

    def view_into(self) -> None:
        """Make the parameters views of the flat tensor (``_update_model_bit16_weights``)."""
        for parameter, shape in zip(self.parameters, self.shapes, strict=True):
            start = self.places[id(parameter)]
            parameter.data = self.tensor.narrow(0, start, math.prod(shape)).view(shape).data

    def ranks(self, parameter: nn.Parameter) -> list[tuple[int, int]]:
        """The GPUs among whose parts a parameter lies, and its elements in each."""
        start = self.places[id(parameter)]
        end, found = start + parameter.numel(), []
        for rank in range(start // self.part, (end - 1) // self.part + 1):
            first, last = max(start, rank * self.part), min(end, (rank + 1) * self.part)
            found.append((rank, last - first))
        return found

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether any of a parameter lies in this GPU's part."""
        return any(rank == self.rank for rank, _ in self.ranks(parameter))

    def own_part(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this GPU's part of a parameter begins in it, and how many elements it has."""
        before = 0
        for rank, count in self.ranks(parameter):
            if rank == self.rank:
                return before, count
            before += count
        return before, 0

    def cut(self, gradients: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """This GPU's part of its parameters' gradients, with zeros behind (``_get_flat_partition_unpadded``)."""
        if not gradients:
            return [torch.zeros(self.part, dtype=dtype, device="meta")]
        found, size = [], 0
        for parameter, gradient in zip(self.held, gradients, strict=True):
            start, count = self.own_part(parameter)
            whole = count == gradient.numel()
            found.append(
                gradient if whole else gradient.contiguous().view(-1).narrow(0, start, count)
            )
            size += count
        if size < self.part:
            found.append(torch.zeros(self.part - size, dtype=dtype, device="meta"))
        return found
