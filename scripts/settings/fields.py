"""The fields of a scenario: what each says, what it allows, what to write. The one table.

Checks and their messages (:mod:`scripts.settings.scenario`), the schema of the configuration and its reference
(:mod:`scripts.settings.configuration`) derive from it; the defaults stand in ``scenario_defaults`` of
config/config.yaml. Standard library only.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scripts.common.errors import UserError

PRECISIONS = ("fp32", "fp16", "bf16")
MOST = 2**24  # of any count: beyond the longest context there is, and sizes of tensors still fit 64 bits


@dataclass(frozen=True)
class Field:
    """One field of a scenario, or one part of a field that is a mapping.

    Attributes
    ----------
    name, about
        ``about`` is Markdown for the reference.
    words
        The values that are allowed, if they can be listed; true, false and null may be among them.
    least
        The smallest whole number that is allowed.
    below
        The field is a number from 0 to below this.
    parts
        The fields of a mapping.
    types
        What else it may be, as JSON Schema names types.
    example
        What to write.
    nullable
        Whether it may be null.
    excluded
        Methods that have no place for the field, each with the reason and what to write instead.
    """

    name: str
    about: str
    words: tuple[Any, ...] = ()
    least: int | None = None
    below: float | None = None
    parts: tuple[Field, ...] = ()
    types: tuple[str, ...] = ()
    example: Any = None
    nullable: bool = False
    excluded: Mapping[str, tuple[str, str]] | None = None

    @property
    def is_boolean(self) -> bool:
        return self.words == (True, False)

    def schema(self) -> dict[str, Any]:
        """The field as JSON Schema."""
        schema: dict[str, Any] = {"description": self.about}
        null = ["null"] if self.nullable else []
        if self.is_boolean:
            schema |= {"type": "boolean"}
        elif self.words:
            schema |= {"enum": [*self.words, *([None] if self.nullable else [])]}
        elif self.least is not None:
            schema |= {"type": ["integer", *null] if null else "integer", "minimum": self.least, "maximum": MOST}
        elif self.below is not None:
            schema |= {"type": "number", "minimum": 0, "exclusiveMaximum": self.below}
        elif self.parts:
            schema |= {
                "type": ["object", *null] if null else "object",
                "additionalProperties": False,
                "properties": {part.name: part.schema() for part in self.parts},
            }
        else:
            schema |= {"type": [*self.types, *null]}
        return schema | {"examples": [self.example]}


_NO_ADAPTERS = {"full": ("method full trains every weight and has no adapters", "method: lora")}
FIELDS = (
    Field("model", "The model: a name in `config/models/`, its id on the Hub (`Qwen/Qwen3-8B`, `owner/name@revision`:"
          " its `config.json` alone is fetched), a path to a `config.json`, or the configuration itself.",
          types=("string", "object"), example="qwen2.5-coder-7b"),
    Field("model_name", "What to call the model; its file's name when left out.",
          types=("string",), nullable=True, example="Qwen2.5-Coder-7B"),
    Field("method", "`full` trains every weight; `lora`: adapters on a dense base; `qlora`: on a 4-bit base.",
          words=("full", "lora", "qlora"), example="qlora"),
    Field("precision", "The dtype of the weights that are not quantized. `*-mixed`: fp32 weights under autocast.",
          words=(*PRECISIONS, "fp16-mixed", "bf16-mixed"), example="bf16"),
    Field("autocast", "Autocast over weights of any dtype, as a trainer's `--bf16` does over a 16-bit or 4-bit base.",
          words=("fp16", "bf16"), nullable=True, example="bf16"),
    Field("quantization", "How a `qlora` base is quantized; ignored for other methods.", nullable=True,
          example={"type": "nf4", "double": True},
          parts=(
              Field("type", "The 4-bit data type.", words=("nf4", "fp4"), example="nf4"),
              Field("double", "Quantize the scales too: 0.373 bits a weight less.", words=(True, False), example=True),
              Field("storage", "The dtype that packed weights are stored as; `bf16` lets FSDP shard them.",
                    words=("uint8", *PRECISIONS), example="uint8"),
              Field("compute", "The dtype that 4-bit layers compute in; `null`: the weights' own.",
                    words=PRECISIONS, nullable=True, example="bf16"),
          ),
          excluded={
              "full": ("method full trains every weight, and 4-bit weights can't be trained", "method: qlora"),
              "lora": ("method lora keeps the base in the precision; a quantized base is method qlora",
                       "method: qlora"),
          }),
    Field("kbit_preparation",
          "`peft` turns embeddings, head and norms to fp32 as `prepare_model_for_kbit_training` does (on"
          " Qwen2.5-Coder-7B 2.2 GB more); `trl` keeps norms and biases in fp32 and brings embeddings and head back to"
          " 16 bits; `none` leaves them.",
          words=("none", "peft", "trl"), example="none",
          excluded={"full": ("PEFT's k-bit preparation freezes the base, which method full trains",
                             "kbit_preparation: none")}),
    Field("lora", "Low-rank adapters, the short form.", nullable=True,
          example={"rank": 16, "target_modules": "all-linear"},
          parts=(
              Field("rank", "The rank of both factors.", least=1, example=16),
              Field("alpha", "The update is scaled by alpha / rank.", least=1, example=32),
              Field("dropout", "Dropout on the adapter's input while training.", below=1.0, example=0.0),
              Field("target_modules", "`all-linear`, or the names of the layers that get an adapter.",
                    types=("string", "array"), example="all-linear"),
          ),
          excluded=_NO_ADAPTERS),
    Field("adapter",
          "Instead of `lora`, any PEFT configuration as `adapter_config.json` writes it: a mapping, or the path of such"
          " a file.",
          types=("string", "object"), nullable=True, example={"peft_type": "LORA", "r": 16, "use_dora": True},
          excluded=_NO_ADAPTERS),
    Field("adapter_precision",
          "The dtype of the adapter's weights, gradients and optimizer states. `fp32` and `base` (the base's own) are"
          " what PEFT does with `autocast_adapter_dtype` on and off.",
          words=("fp32", "base", "fp16", "bf16"), example="fp32"),
    Field("sequence_length", "Tokens of a row of the batch.", least=1, example=512),
    Field("micro_batch",
          "Rows that go through the model at once. This, times the sequence length, decides the activations' memory.",
          least=1, example=1),
    Field("gradient_accumulation",
          "Micro-batches per optimizer step. The effective batch is micro_batch x gradient_accumulation; the memory is"
          " a micro-batch's.", least=1, example=1),
    Field("attention_mask",
          "`padding`: the batch carries a mask, as padded batches do; then fused attention needs more memory.",
          words=("none", "padding"), example="none"),
    Field("packing",
          "`rows`: several rows in one sequence, each computed as if alone. `shared_prefix`: what all rows begin with"
          " is computed once. Both are tested on the model before the first step, and refused where they are not"
          " exact.", words=("none", "rows", "shared_prefix"), example="none"),
    Field("previous_sequence_length",
          "Tokens of the batch before, where a manual loop's outputs stay alive until its next forward pass has ended;"
          " `null`: they go when the step ends.", least=1, nullable=True, example=512),
    Field("use_cache", "Keys and values are kept in the forward pass of training.", words=(True, False),
          example=False),
    Field("gradient_checkpointing",
          "Recompute activations in the backward pass: far less memory, about a third more time. `reentrant`: the older"
          " way of `torch.utils.checkpoint`.", words=(True, False, "reentrant"), example=True),
    Field("attention", "`eager` keeps the scores of every head; the others do not. `flash` needs Ampere or newer.",
          words=("eager", "sdpa", "mem_efficient", "flash"), example="sdpa"),
    Field("optimizer", "8-bit states take a quarter of the memory; paged ones move to the CPU under pressure.",
          words=("adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit"), example="adamw"),
    Field("loss",
          "`chunked` computes the logits a few tokens at a time: for large vocabularies the largest saving of all."
          " `liger`: the fused loss of the package liger-kernel.",
          words=("full", "chunked", "liger"), example="full"),
    Field("loop",
          "`trainer` drops the model's outputs before the backward pass; `manual` keeps them, as simple hand-written"
          " loops do.", words=("trainer", "manual"), example="trainer"),
    Field("allocator", "Settings of PyTorch's caching allocator.", example={"expandable_segments": False},
          parts=(
              Field("expandable_segments", "`PYTORCH_ALLOC_CONF=expandable_segments:True`: less memory left unused.",
                    words=(True, False), example=False),
          )),
    Field("parallel", "How a step is spread over several GPUs; figures are then those of each.",
          example={"strategy": "fsdp2", "gpus": 2},
          parts=(
              Field("strategy",
                    "`ddp`: the whole model on each GPU. `fsdp2`, and the older `fsdp1`: weights, gradients and states"
                    " divided, each layer gathered while it runs. `zero2`, `zero3`: DeepSpeed's ZeRO, predicted"
                    " where `requirements-deepspeed.txt` is installed, and not trained.",
                    words=("none", "ddp", "fsdp1", "fsdp2", "zero2", "zero3"), example="fsdp2"),
              Field("gpus", "How many GPUs.", least=1, example=2),
              Field("reshard_after_forward",
                    "FSDP gives gathered weights back after the forward pass; `false`: keeps them until backward, which"
                    " saves a third of the communication.", words=(True, False), example=True),
              Field("offload", "`cpu`: FSDP keeps divided weights, gradients and states on the host.",
                    words=("none", "cpu"), example="none"),
          )),
    Field("gpu", "The GPU: a name as people write it (`4090`, `A100 80GB`, `24GiB`; `config/gpus.yaml` lists them),"
          " `{vram_gib: 24}`, or null. Several of a kind: `2x3090`, or `{name: rtx-3090, count: 2}`.",
          types=("string", "object"), nullable=True, example="rtx-4090"),
)  # fmt: skip
BY_NAME = {field.name: field for field in FIELDS}


def schema() -> dict[str, dict[str, Any]]:
    """All fields as properties of a JSON Schema, by name."""
    return {field.name: field.schema() for field in FIELDS}


def check(field: Field, values: Mapping[str, Any], where: object, prefix: str = "") -> Any:
    """Check one value of a mapping, and return it.

    Raises
    ------
    UserError
        With the line to write.
    """
    value = values.get(field.name)
    if field.nullable and value is None:
        return None
    if field.words:
        return (_boolean if field.is_boolean else _word)(field, value, where, prefix)
    if field.least is not None:
        return whole(field.name, value, where, example=field.example, least=field.least, most=MOST, prefix=prefix)
    if field.below is not None:
        return _number_below(field, value, where, prefix)
    return value


def check_parts(field: Field, value: Any, defaults: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Check a field that is a mapping; parts that are left out come from the defaults."""
    names = [part.name for part in field.parts]
    if not isinstance(value, Mapping):
        raise UserError(
            f"`{field.name}` is a mapping.",
            where=where,
            found=value,
            allowed=", ".join(names),
            write=f"{field.name}: {yaml_text(field.example)}",
        )
    check_keys(value, names, where, f"{field.name}.")
    value = {**defaults, **value}
    return {part.name: check(part, value, where, f"{field.name}.") for part in field.parts}


