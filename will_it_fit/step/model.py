"""The one way to build a model for a scenario: for training, for the trace, for the measurement.

``build_model`` makes the same structure on every device. On ``meta`` no tensor holds data, so a 7B model takes
seconds; on ``cpu`` and ``cuda`` it holds the weights of a folder, or random ones. What is predicted is what runs.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn

from will_it_fit.common.errors import UserError
from will_it_fit.engine.building import quantize_4bit, quantize_8bit
from will_it_fit.scenario.optimizers import OPTIMIZERS
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.step.adapters import DTYPES, adapter_names, add_adapters
from will_it_fit.step.architecture import attention_name, configuration, model_class, outside_language, unbuildable
from will_it_fit.step.quantized import (
    bitsandbytes_config,
    exchange_layers,
    fill_at_random,
    quantization_notes,
    quantized_layers,
    weights_of,
)

# `torch_dtype` became `dtype` in transformers 4.56; the A100 measurements are traced with 4.48.
_DTYPE_ARGUMENT = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
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
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = scenario.use_cache
    if scenario.images and scenario.images.trained == "language":
        for part in outside_language(model).values():
            part.requires_grad_(False)
    if scenario.loss == "liger":
        from will_it_fit.step.liger import use_liger

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
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks by this name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
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
    return sum(weights_of(parameter) for name, parameter in model.named_parameters() if name not in added)


# --- weights --------------------------------------------------------------------------------------------------------


def _load(scenario: Scenario, device: torch.device, folder: Path, attention: str) -> nn.Module:
    """Load safetensors with transformers, which quantizes each weight as it arrives on the device."""
    if not (folder / "config.json").is_file():
        raise UserError("The folder holds no model.", where=folder, allowed="config.json and *.safetensors")
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
    config, kind = configuration(scenario), model_class(scenario)
    if scenario.aim.scores:
        config.num_labels, config.pad_token_id = 1, 0
    try:
        with torch.device("meta"):
            model = kind.from_config(
                config, attn_implementation=attention, **{_DTYPE_ARGUMENT: weight_dtype(scenario)}
            ).to("meta")  # some architectures draw a parameter's first values on the CPU
    except KeyError as error:
        if attention not in str(error):
            raise unbuildable(scenario.model["model_type"], error) from None
        raise UserError(  # architectures that keep a table of attention classes of their own
            "This architecture takes no attention but its own.",
            where=f"model (model_type {scenario.model['model_type']})",
            found=f"attention: {scenario.attention}",
            allowed="eager",
            change={"attention": "eager"},
        ) from None
    except Exception as error:  # whatever an architecture makes of sizes that don't go together
        raise unbuildable(scenario.model["model_type"], error) from None
    return model


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
    found = []
    config, given = model.config, scenario.model
    untold = [
        f"{name} {getattr(config, name)}"
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        if hasattr(config, name) and not {name, config.attribute_map.get(name, name)} & given.keys()
    ]
    if untold:
        found.append(f"the configuration does not say, so transformers' default is taken: {', '.join(untold)}")
    if scenario.activation_offload:
        found.append("the time leaves out the copies of activations to the host and back")
    if OPTIMIZERS[scenario.optimizer].package == "galore_torch":
        found.append("figures are those of a step with GaLore's projections, every 200th; cuSOLVER's workspaces for"
                     " their decompositions come on top")  # fmt: skip
    return [*found, *quantization_notes(model, scenario)]
