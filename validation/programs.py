"""The programs that measured: each builds its model and takes its step in its own way, and the core traces it.

A function here takes a row and returns what :func:`dryfit.engine.trace.trace_step` gives. Nothing of the trace is
exchanged: what a program does is written down in its own function, from its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.engine.allocator import EMPTY_CACHE
from dryfit.engine.fake_group import fake_group
from dryfit.engine.patching import patched
from dryfit.engine.report import Report
from dryfit.engine.trace import Options, trace_step
from dryfit.step.step import random_step
from dryfit.tracing.loaders import WeightLoader
from dryfit.tracing.prepare import Prepared, prepare
from validation import environments
from validation.rows import SOURCES, MeasuredRow

# How each session on the T4 brought its models to the GPU: as the stated versions of transformers and peft do, but for
# two sessions whose figures say otherwise (docs/memory-validation.md).
SESSIONS = {
    "t4-phase3": {"transformers": "5.0.0", "peft": "0.19.1"},
    "t4-final": {"transformers": "5.0.0", "peft": "0.19.1"},
    "t4-sweep": {"transformers": "5.0.0", "peft": "0.19.1"},  # states 5.17.0 and 0.20.0
    "t4-notebook": {"transformers": "5.17.0", "peft": "0.20.0"},  # states 5.0.0 and 0.19.1
}
TORCH_OF_THE_A100 = "2.4.1"
CANIFINETUNE = {"transformers": "5.8.1", "peft": "0.19.1", "bitsandbytes": "0.49.2"}


def traced(prepared: Prepared, step: Callable[..., None], **options: Any) -> Report:
    """Trace a step of what was prepared, with how it was loaded."""
    options = Options(histories=prepared.histories, label=prepared.label, **options)
    return trace_step(prepared.model, prepared.optimizer, step, options=options)


def fitcheck(row: MeasuredRow, orders: int = 1, *, costs: bool = False) -> Report:
    """``scripts/measure.py`` of fitcheck-llm.

    One tensor is input and label, and serves all steps; the model's output lives until the update is done, the
    gradients until the next step begins; nothing is clipped. Models are quantized on the GPU, others moved to it.
    """
    scenario, gpu = row.scenario, find("t4", row.id)
    quantized = scenario.method == "qlora"
    loader = WeightLoader.of(**SESSIONS[row.session], loaded_on_cpu_first=not quantized)
    prepared = prepare(
        scenario, loader=loader, orders=orders if loader.workers > 1 and quantized else 1
    )
    model, optimizer = prepared.model, prepared.optimizer
    tokens = None

    def step() -> None:
        nonlocal tokens
        optimizer.zero_grad(set_to_none=True)
        if tokens is None:
            tokens = torch.empty(
                (scenario.micro_batch, scenario.sequence_length), dtype=torch.long, device="meta"
            )
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()

    return traced(
        prepared, step, capability=gpu.capability, costs=costs, capacity_bytes=gpu.usable_bytes
    )


def trainer(row: MeasuredRow, orders: int = 1, *, costs: bool = False) -> Report:
    """The benchmark of fms-acceleration: transformers' Trainer under TRL's ``SFTTrainer``, with the package flash-attn.

    ``scripts/benchmarks/scenarios*.yaml`` and ``defaults.yaml`` there say: reentrant checkpointing, as the Trainer's
    default then was; LoRA dropout 0.1; ``bf16: True`` for quantized models, which is autocast over weights of 16 bits;
    no padding; ``baseline-peft-bnb`` lets TRL prepare the model, ``accelerated-peft-bnb`` does without. On several GPUs
    ``accelerate.yaml`` says FSDP1 with ``fsdp_sync_module_states``, and TRL prepares nothing.
    """
    scenario = row.scenario
    gpus = scenario.parallel.gpus
    with fake_group(gpus) if gpus > 1 else nullcontext():
        with _units_are_sent() if gpus > 1 else nullcontext():
            prepared = prepare(scenario, attention_implementation="flash_attention_2")
        step = random_step(prepared.model, prepared.optimizer, scenario, "meta", max_grad_norm=1.0)
        return traced(
            prepared, step, capability=(8, 0), torch_version=TORCH_OF_THE_A100, costs=costs
        )


@contextmanager
def _units_are_sent() -> Iterator[None]:
    """FSDP1's ``sync_module_states``: the first process sends each unit's parameters to the others, in buckets.

    NCCL reads a bucket on a stream of its own, and before PyTorch 2.7 its block is not reused until that is done: the
    unit's one tensor is made in the meantime, and its shard afterwards. So shards lie in what buckets were, two in
    each, where they would otherwise have segments of their own with a rest that can't be split off.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import _init_utils as initialization
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    move, divide = initialization._move_module_to_device, FlatParamHandle.shard
    sent: list[torch.Tensor] = []

    def move_and_send(module: nn.Module, ignored: set, *rest: Any) -> None:
        move(module, ignored, *rest)
        tensors = [
            parameter.detach() for parameter in initialization._get_orig_params(module, ignored)
        ]
        buckets, _ = dist._compute_bucket_assignment_by_size(
            tensors, [initialization.PARAM_BROADCAST_BUCKET_SIZE]
        )
        for bucket in buckets:
            sent.append(torch.cat([tensors[index].reshape(-1) for index in bucket]))

    def shard(handle: Any) -> None:
        sent.clear()
        divide(handle)

    places = [
        (initialization, "_move_module_to_device", move_and_send),
        (FlatParamHandle, "shard", shard),
    ]
    with patched(places):
        yield


