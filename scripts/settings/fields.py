"""The fields of a scenario: what each says, what it allows, what to write. The one table.

Checks and their messages (:mod:`scripts.settings.scenario`), the schema of the configuration and its reference
(:mod:`scripts.settings.configuration`) derive from it; the defaults stand in ``scenario_defaults`` of
config/config.yaml. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

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
    Field("method", "`full` trains every weight; `lora`: adapters on a dense base; `qlora`: on a 4-bit or 8-bit base.",
          words=("full", "lora", "qlora"), example="qlora"),
    Field("objective",
          "What the training aims at. `sft`: the next token. The others are steps of TRL's trainers, predicted where"
          " `requirements-trl.txt` is installed, and not trained: `dpo`, `orpo` and `reward` take pairs of rows"
          " (`micro_batch` counts pairs), `kto` single rows, `grpo` generated ones (without their generation).",
          words=("sft", "dpo", "orpo", "kto", "reward", "grpo"), example="dpo"),
    Field("preference", "What an objective takes beside its rows.", example={"reference": "adapter_off"},
          parts=(
              Field("reference",
                    "What answers are compared with: the model with its adapters off, a second model, or numbers that"
                    " were computed before. `null`: as TRL decides; for `grpo` nothing.",
                    words=("adapter_off", "model", "precomputed"), nullable=True, example="adapter_off"),
              Field("generations", "`grpo`: answers to a prompt.", least=2, example=8),
              Field("completion_length", "Tokens of a row that are the answer; `null`: half of them.", least=1,
                    nullable=True, example=256),
          )),
    Field("precision", "The dtype of the weights that are not quantized. `*-mixed`: fp32 weights under autocast.",
          words=(*PRECISIONS, "fp16-mixed", "bf16-mixed"), example="bf16"),
    Field("autocast", "Autocast over weights of any dtype, as a trainer's `--bf16` does over a 16-bit or 4-bit base.",
          words=("fp16", "bf16"), nullable=True, example="bf16"),
    Field("quantization", "How a `qlora` base is quantized; ignored for other methods.", nullable=True,
          example={"type": "nf4", "double": True},
          parts=(
              Field("type", "The 4-bit data type; `int8`: 8 bits, as LLM.int8 packs them (`load_in_8bit`).",
                    words=("nf4", "fp4", "int8"), example="nf4"),
              Field("double", "Quantize the scales of 4-bit weights too: 0.373 bits a weight less.",
                    words=(True, False), example=True),
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
          " Qwen2.5-Coder-7B 2.03 GiB more); `trl` keeps norms and biases in fp32 and brings embeddings and head back"
          " to 16 bits; `none` leaves them.",
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
                    " the method's weights or adapters everywhere.", words=("language", "all"), example="language"),
          )),
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
    Field("activation_offload",
          "What the backward pass needs waits in the host's memory: little of the GPU's, much traffic. As TRL's"
          " `activation_offloading` without its streams; weights and tensors under 1 kB stay.",
          words=(True, False), example=False),
    Field("optimizer",
          "8-bit states take a quarter of the memory; paged ones move to the CPU under pressure. `lion_8bit` keeps one"
          " state a weight instead of two; `adafactor` (transformers') a row and a column for each matrix; `muon`"
          " (PyTorch's) one state for the matrices of layers, and AdamW's for the others. With"
          " `requirements-optimizers.txt`: torchao's AdamW of 8 or 4 bits, whose step is compiled, and `galore` (states"
          " of rank 128 for the matrices of layers). APOLLO is left out: its package's licence (CC BY-NC 4.0) forbids"
          " commercial use.",
          words=("adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "muon",
                 "adamw_torchao_8bit", "adamw_torchao_4bit", "galore"),
          example="adamw"),
    Field("loss",
          "`chunked` computes the logits a few tokens at a time: for large vocabularies the largest saving of all."
          " `liger`: the fused loss of the package liger-kernel.",
          words=("full", "chunked", "liger"), example="full"),
    Field("compile",
          "`torch.compile`: `model`, the whole model; `layers`, layer by layer, which compiles one for all of them."
          " Predicted through the compiler itself where `requirements-kernels.txt` is installed (Linux), and not"
          " trained.", words=("none", "layers", "model"), example="layers"),
    Field("loop",
          "`trainer` drops the model's outputs before the backward pass; `manual` keeps them, as simple hand-written"
          " loops do.", words=("trainer", "manual"), example="trainer"),
    Field("allocator", "Settings of PyTorch's caching allocator.", example={"expandable_segments": False},
          parts=(
              Field("expandable_segments", "`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`: less memory unused.",
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
    Field("versions", "Versions of libraries that are meant instead of the installed ones.",
          example={"bitsandbytes": "0.42.0"},
          parts=(
              Field("bitsandbytes", "Before 0.43.2 its 4-bit layers kept their inputs: predicted, and not trained.",
                    types=("string",), nullable=True, example="0.42.0"),
          )),
    Field("gpu", "The GPU: a name as people write it (`4090`, `A100 80GB`, `24GiB`; `config/gpus.yaml` lists them),"
          " `{vram_gib: 24}`, or null. Several of a kind: `2x3090`, or `{name: rtx-3090, count: 2}`.",
          types=("string", "object"), nullable=True, example="rtx-4090"),
)  # fmt: skip
BY_NAME = {field.name: field for field in FIELDS}


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
OBJECTIVES = {
    **dict.fromkeys(("pt", "ipo", "simpo", "cpo", "rloo", "ppo", "rm"), f"{_AIM}; an aim is the field `objective`."),
    **{word: f"{_AIM}: write `objective: {word}`." for word in BY_NAME["objective"].words},
}


@cache
def file_schema() -> dict[str, Any]:
    """The schema of a scenario with its defaults; its model, adapter and GPU have checks of their own."""
    own = {key: {} for key in ("model", "adapter", "gpu")}
    form = {"type": "object", "additionalProperties": False, "properties": schema() | own, "x-elsewhere": ELSEWHERE}
    form["properties"]["method"] = {**form["properties"]["method"], "x-confused": OBJECTIVES}
    return form
