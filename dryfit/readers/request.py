"""A scenario as it was asked for: what was named, what ``like`` set, what was assumed.

``like: trl`` takes what TRL's training takes where its file says nothing, and so do ``peft`` (the scripts of its
documentation) and ``axolotl``: ``data/tool_defaults.yaml`` lists it; sizes are not among it. What is named wins.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import yaml_text
from dryfit.data import data_path
from dryfit.scenario.fields import BY_NAME, UNSAID, scenario_defaults
from dryfit.scenario.generation import Preference
from dryfit.scenario.images import Images
from dryfit.scenario.model import language_model_only
from dryfit.scenario.nested_fields import gpu_count
from dryfit.scenario.objectives import OBJECTIVES
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import DIVIDED, NONE

LIKE = ("trl", "peft", "axolotl", "unsloth")
DEFAULT_LIKE = "trl"  # whose step a question about a model alone is about
TOOL_DEFAULTS = data_path("tool_defaults.yaml")  # what `like` sets
# Settings that decide memory or time, for the answer to name where nobody did; the sizes first.
_SIZES = ("sequence_length", "micro_batch")
DECIDING = (
    *_SIZES,
    *(
        name
        for name in BY_NAME
        if name not in (*_SIZES, *UNSAID, "model_name", "adapter", "images")
    ),
)
_ADAPTERS_ALONE = ("lora", "kbit_preparation", "quantization", "adapter_precision")
_COMPUTES_IN_BF16 = (8, 0)  # compute capability
_SHARDED = ("fsdp1", "fsdp2")  # where FSDP shards weights a loss in chunks is not described


@dataclass(frozen=True)
class ScenarioRequest:
    """A scenario, and who decided what of it."""

    scenario: Scenario
    mapping: Mapping[str, Any]  # what was named: by a file, or by options
    # The tool that the rest was taken from, and the fields that it set
    like: str | None = None
    set_by_like: Mapping[str, Any] = field(default_factory=dict)
    # Fields that decide memory and that neither named: this project's defaults, or those of ``assumed_by``
    assumed: Mapping[str, Any] = field(default_factory=dict)
    assumed_by: str | None = None
    warnings: tuple[str, ...] = ()  # what of the model the answer leaves out
    like_is_default: bool = False  # nobody chose the tool

    def origin_fields(self) -> dict[str, Any]:
        """For the answer: ``assumed`` (by whom), and ``like``, None or the ``tool`` with its ``fields``."""
        like = {"tool": self.like, "fields": dict(self.set_by_like)} if self.like else None
        return {"assumed": dict(self.assumed), "assumed_by": self.assumed_by, "like": like}


def read_request(path: str | Path) -> ScenarioRequest:
    """A scenario's file."""
    return parse_request(read_yaml(path), path)


def parse_request(
    mapping: Mapping[str, Any],
    where: object = "scenario",
    capability: tuple[int, int] | None = None,
) -> ScenarioRequest:
    """A scenario's fields, with ``like`` among them or without; ``capability``: of the card that is asked about.

    A GPU with a count, and neither a strategy nor a number of GPUs under ``parallel``, is all of them: with FSDP2, or
    on the mesh that ``parallel`` names, if that has as many places.

    UserError: for all that is wrong.
    """
    if not isinstance(mapping, Mapping):
        return ScenarioRequest(Scenario.from_mapping(mapping, where=where), {})
    named = {name: value for name, value in mapping.items() if name != "like"}
    tool = mapping.get("like")
    if tool is not None and tool not in LIKE:
        near = difflib.get_close_matches(str(tool), LIKE, n=1, cutoff=0.3)
        raise UserError(
            "`like` names tools whose training is known.",
            where=where,
            found=tool,
            allowed=", ".join(LIKE),
            write=f"like: {near[0] if near else LIKE[0]}",
        )
    set_by_tool = like_fields(tool, named, capability) if tool else {}
    given = {name for name, value in named.items() if value is not None}
    defaults = {name: value for name, value in set_by_tool.items() if name not in given}
    own = OBJECTIVES.get(str(named.get("objective")))
    divides = (
        own is None or own.trainer is None
    )  # a trainer of TRL's takes one GPU, and a server perhaps the others
    if (
        divides
        and (count := gpu_count(named.get("gpu"))) > 1
        and not _says_how(named.get("parallel"))
    ):
        defaults["parallel"] = {
            **scenario_defaults()["parallel"],
            **_all_of(count, named.get("parallel") or {}),
        }
    if (
        own and own.grouped and not _says_rows(named)
    ):  # which are answers: all to a prompt stand beside each other
        generations = (named.get("preference") or {}).get("generations")
        defaults["micro_batch"] = (
            generations if isinstance(generations, int) else Preference().generations
        )
    try:
        scenario = Scenario.from_mapping(named, defaults, where)
    except UserError as error:
        raise _with_defaults_named(error, given, set_by_tool, tool) from None
    taken = {name: value for name, value in defaults.items() if name in set_by_tool}
    values = {**scenario_defaults(), **defaults}
    skipped = (
        _ADAPTERS_ALONE if scenario.method == "full" else ("lora",) if scenario.adapter else ()
    )
    assumed_fields = {
        name: values.get(name)
        for name in DECIDING
        if name not in given
        and name not in taken
        and name not in skipped
        and not (name == "parallel" and name not in defaults)
        and not (name == "quantization" and scenario.method != "qlora")
        and not (name == "preference" and scenario.objective == "sft")
        and not (name == "generation" and not scenario.aim.generates)
    }
    return ScenarioRequest(
        scenario,
        named,
        tool,
        taken,
        assumed_fields,
        warnings=left_out(named.get("model"), scenario, where),
    )


