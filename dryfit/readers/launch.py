"""How a command starts a training: the launcher in front of it, how many processes that makes, and what it sets.

Launchers are ``accelerate launch``, ``torchrun`` (``python -m torch.distributed.run``), ``deepspeed`` and plain
``python``. What follows them is a tool's own command, for the tool's reader, or a program.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dryfit.common.files import read_yaml
from dryfit.readers import common, companion_files
from dryfit.readers.reading import Reading
from dryfit.readers.shell import Command, beside, options

_DISTRIBUTED = ("torch.distributed.run", "torch.distributed.launch")
_PLAIN = re.compile(r"python[\d.]*")
_SWITCHES = (
    "-m",
    "-u",
    "--module",
    "--no_python",
    "--multi_gpu",
    "--use_deepspeed",
    "--use_fsdp",
    "--standalone",
)


@dataclass
class Launch:
    """A command behind its launcher."""

    words: list[
        str
    ]  # what is started, with its arguments: a program's path, a module's name or a tool's
    processes: int | None = None  # on all nodes together; None: the command doesn't say
    configuration: str | None = None  # the file of ``accelerate launch --config_file``

    @property
    def program(self) -> str:
        return self.words[0] if self.words else ""


def launched(command: Command, script: Path) -> Launch:
    """The launcher of a command, taken apart; without one the command as it is."""
    words = list(command.words)
    while words and words[0].rpartition("/")[2] in (
        "uv",
        "poetry",
        "pipenv",
        "conda",
        "srun",
        "run",
        "exec",
    ):
        words = words[1:]
    name = words[0].rpartition("/")[2] if words else ""
    if name == "accelerate" and words[1:2] == ["launch"]:
        return behind(words[2:], script, "num_processes", "num_machines")
    if name == "torchrun":
        return behind(words[1:], script, "nproc_per_node", "nnodes")
    if name == "deepspeed":
        return behind(words[1:], script, "num_gpus", "num_nodes")
    if _PLAIN.fullmatch(name):
        rest = words[1:]
        while rest and rest[0] in ("-m", "-u"):
            rest = rest[1:]
        if rest and rest[0] in _DISTRIBUTED:
            return behind(rest[1:], script, "nproc_per_node", "nnodes")
        return Launch(rest)
    return Launch(words)


def behind(words: list[str], script: Path, processes: str, nodes: str) -> Launch:
    """A launcher's options come first; the first other word is what it starts."""
    place = 0
    while place < len(words) and words[place].startswith("-"):
        alone = words[place] in _SWITCHES or "=" in words[place]
        place += 1 if alone or words[place + 1 : place + 2] == [] else 2
    given = options(words[:place], script)
    each, machines = given.get(processes), given.get(nodes, 1)
    if isinstance(given.get("include"), str):  # deepspeed: localhost:0,1
        each = given["include"].partition(":")[2].count(",") + 1
    per_node = processes != "num_processes" and isinstance(machines, int)
    whole = each * (machines if per_node else 1) if isinstance(each, int) else None
    file = given.get("config_file")
    return Launch(words[place:], whole, file if isinstance(file, str) else None)


def visible_gpus(environment: Mapping[str, str]) -> int | None:
    """How many GPUs ``CUDA_VISIBLE_DEVICES`` shows; None: it isn't set, or not known."""
    text = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ASCEND_RT_VISIBLE_DEVICES", ""))
    return len(text.split(",")) if re.fullmatch(r"\d+(,\d+)*", text) else None


def complete(
    reading: Reading, command: Command, launch: Launch, script: Path, gpus: int | None
) -> Reading:
    """Add to a reading what its command decides beside the tool's own settings."""
    common.allocator(reading, command.environment)
    if launch.configuration and "parallel" not in reading.fields:
        _add_accelerate(reading, launch, script, gpus)
    if command.cut_off:
        reading.notes.append(
            "a comment among the command's lines ends it, as in bash: what follows the comment is left out"
        )
    return reading


def _add_accelerate(reading: Reading, launch: Launch, script: Path, gpus: int | None) -> None:
    path = beside(script, str(launch.configuration))
    if path is None:
        why = "this file of accelerate is not here, and may divide the step among GPUs"
        reading.approximates("config_file", launch.configuration, "too high", why)
        return
    other = companion_files.read_accelerate(read_yaml(path), path, gpus or launch.processes)
    reading.fields |= {
        name: value for name, value in other.fields.items() if name not in reading.fields
    }
    reading.remarks += other.remarks
    reading.notes += other.notes
    reading.unknown |= other.unknown
