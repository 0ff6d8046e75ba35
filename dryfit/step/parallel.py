"""One model over several GPUs: how training wraps it under a real group of processes, and the trace under a fake one.

:func:`parallelize` needs the default process group to be there (``torch.distributed``): NCCL's or gloo's for training,
:func:`dryfit.engine.fake_group.fake_group` for the trace. It calls what ``accelerate launch`` with the same
settings would call: accelerate's ``fsdp2_prepare_model``, PyTorch's FSDP1 with PEFT's wrapping policy, PyTorch's DDP,
accelerate's ``_prepare_deepspeed``; on a mesh what :mod:`dryfit.step.meshes` and :mod:`dryfit.step.pipeline`
say. The optimizer is made afterwards, over the parameters that the wrapped model has
(for DeepSpeed's ZeRO before, since it divides what the optimizer updates). The order::

    model = build_model(scenario, where_to_build(scenario, device), weights=folder)
    model = parallelize(model, scenario, device)
    optimizer = build_optimizer(model, scenario, learning_rate=1e-4)

FSDP takes the model from the CPU and brings it to the device unit by unit, so that no GPU ever holds all of it; DDP's
model is built on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import DTYPES, adapter_names
from dryfit.step.meshes import (
    HEADS,
    accelerates_mesh,
    clip_on_meshes,
    compile_parts,
    divided_as_titan_does,
    divided_by_plan,
    dividing_tokens,
    exchanging_heads,
    mesh_of,
)
from dryfit.step.pipeline import pipeline_of


def where_to_build(scenario: Scenario, device: str) -> str:
    """The device to build a model on that is to be parallelized on ``device``: the CPU, if that gets a part alone."""
    by_parts = scenario.parallel.divided or scenario.parallel.by_plan
    return "cpu" if by_parts and device != "meta" else device


def parallelize(
    model: nn.Module,
    scenario: Scenario,
    device: str | torch.device,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Wrap a model as its scenario's ``parallel`` says; without a strategy it stays as it is.

    Parameters
    ----------
    model
        From :func:`dryfit.step.model.build_model`, on :func:`where_to_build`.
    device
        Of this process: ``cuda:0``, ``cpu``, or ``meta`` for the trace.
    optimizer
        Over the model's trainable parameters: for ZeRO, whose engine steps it.

    Raises
    ------
    UserError
        If the process group has another size than the scenario says.
    """
    strategy, device = scenario.parallel.strategy, torch.device(device)
    if strategy == "none" and not scenario.parallel.meshed:
        return model
    _check_group(scenario)
    if scenario.parallel.pipeline > 1:
        return pipeline_of(model, scenario, device)
    if scenario.parallel.by_titan:
        return divided_as_titan_does(model, scenario, device)
    if scenario.parallel.by_plan:
        return _brought(divided_by_plan(model, scenario), device)
    if scenario.parallel.zero_stage:
        return _zero(model, scenario, device, optimizer)
    wrap = (
        _ddp
        if scenario.parallel.kind.replicates
        else (_fsdp1, _fsdp2)[scenario.parallel.kind.fsdp - 1]
    )
    return wrap(model, scenario, device)


def _check_group(scenario: Scenario) -> None:
    import torch.distributed as dist

    gpus = scenario.parallel.gpus
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size != gpus:
        raise UserError(
            f"`parallel.gpus` says {gpus}, and {size} process{'' if size == 1 else 'es'} run{'s' * (size == 1)}.",
            where="parallel.gpus",
            found=gpus,
            allowed=f"{size}, or as many processes as GPUs (accelerate launch --num_processes {gpus})",
            change={"parallel": {"strategy": scenario.parallel.strategy, "gpus": size}},
        )


