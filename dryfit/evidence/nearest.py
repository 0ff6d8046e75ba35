"""Which measured steps are like a step, by a stated rule, and how far the predictions were off on them.

A measured step is like another one if they agree in every kind of :class:`~dryfit.evidence.measured.Kinds`. A kind
that is not known of the step counts for nothing. Of the steps that are alike, those on the same card are named alone
where there are any. On other cards their memory counts, and not their time. Sizes (of the model, the rows, the batch)
are no kind: they are named with the steps.

Where no measured step is alike, the kinds in which it differs are named. They are looked for in the order of ``Kinds``:
a kind that some of the rows left agree in keeps those; a kind that none agrees in is a difference.
"""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dryfit.cards.gpus import Gpu, known
from dryfit.evidence.measured import FITTED, UNREAD, Kinds, MeasuredStep, kinds_of, measured_steps
from dryfit.scenario.scenario import Scenario

FIGURES = {  # the errors of a row, by what they are of
    "allocated": "allocated_error",
    "reserved": "reserved_error",
    "time": "time_error",
    "estimate": "form_error",
}
# How a difference is told: {0} is the step's own kind.
_WORDS = {
    "method": "the method {0}",
    "layers": "layers of {0}",
    "objective": "the objective {0}",
    "program": "{0}",
    "compiled": "compile {0}",
    "parallel": "{0}",
    "capability": "compute capability {0}",
    "platform": "{0}",
    "kernels": "kernels of {0}",
    "preparation": "k-bit preparation {0}",
    "precision": "weights in {0}",
    "optimizer": "the optimizer {0}",
    "attention": "{0} attention",
    "checkpointing": "checkpointing {0}",
    "loss": "the loss {0}",
    "rows": "rows {0}",
    "offload": "offload {0}",
}
_SAME_CHIP = {"a100-40gb": "a100-80gb"}  # with slower memory, within the range
WHOLE_PROGRAM = "modded-nanogpt"  # the program of the measured rows that `run` ran, unchanged
LEAST = 0.1  # of a prediction: the least that a range leaves to either side
FEW = 8  # measured times: fewer make no range
FEW_DIFFERENCES = 3  # kinds in which a step that is near may differ
_MOST = 4  # measured kinds that are named beside a difference
_CARDS = {
    "a10g": "NVIDIA A10G",
    "h100-96gb": "NVIDIA H100 with 96 GB",
}  # measured, and not in the catalogue


@dataclass(frozen=True)
class Errors:
    """Signed errors of one figure over several rows, as shares."""

    rows: int
    low: float
    high: float
    median_size: float

    @property
    def worst_size(self) -> float:
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Difference:
    """A kind in which no measured step agrees: the step's own, and what was measured."""

    kind: str
    own: str
    measured: Sequence[str]

    def __str__(self) -> str:
        others = ", ".join(self.measured[:_MOST]) + (", ..." if len(self.measured) > _MOST else "")
        own = (
            self.own
            if self.kind == "capability" and not self.own[0].isdigit()
            else _WORDS[self.kind].format(self.own)
        )
        return f"{own} (measured: {others})"


