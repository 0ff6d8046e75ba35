"""What the processes of one host take of its memory, where each drives a GPU: while they load, step and save.

A process holds Python and its libraries. While it loads it holds what it builds on the CPU before its GPU gets a part.
With ``parallel.offload: cpu`` its shards of weights, gradients and optimizer states stay there, page-locked. A full
state dict is rank 0's. On a machine without a GPU all tensors lie there too: :func:`started_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario

if TYPE_CHECKING:
    import torch

# Beside tensors, in bytes: Python, the libraries, and freed memory that glibc keeps. 0.4 to 1.0 GB in the stages of the
# default run, on a CPU. CUDA's driver adds to it what was not measured.
PROCESS_BYTES = 1_000_000_000
# The job that starts a process for each GPU and waits holds torch and accelerate: 0.23 to 0.45 GB were seen.
LAUNCHER_BYTES = 500_000_000
# DDP sends rank 0's weights to the others when it wraps the model, in buckets of which two are under way: PyTorch 2.13
# nn/parallel/distributed.py `broadcast_bucket_size`, csrc/distributed/c10d/comm.cpp `kMaxInFlight`.
DDP_BROADCAST_BYTES = 2 * 250 * 2**20


@dataclass(frozen=True)
class Host:
    """Memory of one host, in bytes."""

    processes: int  # one for each of the group's GPUs that the host has
    # Of each process beside tensors; of the job that starts them.
    process_bytes: int
    launcher_bytes: int
    # Of each process while it loads, beside pages of the weights' files, which all share and the kernel may drop.
    loading_bytes: int
    # Of each process while it trains: what `parallel.offload: cpu` keeps there. PyTorch's page-locked blocks are as
    # large as the next power of two, and that counts.
    step_bytes: int
    saving_bytes: (
        int | None
    )  # Of rank 0 alone: a full state dict until it is written. None: not known.
    # Of all processes of rank 0's host together, and when: `loading`, `step` or `saving`.
    peak_bytes: int
    peak_phase: str

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def host_of(scenario: Scenario, gpus_per_node: int, saved_bytes: int | None = None) -> Host:
    """The memory that the processes of a step on several GPUs take of a host.

    ``gpus_per_node``: how many GPUs a host has. ``saved_bytes``: of a full state dict; None: not known, and left out.
    """
    from dryfit.step.adapters import DTYPES

    processes = min(scenario.parallel.gpus, gpus_per_node)
    stored = DTYPES[scenario.weight_precision]
    largest = (
        (scenario.size("vocab_size") or 0) * (scenario.size("hidden_size") or 0) * stored.itemsize
    )
    loading, step = loading_bytes(scenario, stored, largest), offloaded_bytes(scenario)
    every = LAUNCHER_BYTES + processes * PROCESS_BYTES
    phases = {"loading": every + processes * loading, "step": every + processes * step}
    if saved_bytes is not None:
        phases["saving"] = phases["step"] + saved_bytes
    peak = max(phases, key=lambda phase: phases[phase])
    return Host(
        processes=processes,
        process_bytes=PROCESS_BYTES,
        launcher_bytes=LAUNCHER_BYTES,
        loading_bytes=loading,
        step_bytes=step,
        saving_bytes=saved_bytes,
        peak_bytes=phases[peak],
        peak_phase=peak,
    )


def loading_bytes(scenario: Scenario, stored: torch.dtype, largest: int) -> int:
    """Host memory of a process while it loads its model for a GPU, beside Python and the libraries.

    The whole model, where it is divided afterwards (:func:`whole_model_bytes`); else tensor by tensor, of which one is
    on its way to the GPU while the next is read.

    ``stored``: dtype of the weights in their files. ``largest``: bytes of the largest tensor.
    """
    by_parts = scenario.parallel.sharded or scenario.parallel.by_plan
    return 2 * largest + (whole_model_bytes(scenario, stored) if by_parts else 0)


def whole_model_bytes(scenario: Scenario, stored: torch.dtype) -> int:
    """Host memory of a model that FSDP or a tensor plan takes from the CPU; ``stored``: the dtype of its files."""
    from dryfit.tracing.loading import built_on_host_bytes

    return built_on_host_bytes(scenario, stored)


def started_bytes(scenario: Scenario, trace: Mapping[str, Any], stored: torch.dtype) -> int:
    """Tensors that each process of several holds on the CPU, which is its device, until its model is divided.

    Under FSDP or a tensor plan that is the whole model and its part of it; under DDP the model, and rank 0's weights
    beside it.
    """
    left = trace["phases"]["load"]
    if scenario.parallel.kind.replicates:
        return left + min(left, DDP_BROADCAST_BYTES)
    return left + whole_model_bytes(scenario, stored)


def zero_offloaded_bytes(scenario: Scenario) -> int:
    """What DeepSpeed keeps of a GPU's share on the host (0.19.8, ``stage_1_and_2.py``, ``stage3.py``).

    Of each number that is trained: a copy of the weight and its gradient in fp32, the optimizer's states, and in the
    step's dtype the weight on its way back (stages 1 and 2) or the sum of the gradients (stage 3). Of a share of all
    weights, with ``offload_param``, the weight. What is page-locked may take up to twice as much; it is not counted.
    """
    if scenario.zero.offload_optimizer == "none" and scenario.zero.offload_param == "none":
        return 0
    from dryfit.step.adapters import DTYPES
    from dryfit.step.model import build_model

    width = DTYPES[scenario.autocast_precision or "fp32"].itemsize
    parameters = list(build_model(scenario, "meta").parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = 0.0
    if scenario.zero.offload_optimizer == "cpu":
        total += trained * (4 + 4 + width + OPTIMIZERS[scenario.optimizer].state_bytes(4))
    if scenario.zero.offload_param == "cpu":
        total += sum(parameter.numel() for parameter in parameters) * width
    return int(total) // scenario.parallel.gpus


def offloaded_bytes(scenario: Scenario) -> int:
    """What FSDP2 keeps of a GPU's shards on the host with ``parallel.offload: cpu``; else 0.

    Weights and gradients are page-locked (FSDP2's ``CPUOffloadPolicy``), in blocks of the next power of two (PyTorch's
    ``CachingHostAllocator``); optimizer states are not.
    """
    if scenario.parallel.zero_stage:
        return zero_offloaded_bytes(scenario)
    if scenario.parallel.offload != "cpu":
        return 0
    import torch

    from dryfit.engine.fake_group import fake_group
    from dryfit.tracing.prepare import prepare

    with fake_group(scenario.parallel.gpus):
        prepared = prepare(scenario)
        divided = [
            parameter
            for parameter in prepared.model.parameters()
            if hasattr(parameter, "device_mesh")
        ]
        trained = [parameter for parameter in divided if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        prepared.optimizer.step()
        states = [
            getattr(value, "_local_tensor", value).nbytes
            for state in prepared.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        locked = [parameter.to_local().nbytes for parameter in (*divided, *trained)]
    return sum(states) + sum(1 << (size - 1).bit_length() for size in locked if size)
