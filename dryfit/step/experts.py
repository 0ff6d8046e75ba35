"""Experts of a layer that are one tensor: packed on load, or kept as a file has them packed.

transformers 5 keeps all experts of a layer in one parameter of three dimensions, which is no linear layer. So
bitsandbytes' integration leaves it in 16 bits. Three ways around that are known:

===============  =====================================================================================================
``experts``      what runs, and whose way it is
===============  =====================================================================================================
``bitsandbytes`` each tensor is packed as it arrives, and unpacked while its layer runs: bitsandbytes 0.48 and later
                 ``nn/parametrize.py``, ``replace_parameter_4bit``; axolotl's ``quantize_moe_experts``
                 (``monkeypatch/moe_quant.py``), and Unsloth's loading in 4 bits. With LLM.int8's base in 8 bits, as
                 that file's ``replace_parameter_8bit``
``mxfp4``        gpt-oss' own packed weights stay (``Mxfp4Config(dequantize=False)``); a layer's are unpacked while it
                 runs, by transformers ``integrations/mxfp4.py``, ``convert_moe_packed_tensors``
``offload``      packed or not, they lie on the host, and a layer's come to the GPU while it runs: axolotl's
                 ``expert_offload`` (axolotl pull 3797, whose OLMoE-1B-7B then holds 3.62 GB less; 3.63 here), and the
                 part of ``layer_offloading`` that experts have
===============  =====================================================================================================

An unpacked tensor lives while its layer runs: in the forward pass, and again in the backward pass, which needs it for
the gradient of the layer's input.
"""

from __future__ import annotations

import copy
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from dryfit.common.errors import UserError
from dryfit.engine.model_tensors import quantization_state
from dryfit.scenario.scenario import Scenario

