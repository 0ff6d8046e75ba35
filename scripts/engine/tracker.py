"""Follows every tensor storage from its allocation to its end, and knows what each one is for.

The same tracker runs over the ``meta`` device (where nothing is stored) and over real tensors on the CPU. It writes
the sequence of allocations and frees that :mod:`scripts.engine.allocator` replays.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch._guards import active_fake_mode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .allocator import EMPTY_CACHE, Event
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
from .costs import CostRecorder
from .errors import NoValues
from .fake_group import FakeDevice

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
# Libraries ask about values that don't decide what is allocated, or that a real batch answers in one way. By module, or
# by module and function:
ANSWERS = {
    "transformers.modeling_utils:warn_if_padding_and_no_attention_mask": False,
    "transformers.masking_utils:find_packed_sequence_indices": True,  # each row is one text
    "transformers.modeling_flash_attention_utils:_flash_attention_forward": True,  # before 5: positions increase
    "transformers.masking_utils": False,  # a mask that is given masks something
    "deepspeed.runtime.utils:is_invalid_grad_norm": False,  # gradients are finite
    "deepspeed.runtime.zero.stage_1_and_2:has_overflow": False,
    "deepspeed.runtime.zero.stage3:has_overflow": False,
    "peft.tuners.vblora.layer": False,  # logits that inference has thrown away
    "peft.tuners.waveft.layer": True,  # indices lie within the padded matrix
}
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


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
    scalars
        What ``.item()`` and the truth of a tensor on ``meta`` give. None: :class:`NoValues`.
    origins
        Notes where each tensor comes from; None: nobody asks.
    device
        The device of a group of several GPUs; None for one GPU.
    costs
        Notes what each operator costs; None: nobody asks.

    Attributes
    ----------
    events
        ``(id, bytes)`` for an allocation, ``(-id, 0)`` for its end.
    marks
        ``(phase, step, index of its first event)`` in order.
    components
        What each id is for.
    streams
        The stream that an id was allocated on, where it is not the one that models compute on.
    reusable
        For an id that another stream uses as well, and that is freed: the index of the event before which the GPU has
        certainly got there.
    """

    def __init__(
        self,
        devices: Iterable[str],
        *,
        vocabulary: int = 0,
        kernels: Kernels | None = None,
        first_id: int = 1,
        outputs: Callable[[Any, tuple, Any], Any] | None = None,
        scalars: float | None = None,
        origins: Origins | None = None,
        device: FakeDevice | None = None,
        costs: CostRecorder | None = None,
    ) -> None:
        super().__init__()
        self.origins = origins
        self.costs = costs
        self._device = device
        self.streams: dict[int, int] = {}
        self.reusable: dict[int, int] = {}
        self._named: set[int] = set()  # ids that have their component for good
        self._shared: set[int] = set()  # ids that another stream uses as well
        self._pending: list[tuple[int, int]] = []  # such ids that are freed, with the index of that event
        self._host: dict[int, _End] = {}  # what is on `meta` and means the host's memory, by the storage's address
        self._scalars = scalars
        self.events: list[Event] = []
        self.marks: list[tuple[str, int, int]] = []
        self.components: dict[int, str] = {}
        self._devices = frozenset(devices)
        self.on_meta = "meta" in self._devices
        self._vocabulary = vocabulary
        self._kernels = kernels
        self._shapes = Shapes(outputs) if self.on_meta else None
        self._next = first_id
        self._ids: dict[int, int] = {}  # by the storage's address
        self._ends: dict[int, _End] = {}
        self._phase = ""

    def mark(self, phase: str, step: int = 0) -> None:
        """Say that a phase of a step begins."""
        self._phase = phase
        self.marks.append((phase, step, len(self.events)))
        if self.costs is not None:
            self.costs.mark(phase, step)

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

    def allocate(self, count: int, component: str) -> int:
        """Record an allocation that no tensor stands for, such as a workspace; it lasts until :meth:`drop`."""
        identity, self._next = self._next, self._next + 1
        self.components[identity] = component
        self.events.append((identity, count))
        if self._device is not None and self._device.stream_now.id:
            self.streams[identity] = self._device.stream_now.id
        return identity

    def free(self, identity: int) -> None:
        """Record the end of what :meth:`hold` began."""
        self.events.append((-identity, 0))

    def empty_cache(self) -> None:
        """Record ``torch.cuda.empty_cache()``: free segments go back to the device."""
        self.events.append(EMPTY_CACHE)

    def add(self, tensor: torch.Tensor, component: str, *, identity: int | None = None) -> None:
        """Follow a tensor that exists already. With ``identity`` its allocation has been recorded by someone else."""
        tensor = local(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ids or key in self._host or tensor.device.type not in self._devices:
            return
        if identity is None:
            identity = self.allocate(storage.nbytes(), component)
        self.components[identity] = component
        self._follow(storage, key, identity)
        if self.origins is not None:
            self.origins.note_existing(identity, tensor)

    def label(self, tensor: torch.Tensor, component: str) -> None:
        """Correct what a followed tensor is for, now that it is known."""
        identity = self._ids.get(local(tensor).untyped_storage()._cdata)
        if identity is not None and identity not in self._named:
            self.components[identity] = component

    def name(self, tensor: torch.Tensor, component: str) -> None:
        """Say what a followed tensor is for, by those who know: no :meth:`label` corrects it."""
        identity = self._ids.get(local(tensor).untyped_storage()._cdata)
        if identity is not None:
            self.components[identity] = component
            self._named.add(identity)

    def leave_on_host(self, tensor: torch.Tensor) -> None:
        """Say that a tensor on ``meta`` lies in the host's memory; so does what is made of such tensors alone."""
        storage = local(tensor).untyped_storage()
        end = _End(storage, lambda end: self._host.pop(end.key, None))
        end.identity, end.key = 0, storage._cdata
        self._host[end.key] = end

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Record that a storage gets another size, as FSDP frees and allocates gathered parameters.

        To be called before it is resized.
        """
        key = storage._cdata
        identity = self._ids.get(key)
        if size == storage.nbytes() or storage.device.type not in self._devices or key in self._host:
            return
        if identity is not None:
            self._free(identity)
            self.components[identity] = UNSHARDED
        new = self.allocate(size, UNSHARDED)
        if identity is None:
            self._follow(storage, key, new)
        else:
            self._ids[key] = new
            self._ends[new] = self._ends.pop(identity)
            self._ends[new].identity = new

    def used_by_another_stream(self, tensor: torch.Tensor, stream: int | None = None) -> None:
        """As ``Tensor.record_stream``: once freed, the block is not reused before the GPU has got there.

        ``stream``: the one that uses it, where that may be its own.
        """
        identity = self._ids.get(local(tensor).untyped_storage()._cdata)
        if identity is not None and stream != self.streams.get(identity, 0):
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
        self._host.pop(local(tensor).untyped_storage()._cdata, None)
        self.add(tensor, LOADING)

    def left(self, tensor: torch.Tensor) -> None:
        """A tensor on ``meta`` is brought from the device to the host."""
        identity = self._ids.pop(local(tensor).untyped_storage()._cdata, None)
        if identity is not None:
            del self._ends[identity]
            self._free(identity)
        self.leave_on_host(tensor)

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
        end = _End(storage, self._gone)
        end.identity, end.key = identity, key
        self._ends[identity] = end

    def _gone(self, end: _End) -> None:
        self._free(end.identity)
        del self._ids[end.key], self._ends[end.identity]

    def see(self, tensor: torch.Tensor) -> None:
        """Follow a tensor that was made of Python's numbers."""
        self._see(tensor, torch.ops.aten.lift_fresh.default)

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        if tensor.layout is torch.sparse_coo:
            self._see(tensor._indices(), func)
            self._see(tensor._values(), func)
            return
        tensor = local(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ids or tensor.device.type not in self._devices or (self._host and key in self._host):
            return
        elsewhere = self._device is not None and (
            self._device.component or (self._device.stream_now.id and COLLECTIVES)
        )
        if elsewhere:
            component = elsewhere
        elif self._phase == "inputs" or (self._phase == "between" and not tensor.is_floating_point()):
            component = INPUTS
        elif self._phase == "between" or self._phase == "optimizer":
            component = TEMPORARIES
        elif self._vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            component = LOGITS_AND_LOSS
        elif self._phase == "backward" and not torch.is_grad_enabled():  # recomputing activations enables it
            component = TEMPORARIES
        else:
            component = ACTIVATIONS
        identity = self.allocate(storage.nbytes(), component)
        self._follow(storage, key, identity)
        if self.origins is not None:
            self.origins.note(identity, tensor, func)

    def _seen(self, output: torch.Tensor, func: Any) -> torch.Tensor:
        self._see(output, func)
        return output

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = self._dispatch(func, types, args, kwargs or {})
        if self.costs is not None and self.costs.on and output is not NotImplemented and active_fake_mode() is None:
            self.costs.note(func, args, kwargs or {}, output, self._device.stream_now.id if self._device else 0)
        return output

    def _dispatch(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        if self._device is not None and (answer := self._of_several_gpus(func, types, args, kwargs)) is not None:
            return answer
        held, later = [], ()
        if self._kernels is not None:
            for count in self._kernels.persistent(func, args, kwargs):
                self.allocate(count, WORKSPACES)
            earlier, later = self._kernels.temporaries(func, args, kwargs)
            held = [self.allocate(count, TEMPORARIES) for count in earlier]
        if self.on_meta and self._scalars is not None and _leaves_the_device(func, args, kwargs):
            # `.tolist()` and `.cpu()`: values that Python reads. Where the device is the CPU nothing is copied.
            return torch.full(args[0].shape, self._scalars, dtype=kwargs.get("dtype") or args[0].dtype)
        try:
            output = self._shapes(func, args, kwargs) if self._shapes else func(*args, **kwargs)
        except Exception as error:
            if not self.on_meta or _VALUES.isdisjoint(func.tags):
                raise
            if func is torch.ops.aten._local_scalar_dense.default:
                kind = args[0].dtype
                if (answer := _answer()) is not None:
                    return (bool if kind == torch.bool else float if kind.is_floating_point else int)(answer)
                if self._scalars is not None:
                    return (bool if kind == torch.bool else float if kind.is_floating_point else int)(self._scalars)
            if func is torch.ops.aten.index.Tensor and _answer():
                return self._seen(func(args[0], _without_masks(args[1])), func)
            raise NoValues(func._schema.name) from error
        if isinstance(output, torch.Tensor):
            self._see(output, func)
        elif isinstance(output, (tuple, list)):
            for item in output:
                if isinstance(item, torch.Tensor):
                    self._see(item, func)
        held += [self.allocate(count, TEMPORARIES) for count in later]
        for identity in held:
            self.free(identity)
        return output

    def _of_several_gpus(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """The answer to an operator that isn't for the kernels of this GPU; None: it is."""
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes again with the tensors of this GPU
        if active_fake_mode() is not None:  # DTensor works out shapes
            return func(*args, **kwargs)
        if func is torch.ops._c10d_functional.wait_tensor.default:  # what it waits for is there; on `meta` it copies
            return args[0]
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:  # DDP's sizes of buckets
            return args[0]
        copied = _leaves_the_device(func, args, kwargs)
        tensors = list(_on_meta(args)) if copied or self._host else []
        if copied and tensors:
            output = torch.empty_like(tensors[0], dtype=kwargs.get("dtype"))
        elif tensors and all(tensor.untyped_storage()._cdata in self._host for tensor in tensors):
            output = self._shapes(func, args, kwargs) if self._shapes else func(*args, **kwargs)
        else:
            return None
        for item in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(item, torch.Tensor):
                self.leave_on_host(item)
        return output

    @property
    def ids(self) -> dict[int, int]:
        """The id of each storage that is followed, by its address."""
        return dict(self._ids)

    def close(self) -> None:
        """Stop following what is still alive, so that its later end is not recorded."""
        self._ends.clear()
        self._ids.clear()
        self._host.clear()


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: what a person needs to find it.

    ``module``: qualified name of the innermost module that was running ("" outside all of them; for what the backward
    pass makes, that of the forward operator); ``line``: the innermost line outside PyTorch, ``file:line in function``;
    ``operator``: what made it, or the parameter's or buffer's own name.
    """

    shape: tuple[int, ...]
    dtype: str
    module: str
    line: str
    operator: str


NOWHERE = Origin((), "", "", "", "")  # of what no tensor stands for: workspaces, temporaries inside a kernel


class Origins:
    """Notes the :class:`Origin` of each tensor that a :class:`Tracker` sees.

    A gradient is made by the autograd engine, which runs no line of the model: PyTorch numbers the operators of the
    forward pass, and the node that is running knows its number.

    Parameters
    ----------
    model
        Gives the modules, parameters and buffers their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[int, Origin] = {}
        self._modules = {id(module): name for name, module in model.named_modules()}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {local(tensor).untyped_storage()._cdata: name for name, tensor in tensors}
        self._running: list[str] = []
        self._forward: dict[int, tuple[str, str]] = {}  # module and line by the operator's number

    def note_existing(self, identity: int, tensor: torch.Tensor) -> None:
        """A parameter, a buffer, or what hangs on one."""
        name = self._names.get(local(tensor).untyped_storage()._cdata, "")
        module, _, own = name.rpartition(".")
        self.of[identity] = Origin(tuple(tensor.shape), _short(tensor.dtype), module, "", own)

    def note(self, identity: int, tensor: torch.Tensor, func: Any) -> None:
        """What an operator has just made."""
        module, line = self._running[-1] if self._running else "", _calling_line()
        node = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():
            if torch.is_grad_enabled():  # its node has been numbered; operators without one come after it
                self._forward.setdefault(torch._C._autograd._get_sequence_nr() - 1, (module, line))
        else:
            module, line = self._forward.get(node._sequence_nr(), (module, line))
        name = func._schema.name + (" (backward)" if node is not None and not torch.is_grad_enabled() else "")
        self.of[identity] = Origin(tuple(tensor.shape), _short(tensor.dtype), module, line, name)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Know which module is running."""

        def enter(module: nn.Module, *_: Any) -> None:
            self._running.append(self._modules.get(id(module), type(module).__name__))

        def leave(*_: Any) -> None:
            if self._running:
                self._running.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _leaves_the_device(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operator copies a tensor from ``meta`` to the CPU."""
    if func is not torch.ops.aten._to_copy.default or kwargs.get("device") is None:
        return False
    return args[0].device.type == "meta" and torch.device(kwargs["device"]).type == "cpu"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies on this GPU, where it is divided among several."""
    return getattr(tensor, "_local_tensor", tensor)


def _on_meta(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    for item in args:
        if isinstance(item, torch.Tensor):
            if item.is_meta:
                yield item
        elif isinstance(item, (tuple, list)):
            yield from _on_meta(item)


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices that pick what boolean ones would pick if all of them were true."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += [torch.empty(index.numel(), dtype=torch.long, device="meta")] * index.dim()
    return found


def _answer() -> bool | None:
    """What a library's own question about values is answered, by the function that asks; None: it is no library's."""
    frame = _calling_frame()
    if frame is None:
        return None
    module = frame.f_globals.get("__name__", "")
    return ANSWERS.get(f"{module}:{frame.f_code.co_name}", ANSWERS.get(module))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _calling_frame() -> FrameType | None:
    """The innermost frame outside PyTorch and this folder."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    return frame


def _calling_line() -> str:
    frame = _calling_frame()
    if frame is None:
        return ""
    path = frame.f_code.co_filename
    for folder in ("site-packages/", "dist-packages/", f"{Path.cwd()}/"):
        path = path.rpartition(folder)[2]
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"


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
        if func is torch.ops.aten.sparse_mask.default and args[1].device.type == "meta":  # has no shape function
            values = torch.empty_like(args[1]._values(), dtype=args[0].dtype)
            return torch.sparse_coo_tensor(args[1]._indices(), values, args[0].shape, device="meta")
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
        except (TypeError, RuntimeError):  # an argument without a signature, such as a sparse tensor
            return func(*args, **kwargs)
        if known is None:
            if func._schema.name in _PRODUCTS:
                _same_dtype([item for item in args if isinstance(item, torch.Tensor)])
            output = func(*args, **kwargs)
            if isinstance(output, torch.Tensor) and output.layout is not torch.strided:
                self._kinds[func] = "view"
                return output
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


def _same_dtype(operands: Sequence[torch.Tensor]) -> None:
    """Refuse a product that every device refuses; on ``meta`` only shapes are checked."""
    if len({operand.dtype for operand in operands}) > 1:
        found = ", ".join(_short(operand.dtype) for operand in operands)
        raise RuntimeError(f"the operands of a matrix product differ in dtype ({found}), and no autocast is on")


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
