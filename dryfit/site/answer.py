"""The calculator's answers: a choice as JSON in, an answer as JSON out, in a browser as on any machine.

The page shows what stands here and computes nothing itself. The answer is that of ``dryfit --quick``. Standard
library, PyYAML and jsonschema alone: what a browser can load.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dryfit.analytic.certainty import Needs
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.kernels import kernels_of
from dryfit.ask import text
from dryfit.ask.answer import described, quick
from dryfit.ask.question import Question, question, with_method
from dryfit.ask.run_cost import parse_run_options
from dryfit.ask.text import WORDS, scenario_yaml, step_line
from dryfit.ask.words import parse
from dryfit.cards.gpus import Gpu, catalogue
from dryfit.cards.sentences import has_usable, smallest
from dryfit.cards.verdict import Word
from dryfit.common.errors import UserError
from dryfit.common.hub_errors import Failure
from dryfit.common.text import gib, yaml_text
from dryfit.engine.components import COLOURS, GROUPS
from dryfit.hours.run_time import Run
from dryfit.hours.step_time import speed_of
from dryfit.planner.changes import apply, moves
from dryfit.planner.largest_fit import LONGEST, steps
from dryfit.planner.tools import by_tool, tool_lines
from dryfit.scenario.fields import BY_NAME
from dryfit.scenario.hub import FETCH, HubId, explained
from dryfit.site.choice import (
    beside_the_file,
    choice_of,
    named_fields,
    options_of,
    run_words,
    words_of,
)

MOST_CHANGES = 4
MOST_REPLAYS = 2  # of changes, for which the peak alone is too close to call
_STATES = {
    Word.FITS: "fits",
    Word.DOES_NOT_FIT: "too-large",
    Word.TOO_CLOSE: "close",
    None: "close",
}
# What the estimate does not describe, and what comes nearest of what it does.
_NEAR = (("loss", "liger", "chunked"), ("attention_mask", "padding", "none"))
_GROUP = {component: group for group, components in GROUPS.items() for component in components}
_PALER = 0.3  # of the way to white, from one part of a group to the next
# What huggingface_hub calls the Hub's refusals, by the code in its answer.
_REFUSALS = {
    "GatedRepo": "GatedRepoError",
    "RepoNotFound": "RepositoryNotFoundError",
    "RevisionNotFound": "RevisionNotFoundError",
    "EntryNotFound": "RemoteEntryNotFoundError",
}
EXACTNESS = (
    "An estimate. Near the border it replays what the estimate knows of allocations on a GPU of this very size. Where"
    " that hangs on details, it is too close to call, and only the trace can tell."
)
_ON_A_PAGE = "save its config.json from the model's page on the Hub, where you are logged in, and paste it here"


class _Wanted(Exception):
    """A configuration that the browser has to fetch first."""

    def __init__(self, hub: HubId) -> None:
        super().__init__(hub.name)
        self.hub = hub


# What the calculator asks first, and so what the start page names.
CHOSEN = {
    "model": "qwen2.5-coder-7b",
    "gpu": "rtx-4090",
    "gpus": 1,
    "method": "",
    "strategy": "",
    "sequence_length": 2048,
    "micro_batch": 1,
    "settings": {},
}


def reply(request: str) -> str:
    """Answer a question.

    Parameters
    ----------
    request
        JSON: ``ask`` (``answer``, ``others``, ``methods``, ``gpus``, ``changes``, or ``longest`` with ``rows``), the
        choice (``model``, or ``file`` with ``name`` and ``text``, and ``over``: names of what the page changed, which
        alone wins over the file; ``gpu``, ``gpus``, ``method``, ``sequence_length``,
        ``micro_batch``, ``strategy``, ``settings``; ``run``, what is asked about hours and cost: ``rows``, ``epochs``,
        ``price``, ``deadline``, ``grams_per_kwh``), and ``fetched``: what the Hub answered, by id.

    Returns
    -------
    str
        JSON with sorted keys: the answer, or ``fetch`` (an id and the path of its configuration on the Hub), or
        ``error``: what is wrong and what to write.
    """
    asked = json.loads(request)
    with TemporaryDirectory() as folder:
        try:
            answer = _reply(asked, Path(folder))
        except _Wanted as wanted:
            answer = {"fetch": _place(wanted.hub)}
        except UserError as error:
            answer = {"error": [_error(part) for part in error.parts or (error,)]}
        return json.dumps(answer, sort_keys=True, ensure_ascii=False).replace(f"{folder}/", "")


def _error(error: UserError) -> dict[str, Any]:
    where = None if error.where == "the command line" else error.where  # here it's the form
    parts = {
        "problem": error.problem,
        "where": where,
        "found": error.found,
        "allowed": error.allowed,
        "write": error.write,
    }
    return {
        name: yaml_text(part) if name == "found" else str(part)
        for name, part in parts.items()
        if part is not None
    }


def _reply(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    fetched = request.get("fetched") or {}
    token = FETCH.set(lambda hub, where: _kept(hub, where, fetched, folder))
    try:
        request, added = beside_the_file(request, folder)
        words, options = words_of(request, folder), options_of(request)
        asked = question([str(folder / words[0]) if request.get("file") else words[0]], options)
        if request["ask"] == "answer":
            return _answer(asked, words, run_words(request, asked)) | {"added": added}
        if request["ask"] == "others":
            return {
                "others": list(tool_lines({"tools": by_tool(asked.asked, asked.where)}, "--like "))
            }
        asked, _ = _nearest(asked)
        if request["ask"] == "methods":
            return {"methods": _by_method(asked)}
        if request["ask"] == "gpus":
            return {"gpus": _on_all_gpus(asked)}
        if request["ask"] == "changes":
            return {"changes": _what_would_fit(asked, words)}
        return {"longest": _longest(asked, request["rows"])}
    finally:
        FETCH.reset(token)


def _kept(hub: HubId, where: object, fetched: Mapping[str, Any], folder: Path) -> Path:
    """The configuration that the browser fetched, or what the Hub answered instead."""
    place = _place(hub)
    answer = fetched.get(place["id"])
    if answer is None:
        raise _Wanted(hub)
    if answer["status"] == 200:
        path = folder / "fetched.json"
        path.write_text(answer["text"], encoding="utf-8")
        return path
    names = {_REFUSALS.get(answer.get("code") or "", "") if answer["status"] else "ConnectionError"}
    error = explained(Failure(names, answer["status"] or None), hub, "the model")
    raise UserError(
        error.problem, where="the model", found=error.found, allowed=_ON_A_PAGE, write=error.write
    )


def _place(hub: HubId) -> dict[str, str]:
    revision = hub.revision or "main"
    return {"id": f"{hub.name}@{revision}", "path": f"{hub.name}/resolve/{revision}/config.json"}


def _hours(asked: Question, run: Run | None) -> str:
    """What can be told about hours, cost and energy without the trace, and what the trace adds."""
    gpu = asked.gpu
    if gpu is None:
        return "Hours, cost and energy depend on the GPU: choose one."
    speed = speed_of(gpu.name, asked.scenario)
    if speed is None:
        return f"Hours, cost and energy are not known: config/gpus.yaml has no speed of {gpu.name}."
    held = "No step was measured on this GPU: its hours compare settings, and are not for planning."
    if measured := speed.measured:
        shares = f"{measured.low:.2f} to {measured.high:.2f}"
        held = f"{measured.rows} measured steps on this GPU ({measured.of}) took {shares} times as long as predicted."
    if run is None:
        asks = "Fill in the rows of your data, and the command asks for them."
        return f"Hours, cost and energy come from the traced step. {asks} {held}"
    steps = run.steps(asked.scenario)
    kwh = speed.board_watts * asked.scenario.parallel.gpus / 1000
    known = f"The run has {steps:,} steps, and takes at most {kwh:.3g} kWh in an hour."
    if run.deadline_hours is not None:
        seconds = run.deadline_hours * 3600 / steps
        known += f" It ends by the deadline if a step takes no longer than {seconds:.3g} s."
    return f"{known} Hours and cost come from the traced step: the command above gives them. {held}"


def _answer(asked: Question, words: list[str], run_options: list[str]) -> dict[str, Any]:
    estimated = quick(asked, others=False, recorded=False)
    near, instead = _nearest(asked)
    shown = quick(near, others=False, recorded=False) if instead else estimated
    run = parse_run_options(parse([*words, *run_options]))
    rule = (shown["rule_of_thumb"] or {}).get("peak_allocated_bytes")
    parts = sorted(
        (shown["analytic"] or {"components": {}})["components"].items(), key=lambda item: -item[1]
    )
    colours = _colours([name for name, size in parts if size >= 2**20])
    return {
        "answer": estimated,
        "state": _state(estimated),
        "tight": bool(shown["gpu"]) and shown["fits"] is not True,
        "verdict": _near_sentence(shown, instead)
        if instead and not estimated["verdict"]
        else _sentence(estimated),
        "step": step_line(estimated["scenario"]),
        "exactness": EXACTNESS,
        "evidence": _evidence(shown),
        "rule": f"The rule of thumb, bytes per parameter, says {gib(rule)}." if rule else "",
        "hours": _hours(asked, run),
        "assumed": {
            name: yaml_text(value)
            for name, value in asked.asked.assumed.items()
            if value is not None
        },
        "peak_bytes": shown["analytic"]["peak_allocated_bytes"] if shown["analytic"] else None,
        "parts": [
            {
                "title": WORDS.get(name, name),
                "bytes": size,
                "shown": gib(size),
                "colour": colours[name],
            }
            for name, size in parts
            if size >= 2**20
        ],
        "read": text.reading_lines(asked, estimated),
        "command": shlex.join(["dryfit", *words, *run_options]),
        "yaml": scenario_yaml(estimated["scenario"], asked.model),
    }


def _colours(names: list[str]) -> dict[str, str]:
    """A colour for each part, another one for each: parts of one group are paler from one to the next."""
    colours, taken = {}, dict.fromkeys(COLOURS, 0)
    for name in names:
        group = _GROUP[name]
        white = 1 - (1 - _PALER) ** taken[group]
        channels = (int(COLOURS[group][place : place + 2], 16) for place in (1, 3, 5))
        colours[name] = "#" + "".join(
            f"{round(value + (255 - value) * white):02x}" for value in channels
        )
        taken[group] += 1
    return colours


def _evidence(shown: Mapping[str, Any]) -> str:
    """The measured steps that are like this one, and where traced peaks lay beside the estimate's."""
    bound = (
        f" Of the estimate: {text.bound_text(shown['analytic']['bound'])}."
        if shown["analytic"]
        else ""
    )
    return f"{shown['evidence']['text']}.{bound}"


