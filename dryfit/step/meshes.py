"""Models divided on meshes as transformers and accelerate divide them, and gradients that lie on several meshes.

* ``tensor`` and ``expert``, with FSDP2 or without: transformers' ``DistributedConfig`` with the architecture's own
  plans, as ``from_pretrained`` applies it.
* ``tensor`` with ``sequence_parallel`` or ``loss_parallel``, which transformers 5.24 has no plan for: the plan and the
  units of FSDP2 that torchtitan gave transformers' models in April 2026 (``transformers_modeling_backend``), in
  PyTorch's styles. Mixed precision is FSDP2's there, and autocast runs where nothing is sharded.
* ``ulysses``: DeepSpeed's attention for transformers' models under its ZeRO, as accelerate's ``sp_size`` calls it.
* ``context`` and ``replicate``: accelerate's ``ParallelismConfig``, whose mesh its FSDP2 shards on. A micro-batch runs
  inside PyTorch's ``context_parallel``, as transformers' Trainer calls it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dryfit.common.errors import UserError
from dryfit.engine.patching import patched
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import DTYPES

_IGNORED = -100  # the label that transformers' loss leaves out
_CONTEXT = "context_mesh"  # what a model divided by tokens remembers of its mesh
HEADS = "exchanging_attention"  # and one under Ulysses of its attention


def divided_by_plan(model: nn.Module, scenario: Scenario) -> nn.Module:
    """transformers' tensor, expert and FSDP2 plans, as ``from_pretrained(distributed_config=...)`` applies them.

    Raises :class:`UserError` if the architecture has no such plan, or transformers refuses the mesh.
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
            type(base).maybe_distribute_model(
                base, replace(plan, fsdp_size=1, dp_replicate_size=1), mesh
            )
            base.config.distributed_config = plan
            layers = base._resolve_parallel_plans(plan)[2]
        _divide_adapters(base)
        if (
            plan.dp_size > 1
        ):  # PEFT's forward goes past that of the base, so its model is the outermost unit
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
_WITH_WHOLE_ADAPTERS = (
    None,
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_rep",
    "rowwise_split_input",
)


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
            raise ValueError(
                f"PEFT knows no adapter beside {name}, which its plan divides by `{style}`"
            )
        factors = {"colwise": layer.lora_B, "rowwise": layer.lora_A}.get(style, {})
        for adapter, factor in factors.items():
            label = f"{name}.{adapter}"
            add_lora_tp_hooks_dtensor(
                factor, style, mesh, base_layer=layer.base_layer, module_name=label
            )


# --- torchtitan's plan for transformers' models -----------------------------------------------------------------------

_COLUMNS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.fc1",
)
_ROWS = ("self_attn.o_proj", "self_attn.dense", "mlp.down_proj", "mlp.fc2")
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def divided_as_titan_does(model: nn.Module, scenario: Scenario, device: torch.device) -> nn.Module:
    """Tensor, sequence and loss parallel, then FSDP2 over what the mesh leaves.

    Raises :class:`UserError` if a layer has parameters that the plan does not know.
    """
    from torch.distributed.device_mesh import init_device_mesh

    parallel = scenario.parallel
    sizes = {"replicate": parallel.replicate, "shard": parallel.shard, "tensor": parallel.tensor}
    sizes = {axis: size for axis, size in sizes.items() if size > 1}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    divide_matrices(model, scenario, mesh["tensor"])
    compile_parts(model, scenario)
    if others := tuple(axis for axis in sizes if axis != "tensor"):
        _shard_units(model, scenario, mesh[others])
    return model


