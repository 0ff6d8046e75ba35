"""Readers of other tools' configurations: which tool wrote a file, and the scenario that comes out of it.

One module for each tool behind one interface, ``read(mapping, file, gpus)``, which gives a
:class:`~dryfit.readers.reading.Reading`, and a row in one table. Pure Python and PyYAML; no file is executed,
nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import read_toml, read_yaml
from dryfit.data import data_path
from dryfit.readers import (
    axolotl,
    companion_files,
    llama_factory,
    ms_swift,
    openrlhf,
    program,
    torchtitan,
    torchtune,
    trl,
    verl,
)
from dryfit.readers.launch import Launch, complete, launched
from dryfit.readers.reading import Reading, keys
from dryfit.readers.shell import Command, beside, commands, options
from dryfit.scenario.fields import BY_NAME

Read = Callable[[Mapping[str, Any], Path, int | None], Reading]


class Reader(NamedTuple):
    """How a tool's files are known and read.

    Attributes
    ----------
    read
        From a file's content, its path and the number of GPUs that the question names.
    marks
        Keys of which a file of the tool has all of one group; ``model._component_``: a key of the block ``model``.
    beside
        Whether its files only add to another file, or to a model.
    """

    read: Read
    marks: tuple[tuple[str, ...], ...]
    beside: bool = False

    def can_read(self, mapping: Mapping[str, Any]) -> bool:
        return _has_marks(mapping, self.marks)


def _has_marks(mapping: Mapping[str, Any], groups: Iterable[Iterable[str]]) -> bool:
    return any(all(_has(mapping, key) for key in group) for group in groups)


def _has(mapping: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(mapping, Mapping) and first in mapping and (not rest or _has(mapping[first], rest))


READERS = {
    "axolotl": Reader(axolotl.read, (("base_model",),)),
    "llama-factory": Reader(
        llama_factory.read,
        (("model_name_or_path",), *(("model", hint) for hint in llama_factory.NEWER_HINTS)),
    ),
    "trl": Reader(trl.read, (("model_name_or_path",),)),
    "torchtitan": Reader(torchtitan.read, (("training", "parallelism"), ("training", "job"))),
    "torchtune": Reader(torchtune.read, torchtune.MARKS),
    "ms-swift": Reader(ms_swift.read, ms_swift.MARKS),
    "verl": Reader(verl.read, verl.MARKS),
    "openrlhf": Reader(openrlhf.read, openrlhf.MARKS),
    "accelerate": Reader(
        companion_files.read_accelerate, (("distributed_type",), ("compute_environment",)), beside=True
    ),
    "deepspeed": Reader(
        companion_files.read_deepspeed, (("zero_optimization",), ("train_micro_batch_size_per_gpu",)), beside=True
    ),
    "peft": Reader(companion_files.read_adapter, (("peft_type",),), beside=True),
}
TOOLS = tuple(name for name, reader in READERS.items() if not reader.beside)
# Tools whose settings stand in the command of a shell script, or in a file that it names.
SCRIPTS: dict[str, Callable[[Launch, Command, Path], Mapping[str, Any] | None]] = {
    "ms-swift": lambda _, command, script: ms_swift.from_command(command, script),
    "verl": lambda _, command, script: verl.from_command(command, script),
    "openrlhf": lambda _, command, script: openrlhf.from_command(command, script),
    "llama-factory": llama_factory.from_command,
    "axolotl": axolotl.from_command,
    "trl": trl.from_command,
    "torchtune": torchtune.from_command,
}
# How the pipeline's own settings become a step, once they are checked. The pipeline sets it (scripts/ask), since the
# library knows no run.
step_of_a_run: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None


def pipeline(where: object, change: Mapping[str, Any] | None = None) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """:data:`step_of_a_run`; ``change``: what to ask instead where the pipeline is not installed.

    Raises
    ------
    UserError
        If it isn't.
    """
    if step_of_a_run is None:
        raise UserError(
            "These are settings of SecureCLI-Tuner's pipeline, which is not installed with the library.", where=where,
            allowed="a model, a scenario, another tool; or `python -m scripts.ask` in the pipeline's folder",
            write=None if change else f"python -m scripts.ask {where}", change=change,
        )  # fmt: skip
    return step_of_a_run


# The sections of a run's settings (config/schema.yaml): a file with any other key is no run's.
RUN_SECTIONS = frozenset(
    (
        "run sweep task dataset prompt model lora training memory scenario_defaults merging evaluation publish cluster"
    ).split()
)
_LOOKS_LIKE = data_path("looks_like.yaml")  # files that are often tried, by their keys
CAN_READ = (
    "a file of axolotl (base_model), LLaMA-Factory (model_name_or_path, stage), TRL (model_name_or_path, dataset_name),"
    " torchtune (model._component_), torchtitan (training, parallelism), ms-swift (tuner_type) or verl"
    " (actor_rollout_ref); of accelerate, DeepSpeed or PEFT beside a model; a scenario (model); a config.json"
)


def mapping_of(path: Path) -> Mapping[str, Any]:
    """A file's content, YAML, JSON or TOML.

    Raises
    ------
    UserError
        If it is neither, or no mapping.
    """
    if path.suffix in (".jinja", ".j2"):
        raise UserError("This is a template, not a configuration.", where=path, allowed="the rendered file")
    content = read_toml(path) if path.suffix == ".toml" else read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(
            "The file is no configuration: it holds no keys.",
            where=path,
            found=type(content).__name__ if content is not None else "an empty file",
            allowed=CAN_READ,
            write="model: qwen2.5-coder-7b",
        )
    return content


def kind_of(mapping: Mapping[str, Any], path: Path) -> str:
    """``model`` (a config.json), ``scenario``, ``run`` (settings of a run of this project), or a tool's name.

    Raises
    ------
    UserError
        If no tool, or more than one, can have written it.
    """
    if "model_type" in mapping and ("hidden_size" in mapping or "architectures" in mapping or "text_config" in mapping):
        return "model"
    if path.suffix == ".toml" and isinstance(mapping.get("training"), Mapping):
        return "torchtitan"
    tools = [name for name, reader in READERS.items() if reader.can_read(mapping)]
    own = set(mapping) & {*BY_NAME, "like"}
    if "model" in mapping and len(own) == len(mapping):
        return "scenario"
    if not tools and _is_run(mapping):
        return "run"
    if tools == ["llama-factory", "trl"]:
        tools = _by_keys_of_their_own(mapping, tools)
    if len(tools) == 1:
        return tools[0]
    if len(tools) > 1:
        raise UserError(
            "Several tools could have written this file.",
            where=path,
            found=", ".join(tools),
            allowed="--from with one of them",
            write=f"--from {tools[0]}",
        )
    if "model" in mapping and 2 * len(own) > len(mapping):
        return "scenario"  # its check names what is unknown in it
    like = _looks_like(mapping)
    raise UserError(
        f"This looks like a file of {like}, which can't be read."
        if like
        else "No tool is known that writes such a file.",
        where=path,
        found=", ".join(list(map(str, mapping))[:8]),
        allowed=CAN_READ,
        write="model: qwen2.5-coder-7b",
    )


def _is_run(mapping: Mapping[str, Any]) -> bool:
    """Whether a file holds sections of a run's settings and nothing else; the schema checks what is in them."""
    return set(mapping) <= RUN_SECTIONS and any(isinstance(section, Mapping) for section in mapping.values())


