"""Fields of a scenario that have parts, or several ways to be written: each a value of its own, and how it is read.

Every wrong value is a :class:`UserError` that shows the corrected line. Nothing heavier than PyYAML is imported here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_json
from dryfit.common.schema import problems
from dryfit.common.text import closest
from dryfit.scenario.description import ANY, MOST, described, switch
from dryfit.scenario.generation import Generation, Preference
from dryfit.scenario.model import found_beside
from dryfit.scenario.strategies import DIVIDED, NONE, SCHEDULES, STRATEGIES, Strategy, even_stages
from dryfit.scenario.value_fields import (
    DEFAULT_START,
    FAST_SVD,
    STARTS,
    AllocatorSettings,
    Experts,
    Lora,
    Quantization,
    Versions,
    ZeroFile,
)


@dataclass(frozen=True)
class Parallel:
    """How a step is spread over several GPUs."""

    strategy: str = described(
        "`ddp`: the whole model on each GPU. `fsdp2`, and the older `fsdp1`: weights, gradients and states"
        " sharded, each layer gathered while it runs. `zero1`, `zero2`, `zero3`: DeepSpeed's ZeRO, with the field"
        " `zero`; predicted, and not trained.",
        words=tuple(STRATEGIES),
        default=NONE,
        example=DIVIDED,
        closed_form=tuple(name for name, one in STRATEGIES.items() if one.in_closed_form),
    )
    gpus: int = described("How many GPUs.", least=1, default=1, example=2)
    reshard_after_forward: bool = switch(
        "FSDP gives gathered weights back after the forward pass; `false`: keeps them until backward, which"
        " saves a third of the communication.",
        default=True,
        closed_form=ANY,
    )
    reduce_in_fp32: bool = switch(
        "FSDP2 sums 16-bit gradients in fp32, as torchtitan and axolotl's recipes do: each layer's sum takes twice as"
        " much while it is exchanged. Predicted, and not trained.",
    )
    float8_all_gather: bool = switch(
        "With `float8: tensorwise`, FSDP2 casts weights before it gathers them: torchao's"
        " `enable_fsdp_float8_all_gather`. Predicted, and not trained.",
        example=True,
    )
    offload: str = described(
        "`cpu`: FSDP keeps sharded weights, gradients and states on the host.",
        words=("none", "cpu"),
        default="none",
    )
    tensor: int = described(
        "Among how many GPUs each layer's matrices are divided (tensor parallel), by transformers' plan for the"
        " architecture. They take the same rows.",
        least=1,
        default=1,
        example=2,
        closed_form=(1,),
    )
    sequence_parallel: bool = switch(
        "Beside `tensor`: norms and what goes from layer to layer are divided along the row, by torchtitan's plan for"
        " transformers' models. Predicted, and not trained.",
        example=True,
        on="sequence parallel",
    )
    loss_parallel: bool = switch(
        "Beside `tensor`: logits stay divided among its GPUs, and the loss is taken on the parts, by the same plan."
        " Predicted, and not trained.",
        example=True,
        on="loss parallel",
    )
    ulysses: int = described(
        "Beside ZeRO: among how many GPUs each row's tokens are divided, and the heads while attention runs (Ulysses,"
        " DeepSpeed's, which accelerate calls `sp_size`). Predicted, and not trained.",
        least=1,
        default=1,
        example=2,
        closed_form=(1,),
    )
    context: int = described(
        "Among how many GPUs each row's tokens are divided (context parallel): accelerate's and PyTorch's ring"
        " attention, with FSDP2 over these GPUs too.",
        least=1,
        default=1,
        example=2,
        closed_form=(1,),
    )
    pipeline: int = described(
        "Among how many GPUs the layers are divided (pipeline parallel); `gradient_accumulation` is the number of"
        " micro-batches.",
        least=1,
        default=1,
        example=2,
        closed_form=(1,),
    )
    expert: int = described(
        "Among how many GPUs the experts of a mixture are divided (expert parallel); tokens go to theirs and come"
        " back. They are some of the GPUs that share the rest of the model.",
        least=1,
        default=1,
        example=2,
        closed_form=(1,),
    )
    replicate: int = described(
        "How many groups of GPUs hold the whole sharded model each (HSDP).",
        least=1,
        default=1,
        example=2,
        closed_form=(1,),
    )
    schedule: str = described(
        "In which order a pipeline's stages take their micro-batches; with `interleaved` and `zero_bubble` each GPU has"
        " two stages.",
        words=tuple(SCHEDULES),
        default="1f1b",
        closed_form=ANY,
    )
    stage_layers: tuple[int, ...] | None = described(
        "How many layers each stage of a pipeline has, the first stage's first; `null`: as even as they go. The last"
        " stage has the logits too, so fewer layers there may save memory.",
        types=("array",),
        nullable=True,
        example=[17, 15],
        closed_form=ANY,
    )

    def __post_init__(self) -> None:
        if self.stage_layers is not None:
            object.__setattr__(self, "stage_layers", tuple(self.stage_layers))

    @property
    def written(self) -> dict[str, Any]:
        """The strategy, the number of GPUs, and what else is not the default."""
        return {
            one.name: value
            for one in fields(self)
            if (value := getattr(self, one.name)) != one.default or one.name in ("strategy", "gpus")
        }

    @property
    def mesh(self) -> int:
        """The product of what the mesh names: of tensor, context, Ulysses, pipeline and replicate."""
        return self.tensor * self.context * self.ulysses * self.pipeline * self.replicate

    @property
    def meshed(self) -> bool:
        """Whether a mesh divides the step beside, or instead of, the strategy."""
        return self.mesh > 1 or self.expert > 1

    @property
    def pipelined(self) -> bool:
        """Whether anything is said of a pipeline."""
        return (
            self.pipeline > 1 or self.schedule != Parallel.schedule or self.stage_layers is not None
        )

    @property
    def by_plan(self) -> bool:
        """Whether a plan for tensors or experts divides the model."""
        return self.tensor > 1 or self.expert > 1

    @property
    def by_titan(self) -> bool:
        """Whether the plan is torchtitan's, and its FSDP2 and mixed precision too; else it is transformers'."""
        return self.sequence_parallel or self.loss_parallel

    @property
    def shard(self) -> int:
        """Among how many GPUs FSDP alone shards: what the mesh leaves."""
        return self.gpus // self.mesh

    @property
    def rows_at_once(self) -> int:
        """How many micro-batches the GPUs take at once; those that divide a row or the layers take the same rows."""
        return self.gpus // (self.tensor * self.context * self.ulysses * self.pipeline)

    def rows_of(self, rank: int) -> int:
        """Which share of a step's rows a GPU takes, of :attr:`rows_at_once`, from 0.

        In the libraries' meshes GPUs of tensor and context are neighbours, and those of a pipeline are farthest apart.
        """
        return rank // (self.tensor * self.context * self.ulysses) % self.rows_at_once

    @property
    def averaged(self) -> int:
        """Over how many GPUs gradients of own tokens are averaged; with ``context`` over those that share a row too."""
        return self.gpus // (self.tensor * self.ulysses * self.pipeline)

    @property
    def parts_of_a_row(self) -> int:
        """Into how many parts of one length a row is cut: with ``context`` each GPU takes two, else 1."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all GPUs."""
        return self.pipeline * SCHEDULES[self.schedule]

    def layers_of_stages(self, layers: int) -> tuple[int, ...]:
        """How many of a model's layers each stage has."""
        return self.stage_layers or even_stages(layers, self.stages)

    @property
    def kind(self) -> Strategy:
        """What the strategy does with the model."""
        return STRATEGIES[self.strategy]

    @property
    def sharded(self) -> bool:
        """Whether FSDP, the one or the other, divides weights, gradients and optimizer states."""
        return self.kind.fsdp > 0

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        return self.kind.zero

    @property
    def divided(self) -> bool:
        """Whether FSDP or ZeRO divides anything among the GPUs."""
        return self.sharded or self.zero_stage > 0