# What other tools call a field of ours: transformers, TRL, axolotl, LLaMA-Factory.
ELSEWHERE = {
    **dict.fromkeys(("model_name_or_path", "base_model", "pretrained_model_name_or_path", "model_id"), "model"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size", "batch_size"), "micro_batch"
    ),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), "gradient_accumulation"),
    **dict.fromkeys(
        ("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "seq_len", "max_length", "model_max_length"),
        "sequence_length",
    ),
    **dict.fromkeys(("finetuning_type", "adapter_type", "peft_method"), "method"),
    **dict.fromkeys(("optim", "optimizer_type"), "optimizer"),
    **dict.fromkeys(("attn_implementation", "flash_attn"), "attention"),
    **dict.fromkeys(("gpus", "hardware", "device"), "gpu"),
    **dict.fromkeys(
        ("lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "lora_target_modules"), "lora"
    ),
}


def _written(name: str, key: str, value: Any) -> str:
    """The line with a field of ours for a key of others."""
    if name == "lora" and key.startswith("lora_"):
        part = {"r": "rank", "target": "target_modules"}.get(key.removeprefix("lora_"), key.removeprefix("lora_"))
        return f"lora: {{{part}: {yaml_text(value)}}}"
    return f"{name}: {yaml_text(value)}"


def check_keys(mapping: Mapping[str, Any], known: Iterable[str], where: object, prefix: str = "") -> None:
    """Refuse a key that is not known, with the nearest known one."""
    known = list(known)
    for key in mapping:
        if key not in known:
            named = [ELSEWHERE[key]] if not prefix and ELSEWHERE.get(key) in known else []
            near = named or difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            raise UserError(
                f"Unknown field `{prefix}{key}`" + (f"; did you mean `{prefix}{near[0]}`?" if near else "."),
                where=where,
                found=key,
                allowed=", ".join(sorted(known)),
                write=nested(prefix, _written(near[0], str(key), mapping[key])) if near else None,
            )


def whole(
    name: str,
    value: Any,
    where: object,
    *,
    example: int,
    least: int = 1,
    most: int = MOST,
    prefix: str = "",
    beside: str = "",
) -> int:
    """A value that is a whole number within bounds; ``beside``: what else to write in its mapping."""
    line = f"{beside}, {name}" if beside else name
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    if isinstance(value, int) and value > most:
        raise UserError(
            f"`{prefix}{name}` is larger than anything that exists.",
            where=where,
            found=value,
            allowed=f"{least} to {most}",
            write=nested(prefix, f"{line}: {example}"),
        )
    problem = f"`{prefix}{name}` must be a whole number of at least {least}."
    if isinstance(value, float) and math.isfinite(value) and value >= least and value == int(value):
        example = int(value)
    elif (parsed := number(value)) is not None:
        problem = f"`{prefix}{name}` is text, not a number{exponent_hint(value)}."
        example = int(parsed) if parsed >= least and parsed == int(parsed) else example
    allowed = ", ".join(str(least + step) for step in range(3)) + ", ..."
    raise UserError(problem, where=where, found=value, allowed=allowed, write=nested(prefix, f"{line}: {example}"))


# What a training aims at, which `method` does not say: that is which weights are trained.
OBJECTIVES = (
    "sft",
    "dpo",
    "ipo",
    "simpo",
    "orpo",
    "kto",
    "cpo",
    "grpo",
    "rloo",
    "ppo",
    "reward",
    "rm",
    "pt",
    "pretraining",
)


def _refuse_objective(value: Any, where: object) -> None:
    """``method: dpo`` and the like: an objective is no method."""
    supervised = str(value).lower() in ("sft", "pt", "pretraining")
    more = "" if supervised else ", and what this one takes beside it (pairs, a reference model, generations) is not"
    raise UserError(
        f"`{value}` is what a training aims at; `method` says which weights it trains. The step of supervised"
        f" fine-tuning is known{more}.",
        where=where,
        found=f"method: {value}",
        allowed="full, lora, qlora",
        write="method: lora" + ("" if supervised else "    # the step of supervised fine-tuning, which takes less"),
    )


def _word(field: Field, value: Any, where: object, prefix: str) -> Any:
    if field.name == "method" and str(value).lower() in OBJECTIVES:
        _refuse_objective(value, where)
    if any(value is word or (isinstance(word, str) and value == word) for word in field.words):
        return value
    texts = [yaml_text(word) for word in field.words]
    written = str(value).lower().replace("bfloat", "bf").replace("float", "fp")
    booleans = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
    written = booleans.get(written, written) if "true" in texts else written
    near = difflib.get_close_matches(written, texts, n=1, cutoff=0.4)
    name = f"`{prefix}{field.name}`"
    raise UserError(
        f"{name} is not one of the allowed words." if value is not None else f"{name} has no value.",
        where=where,
        found=value,
        allowed=", ".join([*texts, *(["null"] if field.nullable else [])]),
        write=nested(prefix, f"{field.name}: {near[0] if near else yaml_text(field.example)}"),
    )


def _boolean(field: Field, value: Any, where: object, prefix: str) -> bool:
    if isinstance(value, bool):
        return value
    example = "false" if str(value).lower() in ("no", "off", "0", "none", "false") else "true"
    raise UserError(
        f"`{prefix}{field.name}` must be true or false.",
        where=where,
        found=value,
        allowed="true, false",
        write=nested(prefix, f"{field.name}: {example}"),
    )


def _number_below(field: Field, value: Any, where: object, prefix: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < field.below:
        return float(value)
    parsed, name = number(value), f"`{prefix}{field.name}`"
    good = parsed is not None and 0 <= parsed < field.below
    raise UserError(
        f"{name} must be a number from 0 to below {field.below:g}."
        if parsed is None
        else f"{name} is text, not a number{exponent_hint(value)}.",
        where=where,
        found=value,
        allowed=f"0.0 to below {field.below}",
        write=nested(prefix, f"{field.name}: {parsed if good else field.example}"),
    )


def number(value: Any) -> float | None:
    """The number that a text spells, if it does."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value):
        return float(value)
    return None


def exponent_hint(value: Any) -> str:
    """Why YAML read a number as text: 2e-4 has no decimal point (YAML 1.1)."""
    if re.fullmatch(r"\s*[-+]?\d+[eE][-+]?\d+\s*", value):
        return ": YAML reads an exponent without a decimal point as text"
    return " (it stands in quotes)"


def yaml_text(value: Any) -> str:
    """A value as it would stand in a YAML file, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def nested(prefix: str, line: str) -> str:
    """A line as it stands inside its field."""
    return f"{prefix.rstrip('.')}: {{{line}}}" if prefix else line