def _nearest(asked: Question) -> tuple[Question, list[str]]:
    """The question; or where its step is not described, a near one that is, and what was put in place of what."""
    asked = described(asked)
    scenario = asked.scenario
    changes = {name: instead for name, value, instead in _NEAR if getattr(scenario, name) == value}
    if not changes:
        return asked, []
    try:
        analytic_estimate(scenario, asked.where, blocks=False)
        return asked, []
    except NotDescribed:
        pass
    try:
        near = scenario.changed(**changes)
        analytic_estimate(near, asked.where, blocks=False)
    except (NotDescribed, UserError):
        return asked, []
    values = (
        (name, yaml_text(changes[name]), yaml_text(getattr(scenario, name))) for name in changes
    )
    return replace(asked, scenario=near), [
        f"{name}: {instead} in place of {value}" for name, instead, value in values
    ]


def _state(answer: Mapping[str, Any]) -> str:
    if answer["analytic"] is None and answer["verdict"] is None:
        return "unknown"
    if answer["gpu"] is None:
        return "size"
    return _STATES[answer["verdict"] and Word(answer["verdict"])]


def _sentence(answer: Mapping[str, Any]) -> str:
    if answer["verdict"]:
        return f"{answer['sentence']}."
    if answer["analytic"] is None:
        return f"No estimate: {answer['reasons']['analytic']}. The command below traces the step instead."
    analytic, gpu = answer["analytic"], answer["gpu"]
    if gpu is None:
        enough = smallest(analytic["enough_bytes"] or inf)
        return (
            f"At its peak the step takes about {gib(analytic['peak_allocated_bytes'])}: {enough}."
        )
    return f"{answer['sentence']}."


