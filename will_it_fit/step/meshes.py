"""Models divided on meshes as transformers and accelerate divide them, and gradients that lie on several meshes.

* ``tensor`` and ``expert``, with FSDP2 or without: transformers' ``DistributedConfig`` with the architecture's own
  plans, as ``from_pretrained`` applies it.
* ``context`` and ``replicate``: accelerate's ``ParallelismConfig``, whose mesh its FSDP2 shards on. A micro-batch runs
  inside PyTorch's ``context_parallel``, as transformers' Trainer calls it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from will_it_fit.common.errors import UserError
from will_it_fit.scenario.scenario import Scenario

_IGNORED = -100  # the label that transformers' loss leaves out
_CONTEXT = "context_mesh"  # what a model divided by tokens remembers of its mesh


def divided_by_plan(model: nn.Module, scenario: Scenario) -> nn.Module:
    """transformers' tensor, expert and FSDP2 plans, as ``from_pretrained(distributed_config=...)`` applies them.

    Raises
    ------
    UserError
        If the architecture has no such plan, or transformers refuses the mesh.
    """
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
    from transformers.distributed.utils import initialize_distributed_mesh

    parallel = scenario.parallel
    plan = DistributedConfig(
        tp_size=parallel.tensor,
        tp_plan="auto" if parallel.tensor > 1 else None,
        fsdp_size=parallel.shard if parallel.sharded else 1,
        fsdp_mixed_precision=parallel.reduce_in_fp32,
        dp_replicate_size=parallel.replicate,
        pp_size=parallel.pipeline,
        ep_size=parallel.expert,
    )
    try:
        _, mesh = initialize_distributed_mesh(plan)
        plan.pp_size = 1  # transformers' own pipeline runs forward alone
        if scenario.method == "full":
            return type(model).maybe_distribute_model(model, plan, mesh)
        base = model.get_base_model()
        with _adapters_aside(base):
            type(base).maybe_distribute_model(base, replace(plan, fsdp_size=1, dp_replicate_size=1), mesh)
            base.config.distributed_config = plan
            layers = base._resolve_parallel_plans(plan)[2]
        _divide_adapters(base)
        if plan.dp_size > 1:  # PEFT's forward goes past that of the base, so its model is the outermost unit
            units = {f"base_model.model.{name}": style for name, style in layers.items()}
            model = apply_fully_sharded_data_parallelism(model, mesh, units, {})
        return model
    except ValueError as error:
        raise UserError(
            f"transformers can't divide this architecture so: {error}",
            where=f"parallel, model_type {scenario.model['model_type']}",
            found={name: getattr(parallel, name) for name in ("tensor", "expert", "replicate")},
            allowed="fsdp2 without tensor and expert",
            change={"parallel": {"strategy": "fsdp2", "gpus": parallel.gpus}},
        ) from None


# transformers' ways to divide a layer whose output is whole on each GPU; None: the layer is not divided.
_WITH_WHOLE_ADAPTERS = (None, "colwise_gather_output", "colwise_rep", "rowwise_rep", "rowwise_split_input")


@contextmanager
def _adapters_aside(base: nn.Module) -> Iterator[None]:
    """transformers' plans name the layers that LoRA has wrapped."""
    from peft.tuners.lora import LoraLayer

    wrapped = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in wrapped.items():
        base.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in wrapped.items():
            base.set_submodule(name, layer)


def _divide_adapters(base: nn.Module) -> None:
    """Divide adapters as the layers that they are beside, by PEFT's own rule (``LoraModel._create_and_replace``).

    Of a layer whose rows are divided B is, of one whose columns are divided A; the other factor is whole on each GPU.
    So are both beside a layer whose output is whole on each GPU.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.model import add_lora_tp_hooks_dtensor, get_tp_plan_and_mesh

    for name, layer in base.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        style, mesh = get_tp_plan_and_mesh(base, name)
        if style not in ("colwise", "rowwise", *_WITH_WHOLE_ADAPTERS):
            raise ValueError(f"PEFT knows no adapter beside {name}, which its plan divides by `{style}`")
        factors = {"colwise": layer.lora_B, "rowwise": layer.lora_A}.get(style, {})
        for adapter, factor in factors.items():
            label = f"{name}.{adapter}"
            add_lora_tp_hooks_dtensor(factor, style, mesh, base_layer=layer.base_layer, module_name=label)


def accelerates_mesh(scenario: Scenario, device: torch.device) -> tuple[Any, Any]:
    """accelerate's ``ParallelismConfig`` of replicas, shards and parts of rows, and its mesh."""
    from accelerate import ParallelismConfig

    parallel = scenario.parallel
    plan = ParallelismConfig(
        dp_replicate_size=parallel.replicate, dp_shard_size=parallel.shard, cp_size=parallel.context
    )
    return plan, plan.build_device_mesh(device.type)


