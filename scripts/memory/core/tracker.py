"""Follows every tensor storage from its allocation to its end, and knows what each one is for.

The same tracker runs over the ``meta`` device (where nothing is stored) and over real tensors on the CPU. It writes
the sequence of allocations and frees that :mod:`scripts.memory.core.allocator` replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.memory.core.allocator import Event
from scripts.memory.core.components import ACTIVATIONS, LOGITS_AND_LOSS, TEMPORARIES, WORKSPACES


class Kernels(Protocol):
    """What :class:`Tracker` asks about each operator (bytes)."""

    def temporaries(self, func: Any, args: tuple, kwargs: dict) -> tuple[Sequence[int], Sequence[int]]: ...

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
        (before and after the outputs are allocated) are freed when the operator returns, ``persistent(func, args,
        kwargs)`` never.
    first_id
        Ids of the events count up from here.
    outputs
        Corrects what an operator returns on ``meta``, called as ``outputs(func, args, output)``.

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
        outputs: Callable[[Any, tuple, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.marks: list[tuple[str, int, int]] = []
        self.components: dict[int, str] = {}
        self._devices = frozenset(devices)
        self._vocabulary = vocabulary
        self._kernels = kernels
        self._shapes = Shapes(outputs) if "meta" in self._devices else None
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
        held, later = [], ()
        if self._kernels is not None:
            for count in self._kernels.persistent(func, args, kwargs):
                self.hold(count, WORKSPACES)
            earlier, later = self._kernels.temporaries(func, args, kwargs)
            held = [self.hold(count, TEMPORARIES) for count in earlier]
        output = self._shapes(func, args, kwargs) if self._shapes else func(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            self._see(output)
        elif isinstance(output, (tuple, list)):
            for item in output:
                if isinstance(item, torch.Tensor):
                    self._see(item)
        held += [self.hold(count, TEMPORARIES) for count in later]
        for identity in held:
            self.drop(identity)
        return output

    def close(self) -> None:
        """Stop following what is still alive, so that its later end is not recorded."""
        self._ends.clear()
        self._ids.clear()


class Shapes:
    """Runs operators on ``meta``, and each combination of operator and shapes only once.

    A shape function of PyTorch takes some 100 microseconds, and a model's layers are alike: afterwards the outputs are
    made directly. Operators that return views run as ever; pointwise ones that write into their first argument have
    nothing to do.
    """

    def __init__(self, outputs: Callable[[Any, tuple, Any], Any] | None = None) -> None:
        self._corrected = outputs
        self._kinds: dict[Any, str] = {}
        self._outputs: dict[tuple, list[tuple] | tuple | None] = {}

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "view":
            return func(*args, **kwargs)
        if kind == "in place":
            return args[0] if args[0].device.type == "meta" else func(*args, **kwargs)
        if kind == "in place, lists":
            return None if all(item.device.type == "meta" for item in args[0]) else func(*args, **kwargs)
        try:
            key = (func, _signature(args), *((name, _signature((value,))) for name, value in kwargs.items()))
            known = self._outputs.get(key)
        except TypeError:  # an argument without a signature
            return func(*args, **kwargs)
        if known is None:
            output = func(*args, **kwargs)
            if self._corrected is not None:
                output = self._corrected(func, args, output)
            if _share_storage(output, args):  # _unsafe_view's schema doesn't say so
                self._kinds[func] = "view"
            else:
                self._outputs[key] = _layout(output)
            return output
        if type(known) is list:
            return tuple([None if item is None else _empty(*item) for item in known])
        return _empty(*known) if known else func(*args, **kwargs)


def _kind(func: Any) -> str:
    """``view``: outputs share storage with inputs; ``in place``, one tensor or lists; ``new``: outputs are new."""
    returns = func._schema.returns
    if func._schema.name.startswith("aten::_foreach_") and func._schema.name.endswith("_"):
        return "in place, lists"
    if any(item.alias_info is not None for item in returns) or not returns:
        first = func._schema.arguments[0] if func._schema.arguments else None
        written = first is not None and first.alias_info is not None and first.alias_info.is_write
        plain = torch.Tag.pointwise in func.tags or func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_")
        return "in place" if written and plain and len(returns) == 1 and str(first.type) == "Tensor" else "view"
    return "new"


def _share_storage(output: Any, args: tuple) -> bool:
    inputs = {item.untyped_storage()._cdata for item in args if isinstance(item, torch.Tensor)}
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return any(isinstance(item, torch.Tensor) and item.untyped_storage()._cdata in inputs for item in outputs)


def _empty(size: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _signature(values: Iterable[Any]) -> tuple:
    """What of some arguments decides the layout of an operator's outputs."""
    signature = []
    for value in values:
        if isinstance(value, torch.Tensor):
            signature.append((value.shape, value.stride(), value.dtype, value.device.type))
        elif isinstance(value, (list, tuple)):
            signature.append(_signature(value))
        else:
            signature.append((type(value), value))
    return tuple(signature)


def _layout(output: Any) -> list[tuple] | tuple:
    """Sizes, strides and dtypes of an operator's outputs; () where they aren't plain new tensors on ``meta``."""
    if isinstance(output, torch.Tensor):
        plain = output.device.type == "meta" and output.storage_offset() == 0 and _fills_its_storage(output)
        return (output.shape, output.stride(), output.dtype) if plain else ()
    if isinstance(output, tuple):
        items = [None if item is None else _layout(item) for item in output]
        return () if () in items or any(type(item) is list for item in items) else items
    return ()


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() == (extent if tensor.numel() else 0) * tensor.element_size()
