"""A scenario on ``meta``, ready for its first step: what training builds, with the history of its loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dryfit.common.errors import UserError
from dryfit.engine.attention import flash_attention_package
from dryfit.engine.components import ADAPTERS, HOST
from dryfit.engine.errors import AttentionKernelError, StepError
from dryfit.engine.fake_deepspeed import name_states
from dryfit.engine.fake_device import active
from dryfit.engine.loading_rules import ORDERS
from dryfit.engine.model_tensors import Label, component_of, quantization_state
from dryfit.engine.report import History
from dryfit.engine.trace import recorded
from dryfit.engine.zero import ZeroEngine
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import adapter_names
from dryfit.step.experts import on_host
from dryfit.step.meshes import compile_parts
from dryfit.step.model import attention_name, build_model, notes, parameter_count
from dryfit.step.optimizers import build_optimizer
from dryfit.step.parallel import parallelize, zero_notes
from dryfit.step.quantized import assert_quantized
from dryfit.tracing.imports import import_libraries
from dryfit.tracing.loaders import WeightLoader
from dryfit.tracing.loading import host_copy_bytes, loading_history

EVEN = "each GPU's experts are taken to get as many tokens as the others'; where a router sends more, they need more"


@dataclass(frozen=True)
class Prepared:
    """A scenario on ``meta``, ready for its first step: arguments of :func:`~dryfit.engine.trace.trace_step`."""

    # FSDP's model is divided already; the history says how its parts came to the device.
    model: nn.Module
    optimizer: torch.optim.Optimizer
    histories: Sequence[History]
    label: Label
    # For DDP and DeepSpeed, which wrap the model on its device: gives the wrapped model, and allocates. None: nothing
    # to do.
    wrap: Callable[[], nn.Module] | None
    about: dict[
        str, Any
    ]  # `parameters` of the base model, `trainable_parameters`, and `notes` for people


def prepare(
    scenario: Scenario,
    target: str = "cuda",
    *,
    loader: WeightLoader | None = None,
    orders: int | None = None,
    attention_implementation: str | None = None,
) -> Prepared:
    """Build a scenario's model and optimizer on ``meta``, and what happens on the device until they are there.

    Parameters
    ----------
    loader
        How the model comes to the device; the installed versions' way when None.
    orders
        How many orders of loading to replay. None: several where threads load and chance decides, else one.
    attention_implementation
        What transformers calls the attention function that a program took; None: the scenario's.

    For several GPUs the process has to belong to a group of as many (:mod:`dryfit.engine.fake_group`), for ZeRO
    within :mod:`dryfit.engine.fake_deepspeed`.

    Raises
    ------
    UserError
        If the model can't be built.
    """
    if target not in ("cuda", "cpu"):
        raise UserError(
            "Unknown target of the trace.", found=target, allowed="cuda, cpu", write="target: cuda"
        )
    import_libraries(scenario)
    name = attention_implementation or traced_attention(scenario, target)
    model = build_model(scenario, "meta", attention_implementation=name)
    if scenario.method == "qlora":
        assert_quantized(model, scenario)
    about = {
        "notes": [
            *notes(model, scenario),
            *(zero_notes(scenario) if scenario.parallel.zero_stage else ()),
            *([EVEN] if scenario.parallel.expert > 1 else ()),
        ],
        "parameters": parameter_count(model),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    label = labels(model)
    histories: list[History] = []
    parallel = scenario.parallel
    by_parts = parallel.by_plan or parallel.pipeline > 1  # whose parts alone are loaded
    if target == "cuda" and parallel.gpus == 1:
        about["host_copy_bytes"] = host_copy_bytes(model, scenario)
    if parallel.kind.fsdp == 2 and scenario.autocast_precision and scenario.method != "qlora":
        _cast_on_host(model)
    if parallel.sharded or by_parts:
        with speaking_of(scenario):
            if by_parts:
                model = parallelize(model, scenario, "meta")
            model, history = recorded(
                lambda: _arrived(model) if by_parts else _divided(model, scenario)
            )
        histories = [history] if target == "cuda" else []
        if parallel.offload == "cpu":
            label = _offloaded(label)
    if scenario.compile != "none" and not parallel.sharded:
        compile_parts(model, scenario)
    optimizer = build_optimizer(model, scenario)
    if target == "cuda" and not parallel.divided and not by_parts:
        loader = loader or WeightLoader.installed()
        orders = orders or (ORDERS if loader.order_is_random(model, scenario) else 1)
        seeds = range(loader.seed, loader.seed + orders)
        histories = [
            loading_history(model, scenario, 1, replace(loader, seed=seed)) for seed in seeds
        ]
    wrap = partial(parallelize, model, scenario, "meta") if parallel.kind.replicates else None
    if parallel.zero_stage:
        wrap = partial(_engine, model, scenario, optimizer, component_of(model, label))
        if target == "cuda":
            label = _on_host
    return Prepared(model, optimizer, histories, label, wrap, about)


def traced_attention(scenario: Scenario, target: str) -> str:
    """What transformers calls the attention function that runs on a device."""
    name = attention_name(scenario, torch.device(target))
    return flash_attention_package() if name == "flash_attention_2" else name


def labels(model: nn.Module) -> Label:
    """What a scenario's model's parameters and buffers are for, as the core asks: PEFT's additions are adapters."""
    added, away = adapter_names(model), {id(tensor) for tensor in on_host(model)}

    def label(name: str, tensor: torch.Tensor) -> str | None:
        if id(tensor) in away:
            return HOST
        return ADAPTERS if name.replace("_fsdp_wrapped_module.", "") in added else None

    return label