def full_tensor(value: Any) -> Any:
    """All of a tensor that FSDP has divided, on the CPU in each process; anything else as it is."""
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def shard_again(model: nn.Module) -> None:
    """After a forward pass without a backward one: FSDP2 leaves the outermost weights gathered until the next step."""
    for module in model.modules():
        if type(module).__name__.startswith("FSDP") and hasattr(module, "reshard"):
            module.reshard()


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of DDP or FSDP1; FSDP2 wraps none around it."""
    wrapped = type(model).__name__ in (
        "DistributedDataParallel",
        "FullyShardedDataParallel",
    ) or _is_engine(model)
    return model.module if wrapped else model


def _is_engine(model: nn.Module) -> bool:
    return type(model).__name__ in ("DeepSpeedEngine", "ZeroEngine")


def exchanging(model: nn.Module, *, last: bool) -> AbstractContextManager:
    """The context of a micro-batch's backward pass; ``last``: of the step.

    DDP exchanges gradients once a step. FSDP does with each micro-batch: until it has, gradients are as large as on one
    GPU, which is what a divided model is to avoid.
    """
    return (
        nullcontext()
        if last or type(model).__name__ != "DistributedDataParallel"
        else model.no_sync()
    )


def within_forward(
    model: nn.Module,
    function: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor],
    batch: dict,
) -> torch.Tensor:
    """``function(model, batch)``; with DDP, which prepares its exchange there, inside the wrapped model's forward."""
    inner = bare(model)
    if inner is model:
        return function(model, batch)
    own = inner.__dict__.get("forward")

    def forward(**batch: torch.Tensor) -> torch.Tensor:
        restore()
        return function(inner, batch)

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    inner.forward = forward
    try:
        return model(**batch)
    finally:
        restore()


def backward(model: nn.Module, loss: torch.Tensor, *, last: bool) -> None:
    """The backward pass of a micro-batch's loss; ``last``: of the step. DeepSpeed's engine runs its own."""
    if not _is_engine(model):
        loss.backward()
        return
    model.set_gradient_accumulation_boundary(is_boundary=last)
    model.backward(loss, scale_wrt_gas=False)


def engine_step(model: nn.Module, max_norm: float | None) -> bool:
    """Let DeepSpeed's engine clip, update and drop the gradients; False: the model is no engine of DeepSpeed."""
    if not _is_engine(model):
        return False
    model.optimizer.clip_grad = max_norm or 0.0
    model.step()
    return True


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the gradients' norm over all GPUs to ``max_norm``; returns what it was, shape ()."""
    if type(model).__name__ == "FullyShardedDataParallel":
        return model.clip_grad_norm_(max_norm)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meshes = {
        getattr(parameter.grad, "device_mesh", None)
        for parameter in trained
        if parameter.grad is not None
    }
    if len(meshes) > 1:
        return clip_on_meshes(trained, max_norm)
    norm = nn.utils.clip_grad_norm_(trained, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _ddp(model: nn.Module, scenario: Scenario, device: torch.device) -> nn.Module:
    """As accelerate's ``prepare_model`` without a handler: PyTorch's defaults, buckets of 25 MiB."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        model, device_ids=[device.index or 0] if device.type == "cuda" else None
    )


def _brought(model: nn.Module, device: torch.device) -> nn.Module:
    """What is left whole, such as packed bytes, comes to the device too; parts are where their mesh has put them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != device.type and mesh_of(tensor) is None:
            tensor.data = tensor.data.to(device)
    return model


def _fsdp2(model: nn.Module, scenario: Scenario, device: torch.device) -> nn.Module:
    """accelerate's ``fsdp2_prepare_model``, with the plugin that ``accelerate launch`` makes for these settings.

    It asks its accelerator for these attributes alone.
    """
    import torch.distributed as dist
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    _statistics_to(model, device)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=scenario.parallel.reshard_after_forward,
        cpu_offload=scenario.parallel.offload == "cpu",
        cpu_ram_efficient_loading=False,
    )
    if scenario.autocast_precision is not None:
        plugin.set_mixed_precision(scenario.autocast_precision)
    if scenario.parallel.reduce_in_fp32:
        policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)
    parallelism: Any = types.SimpleNamespace(fsdp_dim_names=["dp_shard"])
    if scenario.parallel.meshed:
        parallelism, mesh = accelerates_mesh(scenario, device)
    else:
        mesh = dist.device_mesh.init_device_mesh(
            device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",)
        )
    if scenario.parallel.context > 1:
        dividing_tokens(model, parallelism, mesh)
    accelerator = types.SimpleNamespace(
        device=device,
        is_main_process=False,  # it would warn of what the scenario's notes say
        mixed_precision=scenario.autocast_precision or "no",
        parallelism_config=parallelism,
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
    )
    present = {type(module).__name__ for module in model.modules()}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for each in {
        id(one): one for one in (model, base)
    }.values():  # a language model alone has no block of the tower
        if getattr(each, "_no_split_modules", None):
            each._no_split_modules = [name for name in each._no_split_modules if name in present]
    compile_parts(model, scenario)
    model.state_dict = (
        dict  # taken before sharding, and not used: each process has loaded its own weights
    )
    try:
        model = fsdp2_prepare_model(accelerator, model)
    finally:
        del model.state_dict
    return _brought(model, device)


