"""The fields of a scenario, each stated once: type, default, what it allows, what it means, what else it touches.

Checks and their messages (:mod:`dryfit.scenario.scenario`), the schema of a configuration and its reference, the
site's form, what the closed form describes and the line of an answer derive from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dryfit.scenario.description import (
    ANY,
    SAID_BY_OTHERS,
    Excluded,
    described,
    fields_of,
    said,
    say_adapter,
    say_images,
    say_method,
    say_name,
    say_of_adapters,
    say_parallel,
    say_precision,
    say_quantization,
    switch,
)
from dryfit.scenario.generation import GENERATION, Generation
from dryfit.scenario.images import Images
from dryfit.scenario.model import KERNEL_PACKAGES
from dryfit.scenario.nested_fields import Parallel, Preference
from dryfit.scenario.objectives import OBJECTIVES, SUPERVISED
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.strategies import DIVIDED
from dryfit.scenario.value_fields import (
    PRECISIONS,
    AllocatorSettings,
    Experts,
    Lora,
    Quantization,
    Versions,
    ZeroFile,
    say_zero,
)

CHUNK_TOKENS = (
    256  # whose logits exist at once with `loss: chunked`; 156 MB in fp32 for 152,064 words
)
MICRO_BATCHES = (
    2  # of an accumulated step on `meta`: from the second on gradients are alive, and all are alike
)
_NO_ADAPTERS = {
    "full": Excluded("method full trains every weight and has no adapters", "method: lora")
}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields of a step. :class:`~dryfit.scenario.scenario.Scenario` checks them and says what follows."""

    model: dict[str, Any] = described(
        "The model: a name in `config/models/`, its id on the Hub (`Qwen/Qwen3-8B`, `owner/name@revision`:"
        " its `config.json` alone is fetched), a path to a `config.json`, or the configuration itself.",
        types=("string", "object"),
        example="qwen2.5-coder-7b",
        in_training=False,
    )
    model_name: str | None = described(
        "What to call the model; its file's name when left out.",
        types=("string",),
        nullable=True,
        example="Qwen2.5-Coder-7B",
        said=say_name,
        in_training=False,
    )
    method: str = described(
        "`full` trains every weight; `lora`: adapters on a dense base; `qlora`: on a 4-bit or 8-bit base.",
        words=("full", "lora", "qlora"),
        default="qlora",
        said=say_method,
        closed_form=ANY,
    )
    objective: str = described(
        "What the training aims at. `sft`: the next token. The others are steps of TRL's trainers, predicted with"
        " the extra `trl`, and not trained: `dpo`, `orpo` and `reward` take pairs (`micro_batch` counts them),"
        " `kto` rows, `grpo`, `rloo` and `distillation` answers that `generation` generates, `online_dpo` two each."
        " On several GPUs `dpo` and `orpo` alone are predicted, by rules and without `trl`.",
        words=tuple(OBJECTIVES),
        default=SUPERVISED,
        example="dpo",
        said=lambda value, _: "" if value == "sft" else value.upper().replace("_", " "),
    )
    preference: Preference = described(
        "What an objective takes beside its rows.",
        example={"reference": "adapter_off"},
        parts=Preference,
    )
    generation: Generation = GENERATION
    precision: str = described(
        "The dtype of the weights that are not quantized. `*-mixed`: fp32 weights under autocast.",
        words=(*PRECISIONS, "fp16-mixed", "bf16-mixed"),
        default="bf16",
        said=say_precision,
        closed_form=ANY,
    )
    autocast: str | None = described(
        "Autocast over weights of any dtype, as a trainer's `--bf16` does over a 16-bit or 4-bit base.",
        words=("fp16", "bf16"),
        nullable=True,
        example="bf16",
        said=SAID_BY_OTHERS,
        closed_form=ANY,
    )
    quantization: Quantization | None = described(
        "How a `qlora` base is quantized; ignored for other methods.",
        nullable=True,
        example={"type": "nf4", "double": True},
        excluded={
            "full": Excluded(
                "method full trains every weight, and 4-bit weights can't be trained",
                "method: qlora",
            ),
            "lora": Excluded(
                "method lora keeps the base in the precision; a quantized base is method qlora",
                "method: qlora",
            ),
        },
        said=say_quantization,
        parts=Quantization,
    )  # None unless method is qlora
    experts: Experts = described(
        "How experts lie in memory that are one tensor for a layer, as transformers 5 has them.",
        example={"quantized": "bitsandbytes", "offload": "none"},
        parts=Experts,
        in_training=False,
    )
    kbit_preparation: str = described(
        "`peft` turns embeddings, head and norms to fp32 as `prepare_model_for_kbit_training` does (on"
        " Qwen2.5-Coder-7B 2.03 GiB more); `trl` keeps norms and biases in fp32 and brings embeddings and head back"
        " to 16 bits; `none` leaves them.",
        words=("none", "peft", "trl"),
        default="none",
        excluded={
            "full": Excluded(
                "PEFT's k-bit preparation freezes the base, which method full trains",
                "kbit_preparation: none",
            )
        },
        said=say_of_adapters(
            {
                "none": "no k-bit preparation",
                "peft": "PEFT's k-bit preparation",
                "trl": "TRL's k-bit preparation",
            }
        ),
        closed_form=ANY,
    )
    lora: Lora | None = described(
        "Low-rank adapters, the short form.",
        nullable=True,
        example={"rank": 16, "target_modules": "all-linear"},
        excluded=_NO_ADAPTERS,
        said=SAID_BY_OTHERS,
        parts=Lora,
        in_training=False,
    )  # None when method is full, or an adapter is given
    adapter: dict[str, Any] | None = described(
        "Instead of `lora`, any PEFT configuration as `adapter_config.json` writes it: a mapping, or the path of such"
        " a file.",
        types=("string", "object"),
        nullable=True,
        example={"peft_type": "LORA", "r": 16, "use_dora": True},
        excluded=_NO_ADAPTERS,
        said=say_adapter,
        closed_form=(None,),
        in_training=False,
    )
    adapter_precision: str = described(
        "The dtype of the adapter's weights, gradients and optimizer states. `fp32` and `base` (the base's own) are"
        " what PEFT does with `autocast_adapter_dtype` on and off.",
        words=("fp32", "base", "fp16", "bf16"),
        default="fp32",
        said=say_of_adapters(
            {
                "fp32": "",
                "base": "adapters in the base's dtype",
                "fp16": "adapters in fp16",
                "bf16": "adapters in bf16",
            }
        ),
        closed_form=ANY,
    )
    sequence_length: int = described(
        "Tokens of a row of the batch.",
        least=1,
        default=512,
        said=lambda value, scenario: f"{scenario['micro_batch']} x {value:,} tokens",
    )
    images: Images | None = described(
        "Images in each row of a vision-language model, whose configuration is then taken with its vision tower"
        " (`gemma3`, `gemma4`, `llava`, Qwen's VL models and Qwen3.5): predicted, and not trained. Their tokens are"
        " part of `sequence_length`. `null`: rows of text, and the language model alone.",
        nullable=True,
        example={"count": 1, "height": 896, "width": 896, "trained": "language"},
        said=say_images,
        parts=Images,
        closed_form=(None,),
    )
    micro_batch: int = described(
        "Rows that go through the model at once. This, times the sequence length, decides the activations' memory.",
        least=1,
        default=1,
        said=SAID_BY_OTHERS,
    )
    gradient_accumulation: int = described(
        "Micro-batches per optimizer step. The effective batch is micro_batch x gradient_accumulation; the memory is"
        " a micro-batch's.",
        least=1,
        default=1,
        said=lambda value, _: f"{value} micro-batches a step" if value > 1 else "",
    )
    attention_mask: str = described(
        "`padding`: the batch carries a mask, as padded batches do; then fused attention needs more memory.",
        words=("none", "padding"),
        default="none",
        said={"none": "", "padding": "padded"},
        closed_form=ANY,
    )
    packing: str = described(
        "`rows`: several rows in one sequence, each computed as if alone. `shared_prefix`: what all rows begin with"
        " is computed once. Both are tested on the model before the first step, and refused where they are not"
        " exact.",
        words=("none", "rows", "shared_prefix"),
        default="none",
        said={
            "none": "",
            "rows": "packed rows",
            "shared_prefix": "packed rows with a shared prefix",
        },
        closed_form=ANY,
    )  # rows in one sequence (dryfit.step.packing): the batch then has positions and a square mask
    previous_sequence_length: int | None = described(
        "Tokens of the batch before, where a manual loop's outputs stay alive until its next forward pass has ended"
        " (`keeps_outputs`) and it was of another length; `null`: of the same.",
        least=1,
        nullable=True,
        example=512,
        said="{:,} tokens in the batch before",
        closed_form=(None,),
        in_training=False,
    )
    use_cache: bool = switch(
        "Keys and values are kept in the forward pass of training.",
        on="keys and values kept",
    )
    gradient_checkpointing: bool | str = described(
        "Recompute activations in the backward pass: far less memory, about a third more time. `reentrant`: the older"
        " way of `torch.utils.checkpoint`.",
        words=(True, False, "reentrant"),
        default=True,
        said={
            True: "checkpointing",
            False: "no checkpointing",
            "reentrant": "reentrant checkpointing",
        },
        closed_form=ANY,
    )
    attention: str = described(
        "`eager` keeps the scores of every head; the others do not. `flash` needs Ampere or newer.",
        words=("eager", "sdpa", "mem_efficient", "flash"),
        default="sdpa",
        said="{} attention",
        closed_form=ANY,
    )
    activation_offload: bool = switch(
        "What the backward pass needs waits in the host's memory: little of the GPU's, much traffic. As TRL's"
        " `activation_offloading` without its streams; weights and tensors under 1 kB stay.",
        on="activations wait on the host",
    )
    optimizer: str = described(
        "; ".join(f"`{name}`: {one.about}" for name, one in OPTIMIZERS.items())
        + ". The extra `optimizers` brings torchao's and GaLore's. APOLLO is left out: its package's licence"
        " (CC BY-NC 4.0) forbids commercial use.",
        words=tuple(OPTIMIZERS),
        default="adamw",
        said="{}",
        closed_form=tuple(name for name, one in OPTIMIZERS.items() if one.in_closed_form),
    )
    optimizer_state_precision: str | None = described(
        "`fp32`: the optimizer's states are in fp32 whatever the dtype of what is trained, as Apex's FusedAdam and"
        " bitsandbytes' 32-bit AdamW keep them for 16-bit weights; `adamw` steps such weights one after the other."
        " `null`: in the dtype of what is trained.",
        words=("fp32",),
        nullable=True,
        example="fp32",
        said="optimizer states in {}",
        closed_form=ANY,
    )
    float8: str = described(
        "Products of linear layers in 8 bits, by one of torchao's recipes. Weights stay in their dtype. Predicted where"
        " the extra `optimizers` is installed, and not trained.",
        words=("none", "tensorwise", "rowwise", "rowwise_with_gw_hp"),
        default="none",
        example="rowwise",
        said={
            "none": "",
            "tensorwise": "float8 by tensors",
            "rowwise": "float8 by rows",
            "rowwise_with_gw_hp": "float8 by rows, gradients of weights in 16 bits",
        },
        in_training=False,
    )
    qat: str = described(
        "Weights and inputs rounded to 4 bits and back in each forward pass, as torchao's quantization-aware training"
        " does. Predicted where the extra `optimizers` is installed, and not trained.",
        words=("none", "mxfp4", "nvfp4"),
        default="none",
        example="mxfp4",
        said={"none": "", "mxfp4": "QAT in mxfp4", "nvfp4": "QAT in nvfp4"},
        in_training=False,
    )
    loss: str = described(
        "`chunked` computes the logits a few tokens at a time: for large vocabularies the largest saving of all."
        " `liger`: the fused loss of the package liger-kernel.",
        words=("full", "chunked", "liger"),
        default="full",
        said={"full": "", "chunked": "chunked loss", "liger": "liger loss"},
        closed_form=("full", "chunked"),
    )
    compile: str = described(
        "`torch.compile`: `model`, the whole model; `layers`, layer by layer, which compiles one for all of them."
        " Predicted through the compiler itself where the extra `run` is installed (Linux), and not"
        " trained.",
        words=("none", "layers", "model"),
        default="none",
        example="layers",
        said={"none": "", "model": "compiled", "layers": "compiled layer by layer"},
    )
    compile_mode: str = described(
        "`torch.compile`'s mode. `max-autotune-no-cudagraphs` gives a range: a benchmark on the GPU chooses between"
        " cuBLAS and Inductor's own products, into which more is fused. So does `max-autotune`. Its CUDA graphs, and"
        " those of `reduce-overhead`, keep memory in a pool of their own; they are followed on one GPU.",
        words=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        default="default",
        example="default",
        said=lambda value, _: "" if value == "default" else f"mode {value}",
    )
    kernels: str = described(
        "Whose kernels the model runs. `transformers`: its own, and for linear attention, state spaces and short"
        " convolutions those of `packages`. `packages`: the same, with all packages that the model's code asks for."
        " `liger`: the model as liger-kernel patches it, with `loss: liger`. `unsloth`: as Unsloth patches it, which"
        " can't be followed, so the answer is a range. Predicted, and not trained.",
        words=("transformers", "packages", "liger", "unsloth"),
        default="transformers",
        example="liger",
        said={
            "transformers": "",
            "packages": "",
            "liger": "Liger's kernels",
            "unsloth": "Unsloth's kernels",
        },
        closed_form=("transformers", "unsloth"),  # of Unsloth's step the upper end
    )
    packages: tuple[str, ...] | None = described(
        "Packages with kernels that the target machine has: "
        + ", ".join(f"`{name}`" for name in KERNEL_PACKAGES)
        + "; `[]`: none of them, so that transformers runs loops of its own; `null`: those that are installed here."
        " The trace runs a package's own code where it is installed (the extra `run`). Where it is not, the"
        " answer is the least that the step can need.",
        types=("array",),
        nullable=True,
        example=["fla"],
        said=lambda value, _: (
            "" if value is None else f"with {', '.join(value)}" if value else "without packages"
        ),
        closed_form=ANY,
    )
    loop: str = described(
        "`trainer` drops the model's outputs before the backward pass; `manual` keeps them, as simple hand-written"
        " loops do.",
        words=("trainer", "manual"),
        default="trainer",
        said={"trainer": "", "manual": "a loop that keeps its outputs"},
        closed_form=ANY,
    )
    keeps_outputs: bool = switch(
        "A manual loop's outputs stay alive until its next forward pass has ended, as where `outputs = model(...)`"
        " stands in the loop itself and not in a function of its own.",
        example=True,
        on="outputs kept until the next forward pass",
        in_training=False,
    )
    allocator: AllocatorSettings = described(
        "Settings of PyTorch's caching allocator.",
        example={"expandable_segments": False},
        parts=AllocatorSettings,
    )
    platform: str = described(
        "What the GPU's PyTorch is built for. `windows`: without FlashAttention, so that grouped keys take the plain"
        " formula.",
        words=("linux", "windows"),
        default="linux",
        example="windows",
        said={"linux": "", "windows": "on Windows"},
        closed_form=ANY,
        in_training=False,
    )
    loads: str = described(
        "Where the weights of a model that is not quantized come to be. `host`: in the host's memory, from where they"
        " are moved, as scripts without `device_map` do. `device`: straight on the GPU. It decides where GPU and system"
        " share one memory.",
        words=("host", "device"),
        default="host",
        example="device",
        said={"host": "", "device": "loaded straight onto the GPU"},
        closed_form=ANY,
        in_training=False,
    )
    parallel: Parallel = described(
        "How a step is spread over several GPUs; figures are then those of each.",
        example={"strategy": DIVIDED, "gpus": 2},
        said=say_parallel,
        parts=Parallel,
    )
    zero: ZeroFile = described(
        "With `zero1`, `zero2` and `zero3`: what DeepSpeed's configuration says in `zero_optimization`.",
        example={"reduce_bucket_size": 12_845_056},
        said=say_zero,
        parts=ZeroFile,
        in_training=False,
    )
    versions: Versions = described(
        "Versions of libraries that are meant instead of the installed ones.",
        example={"bitsandbytes": "0.42.0"},
        parts=Versions,
    )
    gpu: str | dict[str, float] | None = described(
        "A name as people write it: `4090`, `A100 80GB` or `24GiB` (`config/gpus.yaml` lists the names). A mapping"
        " holds `name` or `vram_gib`; `count` says how many, and `context_mib` what yours holds beside the allocator.",
        types=("string", "object"),
        nullable=True,
        example="rtx-4090",
        in_training=False,
    )


