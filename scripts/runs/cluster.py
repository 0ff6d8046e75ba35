"""Which of a cluster's GPUs a job should ask for: the smallest that the predicted step fits.

A profile names a map (``profiles/slurm/gpus.yaml``), one entry for each kind of GPU::

    - {gpu: t4, partition: gpu, gres: t4}
    - {gpu: a100-80gb, partition: gpu-large, gres: a100}

``gpu`` is a name in config/gpus.yaml or a size, ``{vram_gib: 24}``; ``partition`` and ``gres`` are what the cluster
calls it. Either of the two may be left out. Standard library and PyYAML only: the rules call this.
"""

import os
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from dryfit.cards.gpus import GIB, Gpu, catalogue, find
from dryfit.common.errors import UserError
from dryfit.common.files import read_report, read_yaml
from dryfit.common.schema import validate

SCHEMA = {
    "additionalProperties": False,
    "properties": {key: {} for key in ("gpu", "partition", "gres")},
}
EXAMPLE = "- {gpu: rtx-4090, partition: gpu, gres: rtx4090}"
Entry = tuple[Gpu, Mapping[str, Any]]


def read_map(path: str | Path) -> list[Entry]:
    """Read a map of a cluster's GPUs, the smallest first.

    UserError: if the file is missing, empty or has a wrong entry.
    """
    content = read_yaml(path)
    if not isinstance(content, list) or not content:
        raise UserError(
            "The map of the cluster's GPUs is a list.", where=path, found=content, write=EXAMPLE
        )
    entries = []
    for number, entry in enumerate(content, 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, Mapping) or "gpu" not in entry:
            raise UserError("Each entry needs `gpu`.", where=where, found=entry, write=EXAMPLE)
        validate(entry, SCHEMA, where)
        if not entry.get("partition") and not entry.get("gres"):
            raise UserError(
                "Each entry needs `partition` or `gres`, the cluster's own names of the GPU.",
                where=where,
                found=dict(entry),
                allowed="partition, gres, or both",
                write=EXAMPLE,
            )
        entries.append((find(entry["gpu"], where), entry))
    return sorted(entries, key=lambda item: item[0].usable_bytes)


def step_bytes(report: str) -> int:
    """What the allocator needs for a training step, by its trace or its gate."""
    answer = _sealed(report)
    return answer.get("trace", answer)["required_bytes"]


def evaluation_bytes(weights_bytes: int) -> int:
    """What an evaluation's job asks for, before it is traced: a quarter more for keys, values and logits, and 2 GiB."""
    return weights_bytes * 5 // 4 + 2 * GIB


def evaluation_job_bytes(report: str) -> int:
    """The same by the report of the weights: of the base, which lists files, or of a merged model, with their sum."""
    written = _sealed(report)
    return evaluation_bytes(
        written.get("bytes") or sum(entry["bytes"] for entry in written["files"].values())
    )


def _sealed(report: str) -> Mapping[str, Any]:
    os.stat(
        report
    )  # says which file is missing, if one is; then Snakemake asks again when it is there
    return read_report(report)


def training_minutes(gate: str) -> int:
    """What a training's job asks for: half as much again as its gate predicts, and half an hour; else 12 hours.

    A job that is ended by its limit goes on from its last checkpoint.
    """
    hours = _sealed(gate)["hours"]
    if hours is None:
        return 12 * 60
    most = hours["hours_at_most"] if hours["hours_range"] else 2 * hours["hours"]
    return ceil(1.5 * 60 * most) + 30


def smallest(required_bytes: int, entries: Sequence[Entry]) -> Mapping[str, Any]:
    """The entry of the smallest GPU whose usable memory holds ``required_bytes``.

    UserError: if none does, with the largest of the map and the smallest GPU of the catalogue that would.
    """
    for gpu, entry in entries:
        if gpu.usable_bytes >= required_bytes:
            return entry
    largest = entries[-1][0]
    enough = min(
        (gpu for gpu in catalogue().values() if gpu.usable_bytes >= required_bytes),
        key=lambda gpu: gpu.usable_bytes,
        default=None,
    )
    raise UserError(
        f"The training step needs {required_bytes / GIB:.2f} GiB, more than any GPU of the cluster has.",
        where="the cluster's GPUs",
        found=f"{largest.title}: {largest.usable_bytes / GIB:.2f} GiB usable",
        allowed=f"{enough.title} ({enough.usable_bytes / GIB:.2f} GiB usable) would do"
        if enough
        else "no GPU known",
        write=f"- {{gpu: {enough.name}, partition: ..., gres: ...}}" if enough else None,
    )