@dataclass(frozen=True)
class Evidence:
    """The measured steps that are like a step, or in what they all differ.

    ``near``: those that differ in :attr:`differences` alone, where these are few.
    """

    kinds: Kinds
    rows: Sequence[MeasuredStep]
    differences: Sequence[Difference]
    same_card: bool = True
    near: Sequence[MeasuredStep] = ()

    def errors(self, figure: str) -> Errors | None:
        """Of one of :data:`FIGURES`; None where it was not measured."""
        if figure == "time" and not self.same_card:
            return None
        found = [error for row in self.rows if (error := getattr(row, FIGURES[figure])) is not None]
        if not found:
            return None
        return Errors(len(found), min(found), max(found), statistics.median(map(abs, found)))

    def to_mapping(
        self, figures: Iterable[str] = ("allocated", "reserved", "time")
    ) -> dict[str, Any]:
        """Plain values for JSON: ``rows`` by their names, ``errors`` by figure as shares, ``differs``, ``text``."""
        errors = {figure: known for figure in figures if (known := self.errors(figure))}
        return {
            "rows": [row.id for row in self.rows],
            "cards": _counted(row.card for row in self.rows),
            "near": [row.id for row in self.near],
            "unread": sum(row.memory_known == UNREAD for row in self.rows),
            "errors": {
                figure: {"rows": one.rows, "range": [one.low, one.high], "median": one.median_size}
                for figure, one in errors.items()
            },
            "differs": [
                {"kind": one.kind, "own": one.own, "measured": list(one.measured)}
                for one in self.differences
            ],
            "text": self.text(figures),
        }

    def text(self, figures: Iterable[str] = ("allocated", "reserved", "time")) -> str:
        """One sentence for people; with ``estimate`` among the figures it says which are the trace's."""
        if not self.rows:
            kind = "step" if self.kinds.program else "program"
            told = f"No measured {kind} resembles this one: {'; '.join(map(str, self.differences))}"
            if not self.near:
                return told
            nearest = Evidence(self.kinds, self.near, (), same_card=False)
            return f"{told}. The nearest are {nearest._runs()}. Errors there: {nearest._errors(figures)}"
        return f"Like {self._runs()}: {self._errors(figures)}"

    def _errors(self, figures: Iterable[str]) -> str:
        """How far the trace was off in these runs, and whether they helped to develop it."""
        traced = "the trace's " if "estimate" in figures else ""
        phrases = [self._phrase(figure, traced) for figure in figures]
        said = ", ".join(phrase for phrase in phrases if phrase)
        return f"{said or 'measured, and not predicted yet'}{self._known()}"

    def _runs(self) -> str:
        count, cards = len(self.rows), _counted(row.card for row in self.rows)
        titles = [_title(card) for card in cards]
        where = titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"
        system = ", Windows" if self.kinds.platform == "windows" else ""
        known = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
        methods = dict.fromkeys(row.kinds.method for row in self.rows)
        what = [" and ".join(known.get(method, method) for method in methods) + system]
        what += (
            [", ".join(sorted({row.model for row in self.rows}))] if not self.kinds.program else []
        )
        what += [self._sizes()] if self._sizes() else []
        return f"{count} measured run{'s' if count > 1 else ''} on {where} ({', '.join(what)})"

    def _sizes(self) -> str:
        sizes = sorted({row.parameters for row in self.rows if row.parameters})
        tokens = sorted({row.sequence_length for row in self.rows if row.sequence_length})
        parts = [_span([_size(size) for size in (sizes[0], sizes[-1])])] if sizes else []
        parts += (
            [f"{_span([f'{length:,}' for length in (tokens[0], tokens[-1])])} tokens a row"]
            if tokens
            else []
        )
        return ", ".join(parts)

    def _phrase(self, figure: str, traced: str) -> str | None:
        errors = self.errors(figure)
        if errors is None:
            return None
        if figure == "time":
            ends = [f"{100 * end:+.0f}" for end in (errors.low, errors.high)]
            return f"time off by {_span(ends)} %"
        name = "the estimate's peak" if figure == "estimate" else f"{traced}{figure}"
        if errors.worst_size == 0:
            return f"{name} exact"
        many = f" (median {_percent(errors.median_size)})" if errors.rows > 2 else ""
        return f"{name} within {_percent(errors.worst_size)}{many}"

    def _known(self) -> str:
        fitted = sum(row.memory_known == FITTED for row in self.rows)
        unread = sum(row.memory_known == UNREAD for row in self.rows)
        if fitted:
            who = (
                {1: "one"}.get(fitted, fitted)
                if fitted < len(self.rows)
                else "it"
                if fitted == 1
                else "they"
            )
            return f"; {who} helped to develop the trace"
        return "; traced before anybody looked at them" if unread == len(self.rows) else ""


def evidence(scenario: Scenario, gpu: Gpu | None) -> Evidence:
    """The measured steps that are like a scenario's step on a GPU."""
    kinds = kinds_of(scenario, gpu and gpu.capability)
    if gpu and gpu.name in known() and gpu.capability is None:
        kinds = kinds._replace(capability="not CUDA")
    return nearest(kinds, gpu and gpu.name, measured_steps())


def program_evidence(gpus: int, compiled: bool, gpu: Gpu | None) -> Evidence:
    """The measured programs that are like one that is run whole: nobody knows what it trains, and how."""
    steps = [step for step in measured_steps() if step.kinds.program == WHOLE_PROGRAM]
    on = "one GPU" if gpus == 1 else f"on {gpus} GPUs"
    alike = (step.kinds.parallel for step in steps if step.kinds.parallel.endswith(on))
    kinds = Kinds(*[""] * len(Kinds._fields))._replace(
        compiled="model" if compiled else "no",
        parallel=next(alike, on),
        capability=".".join(map(str, gpu.capability)) if gpu and gpu.capability else "",
    )
    return nearest(kinds, gpu and gpu.name, steps)


