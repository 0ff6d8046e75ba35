"""The one sentence that says a verdict: for a terminal, JSON, documents, a page, the gate, an assistant.

Each takes an answer as JSON has it, so that whoever reads an answer later says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from dryfit.cards.gpus import known
from dryfit.cards.verdict import NO_VERDICT, TITLES, Verdict, Word, is_lower_bound, of_mapping
from dryfit.common.text import gib
from dryfit.common.versions import INSTALL_TRACE, can_trace
from dryfit.scenario.description import say_way


def title(word: str | None) -> str:
    """A verdict's value in JSON as a sentence begins with it."""
    return TITLES[Word(word)] if word else NO_VERDICT


def said(word: str | None) -> str:
    """A verdict's value in JSON as a predicate, for a row of a table: ``fits``."""
    return {None: "has no verdict", "fits": "fits", "too_close": "is too close to call"}.get(
        word, "does not fit"
    )


def said_of(row: Mapping[str, Any]) -> str:
    """A row's or an answer's verdict as a predicate; one that is told as ``fits`` alone, too."""
    told = {True: Word.FITS.value, False: Word.DOES_NOT_FIT.value}
    return said(row.get("verdict") or told.get(row.get("fits")))


def which(word: str | None) -> str:
    """A verdict's value in JSON as an apposition: ``, which fits``; "" where there is none."""
    return f", which {said(word)}" if word else ""


def sentence(judged: Verdict, need: str, has: str) -> str:
    """A verdict with what is needed and what there is: ``the step needs 3 GiB``, ``the Tesla T4 has 14 GiB usable``."""
    if judged.word is None:
        return f"{NO_VERDICT}: {need}, {has}; what the warning names is not counted"
    return f"{TITLES[judged.word]}: {need}, {has}; {judged.reason}"


def card(gpu: Mapping[str, Any]) -> str:
    """A GPU in a sentence."""
    nameless = gpu["compute_capability"] is None and gpu.get("is_modelled", True)
    return f"a GPU of {gpu['name']}" if nameless else f"the {gpu['title']}"


def has_usable(gpu: Mapping[str, Any]) -> str:
    """What a GPU has for the step, in a sentence."""
    return f"{card(gpu)} has {gib(gpu['usable_bytes'])} usable"


def smallest(required_bytes: float) -> str:
    """The smallest of all GPUs that are known that has so much."""
    cards = (gpu for gpu in known().values() if gpu.is_modelled and not gpu.pool_bytes)
    gpus = sorted(cards, key=lambda gpu: gpu.usable_bytes)
    gpu = next((gpu for gpu in gpus if gpu.usable_bytes >= required_bytes), None)
    if gpu is None:
        return "no GPU known has it; --gpu 2xh100-80gb shards it"
    return f"the smallest GPU known that has it is the {gpu.title} (--gpu {gpu.name})"


def of_step(answer: Mapping[str, Any]) -> str:
    """Whether a step fits, from its answer: with the trace, or without (``--quick``)."""
    gpu, trace = answer["gpu"], answer["trace"]
    if trace is None:
        return _of_estimate(answer)
    need = f"the step needs {'at least ' if is_lower_bound(trace) else ''}{gib(trace['required_bytes'])}"
    if gpu is None:
        return f"{_capital(need)}: {smallest(trace['required_bytes'])}"
    judged, parallel = of_mapping(answer), answer["scenario"]["parallel"]
    if (answer.get("phases_of_cycle") or {}).get("server"):
        return _of_cycle(answer, judged)
    each = (
        f" on each of {parallel['gpus']} GPUs with {say_way(parallel, as_title=True)}"
        if parallel["gpus"] > 1
        else ""
    )
    has = has_usable(gpu)
    if gpu["count"] > parallel["gpus"]:
        has += f" (of {gpu['count']} GPUs the step uses {parallel['gpus']})"
    if (
        not judged.is_modelled and trace["peak_allocated_bytes"] > gpu["usable_bytes"]
    ) or judged.word is None:
        return sentence(
            judged, f"the step allocates {gib(trace['peak_allocated_bytes'])}{each}", has
        )
    if (answer["headroom_bytes"] or 0) < 0 <= gpu["usable_bytes"] - trace["required_bytes"]:
        return f"{title(answer['verdict'])}: loading is {judged.reason}; {need}{each}, {has}"
    if (
        judged.word is not Word.DOES_NOT_FIT
        and 0 <= answer["headroom_bytes"] > gpu["usable_bytes"] - trace["required_bytes"]
    ):
        enough = f"{gib(trace['required_bytes'])} is enough on any card"
        return f"{title(answer['verdict'])} on this card: blocks have to pack well; {has}{each}, {enough}"
    return sentence(judged, f"{need}{each}", has)


