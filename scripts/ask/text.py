"""The answer as text: the verdict first, with the two numbers that decide it, then how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.ask import run
from scripts.ask.bounds import bound_bytes
from scripts.ask.question import Question
from scripts.ask.typed import suggested
from scripts.common.sizes import gib
from scripts.memory.answer_text import answers, head, other_ways, suggestions, time_lines


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
    lines = head(answer, "--like ")
    lines += [*answers(answer), *time_lines(answer), *other_ways(answer)]
    if asked.run:
        lines += run.run_lines(answer["run"], asked.run)
        lines += run.sooner_lines(answer["sooner"], lambda item: suggested(command, item["changes"]))
    lines += reading_lines(asked, answer)
    if answer["trace"]:
        lines += [f"  note: {note}" for note in answer["trace"]["notes"]]
    lines += [f"  warning: {warning}" for warning in answer.get("warnings") or []]
    return "\n".join(lines + suggestions(answer, lambda item: suggested(command, item["changes"])))
