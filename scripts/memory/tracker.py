"""Follows every tensor storage from its allocation to its end, and knows what each one is for.

The same tracker runs over the ``meta`` device (where nothing is stored) and over real tensors on the CPU. It writes
the sequence of allocations and frees that :mod:`scripts.memory.allocator` replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.memory.allocator import Event

# What a storage can be for. Weights are split by dtype: "weights_bf16", "weights_4bit", ...
INPUTS = "inputs"
QUANTIZATION_STATE = "quantization_state"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER_STATES = "optimizer_states"
ACTIVATIONS = "activations"
LOGITS_AND_LOSS = "logits_and_loss"
WEIGHT_CASTS = "weight_casts"  # 16-bit copies that autocast keeps of fp32 weights
TEMPORARIES = "temporaries"  # gradients of activations, dequantized weights, what operators need while they run
WORKSPACES = "workspaces"  # of cuBLAS
LOADING = "loading"  # what only exists while the model is brought to the device
ROUNDING = "allocator_rounding"  # blocks are larger than what was asked for


class Kernels(Protocol):
    """What :class:`Tracker` asks about each operator: bytes allocated before its outputs."""

    def temporaries(self, func: Any, args: tuple, kwargs: dict) -> Sequence[int]: ...

    def persistent(self, func: Any, args: tuple, kwargs: dict) -> Sequence[int]: ...


class _End(weakref.ref):
    """Calls back with the storage's id when the storage is gone."""

    __slots__ = ("identity", "key")


class Tracker(TorchDispatchMode):
    """A dispatch mode that records allocations and frees of storages on some devices.

    Parameters
    ----------
    devices
        Device types to follow; tensors elsewhere (AdamW's step counters on the CPU) don't count.
    vocabulary
        Size of the vocabulary: activations whose last dimension it is are logits.
    kernels
        What the device's kernels need beyond what can be seen in their outputs: ``temporaries(func, args, kwargs)``
        are freed when the operator returns, ``persistent(func, args, kwargs)`` never.
    first_id
        Ids of the events count up from here.

    Attributes
    ----------
    events
        ``(id, bytes)`` for an allocation, ``(-id, 0)`` for its end.
    marks
        ``(phase, step, index of its first event)`` in order.
    components
        What each id is for.
    """

    def __init__(
        self,
        devices: Iterable[str],
        *,
        vocabulary: int = 0,
        kernels: Kernels | None = None,
        first_id: int = 1,
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.marks: list[tuple[str, int, int]] = []
        self.components: dict[int, str] = {}
        self._devices = frozenset(devices)
        self._vocabulary = vocabulary
        self._kernels = kernels
        self._next = first_id
        self._ids: dict[int, int] = {}  # by the storage's address
        self._ends: dict[int, _End] = {}
        self._phase = ""

    def mark(self, phase: str, step: int = 0) -> None:
        """Say that a phase of a step begins."""
        self._phase = phase
        self.marks.append((phase, step, len(self.events)))

    def start(self, step: int) -> int:
        """Index of a step's first event."""
        return next(index for _, number, index in self.marks if number == step)

    def spans(self, step: int) -> list[tuple[str, int, int]]:
        """Return the phases of a step in order: name, index of its first event, index after its last."""
        ends = [index for _, _, index in self.marks[1:]]
        return [
            (phase, first, last)
            for (phase, number, first), last in zip(self.marks, ends, strict=False)
            if number == step
        ]

    def hold(self, count: int, component: str) -> int:
        """Record an allocation that no tensor stands for, such as a workspace; it lasts until :meth:`drop`."""
        identity, self._next = self._next, self._next + 1
        self.components[identity] = component
        self.events.append((identity, count))
        return identity

    def drop(self, identity: int) -> None:
        """Record the end of what :meth:`hold` began."""
        self.events.append((-identity, 0))

    def add(self, tensor: torch.Tensor, component: str, *, identity: int | None = None) -> None:
        """Follow a tensor that exists already. With ``identity`` its allocation has been recorded by someone else."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ids or tensor.device.type not in self._devices:
            return
        if identity is None:
            identity = self.hold(storage.nbytes(), component)
        self.components[identity] = component
        self._follow(storage, key, identity)

    def label(self, tensor: torch.Tensor, component: str) -> None:
        """Correct what a followed tensor is for, now that it is known."""
        identity = self._ids.get(tensor.untyped_storage()._cdata)
        if identity is not None:
            self.components[identity] = component

    def _follow(self, storage: torch.UntypedStorage, key: int, identity: int) -> None:
        self._ids[key] = identity
        end = _End(storage, self._gone)
        end.identity, end.key = identity, key
        self._ends[identity] = end

    def _gone(self, end: _End) -> None:
        self.events.append((-end.identity, 0))
        del self._ids[end.key], self._ends[end.identity]

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ids or tensor.device.type not in self._devices:
            return
        identity, self._next = self._next, self._next + 1
        if self._phase == "optimizer":
            component = TEMPORARIES
        elif self._vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            component = LOGITS_AND_LOSS
        elif self._phase == "backward" and not torch.is_grad_enabled():  # recomputing activations enables it
            component = TEMPORARIES
        else:
            component = ACTIVATIONS
        self.components[identity] = component
        self.events.append((identity, storage.nbytes()))
        self._follow(storage, key, identity)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        held = ()
        if self._kernels is not None:
            for count in self._kernels.persistent(func, args, kwargs):
                self.hold(count, WORKSPACES)
            held = [self.hold(count, TEMPORARIES) for count in self._kernels.temporaries(func, args, kwargs)]
        output = func(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            self._see(output)
        elif isinstance(output, (tuple, list)):
            for item in output:
                if isinstance(item, torch.Tensor):
                    self._see(item)
        for identity in held:
            self.drop(identity)
        return output

    def close(self) -> None:
        """Stop following what is still alive, so that its later end is not recorded."""
        self._ends.clear()
        self._ids.clear()
