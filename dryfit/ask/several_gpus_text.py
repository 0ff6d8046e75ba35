"""What an answer says of several GPUs beside the memory of one: what they exchange, how they save and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.common.text import gib


def exchange_lines(exchanges: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a GPU exchanges in a step, a line for each group that talks."""
    lines = []
    for row in exchanges:
        where = "in a node" if row["on_node"] == row["gpus"] else f"{row['on_node']} in a node, over the network"
        lines.append(
            f"  {row['axis']}, {row['gpus']} GPUs, {where}: {row['sent_bytes'] / 1e9:,.2f} GB sent by each in"
            f" {row['collectives']:,} collectives, {row['seconds']:.3g} s"
        )
    return ["exchanged in a step:", *lines] if lines else []


def host_lines(host: Mapping[str, Any]) -> list[str]:
    """What the processes of a host take of its memory."""
    count, process = host["processes"], host["process_bytes"]
    each = [f"{gib(process + host['loading_bytes'])} each while they load", f"{gib(process + host['step_bytes'])} then"]
    return [
        f"host memory: {count} processes on a host, {', '.join(each)}; with the job that starts them"
        f" {gib(host['peak_bytes'])} at most, while {_WHILE[host['peak_phase']]}"
    ]


_WHILE = {"loading": "they load", "step": "they train", "saving": "rank 0 saves a full state dict"}


def _copies(size: int) -> str:
    if not size:
        return "no copy per process"
    return f"{gib(size)} of each process, or of rank 0 alone with cpu_ram_efficient_loading"


def checkpoint_lines(found: Mapping[str, Any]) -> list[str]:
    """What saving a full state dict and loading take."""
    return [
        f"saving a full state dict: {gib(found['saved_bytes'])} on rank 0's host, {gib(found['saving_gpu_bytes'])} more"
        f" on each GPU; without cpu_offload {gib(found['saving_on_gpu_bytes'])} more on each GPU",
        f"host memory while loading: {_copies(found['loading_host_bytes'])}; {gib(found['file_pages_bytes'])} of"
        " evictable page cache on each host",
    ]
