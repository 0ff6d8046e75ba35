"""A model's layers on several GPUs: PyTorch's pipeline schedules over stages, cut as transformers cuts them.

Each GPU holds one stage, or two with the schedules that interleave them: stage n is on GPU n modulo the pipeline's
length. A step runs all of its micro-batches through the stages; the loss is on the last one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import span_of
from dryfit.step.adapters import DTYPES
from dryfit.step.meshes import divide_matrices, divided_by_plan, dividing_loss

_SCHEDULES = {
    "1f1b": "Schedule1F1B",
    "gpipe": "ScheduleGPipe",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
}


class PipelineStage(nn.Module):
    """The part of a causal language model that one stage runs: hidden states in and out, or tokens in, logits out."""

    tokens = 0  # of a whole row, where hidden states are divided along it

    def __init__(self, model: nn.Module, index: int, stage_layers: Sequence[int]) -> None:
        super().__init__()
        self.model = _cut(
            model, span_of(index, stage_layers), index == 0, index == len(stage_layers) - 1
        )
        self.index, self.count = index, len(stage_layers)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Tokens (rows x tokens) in the first stage, else hidden states (rows x tokens x width)."""
        named = {"inputs_embeds": given} if self.index else {"input_ids": given}
        if self.tokens:
            named["position_ids"] = torch.arange(self.tokens, device=given.device)[None]
        output = self.model.base_model(**named, use_cache=False)
        hidden = output.last_hidden_state
        del output
        return self.model.lm_head(hidden)  # the stand-in of a stage before the last gives them back


class Pipeline(nn.Module):
    """The stages of one GPU, with the schedule that runs them."""

    def __init__(self, stages: list[PipelineStage], schedule: Any, parallel: Any) -> None:
        super().__init__()
        self.stages, self.schedule, self.parallel = nn.ModuleList(stages), schedule, parallel

    @property
    def config(self) -> Any:
        """The configuration of the whole model."""
        return self.stages[0].model.config

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Forward and backward of all micro-batches (rows x tokens, both of int64)."""
        first, last = self.stages[0], self.stages[-1]
        given = {"target": labels, "losses": []} if last.index == last.count - 1 else {}
        with dividing_loss(self.parallel):
            self.schedule.step(
                *([tokens] if first.index == 0 else []), **given, return_outputs=False
            )


def _cut(model: nn.Module, own: range, is_first: bool, is_last: bool) -> nn.Module:
    """The model with one stage's parts: as ``apply_pipeline_parallelism`` of transformers cuts, at layers of choice."""
    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

    base = model.base_model
    if not is_first:
        base.embed_tokens = PipelineIdentityLayer()
    for index in range(len(base.layers)):
        if index not in own:
            base.layers[index] = PipelineIdentityLayer()
    if not is_last:
        base.norm = model.lm_head = PipelineIdentityLayer()
    return model


def pipeline_of(model: nn.Module, scenario: Scenario, device: torch.device) -> Pipeline:
    """The stages of this process's GPU; a tensor plan is applied before the layers are cut."""
    from torch.distributed import device_mesh, pipelining

    parallel = scenario.parallel
    sizes = (parallel.pipeline, parallel.tensor)
    mesh = device_mesh.init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "tensor"))
    group = mesh["pipeline"].get_group()
    if scenario.method != "full":
        model = model.get_base_model()  # with PEFT's layers in it
    if parallel.by_titan:
        divide_matrices(model, scenario, mesh["tensor"])
    elif parallel.by_plan:
        model = divided_by_plan(model, scenario)
    own = range(group.rank(), parallel.stages, parallel.pipeline)
    models = [model, *(copy.deepcopy(model) for _ in own[1:])]
    stage_layers = parallel.layers_of_stages(scenario.size("num_hidden_layers"))
    parts = [
        PipelineStage(one, index, stage_layers) for one, index in zip(models, own, strict=True)
    ]
    for part in parts if parallel.sequence_parallel else ():
        part.tokens = scenario.sequence_length
    shapes = _shapes(scenario, model.config)
    stages = [
        pipelining.PipelineStage(
            part,
            part.index,
            part.count,
            device,
            group=group,
            input_args=shapes["hidden" if part.index else "tokens"],
            output_args=shapes["hidden" if part.index < part.count - 1 else "logits"],
        )
        for part in parts
    ]
    kind = getattr(pipelining.schedules, _SCHEDULES[parallel.schedule])
    several = parallel.stages > parallel.pipeline
    schedule = kind(
        stages if several else stages[0], scenario.gradient_accumulation, loss_fn=_loss(model)
    )
    return Pipeline(parts, schedule, parallel)


def _shapes(scenario: Scenario, config: Any) -> dict[str, torch.Tensor]:
    """What goes in and out of stages: tensors without data, of which a stage keeps the shapes alone."""
    shape, text = (scenario.micro_batch, scenario.sequence_length), config.get_text_config()
    (rows, tokens), parallel = shape, scenario.parallel
    along = parallel.tensor if parallel.sequence_parallel else 1
    computed = DTYPES[
        scenario.autocast_precision or scenario.weight_precision
    ]  # the head is a product, under autocast
    options = {"dtype": DTYPES[scenario.weight_precision], "device": "meta", "requires_grad": True}
    return {
        "tokens": torch.empty(shape, dtype=torch.long, device="meta"),
        "hidden": torch.empty((rows, tokens // along, text.hidden_size), **options),
        "logits": torch.empty((*shape, text.vocab_size), **options | {"dtype": computed}),
    }


def _loss(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    function, words = model.loss_function, model.config.get_text_config().vocab_size
    return lambda logits, labels: function(logits=logits, labels=labels, vocab_size=words)
