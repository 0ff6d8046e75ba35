"""What a program builds before its first step, built on ``meta`` as a GPU would have it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .patching import patched

# Nested statistics: bitsandbytes.functional.quantize_4bit quantizes absmax in blocks of 256 with a map of 256 values.
_NESTED_BLOCK, _NESTED_CODE = 256, 256
_PAGED_FROM = 100_000  # elements: bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer


@contextmanager
def on_meta(target: str = "cuda") -> Iterator[None]:
    """Build a model, a batch and an optimizer on ``meta``: tensors without data, and the optimizer's own choices.

    PyTorch decides by the device's name whether an optimizer may take all tensors at once (``foreach``) or one kernel
    for everything (``fused``); here ``meta`` counts as ``target``, as it does while a step is traced.
    """
    with torch.device("meta"), patched(device_lists(target)):
        yield


def device_lists(target: str) -> list[tuple[Any, str, Any]]:
    """What to exchange so that PyTorch's lists of devices name ``meta`` beside ``target``.

    ``torch/utils/_foreach_utils.py`` and ``torch/optim/optimizer.py`` keep them; other modules import the functions.
    """
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    def beside(function: Callable[..., list[str]]) -> Callable[..., list[str]]:
        def devices(*args: Any) -> list[str]:
            names = function(*args)
            return [*names, "meta"] if target in names else names

        return devices

    support = _foreach_utils._device_has_foreach_support  # the CPU has it, though it is not in the list

    def has_foreach_support(device: torch.device) -> bool:
        return support(torch.device(target) if device.type == "meta" else device)

    new = {
        "_get_foreach_kernels_supported_devices": beside(_foreach_utils._get_foreach_kernels_supported_devices),
        "_get_fused_kernels_supported_devices": beside(_foreach_utils._get_fused_kernels_supported_devices),
        "_get_capturable_supported_devices": beside(optimizer._get_capturable_supported_devices),
        "_device_has_foreach_support": has_foreach_support,
    }
    places = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("torch.optim", "torch.nn.utils", "torch.utils._foreach_utils")) and module is not None
    ]
    return [(module, name, function) for module in places for name, function in new.items() if name in vars(module)]


def quantize_4bit(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give bitsandbytes' 4-bit layers on ``meta`` what quantizing would leave behind: packed weights and statistics.

    Parameters
    ----------
    module
        A ``Linear4bit``, or a model with such layers that are not packed yet.
    dtype
        That a layer's weight had, and is unpacked to; None: its own.
    """
    for layer in module.modules():
        if is_linear_4bit(layer) and layer.weight.quant_state is None:
            _pack(layer, dtype or layer.weight.dtype)


def is_linear_4bit(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' ``Linear4bit``, or a library's class of it; PEFT's wrapper has the same name."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes") for kind in type(layer).__mro__
    )


def quantize_8bit(module: nn.Module) -> None:
    """The same for the layers of LLM.int8: weights of one byte, and a scale for each row."""
    for layer in module.modules():
        by_bitsandbytes = type(layer).__module__.startswith("bitsandbytes")
        if by_bitsandbytes and type(layer).__name__ == "Linear8bitLt" and layer.weight.is_floating_point():
            from bitsandbytes.nn import Int8Params

            packed = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
            scales = torch.empty(layer.out_features, dtype=torch.float32, device="meta")
            layer.weight = Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)


def _pack(layer: nn.Module, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    weight = layer.weight
    count, block = weight.numel(), weight.blocksize

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = -(-count // block)
    common = {
        "shape": torch.Size((layer.out_features, layer.in_features)),
        "dtype": dtype,
        "blocksize": block,
        "code": empty(16),
        "quant_type": weight.quant_type,
    }
    if weight.compress_statistics:
        nested = QuantState(
            absmax=empty(-(-blocks // _NESTED_BLOCK)),
            code=empty(_NESTED_CODE),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
        state = QuantState(absmax=empty(blocks, dtype=torch.uint8), offset=empty(), state2=nested, **common)
    else:
        state = QuantState(absmax=empty(blocks), **common)
    layer.weight = Params4bit(
        empty(-(-count // (2 * weight.quant_storage.itemsize)), 1, dtype=weight.quant_storage),
        requires_grad=False,
        quant_state=state,
        blocksize=block,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state


def keep_paged_states_outside(optimizer: torch.optim.Optimizer) -> None:
    """Leave the states of one of bitsandbytes' paged optimizers out of the count.

    They live in CUDA's managed memory, which PyTorch's allocator knows nothing of; bitsandbytes takes it from its C
    library, which can't be loaded without a GPU.
    """

    def get_state_buffer(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if parameter.numel() < _PAGED_FROM:
            return torch.zeros_like(parameter, dtype=dtype)
        with _disable_current_modes():
            state = torch.zeros_like(parameter, dtype=dtype, device="meta")
        state.outside_the_allocator = True
        return state

    optimizer.get_state_buffer = get_state_buffer
