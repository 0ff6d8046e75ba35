"""The answer that one reads in ten seconds: the verdict, what the memory is for, the step, and what it rests on.

A plain question has at most eight lines of 100 characters. Everything else that is known stands in ``dryfit explain``
(:mod:`dryfit.ask.text`) and in ``--json``.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from dryfit.ask import run_cost
from dryfit.ask.question import Question
from dryfit.ask.text import seconds
from dryfit.ask.words import suggested
from dryfit.cards.sentences import card, said, title
from dryfit.common.text import GIB, gib, printable
from dryfit.planner.tools import TITLES
from dryfit.scenario.fields import line as step_line

WIDTH = 100  # characters of a line, of a wider terminal too: longer ones are hard to read
BAR = 48  # characters of the bar
LEAST = GIB // 10  # a smaller part of the memory is counted with others
WARNINGS = 2  # that the short answer shows whole

# What the memory is for: a part's name here, and the components that it takes together.
PARTS = {
    "weights": (
        "weights_fp32",
        "weights_bf16",
        "weights_fp16",
        "weights_8bit",
        "weights_4bit",
        "quantization_state",
        "weights_other",
    ),
    "activations": ("activations",),
    "logits": ("logits_and_loss",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer_states",),
    "adapters": ("adapters",),
    "copies of weights": ("weight_casts",),
    "gathered layers": ("unsharded_parameters",),
    "temporaries": ("temporaries", "workspaces"),
}
FORMATS = {
    "weights_fp32": "fp32",
    "weights_bf16": "bf16",
    "weights_fp16": "fp16",
    "weights_8bit": "8-bit",
    "weights_4bit": "4-bit",
}
# Of a tool's own step these go without saying.
OF_A_TOOL = (
    "no k-bit preparation",
    "sdpa attention",
    "adamw_fused",
    "chunked loss",
    "adapters in bf16",
    "nf4",
)
COLOURS = {"fits": "32", "does_not_fit": "31", "too_close": "33"}  # of a terminal


def first_lines(asked: Question, answer: Mapping[str, Any]) -> str:
    """What stands as soon as the step is traced or its record is read."""
    lines = [
        *_verdict(answer),
        *_bar(answer),
        *_parts(answer),
        *_step(asked, answer),
        *_cycle(answer),
        *_time(answer),
        *_other_tools(answer),
        *_certainty(answer),
        *_remarks(asked, answer),
    ]
    return _coloured(printable("\n".join(lines)), answer["verdict"])


def last_lines(asked: Question, answer: Mapping[str, Any], command: Sequence[str]) -> str:
    """What takes traces of its own, the change that fits first of all; and where the rest stands."""
    lines = list(_other_ways(answer))
    if asked.run:
        lines += run_cost.run_lines(answer.get("run"), asked.run)
        lines += run_cost.sooner_lines(
            answer.get("sooner") or [], lambda item: suggested(command, item["changes"])
        )
    lines += _changes(answer, command)
    if failed := answer.get("searches_failed"):
        lines.append(f"left out, since its search failed: {', '.join(failed).replace('_', ' ')}")
    lines.append(_more(command))
    return printable("\n".join(lines))


def _wrapped(text: str) -> list[str]:
    """A text as lines that begin two characters further in."""
    return wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _verdict(answer: Mapping[str, Any]) -> list[str]:
    """The verdict with what is needed and what there is; other cases as their sentence says them."""
    gpu, spare = answer["gpu"], answer["headroom_bytes"]
    if gpu is None or not _is_of_one_card(answer):
        return _sentence(answer)
    usable = f"{gpu['usable_bytes'] / GIB:.2f} GiB"
    name = card(gpu).removeprefix("the ").removeprefix("NVIDIA ").removeprefix("GeForce ")
    begin = f"{title(answer['verdict'])}  {name}:"
    estimated = answer["analytic"] or {}
    if answer["trace"] is None and "recorded_with" not in estimated:
        about = estimated.get("required_bytes") or estimated["peak_allocated_bytes"]
        return [f"{begin} about {about / GIB:.2f} of {usable}"]
    needed = (answer["trace"] or estimated)["required_bytes"]
    if gpu["usable_bytes"] - needed != spare:  # loading decides, or how blocks pack on this card
        return _sentence(answer)
    room = f"{spare / GIB:.2f} to spare" if spare >= 0 else f"short by {-spare / GIB:.2f}"
    line = f"{begin} needs {needed / GIB:.2f} of {usable}, {room}"
    if answer["verdict"] != "too_close":
        return [line]
    return [line, *_wrapped(_without_tools(answer).rpartition("; ")[2])]


def _is_of_one_card(answer: Mapping[str, Any]) -> bool:
    """Whether the verdict compares one step with one card, whose allocator is known."""
    one = answer["scenario"]["parallel"]["gpus"] == answer["gpu"]["count"] == 1
    known = answer["gpu"]["is_modelled"] and answer["verdict"] in COLOURS
    compared = answer["trace"] or answer["analytic"]
    return bool(one and known and compared and not answer.get("phases_of_cycle"))


def _sentence(answer: Mapping[str, Any]) -> list[str]:
    text = _without_tools(answer)
    return wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _without_tools(answer: Mapping[str, Any]) -> str:
    """The answer's sentence without its end about other tools, which have a line of their own."""
    plain = answer["sentence"].partition("; so with ")[0].partition("; so as asked, ")[0]
    return plain.replace(" by a record of its trace", "")  # which the last line says


