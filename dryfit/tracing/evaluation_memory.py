"""The memory of an evaluation: the functions that put requests to a model, followed as a training step is.

Base and tuned model answer in batches of prompts of like length (:mod:`dryfit.step.generation`). What a batch
needs is known when its prompts' lengths are: on ``meta`` its keys, values, masks and logits are made as they will be,
to the last token that an answer may have. No row is dropped, since which one ends early only the answers can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dryfit.engine.errors import TraceError
from dryfit.engine.trace import Options, trace_step
from dryfit.hours.step_time import Speed, simulate
from dryfit.scenario.scenario import Scenario
from dryfit.step.batches import Row
from dryfit.step.generation import Shared, batches, halves
from dryfit.step.model import build_model

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Evaluation(NamedTuple):
    """A model and the requests that it answers: ``dtype`` as its files say, rows as the tokenizer encodes requests."""

    model: Mapping[str, Any]
    dtype: str
    rows: Sequence[Row]
    batch_size: int
    max_new_tokens: int


def build(evaluation: Evaluation, device: str) -> nn.Module:
    """The model as an evaluation loads it, on ``meta`` or with random weights; its answers never end by themselves."""
    fields = {
        "model": evaluation.model,
        "precision": PRECISIONS[evaluation.dtype],
        "method": "full",
    }
    fields |= {
        "gradient_checkpointing": False,
        "sequence_length": 1,
    }  # of a step, which is not taken
    scenario = Scenario.from_mapping(fields, where="the evaluation")
    model = build_model(scenario, device).eval()
    model.generation_config.eos_token_id = None
    return model


def widest_batches(evaluation: Evaluation) -> list[list[int]]:
    """The batches of which one needs the most: no other has as many rows, as long prompts and as long answers."""
    prompts, answers = zip(*map(halves, evaluation.rows), strict=True)
    sizes: dict[tuple[int, ...], list[int]] = {}
    for chosen in batches(prompts, evaluation.batch_size):
        lengths = [len(answers[index]) for index in chosen]
        size = len(chosen), max(len(prompts[index]) for index in chosen), max(lengths), sum(lengths)
        sizes.setdefault(size, chosen)

    def outdone(size: tuple[int, ...]) -> bool:
        return any(
            other != size and all(a >= b for a, b in zip(other, size, strict=True))
            for other in sizes
        )

    return [chosen for size, chosen in sizes.items() if not outdone(size)]


def number_of_batches(evaluation: Evaluation) -> int:
    """How many batches the evaluation of one model takes."""
    return len(
        batches([prompt for prompt, _ in map(halves, evaluation.rows)], evaluation.batch_size)
    )


def asking(model: nn.Module, evaluation: Evaluation, chosen: list[int]) -> Callable[[], None]:
    """One batch of the evaluation as a step; the prompts' common beginning is read in it."""

    def step() -> None:
        Shared(model, evaluation.rows).ask(chosen, evaluation.max_new_tokens)

    return step


def whole_rows(model: nn.Module, evaluation: Evaluation, chosen: list[int]) -> Callable[[], None]:
    """For an architecture that takes no shared prefix: prompts and answers of full length in one pass, keys kept.

    ``generate`` decides by values and can't be followed; its last token sees as many keys and values as this.
    """
    parts = [halves(evaluation.rows[index]) for index in chosen]
    learned = max(len(answer) for _, answer in parts)
    longest = max(
        len(prompt) + max(len(answer), evaluation.max_new_tokens) for prompt, answer in parts
    )

    def step() -> None:
        with torch.inference_mode():
            tokens = torch.zeros(len(parts), longest, dtype=torch.long, device=model.device)
            keep = torch.zeros(learned, dtype=torch.long, device=model.device)
            model(input_ids=tokens, use_cache=True, logits_to_keep=keep).logits.float()

    return step


def trace_evaluation(
    evaluation: Evaluation,
    target: str = "cuda",
    capability: tuple[int, int] | None = None,
    speed: Speed | None = None,
) -> dict[str, Any]:
    """Predict the memory of an evaluation.

    Returns
    -------
    dict
        ``seconds_at_most``, with a ``speed``: as if every batch took as long as the longest one;
        ``peak_allocated_bytes``, ``required_bytes`` (CUDA: the least that the allocator must get), ``components`` at
        the peak, ``weights_bytes``, ``rows`` of the batch that needs the most, ``largest_module_bytes``, ``exact``
        (False where only :func:`whole_rows` could be followed), ``target``.

    Raises :class:`TraceError` if the architecture can't be followed at all.
    """
    reports, model, seconds = [], build(evaluation, "meta"), 0.0
    for chosen in widest_batches(evaluation):
        for make in (asking, whole_rows):
            try:
                step = make(model, evaluation, chosen)
                options = Options(
                    steps=1,
                    target=target,
                    capability=capability,
                    scalars=0,
                    costs=speed is not None,
                )
                report = trace_step(model, None, step, options=options)
                break
            except TraceError:
                if make is whole_rows:
                    raise
        reports.append((report, len(chosen), make is asking))
        if speed is not None:
            seconds = max(seconds, simulate(report.costs, speed)[0])
    report, rows, exact = max(
        reports, key=lambda item: item[0].required_bytes or item[0].peak_allocated_bytes
    )
    parts = [
        module
        for module in model.modules()
        if type(module).__name__ in set(model._no_split_modules or ())
    ]
    parts += [model.get_input_embeddings(), model.get_output_embeddings()]
    return {
        "components": report.components,
        "exact": exact,
        "largest_module_bytes": max(_bytes(module) for module in parts if module is not None),
        "peak_allocated_bytes": report.peak_allocated_bytes,
        "required_bytes": report.required_bytes,
        "rows": rows,
        "seconds_at_most": None if speed is None else seconds * number_of_batches(evaluation),
        "target": target,
        "weights_bytes": _bytes(model),
    }


def _bytes(module: nn.Module) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*module.parameters(), *module.buffers())
    )
