"""The same question as each tool's training takes it where nobody says otherwise: peaks, verdicts, what decides."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from dryfit.analytic.certainty import Needs
from dryfit.analytic.decoder import NotDescribed
from dryfit.cards.gpus import Gpu, named
from dryfit.cards.verdict import Word
from dryfit.common.errors import UserError
from dryfit.common.text import GIB, gib, yaml_text
from dryfit.readers.request import LIKE, ScenarioRequest, parse_request
from dryfit.scenario.scenario import Scenario

TITLES = {"trl": "TRL", "peft": "PEFT", "axolotl": "axolotl", "unsloth": "Unsloth"}


def by_tool(
    request: ScenarioRequest, where: object = "scenario", verdict: str | None = None
) -> list[dict[str, Any]]:
    """The question with each tool's defaults, by the analytic estimate.

    Parameters
    ----------
    verdict
        On the step that was asked about; None: what decides is not looked for.

    Returns
    -------
    list of dict
        ``tool``, ``peak_allocated_bytes`` (None: not described, or what was named does not go with the tool),
        ``verdict`` on the GPU that is named, and where that is another one ``decides``, the setting that makes most of
        the difference. Empty where the asker chose a tool, or a file of one was read.
    """
    chosen = request.like is not None and not request.like_is_default
    gpu, found = named(request.scenario.gpu, where), []
    for tool in LIKE if not chosen and request.mapping else ():
        row: dict[str, Any] = {
            "tool": tool,
            "peak_allocated_bytes": None,
            "verdict": None,
            "decides": None,
        }
        try:
            other = parse_request({**request.mapping, "like": tool}, where).scenario
            other = request.scenario if tool == request.like else other
            needs = _needs(other, gpu, where)
            word = needs.word(gpu, replayed=False) if gpu else None
            if word is Word.TOO_CLOSE and verdict not in (None, "fits") and needs.may_fit(gpu):
                word = needs.word(gpu)  # which would be said, and takes a replay
            row |= {"peak_allocated_bytes": needs.peak_bytes, "verdict": word and word.value}
            if word and verdict not in (None, word.value) and word is not Word.TOO_CLOSE:
                row["decides"] = _deciding(request, other, gpu, where)
        except (NotDescribed, UserError):  # what was named does not go with the tool's settings
            pass
        found.append(row)
    return found


def _needs(scenario: Scenario, gpu: Gpu | None, where: object) -> Needs:
    scenario = scenario.changed(attention_mask="none")  # which is not described, and adds little
    return Needs.of(scenario, where, gpu.capability if gpu else None)


def _deciding(
    request: ScenarioRequest, other: Scenario, gpu: Gpu | None, where: object
) -> str | None:
    """The setting of a tool's step that alone moves the asked step's peak farthest towards its; None: nothing does."""
    own, moved = request.scenario, {}
    theirs = other.to_mapping()
    try:
        before = _needs(own, gpu, where).peak_bytes
        way = 1 if _needs(other, gpu, where).peak_bytes > before else -1
    except (NotDescribed, UserError):
        return None
    for name, value in theirs.items():
        if value != own.to_mapping()[name] and name != "attention_mask":
            with suppress(NotDescribed, UserError):  # it goes with the tool's other settings alone
                moved[name] = way * (
                    _needs(own.changed(**{name: value}), gpu, where).peak_bytes - before
                )
    name = max(moved, key=moved.__getitem__, default=None)
    if name is None or moved[name] < GIB / 100:
        return None
    value = theirs[name]
    if name == "gradient_checkpointing":
        return "checkpointing" if value else "no checkpointing"
    return f"{value} loss" if name == "loss" else f"{name} {yaml_text(value)}"


def other_verdicts(answer: Mapping[str, Any]) -> str:
    """The end of the first line where another tool's step has another verdict; "" where all agree."""
    rows = [row for row in answer.get("tools") or [] if row["verdict"] and answer["verdict"]]
    like = answer.get("like") or {}
    fitting = [_row(row) for row in rows if row["verdict"] == "fits" != answer["verdict"]]
    larger = [_row(row) for row in rows if row["verdict"] == "does_not_fit" != answer["verdict"]]
    told = [f"it fits with {' and '.join(fitting)}"] if fitting else []
    told += [f"not with {' and '.join(larger)}"] if larger else []
    whose = f"with {TITLES[like['tool']]}'s defaults" if like else "as asked"
    return f"; so {whose}, but {', '.join(told)}" if told else ""


def _row(row: Mapping[str, Any]) -> str:
    why = f": {row['decides']}" if row["decides"] else ""
    return f"{TITLES[row['tool']]}'s ({gib(row['peak_allocated_bytes'])}{why})"


def tool_lines(answer: Mapping[str, Any], like: str) -> Iterator[str]:
    """What the step takes with each tool's defaults; ``like``: how a tool is named where this is shown."""
    rows = [row for row in answer.get("tools") or [] if row["peak_allocated_bytes"]]
    if rows:
        sizes = ", ".join(
            f"{TITLES[row['tool']]} {row['peak_allocated_bytes'] / GIB:.2f}" for row in rows
        )
        yield f"With each tool's defaults, estimated: {sizes} GiB at the peak ({like}{rows[-1]['tool']})"
