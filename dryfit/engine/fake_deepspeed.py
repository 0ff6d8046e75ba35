"""DeepSpeed's ZeRO in a :mod:`fake group <dryfit.engine.fake_group>`: its own engine runs, on ``meta``.

DeepSpeed asks an accelerator object for everything that it wants of a device; :func:`fake_deepspeed` gives it one for
``meta``. A few functions are exchanged while it lasts, each for a reason that :data:`PATCHES` gives. What DeepSpeed
keeps in modules (its backend, its process groups, the linear function that ZeRO-3 puts in the place of PyTorch's) is
put back afterwards.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .collectives import DESCRIBED
from .components import COLLECTIVES, GRADIENTS, OPTIMIZER_STATES, UNSHARDED
from .fake_device import FakeDevice
from .fake_group import BACKEND
from .patching import patched

# What is exchanged, and what happens on `meta` if it isn't. tests/dryfit/engine/test_fake_deepspeed.py tries each.
PATCHES = {
    "ds_accelerator": "DeepSpeed would ask the machine's CPU or GPU",
    "functional.linear": "ZeRO-3 leaves a function of its own there, for every model that comes later",
    "Tensor.record_stream": "ZeRO-3 and ZeRO-2 tell the allocator which streams use a block; `meta` has no streams",
    "Module.to": "ZeRO-2 brings the model to the GPU there; on `meta` nothing moves, and the tracker is told",
    "Init._convert_to_zero_parameters": "ZeRO-3 brings each weight to the GPU there, before it keeps its share",
    "AllGatherHandle.wait": "gathered weights get their name",
    "AllGatherCoalescedHandle.wait": "the same",
    "Init._all_gather": "the same of weights that ZeRO-3 keeps on each GPU, since they are small",
    "torch.zeros_like": "ZeRO-2 keeps shapes as tensors on `meta`, which nothing is allocated for",
    "DeepSpeedZeroOptimizer.setup_buckets": "ZeRO-2's buffers for the exchange of gradients get their name",
    "assert_ints_same_as_other_ranks": "ZeRO-3 compares the order of layers across processes by values",
    "_dim_zero_all_to_all": "Ulysses exchanges heads in an operator of its own, into which a tracker does not see",
    "initialize_sequence_parallel": "the GPUs that share rows under Ulysses get their group's name",
}


class _Exchanged(torch.autograd.Function):
    """Heads for tokens, there and back: what DeepSpeed's ``dim_zero_all_to_all`` allocates and sends."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        from torch import distributed as dist

        ctx.group, output = group, torch.empty_like(tensor)
        dist.all_to_all_single(output, tensor, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchanged.forward(ctx, gradient.contiguous(), ctx.group), None


def _accelerator(device: FakeDevice, *, synchronous: bool) -> Any:
    """DeepSpeed's accelerator for ``meta``: streams and events are the fake device's."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class MetaAccelerator(CPU_Accelerator):
        """``synchronous``: without streams, as DeepSpeed's CPU is; else as its CUDA."""

        Stream = property(lambda _: None if synchronous else device.Stream)
        Event = property(lambda _: None if synchronous else device.Event)

        def __init__(self) -> None:
            super().__init__()
            self._name, self._communication_backend_name = "meta", BACKEND

        def is_synchronized_device(self) -> bool:
            return synchronous

        def device_name(self, device_index: Any = None) -> str:
            return "meta"

        current_device_name = device_name

        def device(self, device_index: Any = None) -> torch.device:
            return torch.device("meta")

        def current_device(self) -> int:
            return 0

        def device_count(self) -> int:
            return device.gpus

        def synchronize(self, device_index: Any = None) -> None:
            device.synchronize()

        def stream(self, stream: Any) -> Any:
            return super().stream(stream) if synchronous else device.stream(stream)

        def current_stream(self, device_index: Any = None) -> Any:
            return None if synchronous else device.current_stream()

        def default_stream(self, device_index: Any = None) -> Any:
            return None if synchronous else device.first_stream

        def empty_cache(self) -> None:
            torch.cuda.empty_cache()  # which the trace hears

        def available_memory(self, device_index: Any = None) -> int:
            return 1 << 60  # whether it is enough the report says

        def is_fp16_supported(self) -> bool:
            return True

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.is_meta

        def create_op_builder(self, op_name: str) -> None:
            """No operator of DeepSpeed's own: nothing has to be compiled."""

        def FloatTensor(self, values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device="meta")

        def ByteTensor(self, values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.uint8, device="meta")

    return MetaAccelerator()


def name_states(
    device: FakeDevice, engine: torch.nn.Module, component: Callable[[str, torch.Tensor], str]
) -> None:
    """Say what an engine has allocated in the beginning is for.

    ``component`` gives it by a parameter's name and the parameter. The fp32 copy of what is trained counts among the
    optimizer's states, as ZeRO's authors count it.
    """
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        what = component(name, parameter)
        device.named(parameter.data, what)
        if getattr(parameter, "ds_tensor", None) is not None:
            device.named(parameter.ds_tensor, what)
    for group in zero.optimizer.param_groups:
        for parameter in group["params"]:
            device.named(parameter, OPTIMIZER_STATES)
    for state in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for tensor in getattr(zero, state, ()):
            device.named(tensor, OPTIMIZER_STATES)
    for states in zero.optimizer.state.values():
        for tensor in states.values():
            if isinstance(tensor, torch.Tensor):
                device.named(tensor, OPTIMIZER_STATES)
    if getattr(zero, "grad_partitions_flat_buffer", None) is not None:
        device.named(zero.grad_partitions_flat_buffer, GRADIENTS)
    for bucket in zero.ipg_buckets.values():
        if isinstance(bucket.buffer, torch.Tensor):
            device.named(bucket.buffer, COLLECTIVES)


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed looks for an accelerator while it is imported, and says what it found."""
    before, logging.root.manager.disable = logging.root.manager.disable, logging.WARNING
    try:
        yield
    finally:
        logging.root.manager.disable = before


@contextmanager
def fake_deepspeed(device: FakeDevice, target: str = "cuda") -> Iterator[None]:
    """Let DeepSpeed run inside :func:`dryfit.engine.fake_group.fake_group`, whose device this is.

    ``target``: ``cuda``, with streams, or ``cpu``, as DeepSpeed runs on a CPU. DeepSpeed's engine has to be made and
    used inside.
    """
    from torch import distributed as dist

    with quiet():
        from deepspeed.comm import comm
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.utils import groups, logger

    environment = {name: os.environ.get(name) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    kept = [(module, dict(vars(module))) for module in (comm, groups, parallel_state_sp)]
    level = logger.level
    os.environ.update(LOCAL_RANK="0", RANK=str(dist.get_rank()), WORLD_SIZE=str(device.gpus))
    logger.setLevel("ERROR")
    try:
        with patched(_patches(device, target)), warnings.catch_warnings():
            for module in ("torch.distributed", "transformers.integrations.deepspeed"):
                warnings.filterwarnings("ignore", category=FutureWarning, module=module)
            yield
    finally:
        logger.setLevel(level)
        for module, content in kept:
            vars(module).update(content)
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _patches(device: FakeDevice, target: str) -> list[tuple[Any, str, Any]]:
    """What is exchanged, as :func:`dryfit.engine.patching.patched` takes it; why: :data:`PATCHES`."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.runtime.sequence_parallel import parallel_state_sp, ulysses_sp
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero2

    record, to = torch.Tensor.record_stream, torch.nn.Module.to
    init = partition_parameters.Init
    convert = init._convert_to_zero_parameters

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        if not tensor.is_meta:
            record(tensor, stream)
        else:
            device.used_on(tensor, stream)

    def move(module: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
        if arguments == (torch.device("meta"),):
            device.arrived([*module.parameters(), *module.buffers()])
        return to(module, *arguments, **options)

    def convert_to_zero_parameters(self: Any, parameters: Any) -> None:
        for parameter in parameters:
            if not partition_parameters.is_zero_param(parameter):
                device.arrived([parameter])
                convert(self, [parameter])

    def named(wait: Callable) -> Callable:
        def wait_and_name(handle: Any, *arguments: Any, **options: Any) -> None:
            wait(handle, *arguments, **options)
            for parameter in getattr(handle, "params", None) or [handle._AllGatherHandle__param]:
                device.named(parameter.data, UNSHARDED)

        return wait_and_name

    def all_gather(self: Any, parameters: Any, *arguments: Any, **options: Any) -> Any:
        handles = gather(self, parameters, *arguments, **options)
        for parameter in parameters:
            device.named(parameter.data, UNSHARDED)
        return handles

    def zeros_like(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        with _disable_current_modes() if options.get("device") == "meta" else nullcontext():
            return zeros(tensor, **options)

    def set_up_buckets(zero: Any) -> None:
        buckets(zero)
        for bucket in zero.ipg_buckets.values():
            for buffer in bucket.buffer:
                device.named(buffer, COLLECTIVES)

    def initialize_sequence_parallel(sequence_parallel_size: int) -> None:
        initialize(sequence_parallel_size)
        parallel_state_sp.get_sequence_parallel_group()._set_group_desc(f"{DESCRIBED}ulysses")

    gather, zeros, initialize = (
        init._all_gather,
        torch.zeros_like,
        parallel_state_sp.initialize_sequence_parallel,
    )
    buckets = Zero2.setup_buckets
    one, several = (
        partition_parameters.AllGatherHandle,
        partition_parameters.AllGatherCoalescedHandle,
    )
    return [
        (real_accelerator, "ds_accelerator", _accelerator(device, synchronous=target == "cpu")),
        (torch.nn.functional, "linear", torch.nn.functional.linear),
        (torch.Tensor, "record_stream", record_stream),
        (torch.nn.Module, "to", move),
        (init, "_convert_to_zero_parameters", convert_to_zero_parameters),
        (one, "wait", named(one.wait)),
        (several, "wait", named(several.wait)),
        (init, "_all_gather", all_gather),
        (torch, "zeros_like", zeros_like),
        (Zero2, "setup_buckets", set_up_buckets),
        (partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None),
        (
            ulysses_sp,
            "_dim_zero_all_to_all",
            lambda group, tensor: _Exchanged.apply(tensor.contiguous(), group),
        ),
        (parallel_state_sp, "initialize_sequence_parallel", initialize_sequence_parallel),
    ]