_MXFP4_GROUP = 32  # values with one scale of a byte (OCP Microscaling Formats 1.0, table 1)


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The tensors that hold all experts of a layer, by their names: the module and the attribute of each."""
    found = {}
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "experts" in place.split("."):
                found[f"{place}.{name}"] = (module, name)
    return found


def pack_experts(model: nn.Module, scenario: Scenario) -> None:
    """Put packed experts in the place of a model's, on any device, as ``experts`` of the scenario says.

    Raises :class:`UserError` if the model has no such experts.
    """
    experts = scenario.experts
    if experts.quantized == "none" and experts.offload == "none":
        return
    places = expert_parameters(model)
    if not places:
        raise UserError(
            "This model has no experts that are one tensor for a layer.",
            where=f"model (model_type {scenario.model['model_type']})",
            found=f"experts: {{quantized: {experts.quantized}, offload: {experts.offload}}}",
            allowed="a mixture of experts; or experts as they are",
            change={"experts": {"quantized": "none", "offload": "none"}},
        )
    on_meta = next(model.parameters()).is_meta
    with _maps_apart() if on_meta and experts.quantized == "bitsandbytes" else nullcontext():
        for module, name in places.values():
            if experts.quantized == "bitsandbytes":
                _pack_by_bitsandbytes(module, name, scenario)
            elif experts.quantized == "mxfp4":
                _pack_as_mxfp4(module, name)
            if experts.offload == "host":
                _keep_on_host(module, name)


def packed_count(parameter: torch.Tensor) -> int | None:
    """How many weights a packed tensor of experts stands for; None: it is no such tensor."""
    shape = getattr(parameter, "unpacked_shape", None)
    return None if shape is None else shape.numel()


def whole_names(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """PEFT's ``target_parameters`` with the whole names of packed experts, which PEFT does not find by their endings.

    axolotl expands them the same way (``monkeypatch/moe_quant.py``, ``patch_peft_target_parameters_matching``).

    Raises :class:`UserError` if experts that are packed are named, and the installed PEFT can't train adapters of them.
    """
    from peft.tuners.lora import layer

    named = set(targets)
    for place, module in model.named_modules():
        for parameter in getattr(module, "parametrizations", ()):
            if any(f".{place}.{parameter}".endswith(f".{target}") for target in targets):
                named.add(f"{place}.{parameter}")
    if named != set(targets) and hasattr(layer, "_LoraFactorsProxy"):
        # layer.py, ParamWrapper._remove_parametrizations looks for _LoraParameterProxy alone, so that the other kind
        # stays on the packed tensor, and the next forward pass asks bytes for gradients.
        version = importlib.metadata.version("peft")
        raise UserError(
            f"PEFT {version} can't train adapters of packed experts: it leaves its parametrization on them, and the"
            " second forward pass fails.",
            where="adapter.target_parameters",
            found=sorted(targets),
            allowed="PEFT 0.19, which axolotl installs; adapters of the linear layers alone; or experts in 16 bits",
            change={"experts": {"quantized": "none"}},
        )
    return sorted(named)


def expert_notes(model: nn.Module, scenario: Scenario) -> Iterator[str]:
    """What a person should know of experts that are not what was asked for, or not as somebody else has them."""
    whole = [getattr(module, name) for module, name in expert_parameters(model).values()]
    dense = sum(tensor.numel() for tensor in whole if tensor.is_floating_point())
    if scenario.method == "qlora" and dense:
        wide = dense * {"fp32": 4}.get(scenario.weight_precision, 2)
        packed = dense * 33 // 64  # half a byte, and a byte for each 64 weights' scale
        yield (
            f"{dense:,} parameters of experts stay in {scenario.weight_precision}: transformers 5 keeps all experts of"
            f" a layer as one tensor, which bitsandbytes does not pack. They take {wide / 2**30:.1f} GiB, and packed"
            f" on load {packed / 2**30:.1f} (--set experts.quantized=bitsandbytes, as axolotl's quantize_moe_experts"
            " and Unsloth do)"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if scenario.experts.router_loss and not hasattr(
        sys.modules[type(base).__module__], "load_balancing_loss_func"
    ):
        yield "`experts.router_loss` adds nothing: transformers has no routers' loss for this architecture"
    if scenario.experts.quantized == "mxfp4":
        yield (
            "mxfp4 is kept, and a layer's experts are unpacked to run. transformers 5.24 says that it does not train"
            " so. Kernels that read mxfp4 themselves (axolotl's use_scattermoe) need less at a time"
        )
    if scenario.experts.offload == "host":
        size = sum(parameter.untyped_storage().nbytes() for parameter in on_host(model))
        yield (
            f"{size / 2**30:.2f} GiB of experts lie on the host, and a layer's come to the GPU to run (axolotl's"
            " expert_offload). What is fetched ahead for the next layer is not counted, nor the time of the copies"
        )


def on_host(model: nn.Module) -> list[torch.Tensor]:
    """The tensors of experts that lie on the host, with the statistics of packed ones."""
    kept = [
        parameter for parameter in model.parameters() if getattr(parameter, "lies_on_host", False)
    ]
    return kept + [
        tensor
        for part in model.modules()
        if isinstance(part, _HostWeight)
        for tensor in part.statistics.values()
    ]


@contextmanager
def _maps_apart() -> Iterator[None]:
    """Keep bitsandbytes from remembering a map of 8-bit values that lies on ``meta``: no real tensor could use it."""
    from bitsandbytes.functional import name2qmap

    known = dict(name2qmap)
    name2qmap.clear()
    try:
        yield
    finally:
        name2qmap.clear()
        name2qmap.update(known)


class _Int8(nn.Module):
    """Unpacks a tensor of 8 bits whenever it is asked for: in fp32, as bitsandbytes' ``int8_vectorwise_dequant``."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("row_stats", rows)

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        return packed * self.row_stats.unsqueeze(-1) * (1.0 / 127.0)


