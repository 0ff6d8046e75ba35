"""A group of GPUs that are not there: libraries' own code for several GPUs runs in one process, on ``meta``.

Inside :func:`fake_group` PyTorch believes that it is the first of several processes with a GPU each. Collectives do
nothing, and what is allocated for them is allocated; ``torch.meta`` is for ``meta`` what ``torch.cuda`` is for CUDA,
with streams and events. Tensors of ``meta`` have no addresses, no values and no device to ask for, so that a few
functions are exchanged while it lasts, each for a reason that :data:`PATCHES` gives. Nothing of it remains afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from .collectives import of_process_group
from .components import COLLECTIVES
from .costs import COLLECTIVE, Operator, launch
from .errors import TraceError
from .fake_device import FakeDevice
from .fake_pipeline import pipeline_patches
from .patching import patched
from .shardings import sharding_patches

BACKEND = "fakemeta"
DDP_STREAM = 1000  # DDP's all-reduces run beside the backward pass
# What is exchanged, and what happens on `meta` if it isn't. tests/dryfit/engine/test_fake_group.py tries each.
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
    "ProcessGroup.send": "a send's work holds what it sends as long as the work lives; a fake one holds nothing",
    "ProcessGroup.recv": "the same of what is received",
    "torch.accelerator.set_device_index": "transformers binds a process to its GPU, and this machine has none",
    "is_rng_supported_mesh": "DTensor compares the random state of ranks by its values, which nobody has",
    "_from_local_last_dim_shard": "transformers makes a whole tensor on `meta`, which is the GPU here, to read strides",
}


@contextmanager
def fake_group(gpus: int, rank: int = 0) -> Iterator[FakeDevice]:
    """Be one process of a group of ``gpus``, each with a GPU that is really ``meta``: the one of this ``rank``.

    Raises :class:`TraceError` if the process belongs to a group already.
    """

    with fake_gpus(gpus) as device:
        start_group(gpus, rank)
        try:
            yield device
        finally:
            dist.destroy_process_group()


@contextmanager
def fake_gpus(gpus: int) -> Iterator[FakeDevice]:
    """The same before the group is started, by :func:`start_group`: so does a program that starts it itself.

    Raises :class:`TraceError` if the process belongs to a group already.
    """

    if dist.is_initialized():
        raise TraceError(
            "This process belongs to a process group already, and can't pretend to be in another.",
            "Trace in a process of its own, or call torch.distributed.destroy_process_group() before.",
        )
    device = FakeDevice(gpus)
    torch.meta = device
    _forget_meshes()
    try:
        with _backend(), patched([*_patches(device), *pipeline_patches(), *sharding_patches()]):
            yield device
    finally:
        del torch.meta
        _forget_meshes()


def _forget_meshes() -> None:
    """Clear what DTensor keeps by mesh: one of an earlier group is equal to one of this, with other ranks and names."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor, _collective_utils, _redistribute, debug

    debug._clear_sharding_prop_cache()
    DTensor._op_dispatcher.sharding_propagator._propagate_tensor_meta_cached.cache_clear()
    _redistribute._gen_transform_infos.cache_clear()
    _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()


def start_group(gpus: int, rank: int = 0) -> None:
    """Start PyTorch's group of processes, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=gpus)


@contextmanager
def _backend() -> Iterator[None]:
    """Register PyTorch's fake process group for ``meta`` too, under a name of its own."""
    from torch.distributed import Backend
    from torch.testing._internal.distributed.fake_pg import _create_fake_pg

    tables = (
        Backend.default_device_backend_map,
        Backend.backend_type_map,
        Backend.backend_capability,
    )
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
    """What is replaced, as :func:`dryfit.engine.patching.patched` takes it; why: :data:`PATCHES`."""
    return [
        *_tensor_patches(device),
        *_fsdp1_patches(device),
        *_fsdp2_patches(device),
        *_ddp_patches(device),
        *_mesh_patches(device),
    ]


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
        device.used_on(tensor)

    def move_module(module: torch.nn.Module, *_: Any) -> None:
        """Breadth first, units within it left out: parameters, then buffers (FSDP1's ``_move_module_to_device``)."""
        queue, parameters, buffers = [module], [], []
        for current in queue:
            parameters += current.parameters(recurse=False)
            buffers += current.buffers(recurse=False)
            queue += [
                child
                for child in current.children()
                if not isinstance(child, FullyShardedDataParallel)
            ]
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
        parameter._sharded_param_data = torch.empty(
            on_host.shape, dtype=on_host.dtype, device="meta"
        )
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
        model.register_comm_hook(model.process_group, _exchanged_bucket)

    return [
        (ddp, "__init__", make_ddp),
        (ddp, "_pre_forward", _for_collectives(device, ddp._pre_forward)),
        (parallel, "_verify_param_shape_across_processes", lambda *_, **__: None),
    ]


class _Held(dist.Work):
    """The work of a send or receipt: NCCL's and gloo's hold its tensors as long as it lives."""

    def __init__(self, device: FakeDevice, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._device, self._tensors = device, tensors
        self._started = device.listener.last_started() if device.listener else None

    def wait(self, timeout: Any = None) -> bool:
        if self._device.listener:
            self._device.listener.waited_for_work(self._started)
        return True

    def is_completed(self) -> bool:
        return True


def _mesh_patches(device: FakeDevice) -> list[tuple[Any, str, Any]]:
    from torch.distributed.tensor import _dispatch, _random

    def held(function: Callable) -> Callable:
        def call(group: Any, tensors: list[torch.Tensor], *arguments: Any) -> _Held:
            function(group, tensors, *arguments)
            return _Held(device, tensors)

        return call

    patches: list[tuple[Any, str, Any]] = [
        (dist.ProcessGroup, name, held(getattr(dist.ProcessGroup, name)))
        for name in ("send", "recv")
    ]
    patches.append((torch.accelerator, "set_device_index", lambda index: None))
    patches += [
        (module, "is_rng_supported_mesh", lambda mesh: False)
        for module in (_random, _dispatch)
        if hasattr(module, "is_rng_supported_mesh")
    ]
    plans = sys.modules.get("transformers.distributed.tensor_parallel")
    if plans is not None:
        patches.append(
            (plans.TensorParallelLayer, "_from_local_last_dim_shard", staticmethod(_shard_of_last))
        )
    return patches


def _shard_of_last(local: torch.Tensor, mesh: Any, size: int) -> Any:
    """As transformers' ``_from_local_last_dim_shard``: a DTensor of ``size`` in its last dimension, from this part."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*local.shape[:-1], size))
    strides = [prod(shape[place + 1 :]) for place in range(len(shape))]
    return DTensor.from_local(
        local, mesh, [Shard(-1)], run_check=False, shape=shape, stride=tuple(strides)
    )


def _for_collectives(device: FakeDevice, function: Callable) -> Callable:
    """The function, with what it allocates counted as memory of collectives."""

    def named(*arguments: Any, **options: Any) -> Any:
        with device.allocating(COLLECTIVES):
            return function(*arguments, **options)

    return named


def _exchanged_bucket(state, bucket):  # DDP reads the annotations, and takes none or its own
    """A communication hook of DDP: the bucket as it is, and what its all-reduce sends."""
    size, group = bucket.buffer().nbytes, of_process_group(state)
    launch(Operator("c10d::allreduce_", COLLECTIVE, "", 0, size, group=group), DDP_STREAM)
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