def _bar(answer: Mapping[str, Any]) -> list[str]:
    """How much of the card the step needs, where the card has it."""
    peak, gpu = answer["trace"] or answer["analytic"] or {}, answer["gpu"]
    needed = peak.get("required_bytes") or peak.get("peak_allocated_bytes")
    if not (gpu and needed and needed <= gpu["usable_bytes"]):
        return []
    filled = max(1, round(BAR * needed / gpu["usable_bytes"]))
    full, empty = ("█", "░") if _has_blocks() else ("#", "-")
    return [f"  {full * filled}{empty * (BAR - filled)}"]


def _has_blocks() -> bool:
    """Whether standard output can show the bar's characters."""
    try:
        "█░·".encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def _parts(answer: Mapping[str, Any]) -> list[str]:
    """What the memory is for at the peak, the largest first, in GiB."""
    peak = answer["trace"] or answer["analytic"]
    if not peak:
        return []
    left = dict(peak["components"])
    sizes = {}
    for name, components in PARTS.items():
        sizes[name] = sum(left.pop(component, 0) for component in components)
    others = sum(left.values()) + sum(size for size in sizes.values() if size < LEAST)
    shown = {name: size for name, size in sizes.items() if size >= LEAST}
    words = []
    for name, size in sorted(shown.items(), key=lambda item: -item[1]):
        words.append(f"{name} {size / GIB:.1f}{_formats(peak) if name == 'weights' else ''}")
    if others >= LEAST:
        words.append(f"other {others / GIB:.1f}")
    return _wrapped(_separated(words))


def _formats(peak: Mapping[str, Any]) -> str:
    """The weights' formats, where there is more than one."""
    sizes = {FORMATS[name]: peak["components"].get(name, 0) for name in FORMATS}
    several = [f"{size / GIB:.1f} {name}" for name, size in sizes.items() if size >= LEAST]
    return f" ({', '.join(several)})" if len(several) > 1 else ""


def _separated(words: Sequence[str]) -> str:
    return (" · " if _has_blocks() else "; ").join(words)


def _step(asked: Question, answer: Mapping[str, Any]) -> list[str]:
    """The step that was asked about; its model where that stands in a file."""
    model, *words = step_line(answer["scenario"]).split("; ")
    words = [word.replace("LoRA of rank ", "LoRA r") for word in words]
    if asked.readings or model != asked.model:
        words = [model, *words]
    if answer.get("like"):
        tool = TITLES[answer["like"]["tool"]]
        words = [word for word in words if word not in OF_A_TOOL] + [f"{tool}'s defaults"]
        if answer["scenario"]["method"] == "qlora":  # the weights' formats stand above
            words = [word.replace("fp32 under bf16 autocast", "bf16 autocast") for word in words]
    elif tool := answer.get("assumed_by"):
        words.append(f"defaults of {tool}")
    return _wrapped(_separated(words))


def _cycle(answer: Mapping[str, Any]) -> list[str]:
    """Of a reinforcement step's cycle: the phases, and what settles them."""
    from dryfit.ask.text import cycle_lines

    return cycle_lines(answer) if answer.get("phases_of_cycle") else []


def _time(answer: Mapping[str, Any]) -> list[str]:
    """How long a step takes, where it was traced."""
    time = answer.get("time")
    if time is None or answer["verdict"] == "does_not_fit":
        return []
    known = "" if time["range"] else " (not measured on this card)"
    return [f"  {seconds(time)} a step, {time['tokens_per_second']:,.0f} tokens a second{known}"]


