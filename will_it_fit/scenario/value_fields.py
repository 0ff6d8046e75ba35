"""Fields with parts that are a value and nothing more: adapters, quantization, experts, the allocator, versions."""

from __future__ import annotations

from dataclasses import dataclass

from will_it_fit.scenario.description import ANY, described, switch

PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: B (out x rank) times A (rank x in), scaled by alpha / rank, beside each target module."""

    rank: int = described("The rank of both factors.", least=1, default=16)
    alpha: int = described("The update is scaled by alpha / rank.", least=1, default=32)
    dropout: float = described("Dropout on the adapter's input while training.", below=1.0, default=0.0)
    target_modules: str | tuple[str, ...] = described(
        "`all-linear`, or the names of the layers that get an adapter.",
        types=("string", "array"),
        default="all-linear",
    )  # "all-linear" (every linear layer but the output head) or names


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
class Allocator:
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
