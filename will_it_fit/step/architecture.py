"""What transformers makes of a scenario's model: its configuration, and the attention that its architecture can run."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from will_it_fit.common.errors import UserError
from will_it_fit.scenario.scenario import Scenario


def configuration(scenario: Scenario) -> transformers.PretrainedConfig:
    """The transformers configuration of a scenario's model."""
    fields = {key: value for key, value in scenario.model.items() if key not in ("model_type", "quantization_config")}
    kind = scenario.model["model_type"]
    try:
        config = transformers.AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        if "Unrecognized model identifier" in str(error):
            raise UserError(
                "transformers knows no such architecture.",
                where="model.model_type",
                found=kind,
                allowed="a model_type of transformers: qwen2, llama, mistral, gemma2, phi3, gpt2, mixtral, ...",
                write="model: {model_type: qwen2, ...}",
            ) from None
        raise unbuildable(kind, error) from None
    except Exception as error:  # configuration classes check their fields each in their own way
        raise unbuildable(kind, error) from None
    if scenario.images is None:
        _refuse_other_models(config)
    return config


def model_class(scenario: Scenario) -> type:
    """transformers' class that makes the model: with images that of the whole model."""
    if scenario.images is not None:
        return transformers.AutoModelForImageTextToText
    if scenario.aim.scores:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def _known_models(scenario: Scenario) -> Any:
    whole = scenario.images is not None
    return transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if whole else transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def outside_language(model: nn.Module) -> dict[str, nn.Module]:
    """A vision-language model's modules beside its language model: the vision tower, the projector."""
    within = {id(module) for module in model.get_decoder().modules()} | {id(model.get_output_embeddings())}
    parents = {id(module) for module in model.modules() if any(id(part) in within for part in module.modules())}
    return {name: module for name, module in model.named_modules() if id(module) not in within | parents}


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
    problem = None
    if getattr(config, "is_encoder_decoder", False) or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = "is not a language model that is a decoder alone", "a decoder: qwen2, llama, mistral, gemma2, ..."
        write = "model: {model_type: qwen2, ...}"
    if text is not config and not getattr(config, "is_encoder_decoder", False):
        problem = "is more than a language model", "its language model alone, as a configuration of its own"
        write = f"model: {{model_type: {text.model_type}, ...}}"
    elif (  # before transformers 5 every configuration has these fields
        int(transformers.__version__.split(".")[0]) >= 5
        and hasattr(config, "add_cross_attention")
        and getattr(config, "is_decoder", True) is False
    ):
        problem = "is an encoder, which isn't trained to continue a text", "a decoder; for this class, is_decoder: true"
        write = f"model: {{model_type: {config.model_type}, is_decoder: true, ...}}"
    if problem:
        raise UserError(
            f"This model {problem[0]}.",
            where="model.model_type",
            found=config.model_type,
            allowed=problem[1],
            write=write,
        )


def attention_kernel(scenario: Scenario) -> str:
    """The kernel that a scenario's attention runs: the one asked for, or eager where SDPA is not for this architecture.

    Scaled-dot-product attention is a default that architectures such as Gemma 2, which caps the scores, can't take;
    transformers' own choice for them is eager.
    """
    if scenario.attention == "eager":
        return "eager"
    kind = _known_models(scenario).get(type(configuration(scenario)), None)
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
    if device.type != "cuda" or kernel in ("eager", "sdpa"):
        return "eager" if kernel == "eager" else "sdpa"
    kind = _known_models(scenario).get(type(configuration(scenario)), None)
    if kernel == "flash" and kind is not None and not kind._supports_sdpa:
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

    def mem_efficient(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
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


def unbuildable(kind: str, error: Exception) -> UserError:
    said = f"unknown key {error}" if isinstance(error, KeyError) else error  # such as the name of an activation
    return UserError(
        f"transformers can't build a model from this configuration: {said}",
        where=f"model (model_type {kind})",
        allowed="a configuration that AutoModelForCausalLM.from_config can build",
        write="model: {model_type: qwen2, hidden_size: 3584, num_attention_heads: 28, ...}",
    )