def divide_matrices(model: nn.Module, scenario: Scenario, mesh: Any) -> None:
    """The plan itself, over the dimension of a mesh that divides matrices."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as styles

    _refuse_unknown_parts(model, scenario)
    parallel, base = scenario.parallel, model.base_model
    between = Shard(1) if parallel.sequence_parallel else Replicate()
    scores = Shard(-1) if parallel.loss_parallel else Replicate()
    ends = {
        "embed_tokens": styles.RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        **({"norm": styles.SequenceParallel()} if parallel.sequence_parallel else {}),
    }
    styles.parallelize_module(base, mesh, ends)
    head = styles.ColwiseParallel(
        input_layouts=between, output_layouts=scores, use_local_output=not parallel.loss_parallel
    )
    styles.parallelize_module(model, mesh, {"lm_head": head})
    columns, rows, inputs = _styles(scenario)
    plan: dict[str, Any] = {name: columns() for name in _COLUMNS}
    plan |= {name: rows(output_layouts=between) for name in _ROWS}
    plan |= {
        name: styles.SequenceParallel(sequence_dim=2, use_local_output=True) for name in _HEAD_NORMS
    }
    if parallel.sequence_parallel:
        layouts = {"hidden_states": between}, {"hidden_states": Replicate()}
        plan["self_attn"] = inputs(
            input_kwarg_layouts=layouts[0], desired_input_kwarg_layouts=layouts[1]
        )
        plan["mlp"] = inputs(input_layouts=(between,), desired_input_layouts=(Replicate(),))
        plan |= {name: styles.SequenceParallel() for name in _NORMS}
    for layer in base.layers:
        present = {name for name, _ in layer.named_modules()}
        styles.parallelize_module(
            layer, mesh, {name: style for name, style in plan.items() if name in present}
        )


def _styles(scenario: Scenario) -> tuple[Any, Any, Any]:
    """Of products by columns, by rows, and of what goes into them; scaled by tensors, float8 is what they exchange."""
    from torch.distributed.tensor import parallel as styles

    if scenario.float8 != "tensorwise":
        return styles.ColwiseParallel, styles.RowwiseParallel, styles.PrepareModuleInput
    from torchao.float8 import float8_tensor_parallel as eight

    return eight.Float8ColwiseParallel, eight.Float8RowwiseParallel, eight.PrepareFloat8ModuleInput


def _refuse_unknown_parts(model: nn.Module, scenario: Scenario) -> None:
    known = {*_COLUMNS, *_ROWS, *_NORMS, *_HEAD_NORMS, "embed_tokens", "norm", "lm_head"}
    for name, _ in model.named_parameters():
        own = re.sub(r"^(model\.)?(layers\.\d+\.)?", "", name).rpartition(".")[0]
        if own not in known:
            raise UserError(
                "torchtitan's plan for sequence and loss parallel does not know this architecture's layers: they have"
                f" {name}.",
                where=f"parallel, model_type {scenario.model['model_type']}",
                found="sequence_parallel or loss_parallel",
                allowed="a dense decoder such as llama, qwen2, qwen3 or mistral; or both false",
                change={
                    "parallel": {
                        **scenario.parallel.written,
                        "sequence_parallel": False,
                        "loss_parallel": False,
                    }
                },
            )


def _shard_units(model: nn.Module, scenario: Scenario, mesh: Any) -> None:
    """FSDP2 as torchtitan's ``apply_fsdp``: embedding, each layer, and norm with head, which stay gathered."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    parallel, dtype = scenario.parallel, DTYPES.get(scenario.autocast_precision)
    summed = torch.float32 if parallel.reduce_in_fp32 else None
    options: dict[str, Any] = {"mesh": mesh}
    options["mp_policy"] = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=summed, cast_forward_inputs=False
    )
    if parallel.offload == "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    again = {"reshard_after_forward": parallel.reshard_after_forward}
    base = model.base_model
    for unit in (base.embed_tokens, *base.layers):
        fully_shard(unit, **options, **again)
    fully_shard([base.norm, model.lm_head], **options, reshard_after_forward=False)
    fully_shard(model, **options)


@contextmanager
def whole_rows(batch: dict[str, torch.Tensor], scenario: Scenario) -> Iterator[None]:
    """Around a micro-batch of a model divided as torchtitan does: positions of whole rows, and loss parallel."""
    tokens = batch["input_ids"]
    batch["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None]
    with dividing_loss(scenario.parallel):
        yield


def dividing_loss(parallel: Any) -> AbstractContextManager:
    """PyTorch's ``loss_parallel``, forward and backward, where a step has it."""
    if not parallel.loss_parallel:
        return nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel

    return loss_parallel()


# --- accelerate's mesh ------------------------------------------------------------------------------------------------


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
        context_parallel(
            mesh, buffers=parts, buffer_seq_dims=[1] * len(parts), no_restore_buffers=set(parts)
        ),
    ):
        yield


def flash_attention_on_cpu() -> AbstractContextManager[None]:
    """PyTorch's ring knows attention by CUDA's operators alone; here the CPU's own kernel answers for one of them."""
    _register_flash_attention()

    def attention(
        query: Any, key: Any, value: Any, *, is_causal: bool = False, scale: Any = None, **_: Any
    ) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, scale=scale
        )[0]

    # context_parallel exchanges the function by its own name
    attention.__name__ = functional.scaled_dot_product_attention.__name__
    return patched([(functional, "scaled_dot_product_attention", attention)])


