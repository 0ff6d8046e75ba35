"""The one way to build a model for a scenario: for training, for the trace, for the measurement.

``build_model`` makes the same structure on every device. On ``meta`` no tensor holds data, so a 7B model takes
seconds; on ``cpu`` and ``cuda`` it holds the weights of a folder, or random ones. What is predicted is what runs.
"""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dryfit.common.errors import UserError
from dryfit.common.text import gib
from dryfit.engine.bitsandbytes_layers import quantize_4bit, quantize_8bit
from dryfit.scenario.model import SIZES
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.other_models import not_a_language_model
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import DTYPES, adapter_names, add_adapters, left_out, outside_language
from dryfit.step.experts import pack_experts
from dryfit.step.low_precision import exchange_products, low_precision_note
from dryfit.step.quantized import (
    bitsandbytes_config,
    exchange_layers,
    fill_at_random,
    quantization_notes,
    quantized_layers,
    weights_of,
)

# `torch_dtype` became `dtype` in transformers 4.56; the A100 measurements are traced with 4.48.
_DTYPE_ARGUMENT = (
    "dtype"
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    else "torch_dtype"
)
# It recommends a package of kernels for inference on the CPU on every import, and says of each 8-bit product that its
# inputs are cast.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def weight_dtype(scenario: Scenario) -> torch.dtype:
    """Dtype of the weights that are not quantized; fp32 under mixed precision."""
    return DTYPES[scenario.weight_precision]


def autocast_dtype(scenario: Scenario) -> torch.dtype | None:
    """Dtype that autocast computes in; None without autocast."""
    return DTYPES.get(scenario.autocast_precision)


def build_model(
    scenario: Scenario,
    device: str | torch.device,
    *,
    weights: Path | None = None,
    seed: int = 0,
    attention_implementation: str | None = None,
    for_trainer: bool = False,
) -> nn.Module:
    """Build the model of a scenario, ready to train: quantized, prepared, with adapters, in training mode.

    Parameters
    ----------
    device
        ``meta`` (no data), ``cpu`` or ``cuda``.
    weights
        Folder with ``config.json`` and safetensors files. None: random weights from ``seed``.
    attention_implementation
        Name of a registered attention function instead of the scenario's; the trace passes its stand-ins.
    for_trainer
        Without adapters and checkpointing, which another trainer adds by itself.

    Raises
    ------
    UserError
        If the configuration can't be built, or the adapters' target modules match nothing.
    """
    device = torch.device(device)
    attention = attention_implementation or attention_name(scenario, device)
    torch.manual_seed(seed)
    if weights is not None and device.type != "meta":
        model = _load(scenario, device, Path(weights), attention)
    else:
        model = skeleton(scenario, attention)
        if scenario.method == "qlora":
            exchange_layers(model, scenario, weight_dtype(scenario))
            model.tie_weights()
        if device.type == "meta":
            quantize_4bit(model, weight_dtype(scenario))
            quantize_8bit(model)
        else:
            _materialize(model, device)
    pack_experts(model, scenario)
    if scenario.lowers_products:
        exchange_products(model, scenario)
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = scenario.use_cache
    if scenario.images and scenario.images.trained == "language":
        for part in outside_language(model).values():
            part.requires_grad_(False)
    if scenario.loss == "liger":
        from dryfit.step.liger import use_liger

        use_liger(model, kernels=scenario.kernels == "liger")
    if scenario.method != "full" and scenario.kbit_preparation != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if for_trainer:
        return model.train()
    if scenario.gradient_checkpointing:
        _checkpoint_activations(model, scenario)
    if scenario.method != "full":
        torch.manual_seed(seed)
        model = add_adapters(model, scenario)
    if scenario.kbit_preparation == "trl":
        cast_as_trl(model, weight_dtype(scenario))
    return model.train()


def _checkpoint_activations(model: nn.Module, scenario: Scenario) -> None:
    """Let the backward pass compute activations again instead of keeping them."""
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated"
    )  # PEFT asks by this name
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    try:
        enable({"use_reentrant": scenario.gradient_checkpointing == "reentrant"})
    except ValueError as error:
        raise UserError(
            f"This architecture has no activation checkpointing: {error}",
            found=scenario.model.get("model_type"),
            change={"gradient_checkpointing": False},
        ) from None
    if scenario.gradient_checkpointing == "reentrant" and scenario.method != "full":
        model.enable_input_require_grads()  # as the Trainer does: this way of checkpointing looks at the inputs alone


