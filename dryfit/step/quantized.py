"""The quantized linear layers of a model: bitsandbytes' 4-bit ones, and those of LLM.int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import DTYPES, adapter_names, unwrapped
from dryfit.step.experts import expert_notes, packed_count

STORAGES = {**DTYPES, "uint8": torch.uint8}
_BITS = {"Linear4bit": 4, "Linear8bitLt": 8}


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized linear layers of a model by name, in order."""
    # By their package too: PEFT calls the layers that wrap them by the same names.
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in _BITS and type(module).__module__.startswith("bitsandbytes")
    }


def weights_of(parameter: torch.Tensor) -> int:
    """How many weights a parameter stands for: as many as before packing."""
    if (count := packed_count(parameter)) is not None:
        return count
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def bitsandbytes_config(scenario: Scenario, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """How a scenario's base is quantized, as transformers takes it; ``dtype``: of the other weights.

    LLM.int8 keeps transformers' threshold of 6.0, and no 16-bit copy of the weights.
    """
    quantization = scenario.quantization
    if quantization.type == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=DTYPES.get(quantization.compute, dtype),
        bnb_4bit_quant_storage=STORAGES[quantization.storage],
    )


def exchange_layers(model: nn.Module, scenario: Scenario, dtype: torch.dtype) -> None:
    """Put quantized layers in the place of a model's linear ones on ``meta``, as transformers does; still unpacked."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    kind = Bnb8BitHfQuantizer if scenario.quantization.type == "int8" else Bnb4BitHfQuantizer
    quantizer = kind(bitsandbytes_config(scenario, dtype))
    quantizer.pre_quantized = False
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of the new layers' biases, and of the weights to be packed
    try:
        quantizer._process_model_before_weight_loading(model, device_map=None)
    finally:
        torch.set_default_dtype(default)
    quantizer.postprocess_model(
        model
    )  # says so in the configuration, which Jamba's and Falcon Mamba's code asks
    model.modules_not_quantized = list(quantizer.modules_to_not_convert or ())


def fill_at_random(layer: nn.Module, device: torch.device) -> None:
    """Give a quantized layer on ``meta`` random weights on a device, quantized there."""
    old = layer.weight
    from_host = type(old).__name__ == "Int8Params"  # quantizes what arrives from the CPU
    dense = torch.empty(old.shape, dtype=old.dtype, device="cpu" if from_host else device).normal_(
        0.0, 0.02
    )
    layer.weight = type(old)(dense, requires_grad=False, **old.__dict__).to(device)
    del dense
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias, device=device), requires_grad=False)
    for parameter in layer.parameters():
        parameter._is_hf_initialized = True
    layer._is_hf_initialized = True


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, as ``model.eval()`` sets it, quantized layers left as training has them; then training mode.

    Outside training, bitsandbytes packs 4-bit weights anew for CPUs with bf16 instructions: for good, with other
    results, and not for every shape. Products with 8-bit weights are other ones on the CPU, too.
    """
    model.eval()
    for module in quantized_layers(model).values():
        module.training = True
    try:
        yield
    finally:
        model.train()


def dequantized(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with the values that a quantized one computes with; ``dtype``: of an 8-bit one's inputs."""
    from bitsandbytes.functional import dequantize_4bit

    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = layer.weight
    if (
        type(layer).__name__ == "Linear8bitLt"
    ):  # as bitsandbytes/autograd/_functions.py, MatMul8bitFp
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        values = weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    else:
        values = dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype)
    made.weight = nn.Parameter(values, requires_grad=False)
    made.bias = layer.bias
    return made