@cache
def _register_flash_attention() -> torch.library.Library:
    """``aten::_scaled_dot_product_flash_attention`` and its backward for tensors on the CPU, grouped keys included."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    derivative = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(
        query: Any,
        key: Any,
        value: Any,
        dropout: float = 0.0,
        causal: bool = False,
        *_: Any,
        scale: Any = None,
    ) -> tuple[Any, ...]:
        output, sums = kernel(query, key, value, dropout, causal, scale=scale)
        seed, offset = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
        return (
            output,
            sums,
            None,
            None,
            query.shape[2],
            key.shape[2],
            seed,
            offset,
            query.new_empty(0),
        )

    def backward(
        gradient: Any,
        query: Any,
        key: Any,
        value: Any,
        output: Any,
        sums: Any,
        *others: Any,
        scale: Any = None,
    ) -> tuple[Any, ...]:
        dropout, causal = others[4:6]  # behind the rows' limits and longest lengths
        return derivative(gradient, query, key, value, output, sums, dropout, causal, scale=scale)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    return library


# --- DeepSpeed's Ulysses ----------------------------------------------------------------------------------------------


def exchanging_heads(model: nn.Module, scenario: Scenario) -> tuple[Any, dict[str, Any]]:
    """As accelerate's ``_prepare_deepspeed`` with ``sp_size``: the groups that DeepSpeed's engine is told, and
    attention that exchanges heads for tokens, by the name of the kernel that it stands for.

    DeepSpeed puts that attention into transformers' table for good; here :func:`parts_of_rows` puts it there while a
    micro-batch runs.
    """
    from accelerate.big_modeling import _refuse_recurrent_layers_under_sequence_parallelism
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    try:
        _refuse_recurrent_layers_under_sequence_parallelism(model)
    except ValueError as error:
        raise UserError(
            "accelerate refuses Ulysses for a model whose layers carry a state along the row.",
            where=f"parallel.ulysses; model (model_type {scenario.model['model_type']})",
            found=str(error).partition(" (")[0],
            allowed="ulysses: 1, or a model of full attention alone",
            change={"parallel": {"ulysses": 1}},
        ) from None
    name = model.config._attn_implementation
    groups = UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation=name,
        sequence_parallel_size=scenario.parallel.ulysses,
        micro_batch_size=scenario.micro_batch,
        disable_in_eval=True,
    )
    attention = {name: ALL_ATTENTION_FUNCTIONS[name]}
    del ALL_ATTENTION_FUNCTIONS[name]
    return groups, attention


@contextmanager
def parts_of_rows(model: nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[None]:
    """Around a micro-batch under Ulysses: each GPU gets its part of the rows, as DeepSpeed's
    ``UlyssesSPDataLoaderAdapter`` gives it.
    """
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rows, tokens = batch["input_ids"].shape
    count, rank = groups.get_sequence_parallel_world_size(), groups.get_sequence_parallel_rank()
    labels = functional.pad(batch.pop("labels"), (0, 1), value=_IGNORED)
    batch["shift_labels"] = labels[:, 1:]
    batch["position_ids"] = torch.arange(tokens, device=labels.device).expand(rows, -1)
    del labels
    for name, whole in batch.items():
        batch[name] = whole.chunk(count, dim=1)[rank].clone()
    del whole
    attention = getattr(model, HEADS)
    for name, function in attention.items():
        ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        for name in attention:
            del ALL_ATTENTION_FUNCTIONS[name]


def loss_of_parts(model: nn.Module, batch: dict[str, torch.Tensor], parallel: Any) -> torch.Tensor:
    """The loss over a row's parts, as the Trainer takes it under Ulysses."""
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    plan = SimpleNamespace(sp_backend="deepspeed", sp_size=parallel.ulysses)
    return deepspeed_sp_compute_loss(None, model, batch, False, plan)


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


def compile_parts(model: nn.Module, scenario: Scenario) -> None:
    """Compile a model in place, as ``model.compile(mode=...)`` does: the whole, or each of its decoder's layers.

    What a layer is the model itself says, where it tells FSDP and accelerate what not to split. FSDP2 shards what is
    compiled already, as accelerate's regional compilation and torchtitan have it.
    """
    how, mode = scenario.compile, scenario.compile_mode
    if how == "model":
        model.compile(mode=mode)
    elif how == "layers":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = set(base._no_split_modules or ())
        for module in base.modules():
            if type(module).__name__ in names:
                module.compile(mode=mode)
