"""What a model's tensors consist of, down to the plain ones, and what each is for.

Some tensors have no memory of their own: those that are divided among several GPUs, sparse ones, and subclasses that
quantize (torchao's 4-bit weights, optimizer states in 8 bits, float8). Who asks them for their storage gets that of the
tensor which they stand for, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .components import ADAPTERS, WEIGHTS_4BIT, WEIGHTS_8BIT, WEIGHTS_OTHER, weights

Label = Callable[[str, torch.Tensor], str | None]
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor, on this GPU; for a plain one itself."""
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
        yield tensor
    elif hasattr(tensor, "_local_tensor"):
        yield from parts(tensor._local_tensor)
    elif made_of_others(type(tensor)):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    else:
        yield tensor


def made_of_others(kind: type) -> bool:
    """Whether tensors of a class consist of other tensors, to which their operators come down."""
    return hasattr(kind, "__tensor_flatten__")


def those_on_meta(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors on ``meta`` among an operator's arguments, in lists too."""
    for item in args:
        if isinstance(item, torch.Tensor):
            if item.is_meta:
                yield item
        elif isinstance(item, (tuple, list)):
            yield from those_on_meta(item)


def weights_like(tensor: torch.Tensor) -> str:
    """The component of weights in a tensor's dtype."""
    return weights(_NAMES.get(tensor.dtype, ""))


def component_of(
    model: nn.Module, label: Label | None = None
) -> Callable[[str, torch.Tensor], str]:
    """What a model's parameters and buffers are for, as ``label`` says or by default."""
    partly_frozen = not all(parameter.requires_grad for parameter in model.parameters())

    def component(name: str, tensor: torch.Tensor) -> str:
        known = label(name, tensor) if label is not None else None
        if known is not None:
            return known
        if partly_frozen and tensor.requires_grad:
            return ADAPTERS
        if state := quantization_state(tensor):
            return weights_with(state)
        if made_of_others(type(tensor)) and not hasattr(tensor, "_local_tensor"):
            return WEIGHTS_OTHER  # packed, whatever dtype it says
        return weights_like(tensor)

    return component


def weights_with(states: dict[str, torch.Tensor]) -> str:
    """The component of weights that have such quantization states."""
    return WEIGHTS_8BIT if "scales" in states else WEIGHTS_4BIT


def quantization_state(parameter: torch.Tensor | nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes hangs on a quantized weight: they are neither parameters nor buffers.

    Those of an 8-bit weight are with the layer from its first forward pass on.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        scales = getattr(parameter, "SCB", None)
        scales = (
            getattr(getattr(parameter, "state", None), "SCB", None) if scales is None else scales
        )
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
