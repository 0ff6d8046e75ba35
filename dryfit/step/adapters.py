"""Adapters: any of PEFT's methods, put on a model by PEFT itself.

A scenario says them in short (``lora``) or as PEFT writes ``adapter_config.json`` (``adapter``). PEFT builds them,
casts them (``autocast_adapter_dtype``) and decides what is trained; whatever it can't do with a model or on a device
without data becomes a :class:`UserError` that says so.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dryfit.common.errors import UserError
from dryfit.engine.bitsandbytes_layers import quantize_4bit, quantize_8bit
from dryfit.engine.patching import patched
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.value_fields import DEFAULT_START
from dryfit.step.experts import whole_names

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Methods that no scenario can say, and why.
IMPOSSIBLE = {
    "CPT": "its batches carry the types of their tokens, and its loss goes through the values of these",
    "MULTITASK_PROMPT_TUNING": "its batches carry task ids",
    "POLY": "its batches carry task ids",
    "XLORA": "it mixes adapters that have been trained before",
}
# What a scenario's `lora` calls the fields of PEFT's LoRA.
SHORT = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_NUMBERED = re.compile(r"\.\d+(\.|$)")  # the path of a module within a layer
# Methods that read values of what they make, not of the weights: on `meta` they are made on the CPU and then emptied.
VALUED = frozenset({"BOFT", "SHIRA", "UNILORA"})


# Linear layers that take no adapter, by the model's type. PEFT refuses what a state space's kernel reads for itself
# (peft 0.21 tuners/tuners_utils.py, `_check_lora_target_modules_mamba`). The others are linear layers by their class,
# and not by their outputs: a router has two, a grouped projection's have another shape.
_STATE_SPACES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
WITHOUT_ADAPTER = {
    **dict.fromkeys(_STATE_SPACES, "out_proj"),
    "llama4_text": "router",
    "deepseek_v4": "o_a_proj",
}


def left_out(scenario: Scenario) -> str | None:
    """The linear layers of a scenario's model that get no adapter although all were asked for; None: no such."""
    all_linear = scenario.lora is not None and scenario.lora.target_modules == "all-linear"
    return WITHOUT_ADAPTER.get(scenario.model["model_type"]) if all_linear else None


def add_adapters(model: nn.Module, scenario: Scenario) -> nn.Module:
    """Put a scenario's adapters on a model; everything else is frozen.

    The names of what PEFT has added are kept: :func:`adapter_names`.

    Raises :class:`UserError` if PEFT does not know the configuration, if it is for another task, if it fits nothing in
    this model, or can't be put on it.
    """
    from peft import get_peft_model

    config = peft_config(scenario)
    kind = config.peft_type.value
    base = {_storage(tensor): weakref.ref(tensor) for _, tensor in _tensors(model)}
    known = {name for name, _ in _tensors(model)}
    on_meta = next(model.parameters()).device.type == "meta"
    if scenario.images and scenario.images.trained == "language":
        _leave_out(config, list(outside_language(model)), scenario)
    if name := left_out(scenario):
        _leave_out(config, [name], scenario)
    _check_modules_to_save(model, config, scenario)
    if getattr(config, "target_parameters", None):
        config.target_parameters = whole_names(model, config.target_parameters)
    if kind == "SHIRA" and on_meta:
        config.mask_fn = _any_mask
    if (
        kind == "PROMPT_TUNING" and on_meta
    ):  # of a text the tokenizer would have to be fetched; the sizes are the same
        config.prompt_tuning_init = "RANDOM"
    try:
        with (
            torch.device("meta" if on_meta and kind not in VALUED else "cpu"),
            _cast_on_meta() if on_meta else nullcontext(),
            _pack_again_on_meta() if on_meta else nullcontext(),
            warnings.catch_warnings(),
            _quiet("peft"),
        ):
            # PEFT corrects fan_in_fan_out for GPT-2's transposed layers by itself, and warns that it did.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            model = get_peft_model(
                model, config, autocast_adapter_dtype=scenario.adapter_precision == "fp32"
            )
    except Exception as error:  # each method checks its fields and the model in its own way
        raise _refusal(model, scenario, kind, error) from error
    if on_meta and kind in VALUED:
        _empty(model)
    _check_patterns(model, scenario)

    def of_base(name: str, tensor: torch.Tensor) -> bool:
        # Addresses are used again: who had one must have it still. PiSSA gives weights of the base new values.
        before = base[_storage(tensor)]() if _storage(tensor) in base else None
        return (before is not None and _storage(before) == _storage(tensor)) or unwrapped(
            name
        ) in known

    names = {name for name, tensor in _tensors(model) if not of_base(name, tensor)}
    model.adapter_names = frozenset(names)
    if scenario.adapter_precision in ("fp16", "bf16"):
        dtype = DTYPES[scenario.adapter_precision]
        for name, parameter in model.named_parameters():
            if name in names and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"{kind} trains nothing in this model.",
            where=_where(scenario),
            found=scenario.adapter,
            allowed="a configuration without inference_mode, whose target modules the model has",
            change={"adapter": {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}},
        )
    return model


