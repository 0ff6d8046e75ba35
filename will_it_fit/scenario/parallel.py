"""How a step is spread over several GPUs: ``parallel``, as a value, and what follows from it.

Which of its parts go together: :mod:`will_it_fit.scenario.meshes`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from will_it_fit.scenario.description import ANY, described, switch
from will_it_fit.scenario.strategies import DIVIDED, NONE, SCHEDULES, STRATEGIES, Strategy, even_stages


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
        return self.pipeline > 1 or self.schedule != Parallel.schedule or self.stage_layers is not None

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