def nearest(kinds: Kinds, card: str | None, steps: Sequence[MeasuredStep]) -> Evidence:
    """The rule of this module.

    ``card``: its name in gpus.yaml; None: no GPU is named, or one of a size alone.
    """
    left, differences = list(steps), []
    for kind, own in kinds._asdict().items():
        if not own:
            continue
        if agreeing := [step for step in left if getattr(step.kinds, kind) == own]:
            left = agreeing
        else:
            measured = _counted(getattr(step.kinds, kind) for step in left)
            differences.append(Difference(kind, own, tuple(measured)))
    if differences:
        return Evidence(
            kinds, (), differences, near=left if len(differences) <= FEW_DIFFERENCES else ()
        )
    own = [step for step in left if step.card == card]
    return Evidence(kinds, own or left, (), bool(own))


class TimeShares(NamedTuple):
    """What measured steps took as shares of the prediction, 19 of 20 of them; ``of``: which steps, in words."""

    low: float
    high: float
    rows: int
    of: str


def time_shares(card: str, scenario: Scenario | None) -> TimeShares | None:
    """How long measured steps of a card took, as shares of what was predicted for them.

    Of steps on the same card that agree in their layers and objective, and in whether the compiler, several GPUs and
    Windows are used: those of the same method where there are :data:`FEW`, else all. Rows to which the time model was
    fitted say nothing and are left out, and so is the farthest twentieth. The measured steps are of few models and
    programs, so the range is at least :data:`LEAST` to either side. None: there are fewer steps.

    ``scenario``: None: a decoder's eager step on one GPU under Linux, of any method.
    """
    kinds = kinds_of(scenario, None) if scenario else None

    def deciding(of: Kinds) -> tuple[object, ...]:
        return of.layers, of.objective, of.compiled, of.parallel == "one GPU", of.platform

    own = deciding(kinds) if kinds else ("attention", "sft", "no", True, "linux")
    rows = [
        step
        for step in measured_steps()
        if step.card == _SAME_CHIP.get(card, card)
        and step.time_error is not None
        and step.time_known != FITTED
        and deciding(step.kinds) == own
    ]
    method = kinds and _method_class(kinds.method)
    alike = [step for step in rows if _method_class(step.kinds.method) == method]
    if few := len(alike) < FEW:
        alike = rows
    if len(alike) < FEW:
        return None
    shares = sorted(
        (1 / (1 + step.time_error) for step in alike), key=lambda share: abs(math.log(share))
    )
    kept = shares[: len(shares) - len(shares) // 20]
    low, high = min(*kept, 1 - LEAST), max(*kept, 1 + LEAST)
    return TimeShares(low, high, len(kept), "of any method" if few or method is None else method)


def _method_class(method: str) -> str:
    word = method.split(" ")[0]
    return word if word in ("full", "lora", "qlora") else "other adapters"


def _counted(words: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _title(card: str) -> str:
    title = known()[card].title if card in known() else _CARDS.get(card, card)
    short = title.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return f"{'an' if short[0] in 'AHLR' else 'a'} {short}"


def _span(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"


def _size(millions: float) -> str:
    return (
        f"{millions / 1000:.2g}B"
        if millions >= 1000
        else f"{millions:.2g}M"
        if millions < 100
        else f"{millions:.0f}M"
    )


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def summary(steps: Iterable[MeasuredStep]) -> Iterator[Mapping[str, Any]]:
    """For tables: the rows by card, method, program and way to divide, with each figure's median and worst error."""
    groups: dict[tuple[str, ...], list[MeasuredStep]] = {}
    for step in steps:
        kinds = step.kinds
        key = (
            step.card,
            _method_class(kinds.method),
            _way(kinds.parallel),
            kinds.program,
            kinds.platform,
            kinds.compiled,
        )
        groups.setdefault(key, []).append(step)
    for key, rows in groups.items():
        together = Evidence(rows[0].kinds, rows, ())
        yield {
            "key": key,
            "rows": len(rows),
            **{figure: together.errors(figure) for figure in FIGURES},
        }


def _way(parallel: str) -> str:
    """A way to divide without its sizes: ``fsdp2 x context`` of ``fsdp2 x context 4 on 8 GPUs``."""
    axes = re.sub(r" on \d+ GPUs$", "", parallel).split(" x ")
    return " x ".join(
        re.sub(r" \d+$", "", axis) for axis in axes if not re.match("sequence|loss|schedule", axis)
    )