def _check_modules_to_save(model: nn.Module, config: Any, scenario: Scenario) -> None:
    """Refuse a module that is to be trained whole and that the model does not have."""
    known = [name for name, _ in model.named_modules() if name]
    for wanted in getattr(config, "modules_to_save", None) or ():
        if any(f".{name}".endswith(f".{wanted}") for name in known):
            continue
        # A layer's modules are many: whoever trains some whole means those around the layers most of all.
        around = sorted({name.rsplit(".", 1)[-1] for name in known if not _NUMBERED.search(name)})
        near = difflib.get_close_matches(wanted, {n.rsplit(".", 1)[-1] for n in known}, n=1)
        raise UserError(
            f"`modules_to_save` names {wanted}, and this model has no such module.",
            where=_where(scenario),
            found=wanted,
            allowed=f"a module of a layer, or one of {', '.join(around)}",
            change={_where(scenario): {"modules_to_save": near or ["lm_head"]}},
        )


def _check_patterns(model: nn.Module, scenario: Scenario) -> None:
    """Refuse ranks and alphas of the short form that match no adapter, which PEFT would pass over without a word.

    The short form's patterns have no order, so two that match the same layer are refused too.
    """
    if scenario.lora is None:
        return
    names = list(_adapted(model))
    for field in ("rank_pattern", "alpha_pattern"):
        taken: dict[str, str] = {}
        patterns = getattr(scenario.lora, field) or {}
        for pattern, number in patterns.items():
            # As PEFT reads it (peft 0.21 utils/other.py, ``get_pattern_key``).
            matched = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
            twice = next((name for name in matched if name in taken), None)
            if twice:
                problem = (
                    f"`lora.{field}` has {taken[twice]!r} and {pattern!r}, which match {twice}."
                )
            elif not matched:
                problem = f"`lora.{field}` has {pattern!r}, which matches no layer with an adapter."
            else:
                taken |= dict.fromkeys(matched, pattern)
                continue
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            near = difflib.get_close_matches(pattern, last, n=1) or last
            right = {near[0]: number}
            if twice:
                right = {taken[twice]: patterns[taken[twice]]}
            raise UserError(
                problem,
                where=f"lora.{field}",
                found=dict(patterns),
                allowed=f"the end of a layer's path, one pattern for a layer: {', '.join(last)}, {names[0]}",
                change={"lora": {field: right}},
            )


def _adapted(model: nn.Module) -> Iterator[str]:
    """Paths of what has an adapter, as PEFT's patterns are compared with them: layers, and parameters of experts."""
    for name, module in model.named_modules():
        path = name.removeprefix("base_model.model.")
        parameter = getattr(module, "parameter_name", None)
        if parameter is not None:
            yield f"{path.replace('.base_layer', '')}.{parameter}"
        elif hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A"):
            yield path


def _leave_out(config: Any, modules: list[str], scenario: Scenario) -> None:
    """Let a PEFT configuration put no adapters on some modules."""
    if not hasattr(config, "exclude_modules"):
        raise UserError(
            "This method of PEFT can't leave the vision tower out.",
            where=_where(scenario),
            found=config.peft_type.value,
            allowed="a method with exclude_modules, such as LORA; or images.trained all",
            change={"adapter": {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}},
        )
    if config.exclude_modules is None:
        config.exclude_modules = modules


