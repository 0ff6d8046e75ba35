"""A reinforcement step's cycle in words: a line for each phase, what to turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dryfit.common.text import GIB, gib, yaml_text


def cycle_lines(answer: Mapping[str, Any]) -> list[str]:
    """The phases, what the server's cache holds, and what to turn."""
    cycle = answer["phases_of_cycle"]
    lines = ["the cycle, in GiB:"]
    for phase in cycle["phases"]:
        place = "" if phase["card"] == "trainer" else " (a server's card)"
        parts = (
            f"{name.removesuffix('_bytes').replace('_', ' ')} {_between(size)}"
            for name, size in phase["owners"].items()
            if size[1] >= GIB / 100
        )
        lines.append(f"  {phase['phase'] + place:<30}{_between([phase['least_bytes'], phase['most_bytes']]):>13}"
                     f"   {', '.join(parts)}")  # fmt: skip
    lines += _time_lines(cycle["time"]) if cycle["time"] else []
    server = cycle.get("server")
    if not server:
        return lines
    low, high = server["rows_at_once"]
    at_once = f"{low}" if low == high else f"{low} to {high}"
    lines.append(
        f"the server: {gib(server['budget_bytes'])} of the card, {at_once} rows of {server['row_tokens']:,} tokens at"
        f" once (the cache holds {cycle['most_answers_at_once']}); rows of {cycle['longest_row_tokens']:,} tokens would"
        " still run all at once"
    )
    if cycle["largest_utilization"] is not None:
        lines.append(f"the largest utilization with which the cycle fits for sure: {cycle['largest_utilization']:g}")
    for knob in cycle["knobs"]:
        parts = ", ".join(f"{name}: {yaml_text(value)}" for name, value in knob["changes"]["generation"].items())
        word = "fits" if knob["fits"] else "does not fit for sure"
        slower = knob["more_seconds"]
        time = "" if slower is None or abs(slower) < 0.005 else f"; {slower:+.3g} s a cycle"
        lines.append(f"  saves {gib(knob['saves_bytes'])}: generation {{{parts}}}; {word}\n      {knob['cost']}{time}")
    return lines


def _time_lines(time: Mapping[str, Any]) -> list[str]:
    """Seconds of a cycle by phase, and how fast answers come."""
    parts = ", ".join(f"{phase} {seconds:.3g}" for phase, seconds in time["seconds_by_phase"].items())
    updates = f"{time['updates_per_cycle']:g} update{'s' * (time['updates_per_cycle'] != 1)}"
    lines = [f"a cycle of {updates} takes {time['seconds_per_cycle']:.3g} s: {parts}"]
    rate = time["answer_tokens_per_second_of_generation"]
    if rate:
        waves = f", in {time['waves']} waves" if (time["waves"] or 1) > 1 else ""
        lines.append(f"  while it generates {rate:,.0f} tokens a second{waves}; each answer counts as the longest")
    return [*lines, f"  not counted: {time['not_counted']}"]


def _between(size: list[int]) -> str:
    low, high = (f"{each / GIB:.2f}" for each in size)
    return low if low == high else f"{low} to {high}"
