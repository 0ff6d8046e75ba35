"""The answer as text: the verdict first, with the two numbers that decide it, then how it came about."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from will_it_fit.ask import run_cost
from will_it_fit.ask.answer_text import answers, head, other_ways, suggestions, time_lines
from will_it_fit.ask.bounds import bound_bytes
from will_it_fit.ask.question import Question
from will_it_fit.common.schema import yaml_text
from will_it_fit.common.sizes import gib


def reading_lines(asked: Question, answer: Mapping[str, Any]) -> list[str]:
    """The settings that another tool's file has, and those of them that are not described."""
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
    lines = head(answer)
    lines += [*answers(answer), *time_lines(answer), *other_ways(answer)]
    if asked.run:
        lines += run_cost.run_lines(answer["run"], asked.run)
        lines += run_cost.sooner_lines(answer["sooner"], lambda item: suggested(command, item["changes"]))
    lines += reading_lines(asked, answer)
    if answer["trace"]:
        lines += [f"  note: {note}" for note in answer["trace"]["notes"]]
    lines += [f"  warning: {warning}" for warning in answer.get("warnings") or []]
    return "\n".join(lines + suggestions(answer, lambda item: suggested(command, item["changes"])))


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
