"""torchtitan's training of Llama 3.1 as its pages measured it: its parallelisms, on a simulated group of H100.

Written from its settings at commit 9dec370, not run from its code: fp32 weights gathered in bf16 or, with float8, in 8
bits; gradients exchanged in fp32; AdamW; and its plans for tensor, sequence and loss parallel, context parallel and
pipelines, in the order in which it applies them. Each GPU makes its share of the weights itself, so that nothing has to
come from the host. With the compiler each layer is compiled, as its ``--training.compile`` does:

    python -m validation.torchtitan_rows --trace table1-compile      # needs the extra `run`
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.distributed import DeviceMesh, init_device_mesh, pipelining
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

from dryfit.engine.card import H100
from dryfit.engine.fake_group import fake_group
from dryfit.engine.report import Report
from dryfit.engine.simulation import simulated
from dryfit.engine.trace import Options, trace_step
from validation.torchtitan_llama import LLAMAS, Llama, LlamaSizes, selective

AXES = (
    "pipeline",
    "shard",
    "context",
    "tensor",
)  # a mesh's axes, from the outermost to the innermost


@dataclass(frozen=True)
class Training:
    """One run: a model, a mesh, and what its command says.

    Attributes
    ----------
    rows, tokens
        Of a GPU's step, before context parallel divides the tokens; a pipeline cuts the rows into micro-batches.
    batches
        How many of them; by default as many as the pipeline is long.
    compiled_loss
        ``--training.compile`` of 2025 compiles the loss too.
    """

    sizes: LlamaSizes
    rows: int
    tokens: int = 8192
    shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    interleaved: bool = False
    batches: int = 0
    selective: bool = False
    compiled: bool = False
    compiled_loss: bool = False
    float8: bool = False
    expandable: bool = False

    @property
    def gpus(self) -> int:
        """All places of the mesh."""
        return self.shard * self.tensor * self.context * self.pipeline

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.pipeline * (2 if self.interleaved else 1)


# --- dividing a model, in torchtitan's order --------------------------------------------------------------------------


def _mesh(training: Training) -> DeviceMesh:
    sizes = {axis: getattr(training, axis) for axis in AXES if getattr(training, axis) > 1}
    mesh = init_device_mesh("meta", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if shared := tuple(axis for axis in ("shard", "context") if axis in sizes):
        mesh[shared]._flatten("sharded")
    return mesh


def _in_float8(model: nn.Module, gathered: bool) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=gathered)
    convert_to_float8_training(
        model, config=config, module_filter_fn=lambda _, name: name != "head"
    )


def _divide_matrices(model: Llama, mesh: DeviceMesh, float8: bool) -> None:
    """Tensor, sequence and loss parallel; with float8 what is gathered is cast before."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as plans

    ends = {
        "embedding": plans.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": plans.SequenceParallel(),
        "head": plans.ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    present = {name: plan for name, plan in ends.items() if getattr(model, name) is not None}
    plans.parallelize_module(model, mesh, present)
    columns, rows, inputs = plans.ColwiseParallel, plans.RowwiseParallel, plans.PrepareModuleInput
    if float8:
        from torchao.float8 import float8_tensor_parallel as eight

        columns, rows, inputs = (
            eight.Float8ColwiseParallel,
            eight.Float8RowwiseParallel,
            eight.PrepareFloat8ModuleInput,
        )
    for layer in model.layers:
        layouts = {"input_layouts": (Shard(1), None), "desired_input_layouts": (Replicate(), None)}
        plan = {
            "norm": plans.SequenceParallel(),
            "attention": inputs(**layouts),
            "attention.out": rows(output_layouts=Shard(1)),
            "norm_of_mlp": plans.SequenceParallel(),
            "mlp": inputs(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "mlp.gate": columns(),
            "mlp.up": columns(),
            "mlp.down": rows(output_layouts=Shard(1)),
        }
        plan |= {f"attention.{name}": columns() for name in ("query", "key", "value")}
        plans.parallelize_module(layer, mesh, plan)


def _prepared(model: Llama, training: Training, mesh: DeviceMesh) -> Llama:
    """Divided, checkpointed, compiled and sharded."""
    if training.tensor > 1:
        _divide_matrices(model, mesh["tensor"], training.float8)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": policy}
    if training.shard * training.context > 1:
        options["mesh"] = mesh["sharded"]
    last = len(model.layers) - 1
    for index, layer in enumerate(model.layers):
        chosen = {"context_fn": selective} if training.selective else {}
        layer = checkpoint_wrapper(layer, preserve_rng_state=False, **chosen)
        layer = torch.compile(layer, fullgraph=True) if training.compiled else layer
        given_back = training.pipeline == 1 and index < last
        model.layers[index] = fully_shard(layer, reshard_after_forward=given_back, **options)
    fully_shard(
        model, reshard_after_forward=False, **options
    )  # FSDP2 of that time left a root gathered anyway
    return model


def _parts(training: Training, place: int) -> list[range]:
    """The layers of each stage of a GPU: the first and the last stage have one less than others where some remain."""
    each, more = divmod(training.sizes.layers, training.stages)
    counts = [each + (0 < stage <= more) for stage in range(training.stages)]
    ends = list(accumulate(counts[:-1]))
    stages = [
        range(start, end)
        for start, end in zip([0, *ends], [*ends, training.sizes.layers], strict=True)
    ]
    return stages[place :: training.pipeline]


# --- its step ---------------------------------------------------------------------------------------------------------


def _loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(0, 1))


@contextmanager
def _around(
    training: Training, mesh: DeviceMesh, models: list[Llama], batch: list[torch.Tensor]
) -> Any:
    """Loss parallel with tensor parallel, and each GPU's part of the tokens with context parallel."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.parallel import loss_parallel

    with ExitStack() as stack:
        if training.tensor > 1:
            stack.enter_context(loss_parallel())
        if training.context > 1:
            buffers = [*batch, *(model.rotation for model in models)]
            places = [1] * len(batch) + [0] * len(models)
            stack.enter_context(
                context_parallel(
                    mesh["context"],
                    buffers=buffers,
                    buffer_seq_dims=places,
                    no_restore_buffers=set(batch),
                )
            )
        yield


def _clip(parameters: list[nn.Parameter], stages: DeviceMesh | None) -> None:
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True)
    if stages is not None:
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm **= 2
        torch.distributed.all_reduce(norm, group=stages.get_group())
        norm **= 0.5
    nn.utils.clip_grads_with_norm_(parameters, 1.0, norm, foreach=True)


def _schedule(training: Training, models: list[Llama], mesh: DeviceMesh, place: int) -> Any:
    group = mesh["pipeline"].get_group()
    batches = training.batches or training.pipeline
    tokens = training.tokens // training.context
    shape = (training.rows // batches, tokens)
    options = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    given = {
        "tokens": torch.empty(shape, dtype=torch.long, device="meta"),
        "hidden": torch.empty(
            (shape[0], tokens // training.tensor, training.sizes.width), **options
        ),
        "scores": torch.empty((*shape, training.sizes.words // training.tensor), **options),
    }
    stages = []
    for index, model in zip(range(place, training.stages, training.pipeline), models, strict=True):
        last = index == training.stages - 1
        stages.append(
            pipelining.PipelineStage(
                model,
                index,
                training.stages,
                torch.device("meta"),
                group=group,
                input_args=given["hidden" if index else "tokens"],
                output_args=given["scores" if last else "hidden"],
            )
        )
    kind = pipelining.ScheduleInterleaved1F1B if training.interleaved else pipelining.Schedule1F1B
    return kind(stages if training.interleaved else stages[0], batches, loss_fn=_loss)


def trace(training: Training, place: int = 0, *, costs: bool = False) -> Report:
    """Trace one GPU's step, on an H100; ``place``: of its stage in the pipeline."""
    options = Options(
        capability=(9, 0),
        costs=costs,
        compiled="follow" if training.compiled else "refuse",
        expandable_segments=training.expandable,
    )
    rank = place * training.gpus // training.pipeline
    card = simulated(H100) if training.compiled else nullcontext()
    with card, fake_group(training.gpus, rank):
        mesh = _mesh(training)
        with torch.device("meta"):
            build = partial(
                Llama, training.sizes, training.tokens, whole_attention=training.selective
            )
            models = [build(part=part) for part in _parts(training, place)]
            batch = torch.empty((2, training.rows, training.tokens), dtype=torch.long)
        for model in models:
            if training.float8:
                _in_float8(model, gathered=training.shard * training.context > 1)
            _prepared(model, training, mesh)
        parameters = [parameter for model in models for parameter in model.parameters()]
        whole = nn.ModuleList(models) if len(models) > 1 else models[0]
        optimizer = torch.optim.AdamW(parameters, foreach=True)
        schedule = _schedule(training, models, mesh, place) if training.pipeline > 1 else None
        loss_of = torch.compile(_loss) if training.compiled_loss else _loss

        def step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            optimizer.zero_grad()
            inputs, labels = batch
            with _around(training, mesh, models, [inputs, labels]):
                if schedule is None:
                    scores = models[0](inputs)
                    loss = loss_of(scores, labels)
                    del scores
                    loss.backward()
                else:
                    last = (
                        {"target": labels, "losses": []} if place == training.pipeline - 1 else {}
                    )
                    schedule.step(*([inputs] if place == 0 else []), **last)
            _clip(parameters, mesh["pipeline"] if schedule else None)
            optimizer.step()
            if training.float8 and training.shard * training.context > 1:
                from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

                for model in models:
                    precompute_float8_dynamic_scale_for_fsdp(model)

        return trace_step(whole, optimizer, step, tuple(batch.unbind()), options)


def step_of_torchtitan(gpus: int, *, costs: bool = False, compiled: bool = False) -> Report:
    """Trace Llama 3.1 8B on so many H100, sharded, with selective checkpointing; ``compiled``: each layer is."""
    training = Training(LLAMAS["8B"], rows=2, shard=gpus, selective=True, compiled=compiled)
    return trace(training, costs=costs)