def cast_as_trl(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring embeddings and head of a prepared model back to 16 bits.

    TRL 0.13 ``trl/trainer/utils.py``, ``peft_module_casting_to_bf16``: norms stay in fp32, and so do biases.
    """
    for name, module in model.named_modules():
        kept = isinstance(module, nn.LayerNorm) or "norm" in name
        if kept or not any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
            continue
        if getattr(getattr(module, "weight", None), "dtype", None) == torch.float32:
            module.to(dtype)


def parameter_count(model: nn.Module) -> int:
    """Parameters of the base model, quantized weights unpacked and adapters left out."""
    added = adapter_names(model)
    return sum(
        weights_of(parameter) for name, parameter in model.named_parameters() if name not in added
    )


# --- weights --------------------------------------------------------------------------------------------------------


def _load(scenario: Scenario, device: torch.device, folder: Path, attention: str) -> nn.Module:
    """Load safetensors with transformers, which quantizes each weight as it arrives on the device."""
    if not (folder / "config.json").is_file():
        raise UserError(
            "The folder holds no model.", where=folder, allowed="config.json and *.safetensors"
        )
    _iterate_in_order(scenario)
    if (
        device.type == "cuda" and device.index is None
    ):  # transformers copies in threads, whose own device is the first
        device = torch.device("cuda", torch.cuda.current_device())
    dtype, quantization = weight_dtype(scenario), {}
    if scenario.method == "qlora":
        quantization = {"quantization_config": bitsandbytes_config(scenario, dtype)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        **{_DTYPE_ARGUMENT: dtype},
        attn_implementation=attention,
        device_map={"": device},
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **quantization,
    )


def skeleton(scenario: Scenario, attention: str | None = None) -> nn.Module:
    """The base model on ``meta``, as its architecture has it.

    The parameters and errors are those of :func:`build_model`.
    """
    attention = attention or attention_name(scenario, torch.device("meta"))
    config, kind = configuration(scenario), auto_class(scenario)
    _iterate_in_order(scenario)
    if scenario.aim.scores:
        config.num_labels, config.pad_token_id = 1, 0
    try:
        with torch.device("meta"):
            model = kind.from_config(
                config, attn_implementation=attention, **{_DTYPE_ARGUMENT: weight_dtype(scenario)}
            ).to("meta")  # some architectures draw a parameter's first values on the CPU
    except KeyError as error:
        if attention not in str(error):
            raise unbuildable(scenario, error) from None
        raise UserError(  # architectures that keep a table of attention classes of their own
            "This architecture takes no attention but its own.",
            where=f"model (model_type {scenario.model['model_type']})",
            found=f"attention: {scenario.attention}",
            allowed="eager",
            change={"attention": "eager"},
        ) from None
    except Exception as error:  # whatever an architecture makes of sizes that don't go together
        raise unbuildable(scenario, error) from None
    return model


class _InOrder(set[Any]):
    """A set whose strings come in one order in each process."""

    def __iter__(self) -> Iterator[Any]:
        found = [*super().__iter__()]
        return iter(sorted(found) if all(isinstance(each, str) for each in found) else found)


def _iterate_in_order(scenario: Scenario) -> None:
    """Let an architecture's code iterate its sets in one order: those of strings have the order of Python's hashes.

    That order differs between processes. Gemma 4's rotary tables, of two sizes, come in it, so that what the allocator
    reserves differs by a segment.
    """
    if own := architecture(scenario):
        vars(sys.modules[own.__module__])["set"] = _InOrder


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Turn a skeleton into a model with random weights, layer by layer: one dense weight at a time is quantized."""
    quantized = {id(layer) for layer in quantized_layers(model).values()}
    for module in model.modules():
        if id(module) in quantized:
            fill_at_random(module, device)
        else:
            module.to_empty(device=device, recurse=False)
    model.tie_weights()
    with torch.no_grad():
        model.initialize_weights()
    model.tie_weights()


def notes(model: nn.Module, scenario: Scenario) -> list[str]:
    """What a person should know of a model that was built, since the scenario does not say it, or promises else."""
    texts = []
    config, given = model.config, scenario.model
    untold = [
        f"{name} {getattr(config, name)}"
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        if hasattr(config, name) and not {name, config.attribute_map.get(name, name)} & given.keys()
    ]
    if untold:
        texts.append(
            f"the configuration does not say, so transformers' default is taken: {', '.join(untold)}"
        )
    if name := left_out(scenario):
        texts.append(
            f"all linear layers but {name} have adapters: PEFT's LoRA can't go around {name} of this architecture"
        )
    if scenario.activation_offload:
        texts.append("the time leaves out the copies of activations to the host and back")
    if OPTIMIZERS[scenario.optimizer].package == "galore_torch":
        texts.append(
            "figures are those of a step with GaLore's projections, every 200th; cuSOLVER's workspaces for"
            " their decompositions come on top"
        )
    if scenario.lowers_products:
        texts.append(low_precision_note(scenario))
    return [*texts, *quantization_notes(model, scenario)]


# --- what transformers makes of the model: its configuration, and the attention that it can run ---------------


def configuration(scenario: Scenario) -> transformers.PretrainedConfig:
    """The transformers configuration of a scenario's model."""
    fields = {
        key: value
        for key, value in scenario.model.items()
        if key not in ("model_type", "quantization_config")
    }
    kind = scenario.model["model_type"]
    if scenario.experts.router_loss:
        fields["output_router_logits"] = True
    try:
        config = transformers.AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        if "Unrecognized model identifier" in str(error):
            raise unknown(scenario) from None
        raise unbuildable(scenario, error) from None
    except Exception as error:  # configuration classes check their fields each in their own way
        raise unbuildable(scenario, error) from None
    if scenario.images is None:
        _refuse_other_models(config)
    return config


def auto_class(scenario: Scenario) -> type:
    """transformers' class that makes the model: with images that of the whole model."""
    if scenario.images is not None:
        return transformers.AutoModelForImageTextToText
    if scenario.aim.scores:
        return transformers.AutoModelForSequenceClassification
    own = type(configuration(scenario)) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if own else transformers.AutoModelForImageTextToText


def architecture(scenario: Scenario) -> type | None:
    """The model's own class; None where transformers has none."""
    whole = scenario.images is not None
    mappings = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    kind = type(configuration(scenario))
    return (
        mappings[1].get(kind, None)
        if whole
        else mappings[0].get(kind, None) or mappings[1].get(kind, None)
    )


def _is_decoder(config: transformers.PretrainedConfig) -> bool:
    """Whether transformers has a language model of a configuration, be it only as a part of models with images."""
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    part = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return part is not None and part.__name__.endswith("ForCausalLM")


def _refuse_other_models(config: transformers.PretrainedConfig) -> None:
    """Refuse models that transformers can build, but whose training step is not that of a decoder over text."""
    text = config.get_text_config()
    if text.model_type == "mllama_text_model":
        raise UserError(
            "This model reads images in layers between those of its language model, and these are not known here.",
            where="model.model_type",
            found=text.model_type,
            allowed="the language model that it was made from, without these layers",
            write=f"model: {'llama-3.1-8b' if text.num_hidden_layers < 80 else 'llama-3.1-70b'}",
        )
    both = getattr(config, "is_encoder_decoder", False)
    if text is not config and not both:
        raise UserError(
            "This model is more than a language model.",
            where="model.model_type",
            found=config.model_type,
            allowed="its language model alone, as a configuration of its own",
            write=f"model: {{model_type: {text.model_type}, ...}}",
        )
    is_encoder = (  # before transformers 5 every configuration has these fields
        int(transformers.__version__.split(".")[0]) >= 5
        and hasattr(config, "add_cross_attention")
        and getattr(config, "is_decoder", True) is False
    )
    if both or is_encoder or not _is_decoder(config):
        raise not_a_language_model(config.model_type)


def attention_kernel(scenario: Scenario) -> str:
    """The kernel that a scenario's attention runs: the one asked for, or eager where SDPA is not for this architecture.

    Scaled-dot-product attention is a default that architectures such as Gemma 2, which caps the scores, can't take;
    transformers' own choice for them is eager.
    """
    if scenario.attention == "eager":
        return "eager"
    kind = architecture(scenario)
    if kind is None or kind._supports_sdpa:
        return scenario.attention
    if scenario.attention == "sdpa":
        return "eager"
    if scenario.attention == "flash" and getattr(kind, "_supports_flash_attn", False):
        return "flash"
    raise UserError(
        "This architecture can't run its attention through scaled-dot-product attention.",
        where=f"model (model_type {scenario.model['model_type']})",
        found=f"attention: {scenario.attention}",
        allowed="eager",
        change={"attention": "eager"},
    )


def attention_name(scenario: Scenario, device: torch.device) -> str:
    """Name of the attention function that a scenario runs on a device."""
    kernel = attention_kernel(scenario)
    if kernel in ("eager", "sdpa"):
        return kernel
    kind = architecture(scenario)
    alone = kernel == "flash" and kind is not None and not kind._supports_sdpa
    if device.type != "cuda":  # a model whose weights alone count there, too
        return "eager" if alone else "sdpa"
    if alone:
        return "flash_attention_2"  # the package, which can cap scores
    _register_attention()
    return {"flash": "sdpa_fa2", "mem_efficient": "sdpa_mem_efficient"}[kernel]


def _register_attention() -> None:
    """Register scaled-dot-product attention restricted to one fused kernel (it raises where the kernel can't run)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def flash(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa_attention_forward(module, *args, **kwargs)

    def mem_efficient(
        module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        groups = query.shape[1] // key.shape[1]  # this kernel takes no grouped keys and values
        ungrouped = nn.Module()
        ungrouped.is_causal = getattr(module, "is_causal", True)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return sdpa_attention_forward(
                ungrouped, query, repeat_kv(key, groups), repeat_kv(value, groups), *args, **kwargs
            )

    for name, function in (("sdpa_fa2", flash), ("sdpa_mem_efficient", mem_efficient)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


def unknown(scenario: Scenario) -> UserError:
    """transformers has no architecture of that name: which are near, what brings it, and the least that it takes."""
    kind = scenario.model["model_type"]
    near = difflib.get_close_matches(kind, transformers.CONFIG_MAPPING.keys(), n=3, cutoff=0.75)
    return UserError(
        f"transformers {transformers.__version__} knows no such architecture."
        + (f" Is {' or '.join(near)} meant?" if near else ""),
        where="model.model_type",
        found=kind + _least_bytes(scenario),
        allowed="a model_type of this version; or a newer transformers that has it, for its code is what is traced",
        write=None if near else "pip install -U transformers",
    )


def unbuildable(scenario: Scenario, error: Exception) -> UserError:
    """transformers refuses a configuration, or its architecture makes no model of the sizes."""
    kind, said = (
        scenario.model["model_type"],
        f"unknown key {error}" if isinstance(error, KeyError) else error,
    )
    sizes = [name for name in SIZES if scenario.size(name) is not None]
    allowed = "a configuration that AutoModelForCausalLM.from_config can build"
    if len(sizes) < _FEW_SIZES:
        allowed += f": the defaults of {kind} describe no model, so every size has to be there, as in a config.json"
    return UserError(
        f"transformers can't build a model from this configuration: {said}",
        where=f"model (model_type {kind})",
        found=(f"{', '.join(sizes) or 'no size'} alone" if len(sizes) < _FEW_SIZES else kind)
        + _least_bytes(scenario),
        allowed=allowed,
        write="model: owner/name    # its id on the Hub, or the path of its own config.json",
    )


_FEW_SIZES = 4  # of hidden size, layers, heads, vocabulary and the like


def _least_bytes(scenario: Scenario) -> str:
    """The least that is known of a model whose code is not: the rows of its vocabulary."""
    words, hidden = scenario.size("vocab_size"), scenario.size("hidden_size")
    if not words or not hidden:
        return ""
    size = words * hidden * weight_dtype(scenario).itemsize
    return f"; its embedding alone takes {gib(size)} in {scenario.weight_precision}, a lower bound"
