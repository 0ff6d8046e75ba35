"""Shell scripts that start a training, and the Python programs that they start: which tool's settings they hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.readers import READERS, program, read_tool, without_traceback
from dryfit.readers.launch import Launch, complete, launched
from dryfit.readers.reading import Reading
from dryfit.readers.shell import Command, beside, commands, options

# Tools whose settings stand in the command of a shell script, or in a file that it names.
_BY_COMMAND = ("ms-swift", "verl", "openrlhf", "llama-factory", "axolotl", "trl", "torchtune")


def read_script(path: Path, gpus: int | None, capability: tuple[int, int] | None = None) -> Reading:
    """Read a shell script: its first command that trains.

    UserError: if it has none; the last command of a known tool says why.
    """
    refused = None
    for command in commands(path.read_text(encoding="utf-8")):
        launch = launched(command, path)
        try:
            reading = _started(launch, command, path, gpus, capability)
        except UserError as error:
            refused = error
            continue
        if reading is not None:
            return complete(reading, command, launch, path, gpus)
    raise refused or UserError(
        "No command that trains was found in this script.",
        where=path,
        allowed="swift sft, pt or rlhf; python -m verl.trainer.main_ppo;"
        " python -m openrlhf.cli.train_ppo_ray or train_sft;"
        " llamafactory-cli train; axolotl train; trl sft; tune run; python, accelerate launch, torchrun or deepspeed"
        " with a program",
    )


def _started(
    launch: Launch,
    command: Command,
    path: Path,
    gpus: int | None,
    capability: tuple[int, int] | None,
) -> Reading | None:
    """What a command trains: a tool's settings, or a program's; None: it starts neither."""
    refused = None
    for tool in _BY_COMMAND:
        try:
            settings = READERS[tool].module.from_command(launch, command, path)
        except UserError as error:
            refused = error
            continue
        if settings is not None:
            reading = read_tool(path, tool, settings, gpus or launch.processes)
            reading.line = "{key}={value}" if tool in ("verl", "torchtune") else "--{key} {value}"
            return reading
    if refused:
        raise refused
    if not launch.program.endswith(".py") or launch.words == command.words:
        return None
    started = beside(path, launch.program)
    if started is None:
        raise UserError(
            "The script starts a program that isn't there.",
            where=path,
            found=launch.program,
            allowed="a program beside the script, or above it",
        )
    given = options(launch.words[1:], path)
    return read_program(started, gpus or launch.processes, capability=capability, given=given)


def read_program(
    path: Path,
    gpus: int | None,
    part: str | None = None,
    capability: tuple[int, int] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Reading:
    """Read a Python program or a notebook; ``part``: which of the configurations of a torchtitan registry.

    ``capability``: the card's, by which programs choose between bf16 and fp16. ``given``: arguments by their names.
    """

    def read() -> Reading:
        return program.read(path, gpus, part, capability, given or {})

    return without_traceback(read, path, "the program's trainer")
