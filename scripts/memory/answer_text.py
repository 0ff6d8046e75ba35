"""An answer as text, for every command that prints one: the verdict first, then how it came about. In GiB."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from scripts.common.schema import yaml_text
from scripts.common.sizes import gib
from scripts.memory.gpus import EXPANDABLE_LINE, catalogue
from scripts.memory.step_time import NO_SPEED

NAMES = {"rule_of_thumb": "rule of thumb", "analytic": "analytic estimate", "trace": "trace of the step",
         "measurement": "measurement"}  # fmt: skip
WORDS = {
    "weights_4bit": "weights in 4 bits",
    "weights_8bit": "weights in 8 bits",
    "quantization_state": "their scales",
    "weights_bf16": "weights in bf16",
    "weights_fp16": "weights in fp16",
    "weights_fp32": "weights in fp32",
    "weights_other": "other weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations kept for backward",
    "inputs": "the batch",
    "logits_and_loss": "logits and loss",
    "weight_casts": "16-bit copies of weights",
    "temporaries": "temporaries",
    "workspaces": "cuBLAS workspaces",
    "unsharded_parameters": "layers gathered from other GPUs",
    "collective_buffers": "buffers between GPUs",
    "loading": "loading",
    "allocator_rounding": "rounding of blocks",
    "overhead": "overhead",
}


def card(gpu: Mapping[str, Any]) -> str:
    """A GPU in a sentence."""
    return f"the {gpu['title']}" if gpu["compute_capability"] is not None else f"a GPU of {gpu['name']}"


def verdict_line(answer: Mapping[str, Any]) -> str:
    """The first line: does it fit, and the two numbers that decide it."""
    gpu, trace = answer["gpu"], answer["trace"]
    if trace is None and answer["analytic"] is None:
        return f"NO ANSWER without the trace: {answer['reasons']['analytic']} (ask without --quick)"
    if trace is None:
        return _quick_verdict(answer)
    need = f"the step needs {gib(trace['required_bytes'])}"
    if gpu is None:
        return f"{need[0].upper()}{need[1:]}: {smallest(trace['required_bytes'])}"
    parallel = answer["scenario"]["parallel"]
    each = f" on each of {parallel['gpus']} GPUs with {parallel['strategy'].upper()}" if parallel["gpus"] > 1 else ""
    has = f"{card(gpu)} has {gib(gpu['usable_bytes'])} for it"
    if gpu["count"] > parallel["gpus"]:
        has += f" (of {gpu['count']} cards the step uses {parallel['gpus']})"
    if answer["fits"] and gpu["usable_bytes"] < trace["required_bytes"]:
        return f"FITS at this very size: {has}{each}; only from {gib(trace['required_bytes'])} on does every size fit"
    if answer["fits"]:
        return f"FITS: {need}{each}, {has}; {gib(answer['headroom_bytes'])} to spare"
    return f"DOES NOT FIT: {need}{each}, {has}; {gib(-answer['headroom_bytes'])} too few"


def _quick_verdict(answer: Mapping[str, Any]) -> str:
    analytic, gpu = answer["analytic"], answer["gpu"]
    need = f"about {gib(analytic['peak_allocated_bytes'])} at the peak, by the analytic estimate"
    if "required_bytes" in analytic:
        need = f"about {gib(analytic['required_bytes'])} needed, by the analytic estimate"
    if gpu is None:
        return f"{need[0].upper()}{need[1:]}: {smallest(analytic['enough_bytes'] or inf)}"
    has = f"{card(gpu)} has {gib(gpu['usable_bytes'])}"
    word = {True: "SHOULD FIT", False: "DOES NOT FIT", None: "TOO CLOSE TO CALL"}[answer["fits"]]
    return f"{word}: {need}; {has}" + ("; ask without --quick" if answer["fits"] is None else "")


def smallest(required: float) -> str:
    """The smallest card of the catalogue that has so much."""
    cards = sorted(catalogue().values(), key=lambda card: card.usable_bytes)
    found = next((card for card in cards if card.usable_bytes >= required), None)
    return f"the smallest GPU known that has it is the {found.title} (--gpu {found.name})" if found else (
        "no GPU known has it; --gpu 2xh100-80gb divides it"
    )  # fmt: skip


def step_line(scenario: Mapping[str, Any]) -> str:
    """What the answer is for, on one line."""
    lora, parallel, quantization = scenario["lora"], scenario["parallel"], scenario["quantization"]
    method = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[scenario["method"]]
    parts = [scenario["model_name"] or scenario["model"]["model_type"], method]
    if scenario.get("objective", "sft") != "sft":
        parts[-1] = f"{scenario['objective'].upper()}, {parts[-1]}"
    if lora:
        targets = lora["target_modules"]
        on = "all linear layers" if targets == "all-linear" else ", ".join(targets)
        parts[-1] += f" of rank {lora['rank']} on {on}"
    if quantization:
        int8 = quantization["type"] == "int8"
        parts[-1] = parts[-1].replace("QLoRA", "LoRA") if int8 else parts[-1]
        kind = "on a base of LLM.int8" if int8 else quantization["type"]
        parts.append(f"{kind}{' double-quantized' if quantization.get('double') else ''}")
    cast = f"under {scenario['autocast']} autocast" if scenario["autocast"] else "without autocast"
    parts.append(
        scenario["precision"] if scenario["precision"].endswith("-mixed") else f"{scenario['precision']} {cast}"
    )
    if scenario["method"] != "full":
        kind = {"peft": "PEFT's", "trl": "TRL's"}.get(scenario["kbit_preparation"], "no")
        parts.append(f"{kind} k-bit preparation")
    parts.append(f"{scenario['micro_batch']} x {scenario['sequence_length']:,} tokens")
    if scenario["attention_mask"] != "none":
        parts.append("padded")
    checkpointing = scenario["gradient_checkpointing"]
    parts.append({True: "checkpointing", False: "no checkpointing"}.get(checkpointing, "reentrant checkpointing"))
    parts += [scenario["optimizer"], f"{scenario['attention']} attention"]
    if scenario["loss"] != "full":
        parts.append(f"{scenario['loss']} loss")
    if scenario.get("activation_offload"):
        parts.append("activations wait on the host")
    if scenario["allocator"]["expandable_segments"]:
        parts.append("expandable segments")
    if parallel["gpus"] > 1:
        parts.append(f"{parallel['strategy']} on {parallel['gpus']} GPUs")
    return "; ".join(parts)


def head(answer: Mapping[str, Any]) -> list[str]:
    """The verdict, what it is for, what `like` set, and what was assumed."""
    lines = [verdict_line(answer), f"for: {step_line(answer['scenario'])}"]
    if answer.get("like"):
        lines.append(f"as {answer['like']['tool']} has it: {_fields(answer['like']['fields'])}")
    if taken := _fields(answer.get("assumed") or {}):
        lines.append(f"assumed, since nothing says otherwise: {taken}")
    return lines


def _fields(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {yaml_text(value)}" for name, value in values.items() if value is not None)


def answers(answer: Mapping[str, Any]) -> list[str]:
    """The four answers, one a line."""
    lines = []
    for name, title in NAMES.items():
        found = answer[name]
        if found is None:
            lines.append(f"  {title:<20}{answer['reasons'].get(name, 'not asked for')}")
            continue
        line = f"  {title:<20}{gib(found['peak_allocated_bytes']):>10} at the peak"
        if name == "trace":
            line += f", {gib(found['peak_reserved_bytes'])} reserved by the allocator where memory is plentiful"
        lines.append(line)
        if name == "trace":
            lines.append(f"  {'least that works':<20}{gib(found['required_bytes']):>10} the GPU must have: where it is"
                         " full, the allocator first gives back what lies free")  # fmt: skip
            lines += allocators(answer)
    return lines


def allocators(answer: Mapping[str, Any]) -> list[str]:
    """What the step needs with expandable segments and without them: the other figure, and how to get it."""
    both = answer.get("allocators")
    if not both:
        return []
    own = answer["scenario"]["allocator"]["expandable_segments"]
    other = both["default" if own else "expandable_segments"]
    how = f"without {EXPANDABLE_LINE}" if own else f"with {EXPANDABLE_LINE}"
    word = {True: ", which fits", False: ", which does not fit", None: ""}[other["fits"]]
    return [f"  {'':<20}{gib(other['required_bytes']):>10} {how}{word}"]


def time_lines(answer: Mapping[str, Any]) -> list[str]:
    """How long a step takes."""
    time = answer.get("time")
    if time is None:
        return [f"time of a step: {answer['reasons']['time']}"] if answer["reasons"].get("time") == NO_SPEED else []
    between = " ({:.3g} to {:.3g})".format(*time["range"]) if time["range"] else ""
    lines = [
        f"time of a step: {time['seconds_per_step']:.3g} s{between}, {time['tokens_per_second']:,.0f} tokens a second;"
        f" limited by {time['limited_by']}"
    ]
    if not time["range"]:
        lines.append("  no step was measured on this card: compare settings by it, and do not plan by it")
    return lines


def other_ways(answer: Mapping[str, Any]) -> list[str]:
    """The other way to use several GPUs, and what other tools' scripts would take instead."""
    lines = []
    for strategy, found in (answer.get("strategies") or {}).items():
        word = {True: ", which fits", False: ", which does not fit", None: ""}[found["fits"]]
        lines.append(f"  {'with ' + strategy.upper():<20}{gib(found['required_bytes']):>10} on each GPU{word}")
    others = {tool: size for tool, size in (answer.get("scripts_would_take") or {}).items() if size}
    if others:
        said = ", ".join(f"{tool} {gib(size)}" for tool, size in others.items())
        lines.append(
            f"  other tools' scripts  {said} at the peak, by the analytic estimate (like: {next(iter(others))})"
        )
    return lines


def suggestions(answer: Mapping[str, Any], shown: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """What would fit; ``shown`` makes the line to type."""
    if not answer["suggestions"]:
        return []
    lines = ["what would fit, the cheapest first:"]
    for item in answer["suggestions"]:
        lines.append(f"  {shown(item)}\n      {item['cost']}; {gib(item['headroom_bytes'])} to spare")
    return lines


def explanation(answer: Mapping[str, Any]) -> list[str]:
    """What is alive at the peak, in words."""
    shown = answer["trace"] or answer["analytic"]
    lines = [f"alive at the peak, in the {shown.get('peak_phase') or shown.get('phase')} phase:"]
    total = shown["peak_allocated_bytes"]
    for part, size in sorted(shown["components"].items(), key=lambda item: -item[1]):
        if size >= 2**20:
            lines.append(f"  {WORDS.get(part, part):<34}{gib(size):>11}{100 * size / total:>6.0f} %")
    return lines
