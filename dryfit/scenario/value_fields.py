"""Fields with parts that are a value and nothing more: adapters, quantization, experts, the allocator, versions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dryfit.common.text import yaml_text
from dryfit.scenario.description import ANY, described, fields_of, switch
from dryfit.scenario.strategies import STRATEGIES

PRECISIONS = ("fp32", "fp16", "bf16")


# How PEFT 0.21 starts LoRA's factors out of a model and a rank alone (``LoraConfig.init_lora_weights``).
DEFAULT_START = "default"
STARTS = (DEFAULT_START, "gaussian", "orthogonal", "mica", "olora", "pissa", "pissa_niter_16")
FAST_SVD = re.compile(r"pissa_niter_\d+$")  # PiSSA by so many iterations of a faster decomposition
# Starts that take their factors out of the base's weights, so the base is another one while it trains.
_TAKES_FROM_BASE = ("olora", "pissa")
# Starts that PEFT computes from weights in floating point alone: a packed base has to be unpacked for them.
_NEEDS_FLOATS = ("mica", "orthogonal", "pissa")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: B (out x rank) times A (rank x in), scaled, beside each target module."""

    rank: int = described("The rank of both factors.", least=1, default=16)
    alpha: int = described(
        "The update is scaled by alpha / rank (with `rslora`: by alpha / sqrt(rank)).",
        least=1,
        default=32,
    )
    dropout: float = described(
        "Dropout on the adapter's input while training.", below=1.0, default=0.0
    )
    target_modules: str | tuple[str, ...] = described(
        "`all-linear`, or the names of the layers that get an adapter.",
        types=("string", "array"),
        default="all-linear",
    )  # "all-linear" (every linear layer but the output head) or names
    rslora: bool = switch(
        "rsLoRA: the update is scaled by alpha / sqrt(rank), so that a high rank learns as fast as a low one.",
        example=True,
        on="rsLoRA",
        closed_form=ANY,
    )
    dora: bool = switch(
        "DoRA: each output's length is trained apart from its direction. It learns more at low ranks, and takes more"
        " memory and time.",
        example=True,
        on="DoRA",
    )
    initialization: str = described(
        "How the factors start: `default`, `gaussian` and `orthogonal` change nothing at first; `pissa` and `olora`"
        " take the base's largest directions out of it and train these (`pissa_niter_16`: by a faster decomposition of"
        " 16 iterations); `mica` trains its smallest. A quantized base takes `default`, `gaussian` and `olora`.",
        types=("string",),
        default=DEFAULT_START,
        example="olora",
        said={DEFAULT_START: ""},
        closed_form=(DEFAULT_START, "gaussian", "orthogonal"),
    )
    modules_to_save: tuple[str, ...] | None = described(
        "Modules that are trained whole beside the adapters, such as `lm_head` and `embed_tokens` where the vocabulary"
        " is new.",
        types=("array",),
        nullable=True,
        example=["lm_head"],
        closed_form=(None,),
    )
    rank_pattern: dict[str, int] | None = described(
        "Other ranks by the end of a layer's path, a regular expression: `{q_proj: 8, layers.0.mlp.down_proj: 32}`.",
        types=("object",),
        nullable=True,
        example={"q_proj": 8},
        closed_form=(None,),
    )
    alpha_pattern: dict[str, int] | None = described(
        "Other alphas, in the same way.",
        types=("object",),
        nullable=True,
        example={"q_proj": 16},
        closed_form=ANY,
    )

    @property
    def scale(self) -> float:
        """What the update is multiplied with where no pattern says otherwise."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    @property
    def takes_from_base(self) -> bool:
        """Whether the factors are taken out of the base's weights when the adapter is made."""
        return self.initialization.startswith(_TAKES_FROM_BASE)

    @property
    def needs_floats(self) -> bool:
        """Whether the factors can't be made out of a quantized base."""
        return self.initialization.startswith(_NEEDS_FLOATS)


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes packs the base of ``method: qlora``; ``compute`` is None where 4-bit layers compute in the
    dtype of the other weights. Of ``type: int8`` (LLM.int8) there is one kind only.
    """

    type: str = described(
        "The 4-bit data type; `int8`: 8 bits, as LLM.int8 packs them (`load_in_8bit`).",
        words=("nf4", "fp4", "int8"),
        default="nf4",
        closed_form=("nf4", "fp4"),
    )
    double: bool = switch(
        "Quantize the scales of 4-bit weights too: 0.373 bits a weight less.",
        default=True,
        closed_form=ANY,
    )
    storage: str = described(
        "The dtype that packed weights are stored as; `bf16` lets FSDP shard them.",
        words=("uint8", *PRECISIONS),
        default="uint8",
        closed_form=ANY,
    )
    compute: str | None = described(
        "The dtype that 4-bit layers compute in; `null`: the weights' own.",
        words=PRECISIONS,
        nullable=True,
        example="bf16",
    )


@dataclass(frozen=True)
class Experts:
    """How the experts of a layer lie in memory, where they are one tensor and no linear layers."""

    quantized: str = described(
        "`bitsandbytes`: packed on load as `quantization` says, and unpacked while their layer runs, as axolotl's"
        " `quantize_moe_experts` and Unsloth do. `mxfp4`: kept as gpt-oss' files have them (`dequantize: false`)."
        " `none`: in 16 bits, as bitsandbytes leaves them. Predicted, and not trained.",
        words=("none", "bitsandbytes", "mxfp4"),
        default="none",
        example="bitsandbytes",
        said={"none": "", "bitsandbytes": "experts packed too", "mxfp4": "experts kept in mxfp4"},
    )
    offload: str = described(
        "`host`: frozen experts lie on the host, and a layer's come to the GPU while it runs.",
        words=("none", "host"),
        default="none",
        example="host",
        said={"none": "", "host": "experts on the host"},
    )
    router_loss: bool = switch(
        "The loss that spreads tokens over experts is added (`output_router_logits`): the routers' logits are kept.",
        on="a routers' loss",
    )


@dataclass(frozen=True)
class ZeroFile:
    """DeepSpeed's `zero_optimization`, by its own names and with its own defaults; sizes are in elements."""

    overlap_comm: bool | None = described(
        "Gradients are exchanged beside the backward pass, which takes a second bucket with stages 1 and 2; `null`:"
        " with stage 3 alone.",
        types=("boolean",),
        nullable=True,
        closed_form=ANY,
    )
    contiguous_gradients: bool = switch(
        "Gradients are copied into a bucket for their exchange.", default=True, closed_form=ANY
    )
    reduce_scatter: bool = switch(
        "Each GPU gets its part of the gradients alone; `false`: all gradients.",
        default=True,
        closed_form=ANY,
    )
    round_robin_gradients: bool = switch(
        "With stages 1 and 2 the GPUs take a weight each in turn, instead of many one after the other.",
        closed_form=ANY,
    )
    reduce_bucket_size: int | str = described(
        "Elements of a bucket of gradients; `auto`, as transformers fills it in: the hidden size squared.",
        types=("integer", "string"),
        default=500_000_000,
        closed_form=ANY,
    )
    stage3_prefetch_bucket_size: int | str = described(
        "Elements of the weights that stage 3 gathers before they are needed; `auto`: 0.9 times the hidden size"
        " squared.",
        types=("integer", "string"),
        default=50_000_000,
        closed_form=ANY,
    )
    stage3_param_persistence_threshold: int | str = described(
        "Weights of so many elements, and fewer, stay gathered from one update to the next; `auto`: ten times the"
        " hidden size.",
        types=("integer", "string"),
        default=100_000,
        closed_form=ANY,
    )
    stage3_max_live_parameters: int = described(
        "Elements of gathered weights from which nothing more is gathered ahead.",
        types=("integer",),
        default=1_000_000_000,
        closed_form=ANY,
    )
    stage3_max_reuse_distance: int = described(
        "A weight that is needed again within so many elements stays gathered.",
        types=("integer",),
        default=1_000_000_000,
        closed_form=ANY,
    )
    sub_group_size: int = described(
        "Elements of a GPU's share that stage 3 updates at once.",
        types=("integer",),
        default=1_000_000_000,
        closed_form=ANY,
    )
    offload_optimizer: str = described(
        "`cpu`: the fp32 copy of the weights, the states and the update are on the host.",
        words=("none", "cpu"),
        default="none",
        example="cpu",
        said={"none": "", "cpu": "states on the host"},
        closed_form=ANY,
    )
    offload_param: str = described(
        "`cpu`: with stage 3, a GPU's share of the weights lies on the host too.",
        words=("none", "cpu"),
        default="none",
        example="cpu",
        said={"none": "", "cpu": "weights on the host"},
        closed_form=ANY,
    )
    other: dict[str, Any] | None = described(
        "What else DeepSpeed's file says, as it says it. It has no rule here, and is followed with DeepSpeed's own"
        " package.",
        types=("object",),
        nullable=True,
        example={"data_types": {"grad_accum_dtype": "fp32"}},
        closed_form=ANY,
    )

    def for_a(self, hidden_size: int | None) -> ZeroFile:
        """The same with ``auto`` as transformers fills it in (5.24, ``integrations/deepspeed.py``)."""
        square, width = (hidden_size or 0) ** 2, hidden_size or 0
        filled = {
            "reduce_bucket_size": square,
            "stage3_prefetch_bucket_size": int(0.9 * square),
            "stage3_param_persistence_threshold": 10 * width,
        }
        return replace(
            self, **{name: size for name, size in filled.items() if getattr(self, name) == "auto"}
        )


