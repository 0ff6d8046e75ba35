"""What the device sees before the first step: loading, quantizing, preparing, adding adapters.

The blocks that loading leaves behind decide how much the caching allocator counts for the weights (a 16-bit weight
comes to the device, is quantized into a smaller packed one, and goes; the packed one sits in a block whose rest may
be too small to be split off) and which holes later allocations find. :func:`loading_history` gives that as
events for :mod:`dryfit.engine.allocator`, in the order of the libraries' code:

======================  =============================================================================================
what                    source
======================  =============================================================================================
one block of the        transformers ``modeling_utils.caching_allocator_warmup``, ``get_total_byte_count``: all
model's size, freed     parameters once, 0.5 byte for each weight to be quantized (5.0 to 5.24)
order of the tensors    transformers ``core_model_loading.convert_and_load_state_dict_in_model``: checkpoint keys
                        sorted by ``dot_natural_key``
who loads               there: one after the other when quantizing on the fly (from 5.4 on); before that four
                        threads (``GLOBAL_WORKERS``) that run ahead of the quantization
cast to the dtype       on the CPU, before the copy: ATen ``native/cuda/Copy.cu``, ``copy_kernel_cuda``
quantizing              transformers ``integrations/bitsandbytes.py``, ``Bnb4bitQuantize.convert``,
                        ``Bnb8bitQuantize.convert``; bitsandbytes ``nn/modules.py`` ``Params4bit._quantize``,
                        ``Int8Params._quantize``, ``functional.py`` ``quantize_4bit``, ``get_4bit_type``,
                        ``quantize_blockwise``, ``backends/cuda/ops.py``
experts stored singly   transformers ``core_model_loading.WeightConverter``: ``MergeModulelist``, ``Concatenate``
``model.to(device)``    torch ``nn/modules/module.py`` ``Module._apply``: children first, parameters, buffers
16-bit to fp32          peft ``utils/other.py`` ``prepare_model_for_kbit_training``, in the order of the parameters;
                        from 0.20 on it empties the cache afterwards
adapters                peft ``tuners/tuners_utils.py`` ``_move_adapter_to_device_of_base_layer`` (in the dtype of the
                        base layer), then ``cast_adapter_dtype``
======================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dryfit.engine.allocator import EMPTY_CACHE
from dryfit.engine.bitsandbytes_rules import packing
from dryfit.engine.components import QUANTIZATION_STATE
from dryfit.engine.loading_rules import Loading, turns
from dryfit.engine.model_tensors import quantization_state
from dryfit.engine.report import History, alive_after
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import adapter_names, unwrapped
from dryfit.step.experts import on_host, packed_count
from dryfit.step.model import build_model, weight_dtype
from dryfit.step.quantized import quantized_layers, weights_of
from dryfit.tracing.loaders import WeightLoader


def loading_history(
    model: nn.Module,
    scenario: Scenario,
    first_id: int = 1,
    loader: WeightLoader | None = None,
) -> History:
    """Return what happens on the device until the model is ready for its first step.

    ``loader``: how it is loaded; the installed versions' way when None.
    """
    loader = loader or WeightLoader.installed()
    device = _Device(first_id)
    base = _base_tensors(model)
    if loader.loaded_on_cpu_first and scenario.method != "qlora":
        for tensor in _in_module_order(model, adapter_names(model)):
            device.place(tensor, _loaded_bytes(tensor, scenario))
    else:
        _load_on_device(device, model, base, scenario, loader)
    prepared = [
        tensor for tensor in _dense(model) if _loaded_bytes(tensor, scenario) < tensor.numel() * 4
    ]
    if scenario.method != "full" and scenario.kbit_preparation != "none":
        for tensor in prepared:
            device.replace(tensor, tensor.numel() * 4)
        if loader.empties_cache:
            device.events.append(EMPTY_CACHE)
    _add_adapters(device, model)
    if scenario.kbit_preparation == "trl":
        for tensor in prepared:
            if tensor.dtype != torch.float32:
                device.replace(tensor, tensor.untyped_storage().nbytes())
    away = {id(tensor) for tensor in on_host(model)}
    for tensor in (*model.parameters(), *model.buffers()):  # whatever a model holds beyond all that
        if id(tensor) not in away:
            device.place(tensor, tensor.untyped_storage().nbytes())
    left = alive_after(device.events).keys() - set(
        device.ids.values()
    )  # bitsandbytes keeps its map of 8-bit values
    return History(device.events, device.ids, dict.fromkeys(sorted(left), QUANTIZATION_STATE))


class _Device(Loading):
    """Collects events; knows which storage lives under which id."""

    def __init__(self, first_id: int) -> None:
        super().__init__(first_id)
        self.ids: dict[int, int] = {}
        self.map: int | None = None  # of 8-bit values, made once and kept in `functional.name2qmap`

    def place(self, tensor: torch.Tensor, count: int) -> None:
        """Allocate a tensor of the model, once."""
        key = tensor.untyped_storage()._cdata
        if key not in self.ids:
            self.ids[key] = self.allocate(count)

    def replace(self, tensor: torch.Tensor, count: int) -> None:
        """Exchange a tensor's data for a cast copy: the new one exists before the old one goes."""
        key = tensor.untyped_storage()._cdata
        old, self.ids[key] = self.ids[key], self.allocate(count)
        self.free(old)


