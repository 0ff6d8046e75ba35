"""The answer as text: the verdict first, with the two numbers that decide it, then how it came about."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.ask import run
from scripts.ask.bounds import bound_bytes
from scripts.ask.question import Question, assumed
from scripts.common.schema import yaml_text
from scripts.memory.gpus import GIB, catalogue

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
# Where the analytic estimate decides alone: required bytes lie above the peak by up to so much (the traced border cells
# of the memory profile: 2 to 10 %), and the peak itself is within 3 %.
UNTRACED = (0.97, 1.12)


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


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
    each = f" on each of {gpu['count']}" if answer["scenario"]["parallel"]["gpus"] > 1 else ""
    has = f"{card(gpu)} has {gib(gpu['usable_bytes'])} for it"
    if answer["fits"]:
        return f"FITS: {need}{each}, {has}; {gib(answer['headroom_bytes'])} to spare"
    return f"DOES NOT FIT: {need}{each}, {has}; {gib(-answer['headroom_bytes'])} too few"


def _quick_verdict(answer: Mapping[str, Any]) -> str:
    peak, gpu = answer["analytic"]["peak_allocated_bytes"], answer["gpu"]
    need = f"about {gib(peak)} at the peak, by the analytic estimate"
    if gpu is None:
        return f"{need[0].upper()}{need[1:]}: {smallest(peak * UNTRACED[1])}"
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
    if lora:
        targets = lora["target_modules"]
        on = "all linear layers" if targets == "all-linear" else ", ".join(targets)
        parts[-1] += f" of rank {lora['rank']} on {on}"
    if quantization:
        int8 = quantization["type"] == "int8"
        parts[-1] = parts[-1].replace("QLoRA", "LoRA") if int8 else parts[-1]
        kind = "on a base of LLM.int8" if int8 else quantization["type"]
        parts.append(f"{kind}{' double-quantized' if quantization.get('double') else ''}")
    cast = f" under {scenario['autocast']} autocast" if scenario["autocast"] else ""
    parts.append(f"{scenario['precision']}{cast}")
    parts.append(f"{scenario['micro_batch']} x {scenario['sequence_length']:,} tokens")
    if scenario["attention_mask"] != "none":
        parts.append("padded")
    checkpointing = scenario["gradient_checkpointing"]
    parts.append({True: "checkpointing", False: "no checkpointing"}.get(checkpointing, "reentrant checkpointing"))
    parts += [scenario["optimizer"], f"{scenario['attention']} attention"]
    if scenario["loss"] != "full":
        parts.append(f"{scenario['loss']} loss")
    if parallel["gpus"] > 1:
        parts.append(f"{parallel['strategy']} on {parallel['gpus']} GPUs")
    return "; ".join(parts)


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
            reserved, least = gib(found["peak_reserved_bytes"]), gib(found["required_bytes"])
            line += f", {reserved} reserved by the allocator; {least} is the least that works"
        lines.append(line)
    return lines


def reading_lines(asked: Question, answer: Mapping[str, Any]) -> list[str]:
    """What another tool's file said, and what of it is not described."""
    lines = []
    for reading in asked.readings:
        if reading.tool != "Hub":
            count = len(reading.understood)
            lines.append(f"read as {reading.tool} {reading.version}: {reading.file} ({count} settings)")
        for remark in reading.remarks:
            size = bound_bytes(remark.bound, asked.scenario, answer)
            most = f" by up to {gib(size)}" if size else ""
            lines.append(f"  not described: {remark}{most}")
        for key, near in reading.unknown.items():
            lines.append(f"  unknown: {key}" + (f" (is {near} meant?)" if near else "") + ", which is left out")
        lines += [f"  note: {note}" for note in reading.notes]
    return lines


def full_text(asked: Question, answer: Mapping[str, Any], command: Sequence[str]) -> str:
    """The whole answer."""
    lines = [verdict_line(answer), f"for: {step_line(answer['scenario'])}"]
    taken = assumed(asked)
    if taken:
        said = ", ".join(f"{name} {yaml_text(value)}" for name, value in taken.items() if value is not None)
        lines.append(f"assumed, since nothing says otherwise: {said}")
    lines += answers(answer)
    lines += run.time_lines(answer)
    if asked.run:
        lines += run.run_lines(answer["run"], asked.run)
    lines += reading_lines(asked, answer)
    if answer["trace"]:
        lines += [f"  note: {note}" for note in answer["trace"]["notes"]]
    lines += [f"  warning: {warning}" for warning in answer.get("warnings") or []]
    if answer["suggestions"]:
        lines.append("what would fit, the cheapest first:")
        for item in answer["suggestions"]:
            spare = f"{gib(item['headroom_bytes'])} to spare"
            lines.append(f"  {suggested(command, item['changes'])}\n      {item['cost']}; {spare}")
    return "\n".join(lines)


def suggested(command: Sequence[str], changes: Mapping[str, Any]) -> str:
    """A suggestion as a command line to paste: what was typed, with what has to change in its place."""
    flags = {"sequence_length": "-s", "micro_batch": "-b", "method": "--method", "gpu": "--gpu"}
    long = {"-s": "--sequence-length", "-b": "--micro-batch"}
    words = list(command)
    for name, value in changes.items():
        flag = flags.get(name)
        new = [flag, _gpu(value) if name == "gpu" else str(value)] if flag else _settings(name, value)
        for old in (flag, long.get(flag or "")) if flag else ():
            while old in words:
                at = words.index(old)
                del words[at : at + 2]
        for set_now in new[1::2]:
            words = _without_setting(words, set_now.partition("=")[0] if new[0] == "--set" else name)
        words += new
    return " ".join(["will-it-fit", *(shlex.quote(word) for word in words)])


def _without_setting(words: Sequence[str], name: str) -> list[str]:
    """A command line without what it set a field to."""
    kept = list(words)
    for at in range(len(kept) - 2, -1, -1):
        if kept[at] == "--set" and kept[at + 1].partition("=")[0] == name:
            del kept[at : at + 2]
    return kept


def _gpu(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    kind = value.get("name") or f"{value['vram_gib']:g}GiB"
    return f"{value['count']}x{kind}" if value.get("count", 1) > 1 else str(kind)


def _settings(name: str, value: Any) -> list[str]:
    """Options for one change; a mapping's parts one by one."""
    if not isinstance(value, Mapping):
        return ["--set", f"{name}={yaml_text(value)}"]
    if name == "parallel":
        return ["--strategy", str(value["strategy"])]
    parts = [f"{name}.{part}={yaml_text(item)}" for part, item in value.items() if item is not None]
    return [word for part in parts for word in ("--set", part)]


def explanation(answer: Mapping[str, Any]) -> list[str]:
    """What is alive at the peak, in words."""
    shown = answer["trace"] or answer["analytic"]
    lines = [f"alive at the peak, in the {shown.get('peak_phase') or shown.get('phase')} phase:"]
    total = shown["peak_allocated_bytes"]
    for part, size in sorted(shown["components"].items(), key=lambda item: -item[1]):
        if size >= 2**20:
            lines.append(f"  {WORDS.get(part, part):<34}{gib(size):>11}{100 * size / total:>6.0f} %")
    return lines