def say_zero(value: Mapping[str, Any], scenario: Mapping[str, Any]) -> str:
    """Settings of ZeRO that are not DeepSpeed's own."""
    if not STRATEGIES[scenario["parallel"]["strategy"]].zero:
        return ""
    return ", ".join(
        f"{part.name} {yaml_text(value[part.name])}"
        for part in fields_of(ZeroFile)
        if value[part.name] != part.default
    )


@dataclass(frozen=True)
class AllocatorSettings:
    """Settings of PyTorch's caching allocator."""

    expandable_segments: bool = switch(
        "`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`: less memory unused.",
        on="expandable segments",
        closed_form=ANY,
    )


@dataclass(frozen=True)
class Versions:
    """Versions of libraries that are meant instead of those installed."""

    bitsandbytes: str | None = described(
        "Before 0.43.2 its 4-bit layers kept their inputs: predicted, and not trained.",
        types=("string",),
        nullable=True,
        example="0.42.0",
        said="bitsandbytes {}",
        closed_form=(None,),
    )
    vllm: str | None = described(
        "Whose rules the engine beside a reinforcement step follows; `null`: 0.31.0, the newest that TRL 1.16 admits."
        " From 0.22 on.",
        types=("string",),
        nullable=True,
        example="0.26.0",
        said="vLLM {}",
        closed_form=ANY,
    )