FIELDS = fields_of(Fields)
BY_NAME = {field.name: field for field in FIELDS}
# What an answer's line `for:` leaves out, and why.
UNSAID = {
    "model": "its name stands for it",
    "gpu": "the verdict names it",
    "lora.alpha": "it scales the update, and takes neither memory nor time",
}


def line(scenario: Mapping[str, Any]) -> str:
    """What a scenario's answer is for, on one line: every field that decides memory or time."""
    parts = (
        said(field, scenario.get(field.name), scenario)
        for field in FIELDS
        if field.name not in UNSAID
    )
    return "; ".join(filter(None, parts))


@cache
def scenario_defaults() -> dict[str, Any]:
    """The value of each field that a scenario leaves out; ``model`` and ``model_name`` have none."""
    return {
        field.name: {part.name: part.default for part in field.parts}
        if field.parts
        else field.default
        for field in FIELDS
        if not field.name.startswith("model")
    }


def schema() -> dict[str, dict[str, Any]]:
    """All fields as properties of a JSON Schema, by name."""
    return {field.name: field.schema() for field in FIELDS}


# What other tools call a field of ours: transformers, TRL, axolotl, LLaMA-Factory.
ELSEWHERE = {
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "pretrained_model_name_or_path", "model_id"), "model"
    ),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "batch_size"), "micro_batch"
    ),
    **dict.fromkeys(
        ("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len"), "sequence_length"
    ),
    **dict.fromkeys(("max_length", "model_max_length"), "sequence_length"),
    **dict.fromkeys(("lora_r", "lora_rank"), "lora.rank"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "lora.target_modules"),
    **{
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "attn_implementation": "attention",
    },
    "attn": "attention",
    **{
        "gradient_accumulation_steps": "gradient_accumulation",
        "finetuning_type": "method",
        "optim": "optimizer",
    },
}
# What a training aims at, which `method` does not say.
_AIM = "this is what a training aims at, and `method` says which weights it trains"
NO_METHODS = {
    **dict.fromkeys(
        ("pt", "ipo", "simpo", "cpo", "rloo", "ppo", "rm"),
        f"{_AIM}; an aim is the field `objective`.",
    ),
    **{word: f"{_AIM}: write `objective: {word}`." for word in OBJECTIVES},
}


@cache
def file_schema() -> dict[str, Any]:
    """The schema of a scenario with its defaults; its model, adapter and GPU have checks of their own."""
    own = {key: {} for key in ("model", "adapter", "gpu")}
    form = {
        "type": "object",
        "additionalProperties": False,
        "properties": schema() | own,
        "x-elsewhere": ELSEWHERE,
    }
    form["properties"]["method"] = {**form["properties"]["method"], "x-confused": NO_METHODS}
    return form
