"""Follows every tensor storage from its allocation to its end, and knows what each one is for.

The same tracker runs over the ``meta`` device (where nothing is stored) and over real tensors on the CPU. It writes
the sequence of allocations and frees that :mod:`dryfit.engine.allocator` replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .allocator import EMPTY_CACHE
from .components import (
    ACTIVATIONS,
    COLLECTIVES,
    INPUTS,
    LOADING,
    LOGITS_AND_LOSS,
    TEMPORARIES,
    UNSHARDED,
    WORKSPACES,
)
from .custom import opaque
from .exchanges import Exchanges
from .fake_device import FakeDevice
from .known_values import UNANSWERED, Values
from .model_tensors import made_of_others, parts, weights_like
from .record import Record
from .shapes import OperatorRules, Shapes, in_place, resizable, sole_holder
from .stashes import Started

if TYPE_CHECKING:
    from .kernels import CudaKernels


class _StorageEnd(weakref.ref):
    """Calls back with the storage's id when the storage is gone."""

    __slots__ = ("identity", "key")


class Tracker(TorchDispatchMode, Record):
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
    device
        The device of a group of several GPUs; None for one GPU.
    known_outputs
        What trackers with the same ``outputs`` know of operators on ``meta`` together, see :class:`Shapes`.
    """

    def __init__(
        self,
        devices: Iterable[str],
        *,
        vocabulary: int = 0,
        kernels: CudaKernels | None = None,
        first_id: int = 1,
        outputs: Callable[[Any, tuple, Any], Any] | None = None,
        device: FakeDevice | None = None,
        known_outputs: dict[tuple, Any] | None = None,
    ) -> None:
        super().__init__()
        Record.__init__(self)
        sole_holder()
        self._device = device
        self._named: set[int] = set()  # ids that have their component for good
        self._shared: set[int] = set()  # ids that another stream uses as well
        self._pending: list[
            tuple[int, int]
        ] = []  # such ids that are freed, with the index of that event
        self._exchanges = Exchanges(self)
        self._host: dict[
            int, _StorageEnd
        ] = {}  # what is on `meta` and means the host's memory, by the storage's address
        self._devices = frozenset(devices)
        self.on_meta = "meta" in self._devices
        self.vocabulary = vocabulary
        self._kernels = kernels
        self._shapes = Shapes(outputs, known_outputs) if self.on_meta else None
        # Values of tensors on `meta`, as far as they are known; None: the tensors are real.
        self.values = Values() if self.on_meta else None
        self._next = first_id
        self._node, self._first_of_node = (
            -1,
            first_id,
        )  # of autograd, and the first id of what it allocates
        self._ids: dict[int, int] = {}  # by the storage's address
        self._ends: dict[int, _StorageEnd] = {}
        # Tensors on `meta` that are one with a followed one of the CPU, whose storage lives as long as theirs.
        self._same: dict[int, tuple[_StorageEnd, torch.UntypedStorage | None]] = {}
        self._phase = ""
        self.phase_of: Callable[[Any], str | None] | None = (
            None  # of a module that is called (`steps.phases`)
        )
        self.on_card: Callable[..., Any] | None = (
            None  # what an operator is where a card is simulated: `card.on_card`
        )
        self._operators: dict[
            int, OperatorRules
        ] = {}  # that were met, by address: PyTorch hashes them in Python
        self.pool = 0  # of CUDA graphs, that blocks come from now; 0: the general pool
        self.library_workspaces: list[int] = []  # of cuBLAS
        self.graphs: Any = None  # `cuda_graphs.PrivatePools`, where a card is simulated
        self.kernels_launched = 0  # operators and kernels of compilers, but for views
        self.updated_in: set[int] = set()  # steps in which an optimizer has stepped
        self.expecting = (
            False  # whether tensors may be met that existed before, and belong to no model
        )

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Under a tracker nothing is compiled: what PyTorch wraps each operator in against the compiler is saved."""
        return False

    def take_device(self, device: FakeDevice) -> None:
        """Belong to a group of several GPUs from now on."""
        self._device, device.listener = device, self

    def mark(self, phase: str, step: int = 0) -> None:
        """Say that a phase of a step begins."""
        self._phase = phase
        self.marks.append((phase, step, len(self.events)))
        if self.costs is not None:
            self.costs.mark(phase, step)

    def allocate(self, count: int, component: str) -> int:
        """Record an allocation that no tensor stands for, such as a workspace; it lasts until :meth:`drop`."""
        identity, self._next = self._next, self._next + 1
        self.components[identity] = component
        self.events.append((identity, count))
        stream = self.pool or (self._device is not None and self._device.stream_now.id)
        if stream:
            self.streams[identity] = stream
        return identity

    def free(self, identity: int) -> None:
        """Record the end of what :meth:`hold` began."""
        self.events.append((-identity, 0))

    def empty_cache(self) -> None:
        """Record ``torch.cuda.empty_cache()``: free segments go back to the device."""
        self.events.append(EMPTY_CACHE)

    def add(self, tensor: torch.Tensor, component: str, *, identity: int | None = None) -> None:
        """Follow a tensor that exists already. With ``identity`` its allocation has been recorded by someone else."""
        for part in parts(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            if key in self._ids or key in self._host or part.device.type not in self._devices:
                continue
            own = self.allocate(storage.nbytes(), component) if identity is None else identity
            self.components[own] = component
            self._follow(storage, key, own)
            if self.origins is not None:
                self.origins.note_existing(own, part)

    def label(self, tensor: torch.Tensor, component: str) -> None:
        """Correct what a followed tensor is for, now that it is known."""
        for identity in self.identities(tensor):
            if identity not in self._named:
                self.components[identity] = component

    def name(self, tensor: torch.Tensor, component: str) -> None:
        """Say what a followed tensor is for, by those who know: no :meth:`label` corrects it."""
        for identity in self.identities(tensor):
            self.components[identity] = component
            self._named.add(identity)

    def identities(self, tensor: torch.Tensor) -> list[int]:
        """The ids of the storages that a tensor consists of."""
        identities = (self._ids.get(part.untyped_storage()._cdata) for part in parts(tensor))
        return [identity for identity in identities if identity is not None]

    def leave_on_host(self, tensor: torch.Tensor) -> None:
        """Say that a tensor on ``meta`` lies in the host's memory; so does what is made of such tensors alone."""
        for part in parts(tensor):
            storage = part.untyped_storage()
            end = _StorageEnd(storage, lambda end: self._host.pop(end.key, None))
            end.identity, end.key = 0, storage._cdata
            self._host[end.key] = end

    def lies_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor on ``meta`` means the host's memory."""
        return bool(self._host) and tensor.untyped_storage()._cdata in self._host

    @property
    def holds_on_host(self) -> bool:
        """Whether anything on ``meta`` means the host's memory."""
        return bool(self._host)

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Record that a storage gets another size, as FSDP frees and allocates gathered parameters.

        To be called before it is resized.
        """
        key = storage._cdata
        identity = self._ids.get(key)
        if (
            size == storage.nbytes()
            or storage.device.type not in self._devices
            or key in self._host
        ):
            return
        if identity is not None:
            self._free(identity)
            self.components[identity] = UNSHARDED
        new = self.allocate(size, UNSHARDED)
        if identity is None:
            self._follow(storage, key, new)
        else:
            self._moved(key, identity, new)

    def _moved(self, key: int, identity: int, new: int) -> None:
        self._ids[key] = new
        self._ends[new] = self._ends.pop(identity)
        self._ends[new].identity = new

    def _grown(self, before: Sequence[tuple[torch.UntypedStorage, int]]) -> None:
        """Record which storages an operator has made larger: the new block is there before the old one is freed.

        ATen ``native/Resize.cpp``, ``resize_bytes_cpu``; ``native/cuda/Resize.cpp``, ``resize_bytes_cuda``.
        """
        for storage, size in before:
            key = storage._cdata
            identity = self._ids.get(key)
            if identity is None or key in self._same or storage.nbytes() == size:
                continue
            new = self.allocate(storage.nbytes(), self.components[identity])
            if identity in self._named:
                self._named.add(new)
            self._moved(key, identity, new)
            self._free(identity)

    def used_by_another_stream(self, tensor: torch.Tensor, stream: int | None = None) -> None:
        """As ``Tensor.record_stream``: once freed, the block is not reused before the GPU has got there.

        ``stream``: the one that uses it, where that may be its own.
        """
        for identity in self.identities(tensor):
            if stream != self.streams.get(identity, 0):
                self._shared.add(identity)

    def waited(self, since: int | None = None) -> None:
        """The program has waited until the GPU has done what came before an event; None: everything."""
        moment, rest = len(self.events), []
        for identity, index in self._pending:
            if since is None or index < since:
                self.reusable[identity] = moment
            else:
                rest.append((identity, index))
        self._pending = rest

    def arrived(self, tensor: torch.Tensor) -> None:
        """A tensor on ``meta`` is brought to the device from the host."""
        for part in parts(tensor):
            self._host.pop(part.untyped_storage()._cdata, None)
        self.add(tensor, LOADING)

    def left(self, tensor: torch.Tensor) -> None:
        """A tensor on ``meta`` is brought from the device to the host."""
        for part in parts(tensor):
            self._leave(part.untyped_storage()._cdata)
        self.leave_on_host(tensor)

    def _leave(self, key: int) -> None:
        """Follow a storage no longer; what stands for another one ends nothing."""
        identity = self._ids.pop(key, None)
        if self._same.pop(key, None) is None and identity is not None:
            del self._ends[identity]
            self._free(identity)

    def stands_for(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        """A tensor on ``meta`` is a followed one of the CPU, where the CPU is the device: one tensor, and not two."""
        storage, followed = tensor.untyped_storage(), source.untyped_storage()
        key = storage._cdata
        self._leave(key)
        end = _StorageEnd(storage, self._no_more)
        end.identity, end.key = self._ids[followed._cdata], key
        self._ids[key], self._same[key] = end.identity, (end, followed)

    def _no_more(self, end: _StorageEnd) -> None:
        del self._ids[end.key], self._same[end.key]

    def now(self) -> int:
        """Index of the next event."""
        return len(self.events)

    def launched(self) -> int:
        """How many kernels the step has launched, where costs are recorded."""
        return len(self.costs.calls) if self.costs is not None else 0

    def stream_waits(self, waiter: int | None, stream: int, launches: int) -> None:
        """A stream, or the program (None), waits for what another has been given until so many launches."""
        if self.costs is not None:
            self.costs.wait(waiter, stream, launches)

    def _free(self, identity: int) -> None:
        if identity in self._shared:
            self._pending.append((identity, len(self.events)))
        self.events.append((-identity, 0))

    def _follow(self, storage: torch.UntypedStorage, key: int, identity: int) -> None:
        self._ids[key] = identity
        end = _StorageEnd(storage, self._gone)
        end.identity, end.key = identity, key
        self._ends[identity] = end

    def _gone(self, end: _StorageEnd) -> None:
        self._free(end.identity)
        del self._ids[end.key], self._ends[end.identity]

    def see(self, tensor: torch.Tensor) -> None:
        """Follow a tensor that was made of Python's numbers."""
        self._see(tensor, _LIFT_FRESH)

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            if self.on_meta and tensor.layout is torch.sparse_coo:
                self.warn(_SPARSE)
            for part in parts(tensor):
                self._see_part(part, func)
        else:
            self._see_part(tensor, func)

    def _see_part(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (
            key in self._ids
            or tensor.device.type not in self._devices
            or (self._host and key in self._host)
        ):
            return
        elsewhere = self._device is not None and (
            self._device.component or (self._device.stream_now.id and COLLECTIVES)
        )
        if elsewhere:
            component = elsewhere
        elif self._phase == "inputs" or (
            self._phase == "between" and not tensor.is_floating_point()
        ):
            component = INPUTS
        elif self._phase == "between" or self._phase == "optimizer":
            component = TEMPORARIES
        elif self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            component = LOGITS_AND_LOSS
        elif (
            self._phase == "backward" and not torch.is_grad_enabled()
        ):  # recomputing activations enables it
            component = TEMPORARIES
        else:
            component = ACTIVATIONS
        identity = self.allocate(storage.nbytes(), component)
        self._follow(storage, key, identity)
        if self.origins is not None:
            self.origins.note(identity, tensor, func)

    def _meet(self, args: Sequence[Any]) -> None:
        """Count what existed before the first step, and is neither the model nor the batch: another model, a cache."""
        for item in args:
            if isinstance(item, (tuple, list)):
                self._meet(item)
            elif isinstance(item, torch.Tensor) and item.layout is torch.strided:
                storage = item.untyped_storage()
                if storage._cdata in self._ids or storage._cdata in self._host:  # nearly all
                    continue
                if item.device.type not in self._devices or not storage.nbytes():
                    continue
                if hasattr(item, "outside_the_allocator"):  # paged states
                    self.leave_on_host(item)
                    continue
                self.add(item, weights_like(item) if item.is_floating_point() else INPUTS)

    def _seen(self, output: Any, func: Any, *, on_device: str | None = None) -> Any:
        if on_device is None and type(output) is torch.Tensor:  # most of them
            self._see_part(output, func) if output.layout is torch.strided else self._see(
                output, func
            )
            return output
        for item in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(item, torch.Tensor) and on_device in (None, item.device.type):
                self._see(item, func)
        return output

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if types and any(made_of_others(kind) for kind in types):
            return NotImplemented  # it comes again with the tensors that they consist of
        if func is _COPY and not isinstance(args[1], torch.Tensor):  # `tensor.copy_(5)`
            func, args = torch.ops.aten.fill_.Scalar, args[:2]
        if (
            self.on_card is not None
            and (own := self.on_card(func, args, kwargs, self.lies_on_host)) is not None
        ):
            with self:
                return own(*args, **kwargs)
        operator = self._operators.get(id(func)) or self._first_met(func)
        _, concerned, of_values, into_zeros, of_workspaces, may_resize = operator
        if (
            self._device is not None
            and (answer := self._exchanges.answer(func, args, kwargs)) is not None
        ):
            return answer
        values = self.values
        hears = values is not None and (of_values or values.carrying or values.stand_ins)
        if hears and (answer := values.before(func, args, kwargs)) is not UNANSWERED:
            return self._seen(answer, func, on_device="meta")
        if self.expecting and self._device is None and func is not _LIFT_FRESH:
            self._meet(args)
        held, later = [], ()
        self._hear_of_node()
        if concerned:
            for count in self._kernels.persistent(func, args, kwargs):
                self.library_workspaces.append(self.allocate(count, WORKSPACES))
            earlier, later = self._kernels.temporaries(func, args, kwargs)
            held = [self.allocate(count, TEMPORARIES) for count in earlier]
        try:
            sizes = resizable(func, args, kwargs) if may_resize else ()
            if into_zeros:
                func = in_place(func, args, kwargs, self._made_by_node)
            output = self.run(func, args, kwargs)
        except Exception as error:
            output = UNANSWERED if values is None else values.failed(func, args, error)
            if output is UNANSWERED:
                raise
        self.kernels_launched += not func.is_view
        if may_resize:
            self._grown(sizes)
        if func is _ZERO:  # it has no memory on any device: autograd's gradient of a constant
            self.leave_on_host(output)
        self._seen(output, func)
        if concerned:
            self._kernels.keep(func, args, output)
        if of_workspaces:
            self.workspaces.note(func, args, output, len(self.events))
        if values is not None and (of_values or values.carrying):
            values.after(func, args, kwargs, output)
            moved = (
                func is _TO_COPY
                and "cpu" in self._devices
                and output.is_meta
                and not args[0].is_meta
            )
            if (
                moved and output.dtype == args[0].dtype
            ):  # where the CPU is the device nothing is copied
                if self.identities(args[0]):
                    self.stands_for(output, args[0])
                else:
                    self.left(output)
        if self.costs is not None and self.costs.on:
            self.costs.note(
                func, args, kwargs, output, self._device.stream_now.id if self._device else 0
            )
        held += [self.allocate(count, TEMPORARIES) for count in later]
        if self._device is not None:
            held += self._exchanges.made(func, args, output)
        for identity in held:
            self.free(identity)
        return output

    def _hear_of_node(self) -> None:
        """Note where the node of autograd that runs now began to allocate."""
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        if number != self._node:
            self._node, self._first_of_node = number, self._next

    def _made_by_node(self, tensor: torch.Tensor) -> bool:
        """Whether the node of autograd that runs now has made a tensor."""
        identity = self._ids.get(tensor.untyped_storage()._cdata)
        return identity is None or identity >= self._first_of_node

    def _first_met(self, func: Any) -> OperatorRules:
        if self.on_meta and (text := opaque(func)):
            self.warn(text)
        if self._kernels is not None and (text := self._kernels.unknown(func)):
            self.warn(text)
        concerned = self._kernels is not None and self._kernels.concerns(func)
        return self._operators.setdefault(id(func), OperatorRules.of(func, concerned))

    def last_started(self) -> Started | None:
        """The collective that was started last."""
        return self.stashes.last if self.stashes is not None else None

    def waited_for_work(self, started: Started | None = None) -> None:
        """The program calls ``wait`` of a collective's work; None: it is not known which."""
        if self.stashes is not None:
            self.stashes.waited(self.now(), started)

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator; on ``meta`` with the shapes that the device's own would have."""
        return self._shapes(func, args, kwargs) if self._shapes else func(*args, **kwargs)

    @property
    def ids(self) -> dict[int, int]:
        """The id of each storage that is followed, by its address."""
        return dict(self._ids)

    def close(self) -> None:
        """Stop following what is still alive, so that its later end is not recorded."""
        self._ends.clear()
        self._ids.clear()
        self._same.clear()
        self._host.clear()
        self._exchanges.close()


_SPARSE = (
    "a gradient is sparse (`nn.Embedding(sparse=True)`), and what its indices take while they are sorted is not"
    " counted: the peak may be higher"
)
_COPY, _TO_COPY = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default
_LIFT_FRESH = torch.ops.aten.lift_fresh.default
_ZERO = torch.ops.aten._efficientzerotensor.default
