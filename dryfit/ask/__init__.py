"""The question from anywhere: one line, a Hub id, another tool's configuration, a Python program, a notebook.

from dryfit import Run, fit
answer = fit("Qwen/Qwen3-8B", gpu="4090", sequence_length=2048)
answer.fits, answer.required_bytes, answer.suggestions
fit("Qwen/Qwen3-8B", gpu="4090", run=Run(rows=50_000, epochs=3)).run.hours_range
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line imports this package first, and answers --help without them
    from dryfit.hours.run_time import Run, RunTime

__all__ = ["Answer", "Suggested", "fit"]


@dataclass(frozen=True)
class Suggested:
    """A change that makes the step fit: fields of the scenario, as a command line, and what it costs."""

    changes: Mapping[str, Any]
    command: str
    cost: str
    headroom_bytes: int


@dataclass(frozen=True)
class Answer:
    """What a step takes. In a notebook's cell it shows itself.

    Attributes
    ----------
    fits, headroom_bytes
        None where no GPU was named; ``fits`` also where ``quick`` can't decide.
    peak_allocated_bytes, required_bytes
        At the step's peak, and the least that the GPU must have (None with ``quick``).
    components
        The peak by what it is for.
    suggestions
        What would fit, the cheapest first.
    run
        Hours, cost and energy; None where nothing was asked about a run or the GPU's speed is not known.
    text, details
        The whole answer for people, and `predict`'s object for programs.
    """

    fits: bool | None
    headroom_bytes: int | None
    peak_allocated_bytes: int | None
    required_bytes: int | None
    components: Mapping[str, int]
    suggestions: Sequence[Suggested]
    run: RunTime | None
    text: str
    details: Mapping[str, Any]

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from html import escape

        colour = {True: "#2e7d32", False: "#c62828", None: "#616161"}[self.fits]
        first, _, rest = self.text.partition("\n")
        return (
            f'<div style="border-left:4px solid {colour};padding-left:8px"><b>{escape(first)}</b>'
            f'<pre style="white-space:pre-wrap">{escape(rest)}</pre></div>'
        )


def fit(
    what: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    gpu: str | None = None,
    method: str | None = None,
    strategy: str | None = None,
    like: str | None = None,
    quick: bool = False,
    run: Run | None = None,
    **fields: Any,
) -> Answer:
    """Whether a fine-tuning step fits a GPU.

    Parameters
    ----------
    what
        A model's name, its id on the Hub, or a file; with files beside it a list (:mod:`dryfit.ask.command`).
    gpu, method, strategy, like
        As the command line has them.
    quick
        The analytic estimate alone, without torch.
    run
        Hours, cost and energy of a run are asked too: ``Run(rows=50_000, epochs=3, tokens_per_row=350)``.
    **fields
        Any other field of a scenario, ``sequence_length=2048``; mappings give parts, ``lora={"rank": 64}``.

    Raises
    ------
    dryfit.common.errors.UserError
        If something is wrong in the question, with what to write.
    """
    from dryfit.ask.question import QuestionOptions, question
    from dryfit.ask.run_cost import with_run
    from dryfit.common.text import yaml_text

    words = [str(what)] if isinstance(what, (str, PathLike)) else [str(one) for one in what]
    settings = [
        f"{name}.{part}={yaml_text(item)}" if part else f"{name}={yaml_text(item)}"
        for name, value in fields.items()
        for part, item in (value.items() if isinstance(value, Mapping) else [("", value)])
    ]
    options = QuestionOptions(
        gpu=gpu, method=method, strategy=strategy, settings=settings, like=like
    )
    asked = question(words, options)
    return answered(with_run(asked, run) if run else asked, [*words, *options.words], quick=quick)


def answered(asked: Any, words: Sequence[str], *, quick: bool = False) -> Answer:
    """The typed answer to a question that was read."""
    from dryfit.ask import answer, text
    from dryfit.hours.run_time import RunTime

    with nullcontext() if quick else _undisturbed():
        details = answer.quick(asked) if quick else answer.traced(asked)
    shown = details["trace"] or details["analytic"] or {}
    suggestions = [
        Suggested(
            one["changes"],
            text.suggested(words, one["changes"]),
            one["cost"],
            one["headroom_bytes"],
        )
        for one in details["suggestions"]
    ]
    return Answer(
        fits=details["fits"],
        headroom_bytes=details["headroom_bytes"],
        peak_allocated_bytes=shown.get("peak_allocated_bytes"),
        required_bytes=shown.get("required_bytes"),
        components=shown.get("components", {}),
        suggestions=suggestions,
        run=RunTime(**details["run"]) if details.get("run") else None,
        text=text.full_text(asked, details, words),
        details=details,
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave random numbers, warnings, transformers' messages and the garbage collector as the asking program has them.

    The program goes on after its answer, such as a training that asked before its first step.
    """
    import gc
    import random
    import warnings

    import numpy
    import torch
    from transformers import logging

    drawn, of_numpy = random.getstate(), numpy.random.get_state()
    collecting, telling = gc.get_threshold(), logging.get_verbosity()
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(cards), warnings.catch_warnings():
            yield
    finally:
        random.setstate(drawn)
        numpy.random.set_state(of_numpy)
        gc.set_threshold(*collecting)
        logging.set_verbosity(telling)