# The fields with parts that are values of their own; a mapping of these parts makes one.
PARTS = {
    "allocator": AllocatorSettings,
    "experts": Experts,
    "generation": Generation,
    "parallel": Parallel,
    "preference": Preference,
    "quantization": Quantization,
    "versions": Versions,
    "zero": ZeroFile,
}


# --- how adapters are read from a file --------------------------------------------------------------------


def checked_lora(value: Mapping[str, Any], where: object) -> Lora:
    """Adapters in the short form, `lora`; its numbers are checked by the schema."""
    targets = value["target_modules"]
    if isinstance(targets, (list, tuple)):
        targets = tuple(targets)
        good = bool(targets) and all(isinstance(name, str) and name for name in targets)
    else:
        good = targets == "all-linear"
    if not good:
        listed = [targets] if isinstance(targets, str) and targets else ["q_proj", "v_proj"]
        raise UserError(
            "`lora.target_modules` must be the word all-linear or a list of module names.",
            where=where,
            found=value["target_modules"],
            allowed="all-linear, or a list such as [q_proj, v_proj]",
            change={"lora": {"target_modules": listed}},
        )
    wrong = [
        *_wrong_start(value["initialization"], where),
        *_wrong_modules(value["modules_to_save"], where),
        *_wrong_pattern("rank_pattern", value["rank_pattern"], where),
        *_wrong_pattern("alpha_pattern", value["alpha_pattern"], where),
    ]
    if wrong:
        raise UserError.several(wrong)
    modules = value["modules_to_save"]
    return Lora(
        rank=value["rank"],
        alpha=value["alpha"],
        dropout=value["dropout"],
        target_modules=targets,
        rslora=value["rslora"],
        dora=value["dora"],
        initialization=value["initialization"],
        modules_to_save=tuple(modules) if modules else None,
        rank_pattern=dict(value["rank_pattern"] or {}) or None,
        alpha_pattern=dict(value["alpha_pattern"] or {}) or None,
    )