def _any_mask(layer: nn.Module, rank: int, **_: Any) -> torch.Tensor:
    """SHiRA's sparse mask with as many entries as a random one, of the same size in memory wherever they are."""
    weight = layer.weight
    mask = torch.zeros(weight.shape, device="cpu")
    mask.view(-1)[: rank * (layer.in_features + layer.out_features)] = 1.0
    return mask


def _empty(model: nn.Module) -> None:
    """Take the values from the tensors that are not on ``meta``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                module._parameters[name] = nn.Parameter(
                    parameter.data.to("meta"), parameter.requires_grad
                )
        for name, value in vars(
            module
        ).items():  # buffers, and what some methods keep in plain dictionaries
            if isinstance(value, dict) and name not in ("_parameters", "_modules"):
                for key, tensor in value.items():
                    if isinstance(tensor, torch.Tensor):
                        value[key] = tensor.to("meta")


def adapter_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that :func:`add_adapters` has added; none without adapters."""
    return model.__dict__.get("adapter_names", frozenset())


def unwrapped(name: str) -> str:
    """The name that a parameter of the base had before PEFT put its wrappers around it."""
    for wrapper in (".base_layer.", ".original_module."):
        name = name.replace(wrapper, ".")
    return name.removeprefix("base_model.").removeprefix("model.")


def peft_config(scenario: Scenario) -> Any:
    """PEFT's configuration of a scenario's adapters.

    Raises :class:`UserError` if PEFT knows no such method or field, or the task is not causal language modelling.
    """
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if scenario.lora is not None:
        lora = scenario.lora
        targets = (
            lora.target_modules
            if isinstance(lora.target_modules, str)
            else list(lora.target_modules)
        )
        start = True if lora.initialization == DEFAULT_START else lora.initialization
        with warnings.catch_warnings():
            # That PiSSA with rsLoRA and patterns can't be turned into plain LoRA, which who trains it is told.
            warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA")
            return LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                use_rslora=lora.rslora,
                use_dora=lora.dora,
                init_lora_weights=start,
                modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
                rank_pattern=dict(lora.rank_pattern or {}),
                alpha_pattern=dict(lora.alpha_pattern or {}),
                task_type="CAUSAL_LM",
            )
    fields = dict(scenario.adapter)
    kind = str(fields.pop("peft_type")).upper()
    known = {item.value: config for item, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known or kind in IMPOSSIBLE:
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.5)
        raise UserError(
            f"PEFT's {kind} can't be used in a scenario: {IMPOSSIBLE[kind]}."
            if kind in IMPOSSIBLE
            else f"PEFT knows no method {kind}.",
            where="adapter.peft_type",
            found=kind,
            allowed=", ".join(sorted(set(known) - set(IMPOSSIBLE))),
            write=f"adapter: {{peft_type: {near[0] if near and kind not in IMPOSSIBLE else 'LORA'}, ...}}",
        )
    task = fields.pop("task_type", None) or "CAUSAL_LM"
    if task != "CAUSAL_LM":
        raise UserError(
            f"The adapter's configuration is for another task, {task}.",
            where="adapter.task_type",
            found=task,
            allowed="CAUSAL_LM",
            write="adapter: {task_type: CAUSAL_LM, ...}",
        )
    taken = inspect.signature(known[kind].__init__).parameters
    for name in fields:
        if name not in taken and name not in ("auto_mapping", "peft_version"):
            near = (
                [SHORT[name]]
                if SHORT.get(name) in taken
                else difflib.get_close_matches(name, taken, n=1, cutoff=0.5)
            )
            raise UserError(
                f"PEFT's {kind} has no field `{name}`"
                + (f"; did you mean `{near[0]}`?" if near else "."),
                where="adapter",
                found=name,
                allowed=", ".join(sorted(set(taken) - {"self"})),
                write=f"adapter: {{{near[0]}: {fields[name]}, ...}}" if near else None,
            )
    fields = {name: value for name, value in fields.items() if name in taken}
    try:
        with warnings.catch_warnings(), _quiet("peft"):
            warnings.simplefilter("ignore")
            return known[kind](**{**fields, "inference_mode": False, "task_type": task})
    except Exception as error:  # each method checks its fields in its own way
        raise UserError(
            f"PEFT refuses the configuration: {error}",
            where="adapter",
            found=scenario.adapter,
            allowed=f"what {known[kind].__name__} takes",
        ) from error


