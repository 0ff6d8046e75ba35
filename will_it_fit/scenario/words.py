"""What the line of an answer says of fields whose value alone says too little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from will_it_fit.common.errors import yaml_text
from will_it_fit.scenario.objectives import OBJECTIVES

# Adapters' settings that take neither memory nor time.
IDLE = {"peft_type", "lora_alpha", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision",
         "peft_version", "task_type"}  # fmt: skip


def name(name: Any, scenario: Mapping[str, Any]) -> str:
    model = scenario["model"]
    layers = (
        model.get("num_hidden_layers")
        or model.get("n_layer")
        or (model.get("text_config") or {}).get("num_hidden_layers")
    )
    return " ".join(str(name).split()) if name else f"{model.get('model_type')} of {layers} layers"


def method(method: str, scenario: Mapping[str, Any]) -> str:
    """The method with its adapters: their kind, rank and layers."""
    lora, adapter, quantization = scenario["lora"], scenario["adapter"], scenario["quantization"] or {}
    if method == "full":
        return "full fine-tuning"
    kind = str((adapter or {}).get("peft_type") or "LORA").upper()
    if kind != "LORA":
        return f"{kind} on a quantized base" if method == "qlora" else kind
    shown = "QLoRA" if method == "qlora" and quantization.get("type") != "int8" else "LoRA"
    if not lora:
        return shown
    targets = lora["target_modules"]
    on = "all linear layers" if targets == "all-linear" else ", ".join(targets)
    return f"{shown} of rank {lora['rank']} on {on}" + (f", dropout {lora['dropout']:g}" if lora["dropout"] else "")


def quantization(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    if not value:
        return ""
    words = ["on a base of LLM.int8" if value["type"] == "int8" else value["type"]]
    words[0] += " double-quantized" if value.get("double") else ""
    words += [f"stored as {value['storage']}"] if value.get("storage", "uint8") != "uint8" else []
    return ", ".join([*words, *([f"computing in {value['compute']}"] if value.get("compute") else [])])


def adapter(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    """A PEFT configuration by its keys."""
    kept = {
        key: item for key, item in (value or {}).items() if key not in IDLE and item not in (None, False, "", [], {})
    }
    return ", ".join(f"{key} {yaml_text(item)}" for key, item in sorted(kept.items()))


def images(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    if not value or not value.get("height"):
        return ""
    trained = "the vision tower trained too" if value["trained"] == "all" else "the vision tower frozen"
    many = "s" if (value["count"] or 1) > 1 else ""
    return f"{value['count'] or 1} image{many} of {value['height']} x {value['width']} in a row, {trained}"


def parallel(value: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    if value["gpus"] < 2:
        return ""
    kept = "" if value.get("reshard_after_forward", True) else ", gathered weights kept until backward"
    offload = ", offloaded to the CPU" if value.get("offload", "none") != "none" else ""
    return f"{value['strategy']} on {value['gpus']} GPUs{kept}{offload}"


def precision(value: str, scenario: Mapping[str, Any]) -> str:
    if value.endswith("-mixed"):
        return value
    return f"{value} under {scenario['autocast']} autocast" if scenario["autocast"] else f"{value} without autocast"


def of_adapters(words: Mapping[str, str]) -> Callable[[Any, Mapping[str, Any]], str]:
    """What is said of a value where there are adapters."""
    return lambda value, scenario: "" if scenario["method"] == "full" else words[value]


PREPARED = {"none": "no k-bit preparation", "peft": "PEFT's k-bit preparation", "trl": "TRL's k-bit preparation"}
ADAPTERS_IN = {
    "fp32": "",
    "base": "adapters in the base's dtype",
    "fp16": "adapters in fp16",
    "bf16": "adapters in bf16",
}
CHECKPOINTING = {True: "checkpointing", False: "no checkpointing", "reentrant": "reentrant checkpointing"}
PACKED = {"none": "", "rows": "packed rows", "shared_prefix": "packed rows with a shared prefix"}


def generations(value: int, scenario: Mapping[str, Any]) -> str:
    return f"{value} answers to a prompt" if OBJECTIVES[scenario["objective"]].generates else ""


def accumulated(value: int, _: Mapping[str, Any]) -> str:
    return f"{value} micro-batches a step" if value > 1 else ""


def tokens(value: int, scenario: Mapping[str, Any]) -> str:
    return f"{scenario['micro_batch']} x {value:,} tokens"