def _fsdp1(model: nn.Module, scenario: Scenario, device: torch.device) -> nn.Module:
    """As accelerate's ``prepare_model`` calls FSDP1, with the policy that PEFT gives for models with adapters.

    Trained weights of 16 bits become fp32 under autocast, as accelerate turns them after wrapping.
    """
    from torch.distributed.fsdp import (
        BackwardPrefetch,
        FullyShardedDataParallel,
        MixedPrecision,
        ShardingStrategy,
    )

    if device.type == "cpu":
        raise UserError(
            "`parallel.strategy: fsdp1` needs GPUs: PyTorch's FSDP1 runs on no CPU.",
            where="parallel.strategy",
            found="fsdp1 on the CPU",
            allowed="fsdp2, ddp; or a machine with GPUs",
            change={"parallel": {"strategy": "fsdp2", "gpus": scenario.parallel.gpus}},
        )
    dtype = DTYPES.get(scenario.autocast_precision)
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    _statistics_to(model, device)
    reshard = scenario.parallel.reshard_after_forward
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # of FSDP1 itself
            return FullyShardedDataParallel(
                model,
                auto_wrap_policy=_wrapping_policy(model),
                backward_prefetch=BackwardPrefetch.BACKWARD_PRE,
                device_id=device if device.type == "cuda" else None,
                limit_all_gathers=True,
                mixed_precision=None if dtype is None else MixedPrecision(dtype, dtype, dtype),
                param_init_fn=_leave if device.type == "meta" else None,
                sharding_strategy=ShardingStrategy.FULL_SHARD
                if reshard
                else ShardingStrategy.SHARD_GRAD_OP,
                use_orig_params=True,
            )
    except ValueError as error:
        if "uniform dtype" not in str(error):
            raise
        dtypes = sorted(
            {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
        )
        raise UserError(
            "FSDP1 makes one flat tensor of a layer's parameters, and PyTorch refuses this model's: they are of several"
            " dtypes.",
            where=f"parallel.strategy, model_type {scenario.model['model_type']}",
            found=", ".join(dtypes),
            allowed="fsdp2, which divides each parameter by itself",
            change={"parallel": {"strategy": "fsdp2", "gpus": scenario.parallel.gpus}},
        ) from None


def _zero(
    model: nn.Module,
    scenario: Scenario,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None,
) -> nn.Module:
    """DeepSpeed's engine, made as accelerate's ``_prepare_deepspeed`` makes it; or what follows its rules.

    ZeRO-3 divides weights as transformers' ``from_pretrained`` does inside ``zero.Init``: one after the other, in the
    precision of the step. Packed 4-bit weights it leaves to the engine, which brings all of them to the GPU first.
    """
    before: list[nn.Parameter] = []
    if scenario.parallel.zero_stage == 3 and scenario.method != "qlora":
        dtype, added = DTYPES[scenario.autocast_precision or "fp32"], adapter_names(model)
        for name, parameter in model.named_parameters():
            if name not in added:
                parameter.data = parameter.data.to(dtype)
                before.append(parameter)
    if scenario.zero_by_rules and device.type == "meta":
        return _zero_by_rules(model, scenario, optimizer, before)
    import deepspeed

    deepspeed.init_distributed()  # finds the group that is there
    configuration = zero_configuration(scenario)
    if before:
        alone = {name: value for name, value in configuration.items() if name != "train_batch_size"}
        deepspeed.zero.Init(
            module=model, config_dict_or_path=alone
        )  # it knows no groups, and checks the product
    if scenario.parallel.ulysses == 1:
        return deepspeed.initialize(model=model, optimizer=optimizer, config=configuration)[0]
    groups, attention = exchanging_heads(model, scenario)
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, config=configuration, mpu=groups
    )[0]
    setattr(engine, HEADS, attention)
    return engine


