"""The ways to use several GPUs: one row each, with what every module asks about one. Standard library only.

How a model is wrapped: :mod:`dryfit.step.parallel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WEIGHTS, GRADIENTS, STATES = "weights", "gradients", "optimizer states"


@dataclass(frozen=True)
class Strategy:
    """What a strategy does with the model."""

    title: str  # as people call it
    divides: tuple[
        str, ...
    ] = ()  # what each GPU holds a part of: :data:`WEIGHTS`, :data:`GRADIENTS`, :data:`STATES`
    replicates: bool = False  # each GPU holds the whole model, and gradients are averaged
    fsdp: int = 0  # the version of PyTorch's FSDP; 0: another library's
    zero: int = 0  # the stage of DeepSpeed's ZeRO; 0: another library's
    in_closed_form: bool = False  # the analytic estimate describes it
    trained: bool = False  # the pipeline trains with it


NONE, REPLICATED, DIVIDED = "none", "ddp", "fsdp2"  # what is proposed
STRATEGIES = {
    NONE: Strategy("one GPU", in_closed_form=True, trained=True),
    REPLICATED: Strategy("DDP", replicates=True, in_closed_form=True, trained=True),
    "fsdp1": Strategy("FSDP1", (WEIGHTS, GRADIENTS, STATES), fsdp=1),
    DIVIDED: Strategy(
        "FSDP", (WEIGHTS, GRADIENTS, STATES), fsdp=2, in_closed_form=True, trained=True
    ),
    "zero1": Strategy("ZeRO-1", (STATES,), zero=1),
    "zero2": Strategy("ZeRO-2", (GRADIENTS, STATES), zero=2),
    "zero3": Strategy("ZeRO-3", (WEIGHTS, GRADIENTS, STATES), zero=3),
}
# A pipeline's schedules, and how many stages each GPU has with them.
SCHEDULES = {"1f1b": 1, "gpipe": 1, "interleaved": 2, "zero_bubble": 2}
# The axes of a mesh, outermost first, and the word that texts use for each. On the outermost axis, the ranks of
# neighbours differ most.
AXES = {
    "pipeline": "pipeline",
    "replicate": "replicas",
    "context": "context",
    "ulysses": "Ulysses",
    "expert": "experts",
    "tensor": "tensor",
}


def even_stages(layers: int, stages: int) -> tuple[int, ...]:
    """How many of a model's layers each stage of a pipeline has where nobody says it: the first ones take the rest.

    As transformers' ``PipelineStage.layer_range_for_rank`` (5.24) cuts them.
    """
    each, rest = divmod(layers, stages)
    return tuple(each + (stage < rest) for stage in range(stages))


def span_of(stage: int, stage_layers: Sequence[int]) -> range:
    """Which of the model's layers a stage has, counted from 0."""
    first = sum(stage_layers[:stage])
    return range(first, first + stage_layers[stage])