def peft_comparison(row: MeasuredRow, orders: int = 1, *, costs: bool = False) -> Report:
    """``method_comparison/MetaMathQA/run.py`` of peft.

    A manual loop: batch, output and loss live until the next ones replace them; the gradients until the next step
    begins, after its batch is there. Batches are padded and carry a mask; the cache of keys and values is on. The texts
    are sorted in buckets of 20 batches, the longest first, and every 10 steps the allocator's cache is emptied: so the
    longest batch comes after the shortest of the bucket before it, and finds no free segments. Before training the loss
    of the base model is computed inside ``disable_adapter()``, which makes every adapter's parameters trainable again.
    """
    scenario, settings = row.scenario, row.settings
    prepared = prepare(scenario)
    model = prepared.model
    optimizer = _optimizer(model, settings["optimizer"], settings["optimizer_options"])
    if scenario.method != "full":
        with model.disable_adapter():
            pass
    ranks = getattr(getattr(model, "base_model", None), "rankallocator", None)
    kept: dict[str, Any] = {}

    def step(batch: dict[str, torch.Tensor]) -> None:
        kept["batch"] = batch
        optimizer.zero_grad()
        kept["outputs"] = model(**batch, num_items_in_batch=batch["input_ids"].numel())
        kept["loss"] = kept["outputs"].loss
        kept["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (
            ranks is not None
        ):  # update_and_allocate() of AdaLoRA; the masks that it makes then need values
            ranks.update_ipt(model.base_model.model)
        torch.cuda.empty_cache()

    def batch(tokens: int) -> dict[str, torch.Tensor]:
        shape = (scenario.micro_batch, tokens)
        names = ("input_ids", "attention_mask", "labels")
        return {name: torch.empty(shape, dtype=torch.long, device="meta") for name in names}

    (loaded,) = prepared.histories
    return trace_step(
        model,
        optimizer,
        step,
        batch(scenario.sequence_length),
        Options(
            previous_batch=batch(scenario.previous_sequence_length),
            capability=(8, 9),
            histories=[loaded._replace(events=[*loaded.events, EMPTY_CACHE])],
            label=prepared.label,
            costs=costs,
        ),
    )


def canifinetune(row: MeasuredRow, orders: int = 1, *, costs: bool = False) -> Report:
    """``src/canifinetune/bench/runner.py`` of canifinetune, on Windows.

    A loop in a function: batch, outputs and loss live until the next ones are there. Its mask of ones is left out, as
    transformers leaves it out where it hides nothing. Quantized models are loaded to the GPU, others moved to it.
    """
    scenario = row.scenario
    loader = WeightLoader.of(**CANIFINETUNE, loaded_on_cpu_first=scenario.method != "qlora")
    prepared = prepare(scenario, loader=loader, orders=1)
    model, optimizer = prepared.model, prepared.optimizer
    kept: dict[str, Any] = {}

    def step() -> None:
        shape = (scenario.micro_batch, scenario.sequence_length)
        names = ("input_ids", "attention_mask", "labels")
        kept["batch"] = {
            name: torch.empty(shape, dtype=torch.long, device="meta") for name in names
        }
        kept["outputs"] = model(
            input_ids=kept["batch"]["input_ids"], labels=kept["batch"]["labels"]
        )
        kept["loss"] = kept["outputs"].loss
        kept["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    of_windows = {"torch_version": "2.6.0", "platform": scenario.platform}
    return traced(
        prepared, step, capability=(8, 9), costs=costs, steps=row.settings["steps"], **of_windows
    )


def torchtitan(row: MeasuredRow, orders: int = 1, *, costs: bool = False) -> Report:
    """See :mod:`validation.torchtitan`."""
    from validation.torchtitan import step_of_torchtitan

    return step_of_torchtitan(row.scenario.parallel.gpus, costs=costs)


def _optimizer(model: nn.Module, kind: str, options: dict[str, Any]) -> torch.optim.Optimizer:
    """``get_optimizer_and_scheduler`` of peft's ``method_comparison/MetaMathQA/utils.py``, with a GPU's ``foreach``."""
    from peft import optimizers

    adamw = torch.optim.AdamW
    if kind == "lora-fa":
        return optimizers.create_lorafa_optimizer(model, **options)
    if kind == "lora+":
        return optimizers.create_loraplus_optimizer(
            model, optimizer_cls=adamw, foreach=True, **options
        )
    if kind == "riemannian":
        return optimizers.create_riemannian_optimizer(
            model, optimizer_cls=adamw, foreach=True, **options
        )
    return getattr(torch.optim, kind)(model.parameters(), foreach=True, **options)


PROGRAMS: dict[str, Callable[..., Report]] = {
    "fitcheck": fitcheck,
    "trainer": trainer,
    "peft_comparison": peft_comparison,
    "canifinetune": canifinetune,
    "torchtitan": torchtitan,
}


def check_versions(row: MeasuredRow) -> None:
    """Refuse to trace the A100's rows with libraries of which they say nothing."""
    if row.program != "trainer" or environments.older("transformers", "5"):
        return
    installed = environments.installed("transformers", "peft", "bitsandbytes")
    environment = next(
        source.environment for source in SOURCES.values() if row.session in source.sessions
    )
    raise UserError(
        "The A100's rows are those of older versions, whose losses and attention took other memory.",
        where=row.id,
        found=", ".join(f"{name} {number}" for name, number in installed.items()),
        allowed=f"the versions in envs/{environment}",
        write=f"conda env create -f envs/{environment}",
    )


def run(row: MeasuredRow, orders: int = 1, *, costs: bool = False) -> Report:
    """Trace a row's program.

    ``orders``: how many orders of a threaded loading, where chance decided; ``costs``: with what each operator costs.
    """
    return PROGRAMS[row.program](row, orders, costs=costs)
