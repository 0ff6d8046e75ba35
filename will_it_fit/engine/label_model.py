"""What a model consists of, and what each part of it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .components import ADAPTERS, HOST, QUANTIZATION_STATE, WEIGHTS_4BIT, WEIGHTS_8BIT, WEIGHTS_OTHER, weights
from .plain_tensors import made_of_others, parts
from .tracker import NAMES, Tracker

Label = Callable[[str, torch.Tensor], str | None]


def follow_model(tracker: Tracker, model: nn.Module, ids: Any = None, label: Label | None = None) -> None:
    """Begin to follow a model's parameters, buffers and quantization states; ``ids``: of those already recorded."""
    ids, component = ids or {}, component_of(model, label)

    def add(tensor: torch.Tensor, component: str) -> None:
        if component == HOST:
            tracker.leave_on_host(tensor)
            return
        for part in parts(tensor):
            tracker.add(part, component, identity=ids.get(part.untyped_storage()._cdata))

    for name, parameter in model.named_parameters():
        add(parameter, component(name, parameter))
        for tensor in quantization_state(parameter).values():
            add(tensor, QUANTIZATION_STATE)
    for name, buffer in model.named_buffers():
        add(buffer, component(name, buffer))
    for name, module in model.named_modules():  # whatever hangs on a module and is neither
        states = quantization_state(module)
        for tensor in states.values():  # FSDP leaves of a 4-bit weight a plain one, and its states with the module
            add(tensor, QUANTIZATION_STATE)
        if states:
            tracker.label(module.weight, _quantized(states))
        for key, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else (value,)
            for tensor in held:
                if isinstance(tensor, torch.Tensor):
                    add(tensor, component(f"{name}.{key}", tensor))


def component_of(model: nn.Module, label: Label | None = None) -> Callable[[str, torch.Tensor], str]:
    """What a model's parameters and buffers are for, as ``label`` says or by default."""
    partly_frozen = not all(parameter.requires_grad for parameter in model.parameters())

    def component(name: str, tensor: torch.Tensor) -> str:
        known = label(name, tensor) if label is not None else None
        if known is not None:
            return known
        if partly_frozen and tensor.requires_grad:
            return ADAPTERS
        if state := quantization_state(tensor):
            return _quantized(state)
        if made_of_others(type(tensor)) and not hasattr(tensor, "_local_tensor"):
            return WEIGHTS_OTHER  # packed, whatever dtype it says
        return weights(NAMES.get(tensor.dtype, ""))

    return component


def _quantized(states: dict[str, torch.Tensor]) -> str:
    return WEIGHTS_8BIT if "scales" in states else WEIGHTS_4BIT


def quantization_state(parameter: torch.Tensor | nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes hangs on a quantized weight: they are neither parameters nor buffers.

    Those of an 8-bit weight are with the layer from its first forward pass on.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        scales = getattr(parameter, "SCB", None)
        scales = getattr(getattr(parameter, "state", None), "SCB", None) if scales is None else scales
        return {"scales": scales} if isinstance(scales, torch.Tensor) else {}
    tensors = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
    if state.nested:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def vocabulary(model: nn.Module) -> int:
    """Size of the vocabulary of a model of transformers; 0 for others, whose logits count as activations."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or 0