def _load_on_device(
    device: _Device,
    model: nn.Module,
    base: dict[str, torch.Tensor],
    scenario: Scenario,
    loader: WeightLoader,
) -> None:
    if (
        loader.warmup and scenario.experts.quantized == "none"
    ):  # who packs experts on load leaves it out
        bits = 8 if scenario.quantization and scenario.quantization.type == "int8" else 4
        total = sum(
            weights_of(tensor) * bits // 8
            if quantization_state(tensor)
            else _loaded_bytes(tensor, scenario)
            for tensor in base.values()
        )
        device.free(device.allocate(total // 2 * 2))  # torch.empty(byte_count // 2, dtype=float16)

    owners = {id(module.weight): module for module in quantized_layers(model).values()}
    away = {id(tensor) for tensor in on_host(model)}
    order = sorted(base.items(), key=lambda item: _natural_key(item[0]))
    sizes = [_checkpoint_bytes(name, tensor, scenario) for name, tensor in order]
    arrived: dict[int, list[int]] = {}
    workers = loader.workers if scenario.method == "qlora" else loader.dense_workers
    for position, arrives in turns([sum(parts) for parts in sizes], workers, loader.seed):
        tensor = order[position][1]
        if arrives:
            arrived[position] = [device.allocate(count) for count in sizes[position]]
            continue
        parts = arrived.pop(position)
        if id(tensor) in away:
            _pack_and_leave(
                device, tensor, parts, weights_of(tensor) * weight_dtype(scenario).itemsize
            )
            continue
        if len(parts) > 1 and packed_count(tensor):
            whole = device.allocate(weights_of(tensor) * weight_dtype(scenario).itemsize)
            for part in parts:
                device.free(part)
            parts = [whole]
        if getattr(tensor, "quant_state", None) is not None:
            _quantize(device, tensor, parts[0], owners.get(id(tensor)), loader)
        elif quantization_state(tensor):
            _quantize_8bit(device, tensor, parts[0])
        elif (
            packed_count(tensor) and tensor.dtype == torch.int8
        ):  # from a copy in fp16, where they lie
            half = device.allocate(tensor.numel() * 2)
            device.place(tensor, tensor.numel())
            for identity in (half, *parts):
                device.free(identity)
        elif len(parts) == 1:
            device.ids[tensor.untyped_storage()._cdata] = parts[0]
        else:
            whole = device.merged(parts, tensor.shape[0], _loaded_bytes(tensor, scenario))
            device.ids[tensor.untyped_storage()._cdata] = whole
    for tensor in model.buffers():  # _move_missing_keys_from_meta_to_device: not in the checkpoint
        device.place(tensor, tensor.untyped_storage().nbytes())


def _quantize(
    device: _Device, weight: Any, dense: int, module: nn.Module | None, loader: WeightLoader
) -> None:
    """Quantize a dense weight that lies on the device under the id ``dense``; ``module``: its layer, if it has one."""
    count = weight.quant_state.shape.numel()
    kept = quantization_state(weight) | {"weight": weight}
    passing = {"dense": dense}
    if (
        getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D"
    ):  # transposed, so `contiguous()` copies it
        passing = {"copy": device.allocate(count * weight.quant_state.dtype.itemsize), **passing}
    how = {
        "block": weight.quant_state.blocksize,
        "storage": weight.element_size(),
        "in_place": loader.centres_in_place,
    }
    for name, size in packing(count, nested="nested_absmax" in kept, **how):
        if not size:
            device.free(passing.pop(name))
        elif name in kept:
            device.place(kept[name], size)
        elif name != "map":
            passing[name] = device.allocate(size)
        elif device.map is None:
            device.map = device.allocate(size)
    if loader.centres_in_place and "nested_code" in kept:
        device.ids[kept["nested_code"].untyped_storage()._cdata] = device.map
    for identity in passing.values():
        device.free(identity)


def _quantize_8bit(device: _Device, weight: torch.Tensor, dense: int) -> None:
    """The same for LLM.int8: the weight goes to the host and comes back in fp16."""
    half = device.allocate(weight.numel() * 2)
    device.place(quantization_state(weight)["scales"], weight.shape[0] * 4)
    device.place(weight, weight.numel())
    device.free(half)
    device.free(dense)


def _pack_and_leave(device: _Device, tensor: torch.Tensor, parts: list[int], whole: int) -> None:
    """Bring experts together on the device, pack them if they are packed, and take them back to the host."""
    packed = tensor.untyped_storage().nbytes()
    steps = [whole] * (len(parts) > 1) + [packed] * (packed < whole)
    held = parts
    for size in steps:
        made = device.allocate(size)
        for identity in held:
            device.free(identity)
        held = [made]
    for identity in held:
        device.free(identity)


def _add_adapters(device: _Device, model: nn.Module) -> None:
    """Move each adapter to the device in its base layer's dtype, then cast all of them to the adapters' dtype."""
    added = adapter_names(model)
    moved = {}
    for prefix, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        if hasattr(
            module, "get_param"
        ):  # PEFT's ParamWrapper: adapters of a parameter, such as all experts' weights
            dtype = module.get_param().dtype
        else:
            base = module.get_base_layer()
            dtype = (
                getattr(base, "compute_dtype", None)
                or getattr(base, "weight", torch.empty(0)).dtype
            )
            dtype = (
                dtype if dtype.is_floating_point else torch.get_default_dtype()
            )  # then PEFT leaves theirs
        for name, tensor in module.named_parameters():
            if f"{prefix}.{name}" in added and tensor not in moved:
                width = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
                device.place(tensor, tensor.numel() * width)
                moved[tensor] = width
    for tensor, width in moved.items():
        if tensor.element_size() != width:
            device.replace(tensor, tensor.untyped_storage().nbytes())


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of the model without its adapters, by the name they have without PEFT's wrappers, tied ones once."""
    added = adapter_names(model)
    tensors = {}
    for name, tensor in model.named_parameters():
        if name not in added:
            tensors[unwrapped(name) if added else name] = tensor
    return tensors


def _dense(model: nn.Module) -> Iterator[torch.Tensor]:
    """Floating-point parameters that are neither adapters nor 4-bit, in the model's order."""
    added = adapter_names(model)
    for name, tensor in model.named_parameters():
        if name not in added and not quantization_state(tensor) and tensor.is_floating_point():
            yield tensor


def _in_module_order(
    module: nn.Module, added: frozenset[str], prefix: str = ""
) -> Iterator[torch.Tensor]:
    """Parameters and buffers as ``Module._apply`` meets them, adapters left out."""
    for name, child in module.named_children():
        yield from _in_module_order(child, added, f"{prefix}{name}.")
    for name, tensor in (
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ):
        if prefix + name not in added:
            yield tensor


def _loaded_bytes(tensor: torch.Tensor, scenario: Scenario) -> int:
    """Bytes of a dense tensor as it is loaded: before any preparation casts it."""
    prepared = scenario.kbit_preparation != "none" and scenario.method != "full"
    if prepared and isinstance(tensor, nn.Parameter) and tensor.dtype.is_floating_point:
        return tensor.numel() * weight_dtype(scenario).itemsize
    return tensor.untyped_storage().nbytes()


def _checkpoint_bytes(name: str, tensor: torch.Tensor, scenario: Scenario) -> list[int]:
    """Bytes of the checkpoint's tensors that make one of the model's: one, or one for each expert and source."""
    by_bitsandbytes = tensor.dim() == 2 or tensor.dtype == torch.int8
    if packed_count(tensor) and by_bitsandbytes:  # once all of them are there
        parts = tensor.unpacked_shape[0] * (2 if "gate_up" in name else 1)
        return [weights_of(tensor) * weight_dtype(scenario).itemsize // parts] * parts
    if quantization_state(tensor):
        return [weights_of(tensor) * weight_dtype(scenario).itemsize]
    total = _loaded_bytes(tensor, scenario)
    if tensor.dim() == 3 and ".experts." in name:
        parts = tensor.shape[0] * (2 if "gate_up" in name else 1)
        return [total // parts] * parts
    return [total]


def _natural_key(name: str) -> list[tuple]:
    """Sort key of ``dot_natural_key``: parts between dots, numbers before text and by value."""
    key: list[tuple] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        key.append((0, int(part)) if part.isdigit() else (1, text, int(part[len(text) :] or -1)))
    return key


def host_copy_bytes(model: nn.Module, scenario: Scenario) -> int:
    """Bytes of weights that lie on the host beside those on the device while a model loads.

    A model that is built on the host and moved (``model.to``) has all its weights there twice. Loading onto the device,
    with ``device_map`` or quantizing, takes the weights one by one, and holds the largest on the host; a loader that
    reads whole files holds more.
    """
    base = _base_tensors(model)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in on_host(model))
    if scenario.method == "qlora" or scenario.loads == "device":
        return kept + max(
            sum(_checkpoint_bytes(name, tensor, scenario)) for name, tensor in base.items()
        )
    return kept + sum(_loaded_bytes(tensor, scenario) for tensor in base.values())


def built_on_host_bytes(scenario: Scenario, stored: torch.dtype) -> int:
    """Bytes of host memory of its own that a process takes for a whole model that it builds on the CPU.

    Weights that are kept in the dtype they are stored in count nothing: they are pages of the mapped file, which all
    processes share and the kernel may drop (safetensors maps, transformers copies only what it casts or quantizes).

    ``scenario``: the step; whether it is divided afterwards makes no difference. ``stored``: dtype of the
    floating-point weights in the files.
    """
    model = build_model(scenario, "meta")
    added = adapter_names(model)

    def mapped(name: str, tensor: torch.Tensor) -> bool:
        return tensor.dtype == stored and name not in added and not quantization_state(tensor)

    own = [tensor for name, tensor in model.named_parameters() if not mapped(name, tensor)]
    own += [
        *model.buffers(),
        *(tensor for module in model.modules() for tensor in quantization_state(module).values()),
    ]
    return sum(
        {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in own
        }.values()
    )
