"""How long GPUs talk to each other: within a node over its links, between nodes over the network.

A ring passes on as fast as its slowest hop. Where a group's GPUs lie on several nodes, NCCL runs as many rings as a
node has network adapters for them, and each ring leaves the node by another one. So ``k`` GPUs of the group on a node
send at most ``k`` times as fast as one adapter, and not faster than the links inside the node. In an all-to-all each
GPU sends what is meant for other nodes through its own adapter. What of these figures is reached is one share for both.
That share was measured inside a node (config/gpus.yaml, ``speed_shares``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dryfit.engine.collectives import POINT_TO_POINT, kind_of

if TYPE_CHECKING:
    from dryfit.engine.costs import CostRecorder, Operator

# What libraries call the dimensions of their meshes: transformers 5.24, accelerate 1.15, PyTorch's FSDP2.
AXES_OF = {
    "": "all GPUs",
    "tp": "tensor",
    "tensor": "tensor",
    "cp": "context",
    "fsdp": "shard",
    "efsdp": "shard of experts",
    "dp_shard": "shard",
    "dp_shard_cp": "shard and context",
    "dp_replicate": "replicate",
    "ep": "expert",
    "pp": "pipeline",
    "pipeline": "pipeline",
}


@dataclass(frozen=True)
class Links:
    """What a GPU sends to others, as is reached, one way."""

    # To GPUs of its node; to those of other nodes.
    node_bytes_per_second: float
    network_bytes_per_second: float
    gpus_per_node: int  # how many GPUs share a node; ranks fill one node after the other
    # A GPU has a link to each other GPU of its node, and the figure is one link's (AMD's Infinity Fabric). Else all go
    # through one switch, as fast as the GPU's links together (NVLink).
    to_each: bool = False

    def within(self, near: int) -> float:
        """What a GPU sends at once to the ``near`` - 1 others of a group that share its node."""
        return self.node_bytes_per_second * (max(near - 1, 1) if self.to_each else 1)


def collective_seconds(operator: Operator, links: Links) -> float:
    """Seconds of a collective, send or receipt, by the group that it connects and where that group's GPUs are."""
    link, network = links.node_bytes_per_second, links.network_bytes_per_second
    group, sent = operator.group, operator.moved_bytes
    if group is None:
        return sent / link
    near, kind = group.on_one_node(links.gpus_per_node), kind_of(operator.name)
    if kind in POINT_TO_POINT:  # the slowest of a pipeline's hops
        return sent / (link if near == group.size else min(link, network))
    link = links.within(near)
    if near == group.size:
        return sent / link
    if "alltoall" in kind:
        each = operator.bytes / group.size
        return max(each * (near - 1) / link, each * (group.size - near) / network)
    return sent / min(link, near * network)


def exchanges(
    costs: CostRecorder, links: Links, micro_batch: CostRecorder | None = None, left_out: int = 0
) -> list[dict[str, Any]]:
    """What a GPU exchanges in a step, a row for each group that talks, the longest first.

    ``micro_batch``, ``left_out``: the step's first micro-batch, and how many more there are that were not traced.

    Returns ``axis``, ``gpus`` of the group and ``on_node``, how many of them share a node; ``collectives``, their
    number; ``sent_bytes`` by this GPU; ``seconds`` as if one came after the other, although some run beside products.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for part, times in ((costs, 1), (micro_batch, left_out)):
        for index in part.calls if part is not None and times else ():
            operator = part.operators[index]
            if operator.group is None:
                continue
            name, size = operator.group.name, operator.group.size
            row = rows.setdefault(
                (name, size),
                {
                    "axis": AXES_OF.get(name, name),
                    "gpus": size,
                    "on_node": operator.group.on_one_node(links.gpus_per_node),
                    "collectives": 0,
                    "sent_bytes": 0.0,
                    "seconds": 0.0,
                },
            )
            row["collectives"] += times
            row["sent_bytes"] += times * operator.moved_bytes
            row["seconds"] += times * collective_seconds(operator, links)
    for row in rows.values():
        row["sent_bytes"] = round(row["sent_bytes"])
    return sorted(rows.values(), key=lambda row: -row["seconds"])
