"""The one way to build a model for a scenario: for training, for the trace, for the measurement.

``build_model`` makes the same structure on every device. On ``meta`` no tensor holds data, so a 7B model takes
seconds; on ``cpu`` and ``cuda`` it holds the weights of a folder, or random ones. What is predicted is what runs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from scripts.common.errors import UserError
from scripts.engine.building import keep_paged_states_outside, quantize_4bit
from scripts.settings.scenario import Scenario
from scripts.training.adapters import DTYPES, adapter_names, add_adapters, unwrapped
from scripts.training.architecture import attention_name, configuration, unbuildable

STORAGES = {**DTYPES, "uint8": torch.uint8}
# `torch_dtype` became `dtype` in transformers 4.56; the A100 measurements are traced with 4.48.
_DTYPE_ARGUMENT = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
# On the CPU it recommends a package of kernels for inference, on every import.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


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
) -> nn.Module:
    """Build the model of a scenario, ready to train: quantized, prepared, with adapters, in training mode.

    Parameters
    ----------
    scenario
        What to build.
    device
        ``meta`` (no data), ``cpu`` or ``cuda``.
    weights
        Folder with ``config.json`` and safetensors files. None: random weights from ``seed``.
    seed
        Of the random weights and of the adapters.
    attention_implementation
        Name of a registered attention function instead of the scenario's; the trace passes its stand-ins.

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
        model = _skeleton(scenario, attention)
        if device.type == "meta":
            quantize_4bit(model, weight_dtype(scenario))
        else:
            _materialize(model, device)
    model.config.use_cache = scenario.use_cache
    if scenario.loss == "liger":
        from scripts.training.liger import use_liger

        use_liger(model)
    if scenario.method != "full" and scenario.kbit_preparation != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if scenario.gradient_checkpointing:
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks by this name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": scenario.gradient_checkpointing == "reentrant"})
        except ValueError as error:
            raise UserError(
                f"This architecture has no activation checkpointing: {error}",
                found=scenario.model.get("model_type"),
                write="gradient_checkpointing: false",
            ) from None
    if scenario.gradient_checkpointing == "reentrant" and scenario.method != "full":
        model.enable_input_require_grads()  # as the Trainer does: this way of checkpointing looks at the inputs alone
    if scenario.method != "full":
        torch.manual_seed(seed)
        model = add_adapters(model, scenario)
    if scenario.kbit_preparation == "trl":
        cast_as_trl(model, weight_dtype(scenario))
    return model.train()


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


def build_optimizer(
    model: nn.Module,
    scenario: Scenario,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Make the scenario's optimizer over the trainable parameters, with PyTorch's own choice of how it steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device.type
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    if scenario.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        if device == "cpu":
            raise UserError(
                "8-bit Adam needs a GPU: bitsandbytes has no CPU kernel for it.",
                found=scenario.optimizer,
                allowed="adamw, adamw_fused",
                write="optimizer: adamw",
            )
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, is_paged=scenario.optimizer.startswith("paged"), **options)
        if device == "meta" and optimizer.is_paged:
            keep_paged_states_outside(optimizer)
        return optimizer
    if scenario.optimizer == "adamw_fused":
        return torch.optim.AdamW(parameters, fused=True, foreach=False, **options)
    return torch.optim.AdamW(parameters, **options)


def linear_4bit(model: nn.Module) -> dict[str, nn.Module]:
    """The 4-bit linear layers of a model by name, in order."""
    # By its package too: PEFT calls the layer that wraps one by the same name.
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")
    }


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, as ``model.eval()`` sets it, with 4-bit layers left as training has them; then training mode.

    Outside training, bitsandbytes packs 4-bit weights anew for CPUs with bf16 instructions: for good, with other
    results, and not for every shape.
    """
    model.eval()
    for module in linear_4bit(model).values():
        module.training = True
    try:
        yield
    finally:
        model.train()


def assert_quantized(model: nn.Module, scenario: Scenario) -> dict[str, int]:
    """Make sure that a quantized scenario's linear layers really are 4-bit, and count.

    Training settings can ask for 4-bit loading and silently get 16- or 32-bit weights; then every figure that
    follows is about another method.

    Returns
    -------
    dict
        ``linear_4bit_layers``, ``linear_4bit_parameters`` (weights, as many as before packing),
        ``linear_dense_layers`` (the output head, as transformers leaves it).

    Raises
    ------
    UserError
        If a linear layer that should be 4-bit is not.
    """
    packed, added = linear_4bit(model), adapter_names(model)
    skipped = set(getattr(model, "modules_not_quantized", ()) or ()) | set(_output_heads(model))
    dense = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and f"{name}.weight" not in added
    }
    if scenario.method == "qlora":
        kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)} - {"Linear"}
        if not packed and kinds:
            raise UserError(
                f"No layer of this architecture is 4-bit: bitsandbytes packs plain linear layers, and these are of the"
                f" class {', '.join(sorted(kinds))}.",
                where=f"model (model_type {scenario.model['model_type']}), transformers {transformers.__version__}",
                found="method: qlora",
                allowed="full, lora",
                write="method: lora",
            )
        wrong = [
            name for name in dense if name not in skipped and unwrapped(f"{name}.weight").split(".")[-2] not in skipped
        ]
        wrong += [
            name
            for name, module in packed.items()
            if not getattr(module.weight, "bnb_quantized", False)
            or module.weight.quant_state is None
            or module.weight.dtype.itemsize * module.weight.numel() * 2 < module.weight.quant_state.shape.numel()
            or module.weight.element_size() * module.weight.numel() > module.weight.quant_state.shape.numel()
        ]
        if wrong or not packed:
            raise UserError(
                "The linear layers are not 4-bit although the method is qlora.",
                where=f"{len(wrong)} layers, such as {wrong[0]}" if wrong else "no 4-bit layer in the model",
                allowed="every linear layer but the output head is 4-bit",
                write="method: qlora\nquantization: {type: nf4, double: true}",
            )
    return {
        "linear_4bit_layers": len(packed),
        "linear_4bit_parameters": sum(module.weight.quant_state.shape.numel() for module in packed.values()),
        "linear_dense_layers": len(dense),
    }


def parameter_count(model: nn.Module) -> int:
    """Parameters of the base model, 4-bit weights unpacked and adapters left out."""
    added = adapter_names(model)
    return sum(
        parameter.quant_state.shape.numel()
        if getattr(parameter, "quant_state", None) is not None
        else parameter.numel()
        for name, parameter in model.named_parameters()
        if name not in added
    )


# --- weights --------------------------------------------------------------------------------------------------------


def bitsandbytes_config(scenario: Scenario) -> transformers.BitsAndBytesConfig:
    """4-bit settings of a scenario, as transformers takes them."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scenario.quantization.type,
        bnb_4bit_use_double_quant=scenario.quantization.double,
        bnb_4bit_compute_dtype=DTYPES.get(scenario.quantization.compute, weight_dtype(scenario)),
        bnb_4bit_quant_storage=STORAGES[scenario.quantization.storage],
    )


