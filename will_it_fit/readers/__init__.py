"""Readers of other tools' configurations: which tool wrote a file, and the scenario that comes out of it.

One module for each tool behind one interface: ``can_read(mapping)`` and ``read(mapping, file, gpus)``, which gives a
:class:`~will_it_fit.readers.reading.Reading`. Pure Python and PyYAML; no file is executed, nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_yaml
from will_it_fit.readers import axolotl, companion_files, llama_factory, program, trl
from will_it_fit.readers.reading import Reading, keys
from will_it_fit.scenario.fields import BY_NAME

Read = Callable[[Mapping[str, Any], Path, int | None], Reading]
TOOLS: dict[str, tuple[Callable[[Mapping[str, Any]], bool], Read]] = {
    "axolotl": (axolotl.can_read, axolotl.read),
    "llama-factory": (llama_factory.can_read, llama_factory.read),
    "trl": (trl.can_read, trl.read),
}
BESIDE: dict[str, tuple[Callable[[Mapping[str, Any]], bool], Read]] = {
    "accelerate": (companion_files.is_accelerate, companion_files.read_accelerate),
    "deepspeed": (companion_files.is_deepspeed, companion_files.read_deepspeed),
    "peft": (companion_files.is_adapter, companion_files.read_adapter),
}
# How the pipeline's own settings become a step. The pipeline sets it (scripts/ask), since the library knows no run.
step_of_a_run: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
_RUN = {"training", "memory", "dataset", "scenario_defaults", "evaluation", "merging"}  # sections of a run's settings


def mapping_of(path: Path) -> Mapping[str, Any]:
    """A file's content, YAML or JSON.

    Raises
    ------
    UserError
        If it is neither, or no mapping.
    """
    if path.suffix in (".jinja", ".j2"):
        raise UserError("This is a template, not a configuration.", where=path, allowed="the rendered file")
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(
            "The file is no configuration: it holds no keys.",
            where=path,
            found=type(content).__name__ if content is not None else "an empty file",
            allowed="a file of axolotl, LLaMA-Factory, TRL or accelerate, a scenario, or a config.json",
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
    if any(isinstance(mapping.get(section), Mapping) for section in _RUN):
        return "run"
    found = [name for name, (can_read, _) in {**TOOLS, **BESIDE}.items() if can_read(mapping)]
    own = "model" in mapping and not set(mapping) - set(BY_NAME) - {"like"}
    if own:
        return "scenario"
    if found == ["llama-factory", "trl"]:
        found = _by_keys_of_their_own(mapping, found)
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise UserError(
            "Several tools could have written this file.",
            where=path,
            found=", ".join(found),
            allowed="--from with one of them",
            write=f"--from {found[0]}",
        )
    if "model" in mapping:
        return "scenario"  # its check names what is unknown in it
    raise UserError(
        "No tool is known that writes such a file.",
        where=path,
        found=", ".join(list(map(str, mapping))[:8]),
        allowed="a file of axolotl (base_model), LLaMA-Factory (model_name_or_path, stage) or TRL (model_name_or_path,"
        " dataset_name); of accelerate, DeepSpeed or PEFT beside a model; a scenario (model); a config.json",
        write="model: qwen2.5-coder-7b",
    )


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
    return _without_traceback(lambda: {**TOOLS, **BESIDE}[tool][1](mapping, path, gpus), path, tool)


def _without_traceback(read: Callable[[], Reading], path: Path, tool: str) -> Reading:
    """What a reader read; a value inside a key that it could make nothing of is an error of the file's."""
    try:
        return read()
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UserError(
            f"A value in this file is not of a kind that {tool} takes: {error}.", where=path,
            allowed="for each key the kind of value that the tool documents",
        ) from None  # fmt: skip


def read_program(path: Path, gpus: int | None) -> Reading:
    """Read a Python program or a notebook."""
    return _without_traceback(lambda: program.read(path, gpus), path, "the program's trainer")
