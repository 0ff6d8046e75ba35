"""A program to be run, and how: one value, which goes to the process that runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STEPS = 2  # the first update makes the optimizer's states
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What somebody else's program may use of this machine: memory and the largest file in bytes, time in seconds."""

    memory_bytes: int = 16 * GIB
    file_bytes: int = 4 * GIB
    seconds: int = 900


@dataclass(frozen=True)
class ProgramRequest:
    """What is asked."""

    # A file, or with `module` the name of a module; and the words that it is given.
    program: str
    arguments: tuple[str, ...] = ()
    module: bool = False  # whether it is started as `python -m`
    # How many processes with a GPU each `torchrun` would start on one machine; one of them runs. Without `torchrun` the
    # program is started alone, and one GPU is there.
    gpus: int = 1
    torchrun: bool = False
    rank: int = 0  # which of the processes runs
    gpu: str | None = None  # the card, as the catalogue names it
    steps: int = STEPS  # updates after which the program is stopped
    answers: Mapping[str, float] = field(
        default_factory=dict
    )  # what `.item()` gives by line, `train.py:57`
    # Rows and tokens of made up batches, `(8, 1024)`, where the program's data set isn't at hand; None: its own.
    batch: tuple[int, int] | None = None
    # Whether the program may use the network, and whether it runs in the folder it was asked in.
    network: bool = False
    in_place: bool = False
    # Files below the folder with another text, by their paths in it; not together with `in_place`.
    files: Mapping[str, str] = field(default_factory=dict)
    writable: tuple[str, ...] = ()  # folders elsewhere in which it may write too
    runs_out: bool = True  # whether an allocation beyond the card's memory fails, as on a GPU
    recipe: bool = False  # whether it is a recipe, which stands for programs that were not read
    limits: Limits = Limits()  # of the process

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ProgramRequest:
        values: dict[str, Any] = json.loads(text)
        batch = values.pop("batch")
        return cls(
            **values
            | {
                "arguments": tuple(values["arguments"]),
                "writable": tuple(values["writable"]),
                "limits": Limits(**values["limits"]),
                "batch": tuple(batch) if batch else None,
            }
        )
