"""The fields of a scenario: what each says, what it allows, its default, what to write. The one table.

Checks and their messages (:mod:`will_it_fit.scenario.scenario`), the schema of a configuration and its reference
derive from it, and so does the line of an answer that says what it is about. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from will_it_fit.common.errors import yaml_text
from will_it_fit.scenario.objectives import OBJECTIVES, REFERENCES, SUPERVISED
from will_it_fit.scenario.optimizers import OPTIMIZERS
from will_it_fit.scenario.strategies import DIVIDED, NONE, STRATEGIES

PRECISIONS = ("fp32", "fp16", "bf16")
MOST = 2**24  # of any count: beyond the longest context there is, and sizes of tensors still fit 64 bits


Said = str | Mapping[Any, str] | Callable[[Any, Mapping[str, Any]], str] | None


class Excluded(NamedTuple):
    """Why a method has no place for a field, and what to write instead."""

    reason: str
    write: str


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
    default
        The value where nothing is written. A mapping's stand with its parts.
    nullable
        Whether it may be null.
    excluded
        Methods that have no place for the field.
    said
        What an answer's line `for:` says of a value: a text with ``{}`` in its place, a text for each value, or a
        function of the value and the scenario. None: the name and the value, but for null, false and `none`.
    """

    name: str
    about: str
    words: tuple[Any, ...] = ()
    least: int | None = None
    below: float | None = None
    parts: tuple[Field, ...] = ()
    types: tuple[str, ...] = ()
    example: Any = None
    default: Any = None
    nullable: bool = False
    excluded: Mapping[str, Excluded] | None = None
    said: Said = None

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


_QUIET = (None, False, "none")  # what is off goes without saying
# Adapters' settings that take neither memory nor time.
_IDLE = {"peft_type", "lora_alpha", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision",
         "peft_version", "task_type"}  # fmt: skip


def _name(name: Any, scenario: Mapping[str, Any]) -> str:
    model = scenario["model"]
    layers = (
        model.get("num_hidden_layers")
        or model.get("n_layer")
        or (model.get("text_config") or {}).get("num_hidden_layers")
    )
    return " ".join(str(name).split()) if name else f"{model.get('model_type')} of {layers} layers"


def _method(method: str, scenario: Mapping[str, Any]) -> str:
    """The method with its adapters: their kind, rank and layers."""
    lora, adapter, quantization = scenario["lora"], scenario["adapter"], scenario["quantization"] or {}
    if method == "full":
        return "full fine-tuning"
    kind = str((adapter or {}).get("peft_type") or "LORA").upper()
    if kind != "LORA":
        return f"{kind} on a quantized base" if method == "qlora" else kind
    shown = "QLoRA" if method == "qlora" and quantization.get("type") != "int8" else "LoRA"
    if not lora:
        return shown
    targets = lora["target_modules"]
    on = "all linear layers" if targets == "all-linear" else ", ".join(targets)
    return f"{shown} of rank {lora['rank']} on {on}" + (f", dropout {lora['dropout']:g}" if lora["dropout"] else "")


