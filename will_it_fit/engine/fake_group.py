"""A group of GPUs that are not there: libraries' own code for several GPUs runs in one process, on ``meta``.

Inside :func:`fake_group` PyTorch believes that it is the first of several processes with a GPU each. Collectives do
nothing, and what is allocated for them is allocated; ``torch.meta`` is for ``meta`` what ``torch.cuda`` is for CUDA,
with streams and events. Tensors of ``meta`` have no addresses, no values and no device to ask for, so that a few
functions are exchanged while it lasts, each for a reason that :data:`PATCHES` gives. Nothing of it remains afterwards.

A tracker notes on which stream a block is allocated (:class:`FakeDevice` knows it), and which blocks another stream
uses as well: such a block is free for others only when the GPU has got there, which is later than in the program. How
much later depends on the CPU's lead over the GPU; at the latest it is when the program waits for the GPU.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .components import COLLECTIVES
from .costs import COLLECTIVE, Operator, launch
from .errors import TraceError
from .patching import patched

BACKEND = "fakemeta"
DDP_STREAM = 1000  # DDP's all-reduces run beside the backward pass
# What is exchanged, and what happens on `meta` if it isn't. tests/will_it_fit/engine/test_fake_group.py tries each.
PATCHES = {
    "torch.meta": "FSDP looks for the streams of a device as getattr(torch, device.type)",
    "torch._C._get_accelerator": "FSDP1 moves what lies on `meta` to the machine's accelerator, which is the CPU",
    "Tensor.data_ptr": "FSDP1 takes a unit for divided when two addresses are equal; on `meta` all are 0",
    "_no_dispatch_record_stream": "FSDP1 tells only the allocators of real devices which streams use a block",
    "FSDPParamGroup._validate_no_meta_params": "FSDP2 refuses to run a model whose parameters are on `meta`",
    "FSDPParamGroup._validate_cpu_offload_params": "FSDP2 wants offloaded parameters to be on the CPU",
    "FSDPParam._init_sharded_param": "FSDP2 brings offloaded parameters to the host, but not those on `meta`",
    "FSDPParam.all_gather_inputs": "FSDP2 copies offloaded parameters from the CPU to `meta`, where they are already",
    "FSDP2's foreach_reduce": "what is allocated for the exchange of gradients gets its name",
    "FakeWork.wait": "what a program has waited for NCCL doesn't keep",
    "torch.accelerator.current_stream": "FSDP2 waits there for what it gathered for nothing (a frozen embedding)",
    "FSDP1's _move_module_to_device": "what is on `meta` needs no way to the GPU; the tracker is told that it is there",
    "FSDP2's _move_states_to_device": "the same",
    "DistributedDataParallel.__init__": "DDP waits for the result of its exchange, and a fake one has none",
    "DistributedDataParallel._pre_forward": "DDP makes its buckets anew in the second step; they get their name",
    "_verify_param_shape_across_processes": "DDP compares shapes across processes by their values",
}


class Listener(Protocol):
    """What :class:`FakeDevice` tells a tracker."""

    def used_by_another_stream(self, tensor: torch.Tensor, stream: int | None = None) -> None: ...

    def waited(self, since: int | None) -> None: ...

    def arrived(self, tensor: torch.Tensor) -> None: ...

    def left(self, tensor: torch.Tensor) -> None: ...

    def name(self, tensor: torch.Tensor, component: str) -> None: ...

    def now(self) -> int: ...

    def launched(self) -> int: ...

    def stream_waits(self, waiter: int | None, stream: int, launches: int) -> None: ...

    def waited_for_work(self) -> None: ...


class FakeStream:
    """A stream: work that runs in order. The first is the one that models compute on."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.id = device, device.count()

    def record_event(self, event: Any = None) -> FakeEvent:
        event = event or FakeEvent(self.device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.device.wait()

    def wait_event(self, event: FakeEvent) -> None:
        """Streams that wait for each other cost no memory, but time."""
        event.wait(self)

    def wait_stream(self, stream: FakeStream) -> None:
        stream.record_event().wait(self)


class FakeEvent:
    """A point in a stream; the program can wait until the GPU has got there."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.moment = device, None
        self.stream, self.launches = 0, 0

    def record(self, stream: FakeStream | None = None) -> None:
        self.moment = self.device.now()
        self.stream, self.launches = (stream or self.device.stream_now).id, self.device.launched()

    def synchronize(self) -> None:
        if self.moment is not None:
            self.device.wait(self.moment)
            self.device.stream_waits(None, self.stream, self.launches)

    def query(self) -> bool:
        """Whether the GPU has got there: it is as far behind as the program lets it be."""
        return self.moment is None

    def wait(self, stream: FakeStream | None = None) -> None:
        """As a stream that waits: the current one by default."""
        if self.moment is not None:
            self.device.stream_waits((stream or self.device.stream_now).id, self.stream, self.launches)


class FakeDevice(types.ModuleType):
    """For ``meta`` what ``torch.cuda`` is for CUDA, as far as FSDP asks.

    Attributes
    ----------
    first_stream, stream_now
        The stream that models compute on, and the one that is current.
    component
        What an allocation is for, where the library that allocates says so; None: its tracker finds out.
    listener
        The tracker of the running trace.
    """

    def __init__(self, gpus: int) -> None:
        super().__init__("torch.meta")
        self.gpus, self._streams = gpus, 0
        self.component: str | None = None
        self.listener: Listener | None = None
        self.Stream: Callable[..., FakeStream] = lambda *_, **__: FakeStream(self)
        self.Event: Callable[..., FakeEvent] = lambda *_, **__: FakeEvent(self)
        self.first_stream = self.stream_now = FakeStream(self)

    def count(self) -> int:
        self._streams += 1
        return self._streams - 1

    def now(self) -> int:
        return self.listener.now() if self.listener else 0

    def launched(self) -> int:
        return self.listener.launched() if self.listener else 0

    def stream_waits(self, waiter: int | None, stream: int, launches: int) -> None:
        """A stream, or the program (None), waits for those of another's kernels that are among so many launches."""
        if self.listener:
            self.listener.stream_waits(waiter, stream, launches)

    def wait(self, since: int | None = None) -> None:
        """The program waits for the GPU: for all of its work, or for that before a moment."""
        if self.listener:
            self.listener.waited(since)

    def arrived(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors are brought to the GPU from the host: those on ``meta`` are there as soon as somebody says so."""
        for tensor in tensors:
            if not tensor.is_meta:  # of a whole program, where a card is simulated
                tensor.data = tensor.to(torch.device("meta", 0))
            elif self.listener:
                self.listener.arrived(tensor)

    def left(self, tensor: torch.Tensor) -> None:
        """A tensor is brought from the GPU to the host."""
        if self.listener:
            self.listener.left(tensor)

    def named(self, tensor: torch.Tensor, component: str) -> None:
        """Say what a tensor is for."""
        if self.listener:
            self.listener.name(tensor, component)

    def current_stream(self, *_: Any) -> FakeStream:
        return self.stream_now

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    @contextmanager
    def allocating(self, component: str) -> Iterator[None]:
        """Say what is allocated meanwhile is for."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    def synchronize(self, *_: Any) -> None:
        self.wait()

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return self.gpus

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def set_device(self, *_: Any) -> None:
        """There is one."""


def active() -> FakeDevice | None:
    """The device of the group that is there; None outside :func:`fake_group`."""
    device = vars(torch).get("meta")
    return device if isinstance(device, FakeDevice) else None


@contextmanager
def fake_group(gpus: int, rank: int = 0) -> Iterator[FakeDevice]:
    """Be one process of a group of ``gpus``, each with a GPU that is really ``meta``: the one of this ``rank``.

    Raises
    ------
    TraceError
        If the process belongs to a group already.
    """
    import torch.distributed as dist

    with fake_gpus(gpus) as device:
        start_group(gpus, rank)
        try:
            yield device
        finally:
            dist.destroy_process_group()


@contextmanager
def fake_gpus(gpus: int) -> Iterator[FakeDevice]:
    """The same before the group is started, by :func:`start_group`: so does a program that starts it itself.

    Raises
    ------
    TraceError
        If the process belongs to a group already.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise TraceError(
            "This process belongs to a process group already, and can't pretend to be in another.",
            "Trace in a process of its own, or call torch.distributed.destroy_process_group() before.",
        )
    device = FakeDevice(gpus)
    torch.meta = device
    try:
        with _backend(), patched(_patches(device)):
            yield device
    finally:
        del torch.meta


def start_group(gpus: int, rank: int = 0) -> None:
    """Start PyTorch's group of processes, whose collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=gpus)


@contextmanager
def _backend() -> Iterator[None]:
    """Register PyTorch's fake process group for ``meta`` too, under a name of its own."""
    from torch.distributed import Backend
    from torch.testing._internal.distributed.fake_pg import _create_fake_pg

    tables = (Backend.default_device_backend_map, Backend.backend_type_map, Backend.backend_capability)
    before = [dict(table) for table in (*tables, Backend._plugins)]
    names = list(Backend.backend_list)
    Backend.register_backend(BACKEND, _create_fake_pg, extended_api=True, devices=["meta", "cpu"])
    try:
        yield
    finally:
        delattr(Backend, BACKEND.upper())
        Backend.backend_list[:] = names
        for table, content in zip((*tables, Backend._plugins), before, strict=True):
            table.clear()
            table.update(content)


def _patches(device: FakeDevice) -> list[tuple[Any, str, Any]]:
    """What is replaced, as :func:`will_it_fit.engine.patching.patched` takes it; why: :data:`PATCHES`."""
    return [*_tensor_patches(device), *_fsdp1_patches(device), *_fsdp2_patches(device), *_ddp_patches(device)]


def _tensor_patches(device: FakeDevice) -> list[tuple[Any, str, Any]]:
    from torch._C._distributed_c10d import FakeWork

    accelerator, address, wait = torch._C._get_accelerator, torch.Tensor.data_ptr, FakeWork.wait

    def waited(work: Any, *arguments: Any, **options: Any) -> Any:
        if device.listener:
            device.listener.waited_for_work()
        return wait(work, *arguments, **options)

    def get_accelerator(*arguments: Any) -> torch.device:
        return torch.device("meta") if not arguments else accelerator(*arguments)

    def data_ptr(tensor: torch.Tensor) -> int:
        if not tensor.is_meta:
            return address(tensor)
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()

    return [
        (torch._C, "_get_accelerator", get_accelerator),
        (FakeWork, "wait", waited),
        (torch.accelerator, "current_stream", device.current_stream),
        (torch.Tensor, "data_ptr", data_ptr),
    ]


def _fsdp1_patches(device: FakeDevice) -> list[tuple[Any, str, Any]]:
    import torch.distributed.fsdp._flat_param as flat_param
    import torch.distributed.fsdp._init_utils as initialization
    import torch.distributed.fsdp._runtime_utils as runtime
    from torch.distributed.fsdp import FullyShardedDataParallel

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        if device.listener is not None:
            device.listener.used_by_another_stream(tensor)

    def move_module(module: torch.nn.Module, *_: Any) -> None:
        """Breadth first, units within it left out: parameters, then buffers (FSDP1's ``_move_module_to_device``)."""
        queue, parameters, buffers = [module], [], []
        for current in queue:
            parameters += current.parameters(recurse=False)
            buffers += current.buffers(recurse=False)
            queue += [child for child in current.children() if not isinstance(child, FullyShardedDataParallel)]
        device.arrived([*parameters, *buffers])

    return [
        (flat_param, "_no_dispatch_record_stream", record_stream),
        (runtime, "_no_dispatch_record_stream", record_stream),
        (initialization, "_move_module_to_device", move_module),
    ]


def _fsdp2_patches(device: FakeDevice) -> list[tuple[Any, str, Any]]:
    import torch.distributed.fsdp._fully_shard._fsdp_init as initialization
    import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState

    gather_inputs, divide = FSDPParam.all_gather_inputs.fget, FSDPParam._init_sharded_param

    def init_sharded_param(parameter: Any, *arguments: Any, **options: Any) -> None:
        divide(parameter, *arguments, **options)
        if parameter.offload_to_cpu:
            device.left(parameter._sharded_param_data)

    def all_gather_inputs(parameter: Any) -> list[torch.Tensor]:
        if not parameter.offload_to_cpu or parameter.sharded_state != ShardedState.SHARDED:
            return gather_inputs(parameter)
        on_host = parameter._sharded_param_data
        parameter._sharded_param_data = torch.empty(on_host.shape, dtype=on_host.dtype, device="meta")
        try:
            return gather_inputs(parameter)
        finally:
            parameter._sharded_param_data = on_host

    def move_states(parameters: list[torch.Tensor], buffers: list[torch.Tensor], _: Any) -> None:
        device.arrived([*parameters, *buffers])

    return [
        (param_group.FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
        (param_group.FSDPParamGroup, "_validate_cpu_offload_params", lambda group: None),
        (FSDPParam, "_init_sharded_param", init_sharded_param),
        (FSDPParam, "all_gather_inputs", property(all_gather_inputs)),
        (initialization, "_move_states_to_device", move_states),
        (param_group, "foreach_reduce", _for_collectives(device, param_group.foreach_reduce)),
    ]


def _ddp_patches(device: FakeDevice) -> list[tuple[Any, str, Any]]:
    import torch.nn.parallel.distributed as parallel

    ddp = parallel.DistributedDataParallel
    make = ddp.__init__

    def make_ddp(model: Any, *arguments: Any, **options: Any) -> None:
        with device.allocating(COLLECTIVES):
            make(model, *arguments, **options)
        model.register_comm_hook(None, _exchanged_bucket)

    return [
        (ddp, "__init__", make_ddp),
        (ddp, "_pre_forward", _for_collectives(device, ddp._pre_forward)),
        (parallel, "_verify_param_shape_across_processes", lambda *_, **__: None),
    ]


def _for_collectives(device: FakeDevice, function: Callable) -> Callable:
    """The function, with what it allocates counted as memory of collectives."""

    def named(*arguments: Any, **options: Any) -> Any:
        with device.allocating(COLLECTIVES):
            return function(*arguments, **options)

    return named


def _exchanged_bucket(state, bucket):  # DDP reads the annotations, and takes none or its own
    """A communication hook of DDP: the bucket as it is, and what its all-reduce sends."""
    device, size = active(), bucket.buffer().nbytes
    sent = 2 * size * (device.gpus - 1) // device.gpus
    launch(Operator("c10d::allreduce_", COLLECTIVE, "", 0, sent), DDP_STREAM)
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
