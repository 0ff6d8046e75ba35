"""Readers of other tools' configurations: which tool wrote a file, and the scenario that comes out of it.

One module for each tool behind one interface, ``read(mapping, file, gpus)``, which gives a
:class:`~dryfit.readers.reading.Reading`, and a row in one table. A module is imported when a file of its tool is read.
Shell scripts and Python programs: :mod:`dryfit.readers.scripts`. Pure Python and PyYAML; no file is executed, nothing
is fetched.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import read_toml, read_yaml
from dryfit.data import data_path
from dryfit.readers.reading import Reading, keys
from dryfit.scenario.fields import BY_NAME


class Reader(NamedTuple):
    """How a tool's files are known and read."""

    name: str  # of the tool's module in this package
    # Keys of which a file of the tool has all of one group; ``model._component_``: a key of the block ``model``
    marks: tuple[tuple[str, ...], ...]
    beside: bool = False  # whether its files only add to another file, or to a model
    function: str = "read"  # of the module, which reads

    @property
    def module(self) -> ModuleType:
        return import_module(f"{__name__}.{self.name}")

    def read(self, mapping: Mapping[str, Any], path: Path, gpus: int | None) -> Reading:
        """Read a file's content; ``gpus``: how many the question names."""
        return getattr(self.module, self.function)(mapping, path, gpus)

    def can_read(self, mapping: Mapping[str, Any]) -> bool:
        return _has_marks(mapping, self.marks)


def _has_marks(mapping: Mapping[str, Any], groups: Iterable[Iterable[str]]) -> bool:
    return any(all(_has(mapping, key) for key in group) for group in groups)


def _has(mapping: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return (
        isinstance(mapping, Mapping)
        and first in mapping
        and (not rest or _has(mapping[first], rest))
    )


_NEWER_LLAMA_FACTORY = (
    "train_dataset",
    "model_class",
    "dist_config",
    "kernel_config",
    "peft_config",
    "quant_config",
)
READERS = {
    "axolotl": Reader("axolotl", (("base_model",),)),
    "llama-factory": Reader(
        "llama_factory",
        (("model_name_or_path",), *(("model", hint) for hint in _NEWER_LLAMA_FACTORY)),
    ),
    "trl": Reader("trl", (("model_name_or_path",),)),
    "torchtitan": Reader("torchtitan", (("training", "parallelism"), ("training", "job"))),
    "torchtune": Reader(
        "torchtune",
        (("model._component_",), ("tokenizer._component_",), ("checkpointer._component_",)),
    ),
    "ms-swift": Reader(
        "ms_swift", (("rlhf_type",), ("tuner_type",), ("train_type",), ("sft_type",))
    ),
    "verl": Reader("verl", (("actor_rollout_ref",), ("model.partial_pretrain",))),
    "openrlhf": Reader(
        "openrlhf",
        (("pretrain", "micro_train_batch_size"), ("pretrain", "actor_num_gpus_per_node")),
    ),
    "accelerate": Reader(
        "companion_files",
        (("distributed_type",), ("compute_environment",)),
        True,
        "read_accelerate",
    ),
    "deepspeed": Reader(
        "companion_files",
        (("zero_optimization",), ("train_micro_batch_size_per_gpu",)),
        True,
        "read_deepspeed",
    ),
    "peft": Reader("companion_files", (("peft_type",),), True, "read_adapter"),
}
TOOLS = tuple(name for name, reader in READERS.items() if not reader.beside)
# How the pipeline's own settings become a step, once they are checked. The pipeline sets it (scripts/ask), since the
# library knows no run.
step_of_a_run: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None


def pipeline(
    where: object, change: Mapping[str, Any] | None = None
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """:data:`step_of_a_run`; ``change``: what to ask instead where the pipeline is not installed.

    UserError: if it isn't.
    """
    if step_of_a_run is None:
        raise UserError(
            "These are settings of SecureCLI-Tuner's pipeline, which is not installed with the library.",
            where=where,
            allowed="a model, a scenario, another tool; or `python -m scripts.ask` in the pipeline's folder",
            write=None if change else f"python -m scripts.ask {where}",
            change=change,
        )
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

    UserError: if it is neither, or no mapping.
    """
    if path.suffix in (".jinja", ".j2"):
        raise UserError(
            "This is a template, not a configuration.", where=path, allowed="the rendered file"
        )
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

    UserError: if no tool, or more than one, can have written it.
    """
    if "model_type" in mapping and (
        "hidden_size" in mapping or "architectures" in mapping or "text_config" in mapping
    ):
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
    return set(mapping) <= RUN_SECTIONS and any(
        isinstance(section, Mapping) for section in mapping.values()
    )


def _looks_like(mapping: Mapping[str, Any]) -> str | None:
    """Whose file it may be; a run's settings with a section that isn't one."""
    sections = [key for key in mapping if key in RUN_SECTIONS and isinstance(mapping[key], Mapping)]
    others = [str(key) for key in mapping if key not in RUN_SECTIONS]
    if len(sections) > len(others):
        return (
            f"SecureCLI-Tuner's pipeline with sections that it doesn't have ({', '.join(others)})"
        )
    known = read_yaml(_LOOKS_LIKE).items()
    return next((name for name, groups in known if _has_marks(mapping, groups)), None)


def _by_keys_of_their_own(mapping: Mapping[str, Any], tools: list[str]) -> list[str]:
    """The one of two tools that knows a key of the file which the other doesn't; both, if neither or each has one."""

    def knows(tool: str, key: str) -> bool:
        return keys(tool, "transformers").kind(key) != "unknown"

    pairs = (tools, tools[::-1])
    certain = [
        one
        for one, other in pairs
        if any(knows(one, key) and not knows(other, key) for key in mapping)
    ]
    return certain or tools


def read_tool(path: Path, tool: str, mapping: Mapping[str, Any], gpus: int | None) -> Reading:
    """Read a file of a tool.

    UserError: if a value is not of the kind that the tool takes for its key.
    """
    return without_traceback(lambda: READERS[tool].read(mapping, path, gpus), path, tool)


def without_traceback(read: Callable[[], Reading], path: Path, tool: str) -> Reading:
    """What a reader read; a value inside a key that it could make nothing of is an error of the file's."""
    try:
        return read()
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UserError(
            f"A value in this file is not of a kind that {tool} takes: {error}.",
            where=path,
            allowed="for each key the kind of value that the tool documents",
        ) from None
