"""The same question as each tool's training takes it where nobody says otherwise: peaks, verdicts, what decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from will_it_fit.analytic.certainty import Needs
from will_it_fit.analytic.decoder import NotDescribed
from will_it_fit.analytic.estimate import analytic_estimate
from will_it_fit.cards.gpus import Gpu, named
from will_it_fit.common.errors import UserError
from will_it_fit.common.text import GIB, gib, yaml_text
from will_it_fit.readers.request import LIKE, ScenarioRequest, like_fields, parse_request
from will_it_fit.scenario.scenario import Scenario

TITLES = {"trl": "TRL", "peft": "PEFT", "axolotl": "axolotl"}
_SAID = {("gradient_checkpointing", False): "no checkpointing", ("gradient_checkpointing", True): "checkpointing"}


def by_tool(request: ScenarioRequest, where: object = "scenario") -> list[dict[str, Any]]:
    """The question with each tool's defaults, by the analytic estimate.

    Returns
    -------
    list of dict
        ``tool``, ``peak_allocated_bytes`` (None: not described, or what was named does not go with the tool),
        ``verdict`` on the GPU that is named, and ``decides``, the setting in which the tool's step differs most from
        the one that was asked about. Empty where the asker chose a tool, or a file of one was read.
    """
    chosen = request.like is not None and not request.like_is_default
    gpu, found = named(request.scenario.gpu, where), []
    for tool in LIKE if not chosen and request.mapping else ():
        row: dict[str, Any] = {"tool": tool, "peak_allocated_bytes": None, "verdict": None, "decides": None}
        try:
            other = parse_request({**request.mapping, "like": tool}, where).scenario
            needs = _needs(other, gpu, where)
            word = needs.word(gpu) if gpu else None
            row |= {"peak_allocated_bytes": needs.peak_bytes, "verdict": word and word.value,
                    "decides": _deciding(request, tool, gpu, where)}  # fmt: skip
        except (NotDescribed, UserError):  # what was named does not go with the tool's settings
            pass
        found.append(row)
    return found


def _needs(scenario: Scenario, gpu: Gpu | None, where: object) -> Needs:
    form = analytic_estimate(scenario, where, capability=gpu.capability if gpu else None, blocks=False)
    return Needs(scenario, form["peak_allocated_bytes"], gpu.capability if gpu else None)


def _deciding(request: ScenarioRequest, tool: str, gpu: Gpu | None, where: object) -> str | None:
    """The setting of a tool that alone moves the peak of the asked step most; None: it is the asked step's own."""
    own, moved = _peak(request.scenario, gpu, where), {}
    for name, value in like_fields(tool, request.mapping).items():
        if name in request.mapping or getattr(request.scenario, name) == value:
            continue
        try:
            moved[name, _plain(value)] = _peak(request.scenario.changed(**{name: value}), gpu, where) - own
        except (NotDescribed, UserError):
            continue
    if not moved or max(map(abs, moved.values())) < GIB / 100:
        return None
    name, value = max(moved, key=lambda change: abs(moved[change]))
    return _SAID.get((name, value), f"{name} {value}")


def _peak(scenario: Scenario, gpu: Gpu | None, where: object) -> int:
    return analytic_estimate(scenario, where, capability=gpu and gpu.capability, blocks=False)["peak_allocated_bytes"]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, str, int)) else yaml_text(value)


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
        sizes = ", ".join(f"{TITLES[row['tool']]} {row['peak_allocated_bytes'] / GIB:.2f}" for row in rows)
        yield f"With each tool's defaults, estimated: {sizes} GiB at the peak ({like}{rows[-1]['tool']})"
