"""The answer as text: the verdict first, with the two numbers that decide it, then how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from will_it_fit.ask import run_cost
from will_it_fit.ask.answer_text import answers, head, other_ways, suggestions, time_lines
from will_it_fit.ask.bounds import bound_bytes
from will_it_fit.ask.question import Question
from will_it_fit.ask.typed import suggested
from will_it_fit.common.errors import printable
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


def first_text(asked: Question, answer: Mapping[str, Any]) -> str:
    """The verdict, and how it came about: all that stands as soon as the step is traced."""
    lines = [*head(answer, "--like "), *answers(answer), *time_lines(answer), *reading_lines(asked, answer)]
    if answer["trace"]:
        lines += [f"  note: {note}" for note in answer["trace"]["notes"]]
    lines += [f"  warning: {warning}" for warning in answer.get("warnings") or []]
    return printable("\n".join(lines))


def rest_text(asked: Question, answer: Mapping[str, Any], command: Sequence[str]) -> str:
    """What takes traces of its own: the other way to use several GPUs, the run, and what would fit; "" for nothing."""
    lines = other_ways(answer)
    if asked.run:
        lines += run_cost.run_lines(answer.get("run"), asked.run)
        lines += run_cost.sooner_lines(answer.get("sooner") or [], lambda item: suggested(command, item["changes"]))
    lines += suggestions(answer, lambda item: suggested(command, item["changes"]))
    return printable("\n".join(lines))


def full_text(asked: Question, answer: Mapping[str, Any], command: Sequence[str]) -> str:
    """The whole answer."""
    return "\n".join(filter(None, (first_text(asked, answer), rest_text(asked, answer, command))))