def _with_defaults_named(
    error: UserError, given: Collection[str], set_by_tool: Collection[str], tool: str | None
) -> UserError:
    """An error, or several, in which a value that nobody named is called a default."""
    if error.parts:
        return UserError.several(
            [_with_defaults_named(part, given, set_by_tool, tool) for part in error.parts]
        )
    shown = dict(re.findall(r"`([\w.]+): ([^`]+)`", error.problem))
    if error.field in BY_NAME and error.found is not None:
        shown.setdefault(error.field, yaml_text(error.found))
    tops = {name: name.partition(".")[0] for name in shown}
    defaults = [name for name, top in tops.items() if top in BY_NAME and top not in given]
    if not defaults or len(defaults) == len(shown) > 1:
        return error
    of = f"{tool}'s default" if defaults[0] in set_by_tool else "a default"
    values = " and ".join(f"`{name}: {shown[name]}`" for name in defaults)
    return error.with_values(
        problem=f"{error.problem} {values} {'are' if defaults[1:] else 'is'} {of}."
    )


def _says_how(parallel: Any) -> bool:
    """Whether ``parallel`` names a strategy or a number of GPUs; what is no mapping is for the checks."""
    return parallel is not None and (
        not isinstance(parallel, Mapping) or bool({"strategy", "gpus"} & set(parallel))
    )


def _says_rows(named: Mapping[str, Any]) -> bool:
    """Whether a step that generates names its rows, or in how many micro-batches it takes them."""
    parts = [named.get(name) or {} for name in ("preference", "generation")]
    return (
        not all(isinstance(part, Mapping) for part in parts)  # for the checks
        or any(named.get(name) is not None for name in ("micro_batch", "gradient_accumulation"))
        or parts[1].get("steps_per_generation") is not None
    )


def _all_of(count: int, mesh: Mapping[str, Any]) -> dict[str, Any]:
    """How all of so many GPUs take the step: FSDP2 beside a mesh, nothing beside one that has a place for each."""
    places = [mesh.get(axis, 1) for axis in ("tensor", "pipeline")]
    whole = all(isinstance(each, int) for each in places) and prod(places) == count
    return {"strategy": NONE if whole or mesh.get("pipeline", 1) != 1 else DIVIDED, "gpus": count}


def left_out(model: Any, scenario: Scenario, where: object) -> tuple[str, ...]:
    """What to say of a model that reads images where none were asked about: the answer is its language model's."""
    if scenario.images:
        return ()
    whole = language_model_only(model, where)
    if whole is None:
        return ()
    text = "the answer covers the language model alone, of a model that reads images too"
    if not whole:
        text += "; for images ask about its whole config.json, as its page on the Hub has it"
    elif example := Images.example(whole):
        needed = example.pop("tokens") + 2
        if needed > scenario.sequence_length:
            example["sequence_length"] = needed
        fields = {key: yaml_text(value) for key, value in example.items()}
        options = " ".join(f"--set '{key}={value}'" for key, value in fields.items())
        text += f"; for an image in each row add {', '.join(f'{key}: {fields[key]}' for key in fields)} ({options})"
    return (text,)


def like_fields(
    tool: str, named: Mapping[str, Any], capability: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What a tool's training takes for a method, where its file says nothing; in the order of the fields."""
    defaults = read_yaml(TOOL_DEFAULTS)[tool]
    own = defaults["always"] | defaults.get(
        named.get("method") or scenario_defaults()["method"], {}
    )
    if capability is not None and capability < _COMPUTES_IN_BF16:
        own |= {
            name: value
            for name, value in defaults.get("without_bf16", {}).items()
            if own.get(name) is not None
        }
    if tool == "unsloth" and takes_flex(named.get("model"), own["precision"]):
        own["attention"] = "flash"
    contradicting = set(_that_contradict(own, named))
    return {name: own[name] for name in BY_NAME if name in own and name not in contradicting}


def takes_flex(model: Any, precision: Any) -> bool:
    """Whether Unsloth trains a model through flex_attention, which keeps no scores, as FlashAttention keeps none."""
    flex = read_yaml(data_path("unsloth.yaml"))["flex"]
    return precision == "bf16" and re.search(flex, str(model), re.I) is not None


def _that_contradict(fields: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[str]:
    """Fields of a tool that what is named leaves no place for."""
    parallel = named.get("parallel")
    sharded = isinstance(parallel, Mapping) and parallel.get("strategy") in _SHARDED
    trained_alone = (named.get("objective") or "sft") != "sft"
    if sharded or (parallel is None and gpu_count(named.get("gpu")) > 1):
        yield "loss"
    several_gpus = parallel or gpu_count(named.get("gpu")) > 1
    if several_gpus or trained_alone:  # they are of one GPU, for supervised fine-tuning
        yield from ("kernels", "activation_offload")
    if several_gpus and not OPTIMIZERS[fields["optimizer"]].elementwise:  # it can't be divided
        yield "optimizer"
    if (
        named.get("gradient_checkpointing") is False
    ):  # what waits on the host are the inputs of checkpointed layers
        yield "activation_offload"
    rows = named.get("micro_batch")
    several = isinstance(rows, int) and rows > 1
    if not several or named.get("attention") == "flash" or named.get("packing", "none") != "none":
        yield "attention_mask"
    if str(named.get("precision")).endswith("-mixed"):
        yield "autocast"
    if trained_alone:  # its trainer casts adapters itself, and takes the loss whole
        yield from ("adapter_precision", "loss")
    if named.get("autocast") and str(fields.get("precision")).endswith("-mixed"):
        yield "precision"