def _pack_in_8_bits(module: nn.Module, name: str) -> None:
    """A scale in fp32 for each row of each expert (axolotl's ``replace_parameter_8bit``)."""
    dense = getattr(module, name).detach()
    rows = torch.linalg.vector_norm(dense, ord=float("inf"), dim=-1).float()
    packed = (dense * (127.0 / rows.unsqueeze(-1))).round().to(torch.int8)
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    parametrize.register_parametrization(module, name, _Int8(rows), unsafe=True)
    module.parametrizations[name].original.unpacked_shape = dense.shape
    _cache_while_running(module)


def _pack_by_bitsandbytes(module: nn.Module, name: str, scenario: Scenario) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    shape, quantization = getattr(module, name).shape, scenario.quantization
    if quantization.type == "int8":
        _pack_in_8_bits(module, name)
        return
    replace_parameter_4bit(
        module, name, compress_statistics=quantization.double, quant_type=quantization.type
    )
    packed = module.parametrizations[name].original
    packed.quant_state = module.parametrizations[name][
        0
    ].quant_state  # where the engine looks for its tensors
    packed.unpacked_shape = shape


class _Mxfp4(nn.Module):
    """Unpacks a tensor of mxfp4 whenever it is asked for, in the layout of ``GptOssExperts``."""

    def __init__(self, scales: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(blocks, self.scales, dtype=self.dtype)


def _pack_as_mxfp4(module: nn.Module, name: str) -> None:
    """As gpt-oss' files have it: for each expert and output, inputs in groups of 32, two values in a byte."""
    dense = getattr(module, name)
    experts, inputs, outputs = dense.shape
    groups = inputs // _MXFP4_GROUP
    blocks = torch.zeros(
        experts, outputs, groups, _MXFP4_GROUP // 2, dtype=torch.uint8, device=dense.device
    )
    scales = torch.full(
        (experts, outputs, groups), 127, dtype=torch.uint8, device=dense.device
    )  # 2 ** 0
    setattr(module, name, nn.Parameter(blocks, requires_grad=False))
    parametrize.register_parametrization(module, name, _Mxfp4(scales, dense.dtype), unsafe=True)
    module.parametrizations[name].original.unpacked_shape = dense.shape
    _cache_while_running(module)


class _HostWeight(nn.Module):
    """Brings a tensor from the host whenever it is asked for, and unpacks it there if bitsandbytes has packed it."""

    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.packed = SimpleNamespace(
            state=state
        )  # out of reach of who looks for tensors of the device
        self.statistics = quantization_state(SimpleNamespace(quant_state=state)) if state else {}

    @torch.no_grad()
    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        brought, state = kept.clone(), copy.copy(self.packed.state)
        if state is None:
            return brought
        from bitsandbytes.functional import dequantize_4bit

        state.absmax = state.absmax.clone()
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.absmax = state.state2.absmax.clone()
        return dequantize_4bit(brought, state)


def _keep_on_host(module: nn.Module, name: str) -> None:
    """Mark a tensor as one of the host, and let each use copy it: before it is unpacked, where it is packed."""
    if parametrize.is_parametrized(module, name):
        steps = module.parametrizations[name]
        state = getattr(steps.original, "quant_state", None)
        if state is None:
            steps.insert(0, _HostWeight())
        else:
            steps[0] = _HostWeight(state)
            del steps.original.quant_state
        original = steps.original
    else:
        getattr(module, name).requires_grad_(False)
        parametrize.register_parametrization(module, name, _HostWeight(), unsafe=True)
        original = module.parametrizations[name].original
        _cache_while_running(module)
    original.lies_on_host = True


def _cache_while_running(module: nn.Module) -> None:
    """Let several uses within a forward pass share one unpacked tensor, as bitsandbytes' hooks do."""
    from bitsandbytes.nn import parametrize as of_bitsandbytes

    module.register_forward_pre_hook(of_bitsandbytes._enable_parametrization_cache)
    module.register_forward_hook(of_bitsandbytes._disable_parametrization_cache, always_call=True)