# Starts of PEFT's that no scenario can say, and why.
_OTHER_STARTS = {
    "corda": "it needs the model's activations on rows of data",
    "eva": "it needs the model's activations on rows of data",
    "lora_ga": "it needs the gradients of rows of data",
    "loftq": "it quantizes the base by itself, in its own way",
    "true": "PEFT's own start is called `default` here",
    "false": "it is for debugging alone: the adapter would change the model before any step",
}


def _wrong_start(start: str, where: object) -> Iterator[UserError]:
    """The error of a start that PEFT does not have, or that takes more than a model and a rank."""
    if start in STARTS or FAST_SVD.match(start):
        return
    reason = _OTHER_STARTS.get(start.lower())
    near = closest(start, STARTS, cutoff=0.5) or DEFAULT_START
    yield UserError(
        f"`lora.initialization: {start}` can't be used: {reason}."
        if reason
        else f"There is no `lora.initialization: {start}`.",
        where=where,
        found=start,
        allowed=f"{', '.join(STARTS[:-1])}, or pissa_niter_ and a number of iterations",
        field="lora.initialization",
        change={"lora": {"initialization": DEFAULT_START if reason else near}},
    )


def _wrong_modules(modules: Any, where: object) -> Iterator[UserError]:
    if modules and not all(isinstance(name, str) and name for name in modules):
        yield UserError(
            "`lora.modules_to_save` must be a list of module names.",
            where=where,
            found=modules,
            allowed="names such as lm_head and embed_tokens; or null",
            field="lora.modules_to_save",
            change={"lora": {"modules_to_save": ["lm_head"]}},
        )


def _wrong_pattern(field: str, patterns: Any, where: object) -> Iterator[UserError]:
    """The errors of ranks or alphas by the end of a layer's path."""
    for pattern, number in (patterns or {}).items():
        whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if not whole:
            problem = f"`lora.{field}` gives {pattern!r} no whole number."
        elif not is_regular_expression(pattern):
            problem = f"`lora.{field}` has {pattern!r}, which is no regular expression."
        else:
            continue
        yield UserError(
            problem,
            where=where,
            found={pattern: number},
            allowed="the end of a layer's path, a regular expression, and a number from 1 on",
            field=f"lora.{field}",
            change={"lora": {field: {"q_proj": 8}}},
        )


def is_regular_expression(text: Any) -> bool:
    """Whether Python's ``re`` can read a text."""
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