def _near_sentence(shown: Mapping[str, Any], instead: list[str]) -> str:
    peak, gpu = shown["analytic"]["peak_allocated_bytes"], shown["gpu"]
    counted = f"Counted with {' and '.join(instead)}, it needs about {gib(peak)}."
    room = f" {_room(gpu)}" if gpu else ""
    return (
        f"No estimate of this very step. {counted}{room} The command below traces the step itself."
    )


def _room(gpu: Mapping[str, Any]) -> str:
    told = has_usable(gpu)
    return f"{told[0].upper()}{told[1:]}."


def _needs(asked: Question, gpu: Gpu, **changes: int) -> Needs:
    scenario = replace(asked.scenario, **changes)
    form = analytic_estimate(scenario, asked.where, capability=gpu.capability, blocks=False)
    return Needs(scenario, form["peak_allocated_bytes"], gpu.capability)


def _on_each(asked: Question, cards: Iterable[Gpu]) -> dict[str, Needs]:
    """The estimate on each card, by its name, computed once for all that run the same kernels."""
    by_kernels: dict[Any, Needs] = {}
    found = {}
    for gpu in cards:
        kernels = kernels_of(asked.scenario, gpu.capability)
        if kernels not in by_kernels:
            by_kernels[kernels] = _needs(asked, gpu)
        found[gpu.name] = by_kernels[kernels]
    return found