def _cast_on_host(model: nn.Module) -> None:
    """As accelerate casts what is trained to fp32 before it divides a model, which then lies on the host.

    See accelerate 1.15.0 ``fsdp2_prepare_model``.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _divided(model: nn.Module, scenario: Scenario) -> nn.Module:
    """FSDP's model; the statistics of 4-bit weights come to the GPU first."""
    states = [quantization_state(module) for module in model.modules()]
    active().arrived(tensor for state in states for tensor in state.values())
    return parallelize(model, scenario, "meta")


def _arrived(model: nn.Module) -> nn.Module:
    """A divided model with its parts on the GPU: ``from_pretrained`` divides it without data, and reads these alone."""
    active().arrived([*model.parameters(), *model.buffers()])
    return model


def _engine(
    model: nn.Module,
    scenario: Scenario,
    optimizer: torch.optim.Optimizer,
    component: Callable[[str, torch.Tensor], str],
) -> nn.Module:
    engine = parallelize(model, scenario, "meta", optimizer)
    if isinstance(engine, ZeroEngine):
        engine.optimizer.name(component)
    else:
        name_states(active(), engine, component)
    return engine


def _on_host(name: str, tensor: torch.Tensor) -> str:
    """DeepSpeed brings the model to the GPU itself."""
    return HOST


def _offloaded(label: Label) -> Label:
    """What FSDP has divided lies on the host; what it leaves whole, such as packed bytes, on the GPU."""
    return lambda name, tensor: HOST if hasattr(tensor, "device_mesh") else label(name, tensor)


@contextmanager
def speaking_of(scenario: Scenario) -> Iterator[None]:
    """Turn the core's errors into those of a scenario, whose fields they name."""
    try:
        yield
    except AttentionKernelError as error:
        raise UserError(
            error.problem,
            where="attention",
            found=scenario.attention,
            allowed="sdpa, which takes the kernel that fits, or eager",
            change={"attention": "sdpa"},
        ) from error
    except ValueError as error:
        if "Context parallelism does not support" not in str(error):
            raise
        raise UserError(
            "accelerate divides rows among GPUs only where every layer attends to all of a row.",
            where=f"parallel.context; model (model_type {scenario.model['model_type']})",
            found=str(error).partition(" (")[0],
            allowed="context: 1, or a model of full attention alone",
            change={"parallel": {"context": 1}},
        ) from error
    except StepError as error:
        if "differ in dtype" in str(error) and "int8" in str(error):
            raise UserError(
                "This architecture multiplies by the weights of a quantized layer itself, and they are packed.",
                where=f"model (model_type {scenario.model['model_type']}), {error.inner or error.line}",
                found=f"method {scenario.method}",
                allowed="lora, or full",
                write="method: lora",
            ) from error
        if "differ in dtype" in str(error):
            raise UserError(
                f"The step fails: {error.problem}",
                where=f"precision, adapter_precision and kbit_preparation; {error.inner or error.line}",
                found=f"precision {scenario.precision}, adapter_precision {scenario.adapter_precision},"
                f" kbit_preparation {scenario.kbit_preparation}, autocast {scenario.autocast}",
                allowed="autocast, which casts the operands, or one dtype for all",
                change={"autocast": "fp16" if scenario.weight_precision == "fp16" else "bf16"},
            ) from error
        raise UserError(  # an architecture may ask for values, which meta tensors don't have
            f"The step of this architecture can't be traced. {error.problem}",
            where=f"model (model_type {scenario.model['model_type']}), {error.inner or error.line}",
            allowed="a decoder whose forward pass doesn't depend on the values of its tensors",
        ) from error
