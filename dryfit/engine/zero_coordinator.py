"""When ZeRO-3 gathers weights and gives them back (``partitioned_param_coordinator.py``, ``parameter_offload.py``)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .zero import ZeroSettings
from .zero_weights import AWAY, HERE, Divided, Gathering, Weights

IN_QUEUE = 2  # fetches and exchanges that may wait for the GPU (max_ongoing_fetch_events, max_param_reduce_events)


class Coordinator:
    """Which weights are gathered when; after the first step by the order in which the one before used them."""

    def __init__(
        self, model: nn.Module, weights: Weights, settings: ZeroSettings, stream: Any
    ) -> None:
        self.model, self.weights, self.settings, self.stream = model, weights, settings, stream
        self.device = weights.device
        self.way: dict[int, Gathering] = {}  # by the identity of what is on its way
        self.recording, self.complete = False, False
        self.order: list[nn.Module] = []
        self.uses: list[tuple[Divided, int]] = []
        self.outside: dict[int, list[nn.Parameter]] = defaultdict(
            list
        )  # weights that another module's forward reads
        self.recomputed: dict[int, dict[int, Divided]] = defaultdict(dict)
        self.backward: dict[int, nn.Module] = {}  # modules whose backward pass runs
        self.running: list[nn.Module] = [model]
        self.events: deque = deque()
        self.to_release: dict[tuple[int, int], set[int]] = {}
        self.queue: deque[tuple[Divided, int]] = deque()
        self.fetched_for: dict[int, int] = {}
        self.step_number, self.available = 0, 0

    def of(self, module: nn.Module) -> list[Divided]:
        """The weights that a module itself runs with."""
        own = [*module.parameters(recurse=False), *self.outside[id(module)]]
        return list({id(parameter): self.weights[parameter] for parameter in own}.values())

    def begin(self) -> None:
        """``reset_step``, as the model's forward pass begins."""
        self._drop_what_is_on_its_way()
        if not self.complete:
            if self.recording:
                numbers: dict[int, deque[int]] = defaultdict(deque)
                for number, module in enumerate(self.order):
                    numbers[id(module)].append(number)
                for module in self.order:
                    number = numbers[id(module)].popleft()
                    self.uses += [
                        (one, number) for one in sorted(self.of(module), key=lambda one: one.number)
                    ]
                self.complete = True
            self.recording = not self.complete
        self.queue = deque(self.uses)
        self.fetched_for = {}
        self.step_number, self.available = 0, 0

    def _drop_what_is_on_its_way(self) -> None:
        for key, gathering in list(self.way.items()):
            gathering.wait()
            self._release(self.weights.by_parameter[key])
        self.way.clear()

    def _starts(self, module: nn.Module) -> None:
        """``trace_prologue`` and ``record_module``: another order than the recorded one is recorded anew."""
        if self.complete and (
            self.step_number >= len(self.order) or self.order[self.step_number] is not module
        ):
            self.complete, self.order, self.uses = False, [], []
            self.fetched_for, self.queue = {}, deque()
            self._drop_what_is_on_its_way()
        if self.recording:
            self.order.append(module)

    def fetch(self, module: nn.Module, *, forward: bool) -> None:
        """``fetch_sub_module``."""
        self._starts(module)
        if not forward:
            self.backward[id(module)] = module
        needed = self.of(module)
        self._gather(needed)
        again = forward and torch._C._current_graph_task_id() != -1  # checkpointing runs it anew
        for weight in needed:
            weight.users.add(id(module))
            if again and self.backward and not weight.parameter.requires_grad:
                owner = next(reversed(self.backward))
                self.recomputed[owner][id(weight.parameter)] = weight
                weight.users.add(owner)
            gathering = self.way.pop(id(weight.parameter), None)
            if gathering is not None:
                with self.device.stream(self.stream):
                    if len(self.events) > IN_QUEUE:
                        self.events.popleft().synchronize()
                    gathering.wait()
                    self.events.append(self.device.current_stream().record_event())
        self.device.current_stream().wait_stream(self.stream)
        if self.complete:
            self._look_ahead(needed)
        self.step_number += 1

    def _look_ahead(self, needed: Sequence[Divided]) -> None:
        new = [
            one for one in needed if self.fetched_for.get(id(one.parameter), -1) < self.step_number
        ]
        dropped: set[int] = set()
        while self.queue and len(dropped) < len(new):
            weight, number = self.queue.popleft()
            self.fetched_for[id(weight.parameter)] = number
            dropped.add(id(weight.parameter))
        settings = self.settings
        if settings.stage3_prefetch_bucket_size <= 0:
            return
        most = min(
            settings.stage3_max_live_parameters - self.available,
            settings.stage3_prefetch_bucket_size,
        )
        ahead: dict[int, Divided] = {}
        elements = 0
        while self.queue and elements < most:
            weight, number = self.queue.popleft()
            key = id(weight.parameter)
            self.fetched_for[key] = max(self.fetched_for.get(key, -1), number)
            if weight.state == AWAY and key not in ahead:
                ahead[key] = weight
                elements += weight.elements
        self._gather(ahead.values())

    def _gather(self, weights: Iterable[Divided]) -> None:
        away = [weight for weight in weights if weight.state == AWAY]
        if not away:
            return
        self.available += sum(weight.elements for weight in away)
        with self.device.stream(self.stream):
            gathering = self.weights.begin_to_gather(away)
        for weight in away:
            self.way[id(weight.parameter)] = gathering

    def release(self, module: nn.Module, *, forward: bool) -> None:
        """``release_sub_module``."""
        own = {id(weight.parameter): weight for weight in self.of(module)}
        going = self._going(module, own) if self.complete else set(own)
        if not forward:
            again = self.recomputed.pop(id(module), {})
            going |= {key for key, weight in again.items() if not weight.stays}
            own |= again
            self.backward.pop(id(module), None)
        for key, weight in own.items():
            weight.users.discard(id(module))
            if key in going:
                self._release(weight)

    def _release(self, weight: Divided) -> None:
        if weight.state == HERE and not weight.users:
            self.weights.give_back(weight)
            self.available -= weight.elements

    def _going(self, module: nn.Module, own: dict[int, Divided]) -> set[int]:
        """``__params_to_release``, which DeepSpeed remembers by the place in the step."""
        place = id(module), self.step_number
        if place not in self.to_release:
            going = {key for key, weight in own.items() if not weight.stays}
            going -= {key for key in own if self.fetched_for.get(key, -1) > self.step_number}
            passed = 0
            for later in self.order[self.step_number :]:
                if passed >= self.settings.stage3_max_reuse_distance:
                    break
                for weight in self.of(later):
                    going.discard(id(weight.parameter))
                    passed += weight.elements
            self.to_release[place] = going
        return set(self.to_release[place])

    def release_leftovers(self) -> None:
        """``release_backward_leftovers``: modules whose backward pass nobody ended."""
        while self.backward:
            key, module = self.backward.popitem()
            own = {
                id(weight.parameter): weight for weight in self.of(module)
            } | self.recomputed.pop(key, {})
            for weight in own.values():
                weight.users.discard(key)
                if not weight.stays:
                    self._release(weight)

    def release_all(self) -> None:
        """``release_and_reset_all``, before the update."""
        for parameter in self.model.parameters():
            gathering = self.way.pop(id(parameter), None)
            if gathering is not None:
                gathering.wait()
            self.weights[parameter].users.clear()
            self._release(self.weights[parameter])

    def hook(self) -> None:
        """``setup_zero_stage3_hooks``."""
        self.model.register_forward_pre_hook(lambda *_: self.begin())
        for module in _children_first(self.model):
            self._hook(module)

    def _hook(self, module: nn.Module) -> None:
        left = {"outputs": 0, "inputs": 0}

        class BeforeBackward(torch.autograd.Function):
            @staticmethod
            def forward(outputs: torch.Tensor) -> torch.Tensor:
                return outputs.detach()

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
                left["outputs"] += 1

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
                if left["outputs"] > 0:
                    with torch.no_grad():
                        self.fetch(module, forward=False)
                    left["outputs"] -= 1
                return gradients

        class AfterBackward(torch.autograd.Function):
            @staticmethod
            def forward(inputs: torch.Tensor) -> torch.Tensor:
                return inputs.detach()

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
                ctx.counts = inputs[0].requires_grad
                left["inputs"] += ctx.counts

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
                left["inputs"] -= 1
                if left["inputs"] == 0:
                    with torch.no_grad():
                        self.release(module, forward=False)
                return gradients

        def before(module: nn.Module, *_: Any) -> None:
            self.running.append(module)
            with torch.no_grad():
                self.fetch(module, forward=True)

        def inputs_of(module: nn.Module, inputs: Any) -> Any:
            left["inputs"] = 0
            return each_tensor(AfterBackward.apply, inputs)

        def after(module: nn.Module, *_: Any) -> None:
            self.running.pop()
            with torch.no_grad():
                self.release(module, forward=True)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        module.register_forward_hook(
            lambda module, inputs, output: each_tensor(BeforeBackward.apply, output)
        )
        module.register_forward_pre_hook(inputs_of)
        module._parameters = _Asked(self, module._parameters)

    def asked_for(self, parameter: nn.Parameter) -> None:
        """A module reads a weight that is away: it comes at once, and with this module from now on."""
        weight = self.weights.by_parameter.get(id(parameter))
        if weight is not None and weight.state == AWAY and len(self.running) > 1:
            self.outside[id(self.running[-1])].append(parameter)
            self.weights.gather_now([weight])


class _Asked(dict):
    """A module's parameters, which tell the coordinator who reads them (``ZeROOrderedDict``)."""

    def __init__(self, coordinator: Coordinator, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.coordinator = coordinator

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self.coordinator.asked_for(parameter)
        return parameter


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def each_tensor(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A value with each of its tensors exchanged (``zero/utils.py``, ``apply_to_tensors_only``)."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[each_tensor(function, one) for one in value])
    if isinstance(value, (list, tuple)):
        return type(value)([each_tensor(function, one) for one in value])
    if isinstance(value, dict):
        for key in value:
            value[key] = each_tensor(function, value[key])
    return value