def _load(scenario: Scenario, device: torch.device, folder: Path, attention: str) -> nn.Module:
    """Load safetensors with transformers, which quantizes each weight as it arrives on the device."""
    if not (folder / "config.json").is_file():
        raise UserError("The folder holds no model.", where=folder, allowed="config.json and *.safetensors")
    quantization = {"quantization_config": bitsandbytes_config(scenario)} if scenario.method == "qlora" else {}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        **{_DTYPE_ARGUMENT: weight_dtype(scenario)},
        attn_implementation=attention,
        device_map={"": device},
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **quantization,
    )


def _skeleton(scenario: Scenario, attention: str) -> nn.Module:
    """The model on ``meta``, its linear layers exchanged for 4-bit ones where the method says so (still unpacked)."""
    config = configuration(scenario)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
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
            write="attention: eager",
        ) from None
    except Exception as error:  # whatever an architecture makes of sizes that don't go together
        raise unbuildable(scenario.model["model_type"], error) from None
    if scenario.method == "qlora":
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        quantizer = Bnb4BitHfQuantizer(bitsandbytes_config(scenario))
        quantizer.pre_quantized = False
        default = torch.get_default_dtype()
        torch.set_default_dtype(weight_dtype(scenario))  # of the new layers' biases, and of the weights to be packed
        try:
            quantizer._process_model_before_weight_loading(model, device_map=None)
        finally:
            torch.set_default_dtype(default)
        quantizer._process_model_after_weight_loading(model)
        model.modules_not_quantized = list(quantizer.modules_to_not_convert or ())
        model.tie_weights()
    return model


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Turn a skeleton into a model with random weights, layer by layer: one dense weight at a time is quantized."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            from bitsandbytes.nn import Params4bit

            old = module.weight
            dense = torch.empty(old.shape, dtype=old.dtype, device=device).normal_(0.0, 0.02)
            module.weight = Params4bit(dense, requires_grad=False, **old.__dict__).to(device)
            del dense
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros_like(module.bias, device=device), requires_grad=False)
            for parameter in module.parameters():
                parameter._is_hf_initialized = True
            module._is_hf_initialized = True
        else:
            module.to_empty(device=device, recurse=False)
    model.tie_weights()
    with torch.no_grad():
        model.initialize_weights()
    model.tie_weights()


def _output_heads(model: nn.Module) -> list[str]:
    """Names of the modules that transformers never quantizes: the output head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if head is not None and module is head]
    return [part for name in names for part in (name, name.rsplit(".", 1)[-1])]


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
    experts = [p for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name]
    if scenario.method == "qlora" and experts:
        size = sum(parameter.numel() for parameter in experts)
        found.append(
            f"{size:,} parameters of experts stay in {scenario.weight_precision}: transformers 5 keeps all experts of a"
            " layer as one tensor, which bitsandbytes does not pack"
        )
    gpus, whole = scenario.parallel.gpus, [module.weight for module in linear_4bit(model).values()]
    whole = [weight for weight in whole if not weight.is_floating_point()]
    if scenario.parallel.strategy == "fsdp2" and whole:
        size = sum(weight.numel() * weight.element_size() for weight in whole)
        found.append(
            f"the 4-bit weights are stored as {scenario.quantization.storage}, which FSDP does not divide: each GPU"
            f" holds all {size:,} bytes of them; `quantization: {{storage: {scenario.weight_precision}}}` saves"
            f" {size - size // gpus:,} bytes on each of {gpus} GPUs"
        )
    return found
