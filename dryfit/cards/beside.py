"""What a process has on a card beside the step that is traced: by rules with their sources, in ``data``.

NCCL's buffers, kernels that are loaded late, a desktop, and what varied lengths leave in fragments
(``data/beside_the_step.yaml``). Each is a range. The lower end is there for sure, the upper end may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from dryfit.cards.gpus import GIVEN, MEASURED, Gpu
from dryfit.common.files import read_yaml
from dryfit.common.text import MIB
from dryfit.data import data_path
from dryfit.scenario.strategies import AXES

if TYPE_CHECKING:
    from dryfit.scenario.scenario import Scenario

TABLE = data_path("beside_the_step.yaml")


@dataclass(frozen=True)
class Process:
    """What of a training's process decides what it holds beside the step."""

    gpus: int = 1  # how many processes train together, one on each GPU
    groups: int = 0  # NCCL's communicators of a process; 0: it has none
    platform: str = "linux"
    expandable_segments: bool = False
    compiled: bool = False
    meshed: bool = False
    # Communicators that a process may have besides: DeepSpeed clones the group of all processes, and transformers'
    # Trainer gathers losses over the first (deepspeed/utils/groups.py, ``_clone_world_group``)
    more_groups: int = 0
    recipe: bool = False  # whether a recipe was traced, and the process runs another program for the same model

    @classmethod
    def of(cls, scenario: Scenario) -> Process:
        """The process that takes a scenario's step."""
        parallel = scenario.parallel
        axes = sum(getattr(parallel, axis) > 1 for axis in AXES)
        return cls(
            parallel.gpus,
            0 if parallel.gpus < 2 else 1 + axes,
            scenario.platform,
            scenario.allocator.expandable_segments,
            scenario.compile != "none",
            parallel.meshed,
            int(parallel.zero_stage > 0),
        )


ALONE = Process()


@dataclass(frozen=True)
class Part:
    """One thing beside the step, in bytes."""

    name: str
    least_bytes: int
    most_bytes: int
    evidence: str


@dataclass(frozen=True)
class Beside:
    """All that is beside a step on a card."""

    parts: tuple[Part, ...] = ()  # what does not depend on the step's size
    # Of what the step needs: how much less, and more, than the trace says it takes in real life
    least_share: float = 0.0
    most_share: float = 0.0
    evidence: str = ""  # where the shares come from

    def least_bytes(self, needed_bytes: int) -> int:
        """At least so much is beside a step that needs so much; below 0: the step needs less than the trace says."""
        return sum(part.least_bytes for part in self.parts) + round(self.least_share * needed_bytes)

    def most_bytes(self, needed_bytes: int) -> int:
        """At most so much is beside a step that needs so much."""
        return sum(part.most_bytes for part in self.parts) + round(self.most_share * needed_bytes)

    def room_bytes(self, usable_bytes: int) -> int:
        """The most that a step may need so that it fits for sure."""
        return max(
            int(
                (usable_bytes - sum(part.most_bytes for part in self.parts)) / (1 + self.most_share)
            ),
            0,
        )

    def widest_bytes(self, usable_bytes: int) -> int:
        """The most that a step may need so that it fits at best."""
        return int(
            (usable_bytes - sum(part.least_bytes for part in self.parts)) / (1 + self.least_share)
        )

    def to_mapping(self, needed_bytes: int) -> dict[str, Any]:
        """Plain values for JSON, for a step that needs so much."""
        fragments = Part(
            "fragments",
            round(self.least_share * needed_bytes),
            round(self.most_share * needed_bytes),
            self.evidence,
        )
        parts = [fragments, *self.parts] if self.evidence else list(self.parts)
        return {
            "least_bytes": self.least_bytes(needed_bytes),
            "most_bytes": self.most_bytes(needed_bytes),
            "parts": [vars(part) for part in parts],
        }


NOTHING = Beside()


def beside(process: Process, gpu: Gpu) -> Beside:
    """What a process has on a card beside its step."""
    table = _table()
    kinds = {
        "recipe": process.recipe,
        "compiled": process.compiled,
        "mesh": process.meshed,
        "expandable": process.expandable_segments,
        "any": True,
    }
    fragments = next(row for row in table["fragments"] if kinds[row["when"]])
    parts = tuple(_parts(process, gpu, table))
    return Beside(parts, fragments["least_share"], fragments["most_share"], fragments["evidence"])


def room_bytes(process: Process, gpu: Gpu) -> int:
    """The most that a step may need so that it fits a card for sure: what searches look for."""
    return beside(process, gpu).room_bytes(gpu.usable_bytes)


@cache
def _table() -> Mapping[str, Any]:
    return read_yaml(TABLE)


def _parts(process: Process, gpu: Gpu, table: Mapping[str, Any]) -> Iterator[Part]:
    if gpu.context_source != GIVEN and not gpu.context_has_kernels:
        row = table["kernels"]
        more = int(row["most_context_mib"] * MIB) - gpu.context_bytes
        yield Part("kernels loaded late", 0, max(more, 0), row["evidence"])
    if gpu.total_source != MEASURED and any(
        title in gpu.title for title in table["desktop"]["titles"]
    ):
        row = table["desktop"][process.platform]
        yield Part("a desktop", 0, int(row["most_mib"] * MIB), row["evidence"])
    if process.groups:
        linked = gpu.compute_capability in table["nccl"]["nvlink"]["capabilities"]
        row = table["nccl"]["nvlink" if linked else "pcie"]
        least = row["least_mib"]["two" if process.gpus == 2 else "more"]
        yield Part(
            "NCCL's buffers",
            process.groups * int(least * MIB),
            (process.groups + process.more_groups) * int(row["most_mib"] * MIB),
            row["evidence"],
        )
