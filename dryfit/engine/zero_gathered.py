"""ZeRO-3 by rules: weights, gradients and states are divided (``stage3.py``, and ``linear.py``).

As :mod:`dryfit.engine.zero`, after DeepSpeed 0.19.8. What is gathered when:
:mod:`dryfit.engine.zero_coordinator`.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .components import COLLECTIVES, GRADIENTS, OPTIMIZER_STATES
from .fake_device import FakeDevice
from .patching import patched
from .zero import NORM_DTYPE, Component, Zero, ZeroSettings, cast
from .zero_coordinator import IN_QUEUE, Coordinator
from .zero_weights import Divided, Weights


class _Linear(torch.autograd.Function):
    """``zero/linear.py``: a linear layer whose backward pass finds the weight as it is then."""

    @staticmethod
    def forward(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if inputs.dim() == 2 and bias is not None:
            return torch.addmm(bias, inputs, weight.t())
        output = inputs.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        inputs, weight, bias = ctx.saved_tensors
        of_inputs = of_weight = of_bias = None
        rows = gradient.reshape(-1, gradient.shape[-1]) if gradient.dim() > 2 else gradient
        if ctx.needs_input_grad[0]:
            of_inputs = gradient.matmul(weight)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t().matmul(inputs.reshape(-1, inputs.shape[-1]))
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = gradient.sum(list(range(gradient.dim() - 1)))
        return of_inputs, of_weight, of_bias


@contextmanager
def zero_in_place(stage: int) -> Iterator[None]:
    """Around all of a trace by rules: with stage 3 linear layers are DeepSpeed's (``memory_efficient_linear``)."""

    def linear(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return _Linear.apply(inputs, weight, bias)

    with (
        patched([(nn.functional, "linear", linear)] if stage == 3 else []),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        yield


class GatheredWeights(Zero):
    """Stage 3 (``stage3.py``): weights, gradients and states are divided.

    Weights that are to be divided before the engine is made, as ``from_pretrained`` does, are in ``before``.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: ZeroSettings,
        device: FakeDevice,
        dtype: torch.dtype | None,
        before: Iterable[nn.Parameter] = (),
    ) -> None:
        weights = Weights(device, settings)
        weights.divide(before)
        if not weights.by_parameter:  # else each weight has its dtype and place already
            cast(module.parameters(), dtype)
            device.arrived([*module.parameters(), *module.buffers()])
        super().__init__(optimizer, settings, device, overlaps=True)
        self.summed_in = dtype or torch.float32  # also where adapters were added in another dtype
        weights.divide(module.parameters())
        self.module, self.weights = module, weights
        self.small: list[Divided] = []
        for parameter in module.parameters():
            weight = weights[parameter]
            if weight.elements <= settings.stage3_param_persistence_threshold:
                weight.stays = True
                self.small.append(weight)
        stream = device.Stream() if self.overlaps else device.first_stream
        self.coordinator = Coordinator(module, weights, settings, stream)
        self.coordinator.hook()
        self.groups: list[list[Divided]] = []  # of weights that are updated together
        self.owner: list[dict[str, Any]] = []  # by group, that of the user's optimizer
        for group in optimizer.param_groups:
            every = [weights[parameter] for parameter in group["params"] if parameter.requires_grad]
            for some in self._sub_groups(every):
                self.groups.append(some)
                self.owner.append(group)
        self.found_infinite = torch.zeros(1, dtype=torch.bool, device="meta")
        self.halves = self._one_buffer()
        self.masters = self._masters()
        if not self.offloads:
            largest = max(sum(weight.size for weight in group) for group in self.groups)
            torch.zeros(largest, device="meta")  # initialize_optimizer_states: it goes again
        for group in optimizer.param_groups:
            group["params"] = []
        self.elements, self.waiting, self.events = 0, [], deque()
        self.buffer = None
        if settings.contiguous_gradients:
            self.buffer = torch.empty(
                settings.reduce_bucket_size, dtype=self.summed_in, device="meta"
            )
            device.named(self.buffer, COLLECTIVES)
        self.micro_batch, self.has_ended = 0, False
        self.norms: list[torch.Tensor] = []
        self._gradients()
        for weight in (weight for group in self.groups for weight in group):
            weights.gather_now([weight])
            weight.parameter.register_post_accumulate_grad_hook(self._grown)
            weights.give_back(weight)

    def name(self, component: Component) -> None:
        for name, parameter in self.module.named_parameters():
            self.device.named(self.weights[parameter].part, component(name, parameter))

    def _sub_groups(self, weights: Sequence[Divided]) -> list[list[Divided]]:
        """``_create_fp16_sub_groups``: states are updated in groups of so many elements."""
        most, groups = self.settings.sub_group_size, [[]]
        if most >= sum(weight.size for weight in weights):
            return [list(weights)]
        for weight in weights:
            groups[-1].append(weight)
            if sum(one.size for one in groups[-1]) >= most:
                groups.append([])
        return [group for group in groups if group]

    def _one_buffer(self) -> list[torch.Tensor]:
        """``defragment``: what is trained goes to the host and comes back as one tensor, which groups are views of."""
        every = [weight for group in self.groups for weight in group]
        dtype = every[0].part.dtype
        if self.settings.offload_param == "cpu":
            for weight in every:
                weight.on_host = True
            return [torch.empty(0, dtype=dtype, device="meta") for _ in self.groups]
        for weight in every:
            weight.part = torch.empty(0, dtype=dtype, device="meta")
        torch.cuda.empty_cache()
        whole = torch.empty(sum(weight.size for weight in every), dtype=dtype, device="meta")
        start, halves = 0, []
        for group in self.groups:
            first = start
            for weight in group:
                weight.part = whole.narrow(0, start, weight.size)
                start += weight.size
            halves.append(whole.narrow(0, first, start - first))
        return halves

    def _masters(self) -> list[torch.Tensor]:
        """``_create_fp32_partitions``: a cast, and a copy of it that stays."""
        masters = []
        for half, group in zip(self.halves, self.groups, strict=True) if not self.offloads else ():
            on_host = self.settings.offload_param == "cpu"  # cast there
            converted = (
                torch.empty(sum(one.size for one in group), device="meta")
                if on_host
                else half.to(torch.float32)
            )
            master = converted.clone().detach()
            master.requires_grad = True
            self.device.named(master, OPTIMIZER_STATES)
            masters.append(master)
        return masters

    def _gradients(self) -> None:
        """``grad_partitions_flat_buffer``."""
        every = [weight for group in self.groups for weight in group]
        size = 0 if self.offloads else sum(weight.size for weight in every)
        self.summed = torch.zeros(size, dtype=self.summed_in, device="meta")
        self.device.named(self.summed, GRADIENTS)
        start, self.places = 0, {}
        for weight in every:
            if not self.offloads:
                self.places[id(weight.parameter)] = self.summed.narrow(0, start, weight.size)
            start += weight.size

    def forward_begins(self) -> None:
        self.micro_batch += self.has_ended
        self.has_ended = False

    def _grown(self, parameter: nn.Parameter) -> None:
        """``reduce_independent_p_g_buckets_and_remove_grads`` and ``__add_grad_to_ipg_bucket``."""
        size = self.settings.reduce_bucket_size
        if self.elements and self.elements + parameter.grad.numel() > size:
            self._exchange()
        self.exchanging.wait_stream(self.device.current_stream())
        if self.buffer is not None and self.elements + parameter.grad.numel() <= size:
            with self.device.stream(self.exchanging):
                place = self.buffer.narrow(0, self.elements, parameter.grad.numel()).view_as(
                    parameter.grad
                )
                place.copy_(parameter.grad)
                self.device.used_on(parameter.grad, self.exchanging)
                parameter.grad.data = place
        self.waiting.append(parameter)
        self.elements += parameter.grad.numel()

    def _exchange(self) -> None:
        """``__reduce_and_partition_ipg_grads``."""
        if not self.waiting:
            return
        if len(self.events) > IN_QUEUE:
            self.events.popleft().synchronize()
        with torch.no_grad(), self.device.stream(self.exchanging):
            fits = self.buffer is not None and self.elements <= self.settings.reduce_bucket_size
            if fits and not self.settings.reduce_scatter:
                parts = self._averaged_whole(self.buffer.narrow(0, 0, self.elements))
            else:
                self.waiting.sort(key=lambda parameter: self.weights[parameter].number)
                parts = self._averaged_parts(
                    [parameter.grad.to(self.summed_in) for parameter in self.waiting]
                )
            self._keep(parts)
            self.waiting, self.elements = [], 0
            self.events.append(self.exchanging.record_event())

    def _averaged_whole(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """``__avg_scatter_contiguous_grads``."""
        tensor.div_(self.world)
        dist.all_reduce(tensor)
        tensor = tensor.mul(1.0)
        parts, start = [], 0
        for parameter in self.waiting:
            weight = self.weights[parameter]
            first = min(self.rank * weight.size, weight.elements)
            last = min(first + weight.size, weight.elements)
            part = tensor[start + first : start + last]
            if len(part) != weight.size:
                padded = torch.zeros(weight.size, dtype=self.summed_in, device="meta")
                if len(part):
                    padded[: len(part)] = part
                part = padded
            parts.append(part)
            start += weight.elements
        return parts

    def _averaged_parts(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``reduce_scatter_coalesced``: gradients by rank in one tensor, of which each GPU gets its sum."""
        sizes = [math.ceil(gradient.numel() / self.world) for gradient in gradients]
        if len(gradients) == 1 and gradients[0].numel() % self.world == 0:
            flat = gradients[0].view(-1)
        else:
            parts = []
            for rank in range(self.world):
                for gradient, size in zip(gradients, sizes, strict=True):
                    part = gradient.view(-1)[rank * size : rank * size + size]
                    parts.append(part)
                    if len(part) < size:
                        parts.append(torch.empty(size - len(part), dtype=part.dtype, device="meta"))
            flat = torch.cat(parts)
            del parts
        flat.div_(self.world)
        own = torch.chunk(flat, self.world)[self.rank]
        dist.reduce_scatter_tensor(own, flat)
        found, start = [], 0
        for gradient, size in zip(gradients, sizes, strict=True):
            has = min(max(gradient.numel() - self.rank * size, 0), size)
            found.append(own.narrow(0, start, has))
            start += size
        return found

    def _keep(self, parts: Sequence[torch.Tensor]) -> None:
        """``partition_grads``."""
        for parameter, part in zip(self.waiting, parts, strict=True):
            if not self.weights[parameter].holds_data(self.rank):
                parameter.grad = None
                continue
            if self.offloads:
                self._to_host(part)
            else:
                place = self.places[id(parameter)].narrow(0, 0, part.numel())
                place.copy_(part) if self.micro_batch == 0 else place.add_(part.view(place.shape))
            self.device.used_on(parameter.grad, self.device.current_stream())
            parameter.grad = None

    def _to_host(self, part: torch.Tensor) -> None:
        """The sum lies on the host; a copy of it comes back for what follows."""
        total = torch.empty(part.numel(), dtype=self.summed_in, device="meta")
        if self.micro_batch > 0:
            total.add_(part)
        if self.is_last:
            self.norms.append(norm_of(total))
            total.to(torch.float32)

    def backward_ends(self) -> None:
        """``independent_gradient_partition_epilogue`` and ``backward_epilogue``."""
        self._exchange()
        self.exchanging.synchronize()
        self.has_ended = True
        with torch.no_grad():
            self.coordinator.release_leftovers()

    def step(self) -> None:
        self.micro_batch, self.has_ended = 0, False
        with torch.no_grad():
            self.coordinator.release_all()
            norms = self._norms()
            norm = torch.linalg.vector_norm(torch.stack(norms), ord=2)
            self.last_norm = norm / self.loss_scale
        if not self.offloads:
            self._drop_gradients()
            for number, (group, master) in enumerate(zip(self.groups, self.masters, strict=True)):
                own = [self.places[id(weight.parameter)] for weight in group]
                master.grad = _flatten_dense_tensors(own).to(torch.float32)
                self.scale(master.grad, norm)
                of_group = self.owner[number]
                of_group["params"] = [master]
                self.own.step()
                of_group["params"] = []
                if self.settings.offload_param == "none":
                    self._back(number)
                master.grad = None
        self.norms = []
        with torch.no_grad():
            self.weights.gather_now(self.small)
        self._drop_gradients()

    def _back(self, number: int) -> None:
        """``_reassign_or_swap_out_partitioned_parameters``."""
        half, group = self.halves[number], self.groups[number]
        half.copy_(self.masters[number].data)
        for weight, part in zip(
            group, _unflatten_dense_tensors(half, [one.part for one in group]), strict=True
        ):
            weight.part.data = part.data

    def _norms(self) -> list[torch.Tensor]:
        """``_overflow_check_and_loss_scale_update`` and ``_get_norm_groups``."""
        if self.dtype == torch.float16:
            with self.device.stream(self.exchanging):
                self.found_infinite.logical_or_(torch.isinf(self.summed).any())
                self.found_infinite.logical_or_(torch.isnan(self.summed).any())
                found = self.found_infinite.clone().to(torch.uint8)
                self.found_infinite.zero_()
            self.device.first_stream.wait_stream(self.exchanging)
            dist.all_reduce(found)
        norms = []
        for group in self.groups:
            if self.offloads:
                norms.append(torch.zeros((), dtype=torch.float32, device="meta"))
                continue
            each = [self.places[id(weight.parameter)].to(NORM_DTYPE).norm(2.0) for weight in group]
            summed = torch.sum(torch.pow(torch.stack(each), 2.0))
            dist.all_reduce(summed)
            norms.append(summed**0.5)
        return norms

    def _drop_gradients(self) -> None:
        for weight in (weight for group in self.groups for weight in group):
            if weight.parameter.grad is not None:
                self.device.used_on(weight.parameter.grad, self.device.current_stream())
            weight.parameter.grad = None


def norm_of(tensor: torch.Tensor) -> torch.Tensor:
    """``_constant_buffered_norm2``."""
    norm = None
    for part in tensor.view(-1).split(250_000_000):
        own = part.to(NORM_DTYPE).norm(2) ** 2.0
        norm = own if norm is None else norm + own
    return norm**0.5
