"""What saving and loading a divided model takes, on the GPU and on the host, beside the step.

A full state dict is gathered by PyTorch's own ``get_model_state_dict`` over the simulated group. With ``cpu_offload``,
as accelerate asks for it, one weight after the other is whole on each GPU, and rank 0 keeps all of them in its host's
memory. Without it the whole model is on each GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dryfit.engine.fake_group import fake_group
from dryfit.engine.trace import Options, trace_step
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import DTYPES
from dryfit.step.model import build_model
from dryfit.tracing.loading import built_on_host_bytes
from dryfit.tracing.prepare import prepare


@dataclass(frozen=True)
class CheckpointSizes:
    """What a full state dict and loading take, in bytes."""

    saved_bytes: (
        int  # of all weights together: what rank 0 keeps on its host until they are written
    )
    # On each GPU beside what lies there between two steps, while rank 0 takes them to its host one by one.
    saving_gpu_bytes: int
    saving_on_gpu_bytes: int  # the same where the weights stay on the GPUs until they are whole (`cpu_offload=False`)
    # Of each process that builds the whole model on its host before it is divided; of rank 0 alone where it reads the
    # weights and sends them (accelerate's `cpu_ram_efficient_loading`). Weights that are kept in the dtype of their
    # files are pages of the files, which all processes of a host share, and count nothing here.
    loading_host_bytes: int
    file_pages_bytes: int  # what the files' pages take on each host, which the kernel may drop

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def checkpoint(scenario: Scenario) -> CheckpointSizes | None:
    """The same of a scenario; None where nothing is divided, or by another library than PyTorch's FSDP2."""
    parallel = scenario.parallel
    if parallel.kind.fsdp != 2 or parallel.offload != "none" or scenario.method == "qlora":
        return None
    extra, saved = {}, 0
    for cpu_offload in (True, False):
        peak, resident, saved = saving(scenario, cpu_offload=cpu_offload)
        extra[cpu_offload] = peak - resident
    stored = DTYPES[scenario.weight_precision]
    return CheckpointSizes(
        saved_bytes=saved,
        saving_gpu_bytes=extra[True],
        saving_on_gpu_bytes=extra[False],
        loading_host_bytes=built_on_host_bytes(scenario, stored),
        file_pages_bytes=sum(
            parameter.nbytes for parameter in build_model(scenario, "meta").parameters()
        ),
    )


def saving(
    scenario: Scenario, target: str = "cuda", *, cpu_offload: bool, rank: int = 0
) -> tuple[int, int, int]:
    """Bytes on a GPU at the peak of gathering a full state dict, without it, and of the state dict that it gives.

    On the CPU (``target``) what rank 0 keeps lies beside the rest, so it counts there.
    """
    with fake_group(scenario.parallel.gpus, rank):
        prepared = prepare(scenario, target)
        kept: list[dict[str, torch.Tensor]] = []
        report = trace_step(
            prepared.model,
            None,
            gathering(prepared.model, cpu_offload, kept),
            options=Options(
                target=target, steps=1, histories=prepared.histories, label=prepared.label
            ),
        )
        saved = sum(tensor.nbytes for tensor in kept[-1].values())
    return report.peak_allocated_bytes, report.resident_bytes, saved


def gathering(
    model: nn.Module, cpu_offload: bool, kept: list[dict[str, torch.Tensor]]
) -> Callable[[], None]:
    """What gathers a model's full state dict, and keeps it in ``kept``."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    return lambda: kept.append(get_model_state_dict(model, options=options))