def _zero_by_rules(
    model: nn.Module,
    scenario: Scenario,
    optimizer: torch.optim.Optimizer | None,
    before: list[nn.Parameter],
) -> nn.Module:
    from dryfit.engine.fake_device import active
    from dryfit.engine.zero import ZeroEngine
    from dryfit.engine.zero_flat import FlatPartitions
    from dryfit.engine.zero_gathered import GatheredWeights

    dtype, device, settings = (
        DTYPES.get(scenario.autocast_precision),
        active(),
        scenario.zero_settings,
    )
    if scenario.parallel.zero_stage == 3:
        return ZeroEngine(model, GatheredWeights(model, optimizer, settings, device, dtype, before))
    stage = scenario.parallel.zero_stage
    return ZeroEngine(model, FlatPartitions(model, optimizer, settings, device, dtype, stage=stage))


def zero_configuration(scenario: Scenario) -> dict[str, Any]:
    """What accelerate's plugin for ``accelerate launch --use_deepspeed --zero_stage N`` tells DeepSpeed.

    The rest is what ``_prepare_deepspeed`` (accelerate 1.15, ``accelerator.py``) fills in, and what the scenario says.
    """
    from accelerate.utils import DeepSpeedPlugin

    stage, at_once = scenario.parallel.zero_stage, scenario.parallel.rows_at_once
    accumulation = scenario.gradient_accumulation
    plugin = DeepSpeedPlugin(
        zero_stage=stage, gradient_accumulation_steps=accumulation, zero3_init_flag=stage == 3
    )
    plugin.set_mixed_precision(scenario.autocast_precision or "no")
    plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
    plugin.deepspeed_config_process(
        must_match=False,
        gradient_clipping=1.0,
        train_micro_batch_size_per_gpu=scenario.micro_batch,
        train_batch_size=scenario.micro_batch * accumulation * at_once,
    )
    said, configuration = dataclasses.asdict(scenario.zero_settings), plugin.deepspeed_config
    other = dict(said.pop("other") or {})
    places = {name: {"device": said.pop(name)} for name in ("offload_optimizer", "offload_param")}
    configuration["zero_optimization"] |= said | places | other.pop("zero_optimization", {})
    for name, value in other.items():
        configuration[name] = (
            {**configuration.get(name, {}), **value} if isinstance(value, dict) else value
        )
    return configuration


def zero_notes(scenario: Scenario) -> list[str]:
    """What a person should know of the settings that :func:`zero_configuration` takes."""
    width = DTYPES[scenario.autocast_precision or "fp32"].itemsize
    elements, hidden = scenario.zero_settings.reduce_bucket_size, scenario.size("hidden_size")
    buckets = 2 if scenario.zero.overlap_comm and scenario.parallel.zero_stage < 3 else 1
    note = (
        f"`zero.reduce_bucket_size`, {elements:,} elements, takes {elements * width * buckets:,} bytes on each GPU"
        f" {'all the time' if scenario.parallel.zero_stage == 3 else 'while gradients are exchanged'}"
    )
    if hidden and elements != hidden**2:
        note += f"; a configuration file that says `auto` makes it {hidden**2:,} elements"
    notes = [note]
    if cast := scenario.autocast_precision:
        notes.append(
            f"DeepSpeed casts the weights to {cast}, keeps an fp32 copy of what is trained, and runs no autocast"
        )
    if scenario.zero_by_rules:
        notes.append("ZeRO is followed by the rules of DeepSpeed 0.19.8, not by the package itself")
    return notes


def _wrapping_policy(model: nn.Module) -> Callable[..., bool]:
    """Which modules FSDP1 makes units of: layers, and for adapters each trained layer."""
    if hasattr(model, "get_base_model"):
        from peft.utils.other import fsdp_auto_wrap_policy

        return fsdp_auto_wrap_policy(model)
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    kinds = {
        type(module)
        for module in model.modules()
        if type(module).__name__ in (model._no_split_modules or ())
    }
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)


def _leave(module: nn.Module) -> None:
    """FSDP1 gives modules on ``meta`` their data by this; the trace's have none."""


def _statistics_to(model: nn.Module, device: torch.device) -> None:
    """Bring the statistics of 4-bit weights to the device: FSDP moves parameters and buffers, and they are neither."""
    if device.type == "meta":
        return
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            state.to(device)