def _looks_like(mapping: Mapping[str, Any]) -> str | None:
    """Whose file it may be; a run's settings with a section that isn't one."""
    sections = [key for key in mapping if key in RUN_SECTIONS and isinstance(mapping[key], Mapping)]
    others = [str(key) for key in mapping if key not in RUN_SECTIONS]
    if len(sections) > len(others):
        return f"SecureCLI-Tuner's pipeline with sections that it doesn't have ({', '.join(others)})"
    known = read_yaml(_LOOKS_LIKE).items()
    return next((name for name, groups in known if _has_marks(mapping, groups)), None)


def _by_keys_of_their_own(mapping: Mapping[str, Any], tools: list[str]) -> list[str]:
    """The one of two tools that knows a key of the file which the other doesn't; both, if neither or each has one."""

    def knows(tool: str, key: str) -> bool:
        return keys(tool, "transformers").kind(key) != "unknown"

    pairs = (tools, tools[::-1])
    certain = [one for one, other in pairs if any(knows(one, key) and not knows(other, key) for key in mapping)]
    return certain or tools


def read_tool(path: Path, tool: str, mapping: Mapping[str, Any], gpus: int | None) -> Reading:
    """Read a file of a tool.

    Raises
    ------
    UserError
        If a value is not of the kind that the tool takes for its key.
    """
    return _without_traceback(lambda: READERS[tool].read(mapping, path, gpus), path, tool)


def _without_traceback(read: Callable[[], Reading], path: Path, tool: str) -> Reading:
    """What a reader read; a value inside a key that it could make nothing of is an error of the file's."""
    try:
        return read()
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UserError(
            f"A value in this file is not of a kind that {tool} takes: {error}.", where=path,
            allowed="for each key the kind of value that the tool documents",
        ) from None  # fmt: skip


def read_script(path: Path, gpus: int | None, capability: tuple[int, int] | None = None) -> Reading:
    """Read a shell script: its first command that trains.

    Raises
    ------
    UserError
        If it has none; the last command of a known tool says why.
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
        "No command that trains was found in this script.", where=path,
        allowed="swift sft, pt or rlhf; python -m verl.trainer.main_ppo;"
        " python -m openrlhf.cli.train_ppo_ray or train_sft;"
        " llamafactory-cli train; axolotl train; trl sft; tune run; python, accelerate launch, torchrun or deepspeed"
        " with a program",
    )  # fmt: skip


def _started(
    launch: Launch, command: Command, path: Path, gpus: int | None, capability: tuple[int, int] | None
) -> Reading | None:
    """What a command trains: a tool's settings, or a program's; None: it starts neither."""
    refused = None
    for tool, from_command in SCRIPTS.items():
        try:
            settings = from_command(launch, command, path)
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
        raise UserError("The script starts a program that isn't there.", where=path, found=launch.program,
                        allowed="a program beside the script, or above it")  # fmt: skip
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

    return _without_traceback(read, path, "the program's trainer")