def dividing_tokens(model: nn.Module, plan: Any, mesh: Any) -> None:
    """As accelerate's ``_prepare_cp``: how keys and values go around, and attention without masks."""
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(plan.cp_handler.cp_comm_strategy)
    _attach_context_parallel_hooks(model)
    setattr(model, _CONTEXT, mesh["cp"])


@contextmanager
def split_tokens(model: nn.Module, batch: dict[str, Any], learned: int) -> Iterator[None]:
    """Around a micro-batch: each GPU gets its part of the tokens, and attention goes around the ring.

    As the Trainer's ``_prepare_context_parallel_inputs``: shifted labels and positions are added to the batch.
    ``learned`` is the number of tokens that the loss counts in the whole rows (``num_items_in_batch``). So the GPUs'
    losses add up to the mean over all of them, however many of them are on each GPU.
    """
    from torch.distributed.tensor.experimental import context_parallel

    rows, tokens = batch["input_ids"].shape
    shifted = functional.pad(batch["labels"], (0, 1), value=_IGNORED)
    batch["shift_labels"] = shifted[:, 1:].contiguous()
    batch["position_ids"] = torch.arange(tokens, device=batch["input_ids"].device).expand(rows, -1)
    batch["num_items_in_batch"] = learned
    del shifted
    parts = [batch[name] for name in ("input_ids", "labels", "shift_labels", "position_ids")]
    mesh = getattr(model, _CONTEXT)
    on_cpu = parts[0].device.type == "cpu"
    with (
        flash_attention_on_cpu() if on_cpu else nullcontext(),
        context_parallel(mesh, buffers=parts, buffer_seq_dims=[1] * len(parts), no_restore_buffers=set(parts)),
    ):
        yield


@contextmanager
def flash_attention_on_cpu() -> Iterator[None]:
    """PyTorch's ring knows attention by CUDA's operators alone; here the CPU's own kernel answers for one of them."""
    _register_flash_attention()
    original = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *, is_causal: bool = False, scale: Any = None, **_: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]

    attention.__name__ = original.__name__  # context_parallel exchanges the function by its own name
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


@cache
def _register_flash_attention() -> torch.library.Library:
    """``aten::_scaled_dot_product_flash_attention`` and its backward for tensors on the CPU, grouped keys included."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    derivative = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(
        query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, *_: Any, scale: Any = None
    ) -> tuple[Any, ...]:
        output, sums = kernel(query, key, value, dropout, causal, scale=scale)
        seed, offset = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
        return output, sums, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)

    def backward(
        gradient: Any, query: Any, key: Any, value: Any, output: Any, sums: Any, *others: Any, scale: Any = None
    ) -> tuple[Any, ...]:
        dropout, causal = others[4:6]  # behind the rows' limits and longest lengths
        return derivative(gradient, query, key, value, output, sums, dropout, causal, scale=scale)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    return library


def mesh_of(tensor: torch.Tensor) -> Any:
    """The mesh that a tensor is divided on; None of a plain one."""
    return getattr(tensor, "device_mesh", None)


def clip_on_meshes(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip gradients that lie on several meshes, as the Trainer's ``_mixed_mesh_grad_norm``; returns their norm."""
    by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[mesh_of(parameter.grad)].append(parameter)
    norms = []
    for group in by_mesh.values():
        norm = nn.utils.get_total_norm([parameter.grad for parameter in group])
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    whole = torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, whole)
    return whole