def _cast_on_meta() -> AbstractContextManager[None]:
    """PEFT gives adapters the dtype of their base layer while it moves them to its device, but not those on ``meta``.

    peft ``tuners/tuners_utils.py``, ``BaseTunerLayer._move_adapter_to_device_of_base_layer``.
    """
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.lora import layer as layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    def cast(self: Any, adapter_name: str, device: Any = None) -> None:
        base = self.get_base_layer()
        if hasattr(self, "get_param"):  # adapters of a parameter, such as all experts' weights
            dtype = self.get_param().dtype
        else:
            dtype = getattr(base, "compute_dtype", None) or getattr(
                getattr(base, "weight", None), "dtype", None
            )
        if dtype is None or not dtype.is_floating_point:
            return
        for name in (*self.adapter_layer_names, *self.other_param_names):
            layer = getattr(self, name, None)
            if (
                isinstance(layer, nn.ModuleDict | nn.ParameterDict | BufferDict)
                and adapter_name in layer
            ):
                item = layer[adapter_name]
                if getattr(item, "dtype", dtype).is_floating_point:  # modules have no dtype
                    layer[adapter_name] = item.to(dtype=dtype)

    kinds = [
        BaseTunerLayer,
        *filter(None, [getattr(layers, "ParamWrapper", None)]),
    ]  # the second from PEFT 0.17 on
    return patched([(kind, "_move_adapter_to_device_of_base_layer", cast) for kind in kinds])


def _pack_again_on_meta() -> AbstractContextManager[None]:
    """OLoRA unpacks a quantized layer, takes its factors out and packs it again, which has no effect on ``meta``.

    Packed from fp32, a 4-bit layer is from then on unpacked to fp32 (peft 0.21 ``LoraLayer.olora_init``).
    """
    from peft.tuners.lora.layer import LoraLayer

    take_factors = LoraLayer.olora_init

    def packed(self: Any, adapter_name: str) -> None:
        take_factors(self, adapter_name)
        quantize_4bit(self.get_base_layer())
        quantize_8bit(self.get_base_layer())

    return patched([(LoraLayer, "olora_init", packed)])


def _refusal(model: nn.Module, scenario: Scenario, kind: str, error: Exception) -> UserError:
    text = str(error).strip() or type(error).__name__
    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    targets = (
        scenario.lora.target_modules if scenario.lora else scenario.adapter.get("target_modules")
    )
    if (
        "target" in text.lower() and "not found" in text.lower()
    ) or "No modules were targeted" in text:
        return UserError(
            f"The adapters fit nothing in this model: {text}",
            where="lora.target_modules" if scenario.lora else "adapter.target_modules",
            found=list(targets) if isinstance(targets, tuple) else targets,
            allowed=f"all-linear, or a list of {', '.join(sorted(set(linear)))}",
            change={"lora": {"target_modules": "all-linear"}}
            if scenario.lora
            else {"adapter": {"peft_type": kind, "target_modules": "all-linear"}},
        )
    if _needs_values(error):
        return UserError(
            f"{kind} makes its adapters out of the values of the weights, and a traced model has none: {text}",
            where=_where(scenario),
            found=scenario.adapter,
            allowed="an initialization that needs no values, such as init_weights: true, where the method has one",
        )
    return UserError(
        f"PEFT can't put {kind} on this model: {text}",
        where=f"{_where(scenario)}, model (model_type {scenario.model['model_type']})",
        found=scenario.adapter,
        allowed="a method and target modules that fit the model",
    )


def _needs_values(error: BaseException) -> bool:
    return "meta" in str(error).lower() or "no data" in str(error).lower()


def _where(scenario: Scenario) -> str:
    return "lora" if scenario.lora else "adapter"


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def outside_language(model: nn.Module) -> dict[str, nn.Module]:
    """A vision-language model's modules beside its language model: the vision tower, the projector."""
    within = {id(module) for module in model.get_decoder().modules()} | {
        id(model.get_output_embeddings())
    }
    parents = {
        id(module)
        for module in model.modules()
        if any(id(part) in within for part in module.modules())
    }
    return {
        name: module for name, module in model.named_modules() if id(module) not in within | parents
    }