def _quantization(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    if not value:
        return ""
    words = ["on a base of LLM.int8" if value["type"] == "int8" else value["type"]]
    words[0] += " double-quantized" if value.get("double") else ""
    words += [f"stored as {value['storage']}"] if value.get("storage", "uint8") != "uint8" else []
    return ", ".join([*words, *([f"computing in {value['compute']}"] if value.get("compute") else [])])


def _adapter(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    """A PEFT configuration by its keys."""
    kept = {
        key: item for key, item in (value or {}).items() if key not in _IDLE and item not in (None, False, "", [], {})
    }
    return ", ".join(f"{key} {yaml_text(item)}" for key, item in sorted(kept.items()))


def _images(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    if not value or not value.get("height"):
        return ""
    trained = "the vision tower trained too" if value["trained"] == "all" else "the vision tower frozen"
    many = "s" if (value["count"] or 1) > 1 else ""
    return f"{value['count'] or 1} image{many} of {value['height']} x {value['width']} in a row, {trained}"


def _parallel(value: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    if value["gpus"] < 2:
        return ""
    kept = "" if value.get("reshard_after_forward", True) else ", gathered weights kept until backward"
    offload = ", offloaded to the CPU" if value.get("offload", "none") != "none" else ""
    return f"{value['strategy']} on {value['gpus']} GPUs{kept}{offload}"


def _precision(value: str, scenario: Mapping[str, Any]) -> str:
    if value.endswith("-mixed"):
        return value
    return f"{value} under {scenario['autocast']} autocast" if scenario["autocast"] else f"{value} without autocast"


def _of_adapters(words: Mapping[str, str]) -> Callable[[Any, Mapping[str, Any]], str]:
    """What is said of a value where there are adapters."""
    return lambda value, scenario: "" if scenario["method"] == "full" else words[value]


_PREPARED = {"none": "no k-bit preparation", "peft": "PEFT's k-bit preparation", "trl": "TRL's k-bit preparation"}
_ADAPTERS_IN = {
    "fp32": "",
    "base": "adapters in the base's dtype",
    "fp16": "adapters in fp16",
    "bf16": "adapters in bf16",
}
_CHECKPOINTING = {True: "checkpointing", False: "no checkpointing", "reentrant": "reentrant checkpointing"}
_PACKED = {"none": "", "rows": "packed rows", "shared_prefix": "packed rows with a shared prefix"}


def _generations(value: int, scenario: Mapping[str, Any]) -> str:
    return f"{value} answers to a prompt" if scenario["objective"] == "grpo" else ""


def _accumulated(value: int, _: Mapping[str, Any]) -> str:
    return f"{value} micro-batches a step" if value > 1 else ""


def _tokens(value: int, scenario: Mapping[str, Any]) -> str:
    return f"{scenario['micro_batch']} x {value:,} tokens"


_SAID_BY_OTHERS = ""  # a field that another one's words tell with theirs
_NO_ADAPTERS = {"full": Excluded("method full trains every weight and has no adapters", "method: lora")}
FIELDS = (
    Field("model", "The model: a name in `config/models/`, its id on the Hub (`Qwen/Qwen3-8B`, `owner/name@revision`:"
          " its `config.json` alone is fetched), a path to a `config.json`, or the configuration itself.",
          types=("string", "object"), example="qwen2.5-coder-7b"),
    Field("model_name", "What to call the model; its file's name when left out.",
          types=("string",), nullable=True, example="Qwen2.5-Coder-7B", said=_name),
    Field("method", "`full` trains every weight; `lora`: adapters on a dense base; `qlora`: on a 4-bit or 8-bit base.",
          words=("full", "lora", "qlora"), default="qlora", example="qlora", said=_method),
    Field("objective",
          "What the training aims at. `sft`: the next token. The others are steps of TRL's trainers, predicted where"
          " `requirements-trl.txt` is installed, and not trained: `dpo`, `orpo` and `reward` take pairs of rows"
          " (`micro_batch` counts pairs), `kto` single rows, `grpo` generated ones (without their generation).",
          words=tuple(OBJECTIVES), default=SUPERVISED, example="dpo",
          said=lambda value, _: "" if value == "sft" else value.upper()),
    Field("preference", "What an objective takes beside its rows.", example={"reference": "adapter_off"},
          parts=(
              Field("reference",
                    "What answers are compared with: the model with its adapters off, a second model, or numbers that"
                    " were computed before. `null`: as TRL decides; for `grpo` nothing.",
                    words=REFERENCES, nullable=True, example="adapter_off",
                    said="reference {}"),
              Field("generations", "`grpo`: answers to a prompt.", least=2, default=8, example=8, said=_generations),
              Field("completion_length", "Tokens of a row that are the answer; `null`: half of them.", least=1,
                    nullable=True, example=256, said="{} tokens of answer"),
          )),
    Field("precision", "The dtype of the weights that are not quantized. `*-mixed`: fp32 weights under autocast.",
          words=(*PRECISIONS, "fp16-mixed", "bf16-mixed"), default="bf16", example="bf16", said=_precision),
    Field("autocast", "Autocast over weights of any dtype, as a trainer's `--bf16` does over a 16-bit or 4-bit base.",
          words=("fp16", "bf16"), nullable=True, example="bf16", said=_SAID_BY_OTHERS),
    Field("quantization", "How a `qlora` base is quantized; ignored for other methods.", nullable=True,
          example={"type": "nf4", "double": True},
          parts=(
              Field("type", "The 4-bit data type; `int8`: 8 bits, as LLM.int8 packs them (`load_in_8bit`).",
                    words=("nf4", "fp4", "int8"), default="nf4", example="nf4"),
              Field("double", "Quantize the scales of 4-bit weights too: 0.373 bits a weight less.",
                    words=(True, False), default=True, example=True),
              Field("storage", "The dtype that packed weights are stored as; `bf16` lets FSDP shard them.",
                    words=("uint8", *PRECISIONS), default="uint8", example="uint8"),
              Field("compute", "The dtype that 4-bit layers compute in; `null`: the weights' own.",
                    words=PRECISIONS, nullable=True, example="bf16"),
          ),
          excluded={
              "full": Excluded("method full trains every weight, and 4-bit weights can't be trained", "method: qlora"),
              "lora": Excluded("method lora keeps the base in the precision; a quantized base is method qlora",
                       "method: qlora"),
          }, said=_quantization),
    Field("kbit_preparation",
          "`peft` turns embeddings, head and norms to fp32 as `prepare_model_for_kbit_training` does (on"
          " Qwen2.5-Coder-7B 2.03 GiB more); `trl` keeps norms and biases in fp32 and brings embeddings and head back"
          " to 16 bits; `none` leaves them.",
          words=("none", "peft", "trl"), default="none", example="none",
          excluded={"full": Excluded("PEFT's k-bit preparation freezes the base, which method full trains",
                             "kbit_preparation: none")}, said=_of_adapters(_PREPARED)),
    Field("lora", "Low-rank adapters, the short form.", nullable=True,
          example={"rank": 16, "target_modules": "all-linear"},
          parts=(
              Field("rank", "The rank of both factors.", least=1, default=16, example=16),
              Field("alpha", "The update is scaled by alpha / rank.", least=1, default=32, example=32),
              Field("dropout", "Dropout on the adapter's input while training.", below=1.0, default=0.0, example=0.0),
              Field("target_modules", "`all-linear`, or the names of the layers that get an adapter.",
                    types=("string", "array"), default="all-linear", example="all-linear"),
          ),
          excluded=_NO_ADAPTERS, said=_SAID_BY_OTHERS),
    Field("adapter",
          "Instead of `lora`, any PEFT configuration as `adapter_config.json` writes it: a mapping, or the path of such"
          " a file.",
          types=("string", "object"), nullable=True, example={"peft_type": "LORA", "r": 16, "use_dora": True},
          excluded=_NO_ADAPTERS, said=_adapter),
    Field("adapter_precision",
          "The dtype of the adapter's weights, gradients and optimizer states. `fp32` and `base` (the base's own) are"
          " what PEFT does with `autocast_adapter_dtype` on and off.",
          words=("fp32", "base", "fp16", "bf16"), default="fp32", example="fp32", said=_of_adapters(_ADAPTERS_IN)),
    Field("sequence_length", "Tokens of a row of the batch.", least=1, default=512, example=512, said=_tokens),
    Field("images",
          "Images in each row of a vision-language model, whose configuration is then taken with its vision tower"
          " (`gemma3`, `llava`, `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`): predicted, and not trained. Their tokens are"
          " part of `sequence_length`. `null`: rows of text, and the language model alone.", nullable=True,
          example={"count": 1, "height": 896, "width": 896, "trained": "language"},
          parts=(
              Field("count", "Images of a row; `null`: one.", least=1, nullable=True, example=1),
              Field("height", "Pixels, as the model's processor hands them on; `null`: no images.", least=1,
                    nullable=True, example=896),
              Field("width", "Pixels, likewise.", least=1, nullable=True, example=896),
              Field("trained", "`language`: the vision tower and the projector are frozen and get no adapters. `all`:"
                    " the method's weights or adapters everywhere.", words=("language", "all"), default="language",
                    example="language"),
          ), said=_images),
    Field("micro_batch",
          "Rows that go through the model at once. This, times the sequence length, decides the activations' memory.",
          least=1, default=1, example=1, said=_SAID_BY_OTHERS),
    Field("gradient_accumulation",
          "Micro-batches per optimizer step. The effective batch is micro_batch x gradient_accumulation; the memory is"
          " a micro-batch's.", least=1, default=1, example=1, said=_accumulated),
    Field("attention_mask",
          "`padding`: the batch carries a mask, as padded batches do; then fused attention needs more memory.",
          words=("none", "padding"), default="none", example="none", said={"none": "", "padding": "padded"}),
    Field("packing",
          "`rows`: several rows in one sequence, each computed as if alone. `shared_prefix`: what all rows begin with"
          " is computed once. Both are tested on the model before the first step, and refused where they are not"
          " exact.", words=("none", "rows", "shared_prefix"), default="none", example="none", said=_PACKED),
    Field("previous_sequence_length",
          "Tokens of the batch before, where a manual loop's outputs stay alive until its next forward pass has ended"
          " (`keeps_outputs`) and it was of another length; `null`: of the same.", least=1, nullable=True, example=512,
          said="{:,} tokens in the batch before"),
    Field("use_cache", "Keys and values are kept in the forward pass of training.", words=(True, False),
          default=False, example=False, said={True: "keys and values kept", False: ""}),
    Field("gradient_checkpointing",
          "Recompute activations in the backward pass: far less memory, about a third more time. `reentrant`: the older"
          " way of `torch.utils.checkpoint`.", words=(True, False, "reentrant"), default=True, example=True,
          said=_CHECKPOINTING),
    Field("attention", "`eager` keeps the scores of every head; the others do not. `flash` needs Ampere or newer.",
          words=("eager", "sdpa", "mem_efficient", "flash"), default="sdpa", example="sdpa", said="{} attention"),
    Field("activation_offload",
          "What the backward pass needs waits in the host's memory: little of the GPU's, much traffic. As TRL's"
          " `activation_offloading` without its streams; weights and tensors under 1 kB stay.",
          words=(True, False), default=False, example=False, said={True: "activations wait on the host", False: ""}),
    Field("optimizer",
          "; ".join(f"`{name}`: {one.about}" for name, one in OPTIMIZERS.items())
          + ". `requirements-optimizers.txt` brings torchao's and GaLore's. APOLLO is left out: its package's licence"
          " (CC BY-NC 4.0) forbids commercial use.",
          words=tuple(OPTIMIZERS), default="adamw", example="adamw", said="{}"),
    Field("loss",
          "`chunked` computes the logits a few tokens at a time: for large vocabularies the largest saving of all."
          " `liger`: the fused loss of the package liger-kernel.",
          words=("full", "chunked", "liger"), default="full", example="full",
          said={"full": "", "chunked": "chunked loss", "liger": "liger loss"}),
    Field("loop",
          "`trainer` drops the model's outputs before the backward pass; `manual` keeps them, as simple hand-written"
          " loops do.", words=("trainer", "manual"), default="trainer", example="trainer",
          said={"trainer": "", "manual": "a loop that keeps its outputs"}),
    Field("keeps_outputs",
          "A manual loop's outputs stay alive until its next forward pass has ended, as where `outputs = model(...)`"
          " stands in the loop itself and not in a function of its own.", words=(True, False), default=False,
          example=True, said={True: "outputs kept until the next forward pass", False: ""}),
    Field("allocator", "Settings of PyTorch's caching allocator.", example={"expandable_segments": False},
          parts=(
              Field("expandable_segments", "`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`: less memory unused.",
                    words=(True, False), default=False, example=False, said={True: "expandable segments", False: ""}),
          )),
    Field("platform",
          "What the GPU's PyTorch is built for. `windows`: without FlashAttention, so that grouped keys take the plain"
          " formula.", words=("linux", "windows"), default="linux", example="windows",
          said={"linux": "", "windows": "on Windows"}),
    Field("parallel", "How a step is spread over several GPUs; figures are then those of each.",
          example={"strategy": DIVIDED, "gpus": 2},
          parts=(
              Field("strategy",
                    "`ddp`: the whole model on each GPU. `fsdp2`, and the older `fsdp1`: weights, gradients and states"
                    " divided, each layer gathered while it runs. `zero2`, `zero3`: DeepSpeed's ZeRO, predicted"
                    " where `requirements-deepspeed.txt` is installed, and not trained.",
                    words=tuple(STRATEGIES), default=NONE, example=DIVIDED),
              Field("gpus", "How many GPUs.", least=1, default=1, example=2),
              Field("reshard_after_forward",
                    "FSDP gives gathered weights back after the forward pass; `false`: keeps them until backward, which"
                    " saves a third of the communication.", words=(True, False), default=True, example=True),
              Field("offload", "`cpu`: FSDP keeps divided weights, gradients and states on the host.",
                    words=("none", "cpu"), default="none", example="none"),
          ), said=_parallel),
    Field("versions", "Versions of libraries that are meant instead of the installed ones.",
          example={"bitsandbytes": "0.42.0"},
          parts=(
              Field("bitsandbytes", "Before 0.43.2 its 4-bit layers kept their inputs: predicted, and not trained.",
                    types=("string",), nullable=True, example="0.42.0", said="bitsandbytes {}"),
          )),
    Field("gpu", "The GPU: a name as people write it (`4090`, `A100 80GB`, `24GiB`; `config/gpus.yaml` lists them),"
          " `{vram_gib: 24}`, or null. Several of a kind: `2x3090`, or `{name: rtx-3090, count: 2}`.",
          types=("string", "object"), nullable=True, example="rtx-4090"),
)  # fmt: skip
BY_NAME = {field.name: field for field in FIELDS}
# What an answer's line `for:` leaves out, and why.
UNSAID = {
    "model": "its name stands for it",
    "gpu": "the verdict names it",
    "lora.alpha": "it scales the update, and takes neither memory nor time",
}


def said(field: Field, value: Any, scenario: Mapping[str, Any]) -> str:
    """What the line `for:` says of a field's value; "" where that goes without saying."""
    how = field.said
    if callable(how):
        return how(value, scenario)
    if how is None and field.parts and isinstance(value, Mapping):
        parts = (said(part, value.get(part.name), scenario) for part in field.parts)
        return ", ".join(filter(None, parts))
    if isinstance(how, Mapping) and value in how:
        return how[value]
    if any(value is quiet for quiet in _QUIET) or value == "none" or how == _SAID_BY_OTHERS:
        return ""
    return how.format(value) if isinstance(how, str) else f"{field.name} {yaml_text(value)}"


def line(scenario: Mapping[str, Any]) -> str:
    """What a scenario's answer is for, on one line: every field that decides memory or time."""
    parts = (said(field, scenario.get(field.name), scenario) for field in FIELDS if field.name not in UNSAID)
    return "; ".join(filter(None, parts))


def goes_without_saying(field: Field, value: Any, scenario: Mapping[str, Any]) -> bool:
    """Whether a value is what nobody would name: something that is off."""
    return value is None or (field.said != _SAID_BY_OTHERS and not said(field, value, scenario))


@cache
def scenario_defaults() -> dict[str, Any]:
    """The value of each field that a scenario leaves out; ``model`` and ``model_name`` have none."""
    return {
        field.name: {part.name: part.default for part in field.parts} if field.parts else field.default
        for field in FIELDS
        if not field.name.startswith("model")
    }


def schema() -> dict[str, dict[str, Any]]:
    """All fields as properties of a JSON Schema, by name."""
    return {field.name: field.schema() for field in FIELDS}


# What other tools call a field of ours: transformers, TRL, axolotl, LLaMA-Factory.
ELSEWHERE = {
    **dict.fromkeys(("model_name_or_path", "base_model", "pretrained_model_name_or_path", "model_id"), "model"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "batch_size"), "micro_batch"),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len"), "sequence_length"),
    **dict.fromkeys(("max_length", "model_max_length"), "sequence_length"),
    **dict.fromkeys(("lora_r", "lora_rank"), "lora.rank"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "lora.target_modules"),
    **{"lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "attn_implementation": "attention"},
    **{"gradient_accumulation_steps": "gradient_accumulation", "finetuning_type": "method", "optim": "optimizer"},
}
# What a training aims at, which `method` does not say.
_AIM = "this is what a training aims at, and `method` says which weights it trains"
NO_METHODS = {
    **dict.fromkeys(("pt", "ipo", "simpo", "cpo", "rloo", "ppo", "rm"), f"{_AIM}; an aim is the field `objective`."),
    **{word: f"{_AIM}: write `objective: {word}`." for word in OBJECTIVES},
}


@cache
def file_schema() -> dict[str, Any]:
    """The schema of a scenario with its defaults; its model, adapter and GPU have checks of their own."""
    own = {key: {} for key in ("model", "adapter", "gpu")}
    form = {"type": "object", "additionalProperties": False, "properties": schema() | own, "x-elsewhere": ELSEWHERE}
    form["properties"]["method"] = {**form["properties"]["method"], "x-confused": NO_METHODS}
    return form