def _other_tools(answer: Mapping[str, Any]) -> list[str]:
    """What the same question takes with other tools' defaults."""
    own = (answer.get("like") or {}).get("tool")
    rows = [
        row
        for row in answer.get("tools") or []
        if row["peak_allocated_bytes"] and row["tool"] != own
    ]
    if not rows:
        return []
    told, all_agree = [], True
    for row in rows:
        differs = row["verdict"] and answer["verdict"] and row["verdict"] != answer["verdict"]
        all_agree = all_agree and not differs
        why = f": {row['decides']}" if row["decides"] else ""
        verdict = f" ({said(row['verdict']).removeprefix('is ')}{why})" if differs else ""
        size = row["peak_allocated_bytes"] / GIB
        told.append(f"{TITLES[row['tool']]} {size:.1f}{verdict}" if size >= 0.05 else "")
    told = [text for text in told if text]
    if not told:
        return []
    if all_agree and answer["verdict"] == "does_not_fit":
        return []
    return _wrapped(f"with other defaults: {', '.join(told)} (--like {rows[-1]['tool']})")


def _certainty(answer: Mapping[str, Any]) -> list[str]:
    """How the figures came about, and how many measured runs are like this step."""
    versions = answer.get("versions") or {}
    named = [name for name in ("transformers", "torch") if name in versions]
    of = ", ".join(f"{name} {versions[name].partition('+')[0]}" for name in named)
    analytic = answer["analytic"] or {}
    if answer["trace"]:
        words = f"exact: its own allocations, traced ({of})"
    elif "recorded_with" in analytic:
        words = f"exact: a record of its allocations ({of})"
    elif "bound" in analytic:
        bound = analytic["bound"]
        words = (
            f"estimated: traced peaks lay {100 * bound['low']:+.1f} to {100 * bound['high']:+.1f} % from it;"
            " ask without --quick"
        )
    else:
        return []
    found = answer.get("evidence") or {}
    if found.get("rows"):
        words += f"; {_runs(len(found['rows']))} like it"
        if known := found["errors"].get("allocated"):
            worst = max(map(abs, known["range"]))
            words += f", within {100 * worst:.2g} %"
    elif found.get("near"):
        words += f"; {_runs(len(found['near']))} near it"
    return _wrapped(words)


def _runs(count: int) -> str:
    return f"{count} measured run{'' if count == 1 else 's'}"


def _remarks(asked: Question, answer: Mapping[str, Any]) -> Iterator[str]:
    """What was read from another tool's file, and warnings; of many the number."""
    for reading in asked.readings:
        words = f"read as {reading.tool} {reading.version}: {len(reading.understood)} settings"
        left_out = len(reading.remarks) + len(reading.unknown)
        if left_out:
            words += f", {left_out} not described or unknown (see explain)"
        if reading.tool != "Hub":
            yield from _wrapped(words)
        for note in reading.notes:
            yield from _wrapped(f"note: {note}")
        for key, near in reading.unknown.items():
            meant = f" (is {near} meant?)" if near else ""
            yield from _wrapped(f"unknown: {key}{meant}")
    warnings = answer.get("warnings") or []
    for warning in warnings[:WARNINGS]:
        yield from _wrapped(f"warning: {warning}")
    if len(warnings) > WARNINGS:
        yield f"  {len(warnings) - WARNINGS} more warnings: see explain"


def _other_ways(answer: Mapping[str, Any]) -> Iterator[str]:
    """The other way to use several GPUs, and the same step by other kernels."""
    for strategy, other in (answer.get("strategies") or {}).items():
        yield (
            f"  with {strategy.upper()}: {gib(other['required_bytes'])} on each GPU,"
            f" {said(other['verdict'])}"
        )


def _changes(answer: Mapping[str, Any], command: Sequence[str]) -> Iterator[str]:
    """Up to which length the step fits, and the cheapest change with which it does."""
    found = answer["suggestions"]
    shorter = next((one for one in found if "sequence_length" in one["changes"]), None)
    if shorter:
        yield f"  fits up to {shorter['changes']['sequence_length']:,} tokens a row"
    others = [one for one in found if one is not shorter]
    more = f"; {len(others) - 1} more: see explain" if len(others) > 1 else ""
    for one in others[:1] or found[:1]:
        yield f"fits with: {suggested(command, one['changes'])}"
        yield from _wrapped(f"{one['cost']}; {one['headroom_bytes'] / GIB:.2f} GiB to spare{more}")


def _more(command: Sequence[str]) -> str:
    """The line that shows everything."""
    words = [word for word in command if word not in ("fit", "--fresh", "--quick")]
    program = [] if words[:1] == ["dryfit"] else ["dryfit"]
    words = words[1:] if not program else words
    return f"more: {shlex.join(['dryfit', 'explain', *words])}  (or --json)"


def _coloured(text: str, verdict: str | None) -> str:
    """The verdict in its colour, where a terminal shows it."""
    if verdict not in COLOURS or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    word = title(verdict)
    return text.replace(word, f"\x1b[1;{COLOURS[verdict]}m{word}\x1b[0m", 1)
