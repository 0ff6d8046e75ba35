"""Fields of a scenario that have parts: each a value of its own, whose parts are described as fields are."""

from __future__ import annotations

from dataclasses import dataclass

from will_it_fit.scenario import words
from will_it_fit.scenario.description import ANY, described, switch
from will_it_fit.scenario.objectives import REFERENCES
from will_it_fit.scenario.strategies import DIVIDED, NONE, STRATEGIES, Strategy

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
class Preference:
    """What an objective takes beside its rows; a reference of None is what TRL takes by default."""

    reference: str | None = described(
        "What answers are compared with: the model with its adapters off, a second model, or numbers that"
        " were computed before. `null`: as TRL decides; for `grpo` nothing.",
        words=REFERENCES,
        nullable=True,
        example="adapter_off",
        said="reference {}",
        closed_form=ANY,
    )
    generations: int = described("`grpo`: answers to a prompt.", least=2, default=8, said=words.generations)
    completion_length: int | None = described(
        "Tokens of a row that are the answer; `null`: half of them.",
        least=1,
        nullable=True,
        example=256,
        said="{} tokens of answer",
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
class Parallel:
    """How a step is spread over several GPUs."""

    strategy: str = described(
        "`ddp`: the whole model on each GPU. `fsdp2`, and the older `fsdp1`: weights, gradients and states"
        " sharded, each layer gathered while it runs. `zero2`, `zero3`: DeepSpeed's ZeRO, predicted"
        " where `requirements-deepspeed.txt` is installed, and not trained.",
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
    offload: str = described(
        "`cpu`: FSDP keeps sharded weights, gradients and states on the host.",
        words=("none", "cpu"),
        default="none",
    )

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


# The fields with parts that are values of their own; a mapping of these parts makes one.
PARTS = {
    "allocator": Allocator,
    "parallel": Parallel,
    "preference": Preference,
    "quantization": Quantization,
    "versions": Versions,
}