def _of_estimate(answer: Mapping[str, Any]) -> str:
    analytic, gpu = answer["analytic"], answer["gpu"]
    if analytic is None and answer["verdict"]:
        least = gpu["usable_bytes"] - answer["headroom_bytes"]
        return sentence(of_mapping(answer), f"the weights alone take {gib(least)}", has_usable(gpu))
    if analytic is None:
        how = "ask without --quick" if can_trace() else f"to trace it: {INSTALL_TRACE}"
        return f"NO ANSWER without the trace: {answer['reasons']['analytic']} ({how})"
    need = f"about {gib(analytic['peak_allocated_bytes'])} at the peak, by the analytic estimate"
    exact = "recorded_with" in analytic
    if exact:
        need = f"the step needs {gib(analytic['required_bytes'])} by a record of its trace"
    elif "required_bytes" in analytic:
        need = f"about {gib(analytic['required_bytes'])} needed, by the analytic estimate"
    if gpu is None:
        return f"{_capital(need)}: {smallest(analytic['enough_bytes'] or inf)}"
    if exact:
        return sentence(of_mapping(answer), need, has_usable(gpu))
    end = "; ask without --quick" if answer["verdict"] == Word.TOO_CLOSE.value else ""
    return f"{title(answer['verdict'])}: {need}; {has_usable(gpu)}{end}"


def _of_cycle(answer: Mapping[str, Any], judged: Verdict) -> str:
    """The phase that needs the most of a reinforcement step's cycle, and whether the card has it."""
    cycle = answer["phases_of_cycle"]
    phase = next(one for one in cycle["phases"] if one["phase"] == cycle["peak_phase"])
    trainer = phase["owners"].get("trainer_bytes", [0, 0])[1]
    need = f"the largest phase, the {cycle['peak_phase']}, needs {gib(cycle['required_bytes'])}"
    need += f" (trainer {gib(trainer)}" if trainer else f" ({cycle['peak_owner']}"
    has = f"{card(answer['gpu'])} has {gib(cycle['usable_bytes'])} in all"
    measured = judged.word is Word.TOO_CLOSE and judged.omissions
    advice = (
        ". What vLLM's CUDA graphs take decides (cuda_graphs: false settles it)" if measured else ""
    )
    return sentence(judged, f"{need})", has) + advice


def of_program(answered: Mapping[str, Any], subject: str = "the program") -> str:
    """Whether somebody's program fits, from its run's answer; ``subject``: what needs the memory."""
    trace, gpu = answered["trace"], answered["gpu"]
    need = f"{subject} needs {gib(trace['required_bytes'])}"
    if answered["gpus"] > 1:
        several = len(answered["ranks"]) > 1
        need += (
            f" on the GPU of rank {answered['rank']}"
            if several
            else f" on each of {answered['gpus']} GPUs"
        )
    if gpu is None:
        return f"{_capital(need)}: {smallest(trace['required_bytes'])}"
    return sentence(of_mapping(answered), need, has_usable(gpu))


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"