def assert_quantized(model: nn.Module, scenario: Scenario) -> dict[str, int]:
    """Make sure that a quantized scenario's linear layers really are quantized, and count.

    Training settings can ask for 4-bit loading and silently get 16- or 32-bit weights; then every figure that
    follows is about another method.

    Returns
    -------
    dict
        ``linear_4bit_layers``, ``linear_4bit_parameters`` (weights, as many as before packing), or ``linear_8bit_*``;
        ``linear_dense_layers`` (the output head, as transformers leaves it).

    Raises :class:`UserError` if a linear layer that should be quantized is not.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    bits = 8 if scenario.quantization and scenario.quantization.type == "int8" else 4
    packed, added = quantized_layers(model), adapter_names(model)
    skipped = [*(getattr(model, "modules_not_quantized", ()) or ()), *_output_heads(model)]
    dense = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
        and f"{name}.weight" not in added
    }
    if scenario.method == "qlora":
        kinds = {
            type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)
        } - {"Linear"}
        if not packed and kinds:
            raise UserError(
                f"No layer of this architecture is {bits}-bit: bitsandbytes packs plain linear layers, and these are of"
                f" the class {', '.join(sorted(kinds))}.",
                where=f"model (model_type {scenario.model['model_type']}), transformers {transformers.__version__}",
                found="method: qlora",
                allowed="full, lora",
                change={"method": "lora"},
            )
        # A pattern may be a part of many names, such as those that DeepSeek-V4 keeps in 16 or 32 bits.
        wrong = [name for name in dense if should_convert_module(_name_in_base(name), skipped)]
        wrong += [name for name, module in packed.items() if not _holds(module, bits)]
        if wrong or not packed:
            raise UserError(
                f"The linear layers are not {bits}-bit although the method is qlora.",
                where=f"{len(wrong)} layers, such as {wrong[0]}"
                if wrong
                else f"no {bits}-bit layer in the model",
                allowed=f"every linear layer but the output head is {bits}-bit",
                write=f"method: qlora\nquantization: {{type: {'int8' if bits == 8 else 'nf4, double: true'}}}",
            )
    return {
        f"linear_{bits}bit_layers": len(packed),
        f"linear_{bits}bit_parameters": sum(
            weights_of(module.weight) for module in packed.values()
        ),
        "linear_dense_layers": len(dense),
    }


def _name_in_base(layer: str) -> str:
    return unwrapped(f"{layer}.weight").removesuffix(".weight")


def _holds(layer: nn.Module, bits: int) -> bool:
    weight = layer.weight
    if bits == 8:
        return weight.dtype == torch.int8 and not layer.state.has_fp16_weights
    packed = getattr(weight, "bnb_quantized", False) and weight.quant_state is not None
    return packed and weight.numel() * weight.element_size() <= weights_of(
        weight
    ) <= 2 * weight.numel() * (weight.element_size())


def _output_heads(model: nn.Module) -> list[str]:
    """Names of the modules that transformers never quantizes: the output head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if head is not None and module is head]
    return [part for name in names for part in (name, name.rsplit(".", 1)[-1])]


def quantization_notes(model: nn.Module, scenario: Scenario) -> Iterator[str]:
    """What a person should know of a quantized base since it is not what was asked for, or is not counted whole."""
    yield from expert_notes(model, scenario)
    layers = list(quantized_layers(model).values())
    if scenario.method == "qlora" and scenario.quantization.type == "int8":
        kept = sum(layer.in_features for layer in layers) * scenario.tokens * 2 // 100
        yield (
            "LLM.int8 keeps columns of a layer's inputs that hold a value of 6 or more in 16 bits besides: how many"
            " there are depends on model and text, and none are counted. Where they are 1 % of all columns, they take"
            f" up to {kept:,} bytes"
        )
        if scenario.gradient_checkpointing is True:
            yield (
                "LLM.int8's layers hold on to their inputs until the step's end, whatever checkpointing lets go of;"
                " `gradient_checkpointing: reentrant` spares that"
            )
    whole = [layer.weight for layer in layers if not layer.weight.is_floating_point()]
    if scenario.parallel.kind.fsdp == 2 and whole:
        gpus, size = (
            scenario.parallel.gpus,
            sum(weight.numel() * weight.element_size() for weight in whole),
        )
        yield (
            f"the 4-bit weights are stored as {scenario.quantization.storage}, which FSDP does not divide: each GPU"
            f" holds all {size:,} bytes of them; `quantization: {{storage: {scenario.weight_precision}}}` saves"
            f" {size - size // gpus:,} bytes on each of {gpus} GPUs"
        )