def checked_adapter(value: Any, given: Mapping[str, Any], where: object) -> dict[str, Any] | None:
    """A PEFT configuration as a mapping; what its fields mean only PEFT knows (:mod:`dryfit.step.adapters`)."""
    if value is None:
        return None
    example = {"adapter": {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}}
    if "lora" in given:
        raise UserError(
            "`lora` and `adapter` both say what the adapters are.",
            where=where,
            found={"adapter": value, "lora": given["lora"]},
            allowed="one of them: `lora` is the short form of an `adapter` with peft_type LORA",
            change=example,
        )
    if isinstance(value, str):
        path = found_beside(value, where)
        if path is None:
            raise UserError(
                "`adapter` is not a path to a file.",
                where=where,
                found=value,
                allowed="an adapter_config.json, its folder, or the configuration as a mapping",
                change=example,
            )
        path = path / "adapter_config.json" if path.is_dir() else path
        value = read_json(path)
    if not isinstance(value, Mapping) or not isinstance(value.get("peft_type"), str):
        raise UserError(
            "`adapter` needs a `peft_type`: it says which of PEFT's methods the other fields belong to.",
            where=where,
            found=value,
            allowed="a PEFT configuration as adapter_config.json writes it",
            change=example,
        )
    return json.loads(json.dumps(dict(value), default=str))


# Several of a kind as people write it: "8 x h100", "h100 x8".
_SEVERAL = re.compile(
    r"^\s*(?:(?P<before>\d{1,3})\s*[x×*]\s*(?P<rest>.+?)|(?P<name>.+?)\s*[x×*]\s*(?P<after>\d{1,3}))\s*$",
    re.I,
)


def counted(text: str) -> tuple[str, int | None]:
    """A GPU's name without the number of GPUs in front of it or behind, and that number; None: the text says none."""
    match = _SEVERAL.match(text)
    if not match:
        return text, None
    return match["rest"] or match["name"], int(match["before"] or match["after"])


def gpu_count(value: Any) -> int:
    """How many GPUs a scenario's ``gpu`` means, as text or as a mapping; 1 where it does not say."""
    if isinstance(value, str):
        return counted(value)[1] or 1
    count = (
        (value.get("count") or gpu_count(value.get("name"))) if isinstance(value, Mapping) else 1
    )
    return count if isinstance(count, int) else 1


_GPU = {
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "examples": ["rtx-3090"]},
        "vram_gib": {"type": "number", "exclusiveMinimum": 0, "examples": [24]},
        "count": {"type": "integer", "minimum": 1, "maximum": MOST, "examples": [2]},
        "context_mib": {"type": "number", "minimum": 0, "examples": [530]},
    },
}


def checked_gpu(value: Any, where: object) -> str | dict[str, Any] | None:
    """A GPU, or several of a kind, as a scenario says it.

    Returns
    -------
    str, dict or None
        A name (looked up in config/gpus.yaml by who needs the GPU), ``{vram_gib: number}`` or ``{name: text}``; with
        ``count`` where there are several, and ``context_mib``, what your card holds beside the allocator.

    Raises
    ------
    UserError
        With the line to write.
    """
    if value is None:
        return value
    if isinstance(value, str) and value:
        return _counted_gpu({"name": value}, where)
    if isinstance(value, int) and not isinstance(value, bool) and 1000 <= value < 10_000:
        return str(value)  # a GPU's number, `gpu: 4090`, which YAML reads as one
    if isinstance(value, Mapping) and ("name" in value) != ("vram_gib" in value):
        if wrong := problems(value, _GPU, where, within="gpu"):
            raise UserError.several(wrong)
        size = {"vram_gib": float(value["vram_gib"])} if "vram_gib" in value else {}
        return _counted_gpu({**value, **size}, where)
    gib = (
        value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        else 24
    )
    raise UserError(
        "`gpu` must be a name or a size.",
        where=where,
        found=value,
        allowed="a name in config/gpus.yaml, {vram_gib: number}, {name: rtx-3090, count: 2} for several, or null",
        change={"gpu": {"vram_gib": gib if gib < 1000 else 24}},
    )


def _counted_gpu(gpu: dict[str, Any], where: object) -> str | dict[str, Any]:
    """A checked GPU whose count, where its name says one, stands beside the name."""
    name, count = counted(gpu.get("name", ""))
    if count is not None:
        if count < 1 or gpu.get("count", count) != count:
            raise UserError(
                "`gpu` says two numbers of GPUs." if count else "There is no such number of GPUs.",
                where=where,
                found=gpu if "count" in gpu else gpu["name"],
                allowed="one number, of at least 1",
                change={"gpu": f"{gpu.get('count') or 2}x{name}"},
            )
        gpu = {**gpu, "name": name} | ({"count": count} if count > 1 else {})
    return gpu["name"] if list(gpu) == ["name"] else gpu
