"""Models divided on meshes as transformers and accelerate divide them, and gradients that lie on several meshes.

* ``tensor`` and ``expert``, with FSDP2 or without: transformers' ``DistributedConfig`` with the architecture's own
  plans, as ``from_pretrained`` applies it.
* ``context`` and ``replicate``: accelerate's ``ParallelismConfig``, whose mesh its FSDP2 shards on. A micro-batch runs
  inside PyTorch's ``context_parallel``, as transformers' Trainer calls it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
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
    from transformers.distributed.utils import initialize_distributed_mesh

    parallel = scenario.parallel
    sharded = parallel.sharded
    try:
        plan = DistributedConfig(
            tp_size=parallel.tensor,
            tp_plan="auto" if parallel.tensor > 1 else None,
            fsdp_size=parallel.shard if sharded else 1,
            fsdp_mixed_precision=parallel.reduce_in_fp32,
            dp_replicate_size=parallel.replicate,
            pp_size=parallel.pipeline,
            ep_size=parallel.expert,
        )
        _, mesh = initialize_distributed_mesh(plan)
        plan.pp_size = 1  # transformers' own pipeline runs forward alone
        return type(model).maybe_distribute_model(model, plan, mesh)
    except ValueError as error:
        raise UserError(
            f"transformers can't divide this architecture so: {error}",
            where=f"parallel, model_type {scenario.model['model_type']}",
            found={name: getattr(parallel, name) for name in ("tensor", "expert", "replicate")},
            allowed="fsdp2 without tensor and expert",
            change={"parallel": {"strategy": "fsdp2", "gpus": parallel.gpus}},
        ) from None


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
def split_tokens(model: nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[None]:
    """Around a micro-batch: each GPU gets its part of the tokens, and attention goes around the ring.

    As the Trainer's ``_prepare_context_parallel_inputs``: shifted labels and positions are added to the batch.
    """
    from torch.distributed.tensor.experimental import context_parallel

    rows, tokens = batch["input_ids"].shape
    shifted = functional.pad(batch["labels"], (0, 1), value=_IGNORED)
    batch["shift_labels"] = shifted[:, 1:].contiguous()
    batch["position_ids"] = torch.arange(tokens, device=batch["input_ids"].device).expand(rows, -1)
    del shifted
    parts = [batch[name] for name in ("input_ids", "labels", "shift_labels", "position_ids")]
    mesh = getattr(model, _CONTEXT)
    with context_parallel(mesh, buffers=parts, buffer_seq_dims=[1] * len(parts), no_restore_buffers=set(parts)):
        yield


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