def _on_all_gpus(asked: Question) -> list[dict[str, Any]]:
    try:
        found = _on_each(asked, catalogue().values())
    except NotDescribed:
        return []
    rows = []
    for gpu in catalogue().values():
        needs = found[gpu.name]
        # Only the GPU that was asked about is replayed: that takes a browser seconds.
        replayed = asked.gpu is not None and gpu.name == asked.gpu.name
        peak, state = needs.peak_bytes, _STATES[needs.word(gpu, replayed=replayed)]
        rows.append(
            {
                "name": gpu.name,
                "title": _short(gpu),
                "state": state,
                "peak": gib(peak),
                "usable": gib(gpu.usable_bytes),
                "share": round(peak / gpu.usable_bytes, 3),
            }
        )
    return rows


def _short(gpu: Gpu) -> str:
    return gpu.title.removeprefix("NVIDIA ")


def _by_method(asked: Question) -> list[dict[str, Any]]:
    """The same step by each method: its peak, its verdict on the GPU, and the smallest card that should hold it."""
    cards = sorted(
        (gpu for gpu in catalogue().values() if gpu.capability), key=lambda gpu: gpu.usable_bytes
    )
    rows = []
    for method in BY_NAME["method"].words:
        try:
            step = replace(asked, scenario=with_method(asked, method))
            found = _on_each(step, [*cards, *([asked.gpu] if asked.gpu else [])])
        except (NotDescribed, UserError):
            continue
        least = next(
            (gpu for gpu in cards if found[gpu.name].word(gpu, replayed=False) is Word.FITS), None
        )
        needs = found[(asked.gpu or least or cards[-1]).name]
        rows.append(
            {
                "method": method,
                "chosen": method == asked.scenario.method,
                "peak": gib(needs.peak_bytes),
                "state": _STATES[needs.word(asked.gpu, replayed=False)] if asked.gpu else "size",
                "least": least
                and {"name": least.name, "title": _short(least), "usable": gib(least.usable_bytes)},
            }
        )
    return rows


def _what_would_fit(asked: Question, words: list[str]) -> list[dict[str, Any]]:
    """Changes by which the step should fit, the cheapest first, as the form takes them."""
    gpu, choices, replays = asked.gpu, [], MOST_REPLAYS
    if gpu is None:
        return []
    for move in moves(asked.scenario):
        for changes in move.options:
            try:
                changed = replace(asked, scenario=apply(asked.scenario, changes))
                needs = _needs(changed, gpu)
                word = needs.word(gpu, replayed=False)
                if (
                    word is Word.TOO_CLOSE and replays and needs.may_fit(gpu)
                ):  # which takes a browser seconds
                    word, replays = needs.word(gpu), replays - 1
            except (NotDescribed, UserError):
                continue
            if word is Word.FITS:
                command = text.suggested(words, changes)
                fields = [
                    f"{name}.{part}" if part else name for name, part in named_fields(changes)
                ]
                choices.append(
                    {
                        "cost": move.cost,
                        "command": command,
                        "choice": choice_of(command),
                        "fields": fields,
                    }
                )
                break
        if len(choices) == MOST_CHANGES:
            break
    return choices


def _longest(asked: Question, rows: int) -> dict[str, Any] | None:
    """For a micro-batch the longest row that should fit, and the longest that may; None where there is no estimate."""
    gpu = asked.gpu
    if gpu is None:
        return None
    lengths = steps("sequence_length", asked.scenario.size("max_position_embeddings") or LONGEST)

    def count(low: int, verdicts: tuple[Word | None, ...]) -> int:
        """How many lengths, from the shortest on, have one of these verdicts; that the first ``low`` do is known."""
        high = len(lengths)
        while low < high:
            middle = (low + high) // 2
            needs = _needs(asked, gpu, sequence_length=lengths[middle], micro_batch=rows)
            inside = needs.word(gpu, replayed=False) in verdicts  # at once: the map asks for dozens
            low, high = (middle + 1, high) if inside else (low, middle)
        return low

    try:
        sure = count(0, (Word.FITS,))
        most = count(sure, (Word.FITS, Word.TOO_CLOSE, None))
    except NotDescribed:
        return None
    ends = [0, *lengths]
    return {"rows": rows, "fits": ends[sure], "may_fit": ends[most], "positions": lengths[-1]}
