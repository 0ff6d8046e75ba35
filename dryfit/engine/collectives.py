"""What collectives send, and among which GPUs: each by the group that talks, not by all GPUs of the job.

A group is that of a mesh's dimension, whose name ``init_device_mesh`` gives to it, or the whole job's. A ring sends all
but its own part, so what one GPU sends is a share of the whole tensor (NCCL's ``doc/PERFORMANCE.md`` in nccl-tests).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

EXCHANGES = ("c10d", "_c10d_functional")  # namespaces of collectives, sends and receipts
POINT_TO_POINT = ("send", "recv")
DESCRIBED = "mesh_"  # as torch.distributed.device_mesh describes the groups that it makes
_SENDING = ("gather", "reduce", "broadcast", "alltoall", "scatter")


class GpuGroup(NamedTuple):
    """GPUs that talk to each other."""

    name: str  # of the mesh's dimension, such as `tp`; `""`: the job's own group
    ranks: tuple[int, ...]  # their numbers in the job, in order

    @property
    def size(self) -> int:
        return len(self.ranks)

    def on_one_node(self, gpus_per_node: int) -> int:
        """How many of them share a node, on the node that has most of them."""
        return _most_on_a_node(self.ranks, gpus_per_node)


@cache
def _most_on_a_node(ranks: tuple[int, ...], gpus_per_node: int) -> int:
    return max(Counter(rank // gpus_per_node for rank in ranks).values())


def everybody(gpus: int) -> GpuGroup:
    """The group of all GPUs of a job."""
    return GpuGroup("", tuple(range(gpus)))


def group_of(func: Any, args: Sequence) -> GpuGroup | None:
    """The group among a collective's arguments; None: it names none."""
    import torch
    from torch.distributed import ProcessGroup, distributed_c10d

    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "process_group" and isinstance(value, torch.ScriptObject):
            return of_process_group(ProcessGroup.unbox(value))
        if argument.name == "group_name" and isinstance(value, str):
            return of_process_group(distributed_c10d._resolve_process_group(value))
    return None


def of_process_group(group: Any) -> GpuGroup:
    """The same of PyTorch's ``ProcessGroup``."""
    from torch.distributed import get_process_group_ranks

    name = group.group_desc
    own = name.removeprefix(DESCRIBED) if name.startswith(DESCRIBED) else ""
    return GpuGroup(own, tuple(get_process_group_ranks(group)))


def kind_of(name: str) -> str:
    """A collective's kind from its operator's name: ``c10d::allreduce_`` is ``_c10d_functional::all_reduce``."""
    return name.partition("::")[2].replace("_", "")


def whole_bytes(name: str, inputs: Sequence[int], outputs: Sequence[int]) -> int:
    """Bytes of the whole tensor that a collective gathers, sums or exchanges; 0: nothing is sent.

    ``name``: the operator's, ``c10d::allreduce_``. ``inputs``, ``outputs``: bytes of each of its tensors.
    """
    kind = kind_of(name)
    if kind in POINT_TO_POINT:
        return sum(inputs)
    if kind == "alltoall":  # lists, a tensor for each GPU
        return sum(outputs)
    return max((*inputs, *outputs), default=0) if any(word in kind for word in _SENDING) else 0


@cache
def sent_share(name: str, gpus: int) -> Fraction:
    """What a GPU of so many sends of the whole tensor; an all-reduce goes around twice."""
    kind = kind_of(name)
    if kind in POINT_TO_POINT:
        return Fraction(1)
    return Fraction((2 if "allreduce" in kind else 1) * (gpus - 1), gpus)
