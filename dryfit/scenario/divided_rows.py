"""What divides a row's tokens among GPUs, and what its numbers have to be: sequence parallel, context, Ulysses."""

from collections.abc import Iterator
from math import gcd
from typing import Any, NamedTuple

OF_TITAN = ("sequence_parallel", "loss_parallel")  # by its plan (dryfit.step.meshes)


class Problem(NamedTuple):
    """``change`` are parts of ``parallel``, or fields of the scenario where ``field`` is another."""

    text: str
    allowed: str
    change: dict[str, Any]
    field: str = "parallel"


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above another."""
    return max(count for count in range(1, max(most, 1) + 1) if number % count == 0)


def divides(
    parallel: Any, axis: str, number: int | None, what: str, common: int = 0
) -> Iterator[Problem]:
    """``common``: what an axis has to divide besides."""
    count = getattr(parallel, axis)
    if number and number % count:
        fits = [each for each in range(2, number + 1) if number % each == 0]
        yield Problem(
            f"`parallel.{axis}: {count}` does not divide {what}, {number}.",
            f"a divisor of {number}: {', '.join(map(str, [1, *fits][:6]))}{', ...' if len(fits) > 5 else ''}",
            {axis: _divisor(gcd(number, common), count)},
        )


def _parts(scenario: Any, parts: int, what: str) -> Iterator[Problem]:
    """A row whose tokens can't be cut into so many parts of one length; ``what`` is said behind the row's length."""
    tokens = scenario.sequence_length
    if tokens % parts:
        change = {"sequence_length": -(-tokens // parts) * parts}
        yield Problem(
            f"`sequence_length: {tokens}` {what}.",
            f"a multiple of {parts}",
            change,
            "sequence_length",
        )


def sequence_and_loss(scenario: Any) -> Iterator[Problem]:
    """Sequence and loss parallel, by torchtitan's plan for transformers' models."""
    parallel, named = (
        scenario.parallel,
        [name for name in OF_TITAN if getattr(scenario.parallel, name)],
    )
    if parallel.expert > 1:
        yield Problem(
            f"`parallel.{named[0]}` and `parallel.expert: {parallel.expert}` are not predicted together: the plan is"
            " followed for dense models.",
            f"expert: 1; or {' and '.join(named)}: false",
            dict.fromkeys(named, False),
        )
    if not parallel.sequence_parallel:
        return
    count = parallel.tensor
    yield from _parts(
        scenario, count, f"can't be divided among `parallel.tensor: {count}` (sequence_parallel)"
    )
    if scenario.attention == "eager":
        yield Problem(
            "With `parallel.sequence_parallel` transformers makes a mask for a GPU's part of the tokens, and attention"
            " runs on all of them. `attention: eager` needs that mask.",
            "sdpa, mem_efficient, flash",
            {"attention": "sdpa"},
            "attention",
        )
    yield from _full_attention(
        scenario,
        {"sequence_parallel": False},
        "transformers would make its mask for a GPU's part of the tokens",
    )


def _full_attention(scenario: Any, change: dict[str, Any], why: str) -> Iterator[Problem]:
    """A model with layers that attend to a part of the row."""
    text = scenario.model.get("text_config") or scenario.model
    kinds = set(text.get("layer_types") or ()) - {"full_attention"}
    if kinds or (
        text.get("sliding_window")
        and text.get("use_sliding_window", True)
        and not text.get("layer_types")
    ):
        name = next(iter(change))
        yield Problem(
            f"`parallel.{name}` is not for a model with sliding-window or chunked attention: {why}.",
            f"{name}: {str(change[name]).lower()}; or a model with full attention",
            change,
        )


def context(scenario: Any) -> Iterator[Problem]:
    """accelerate's context parallel."""
    parallel = scenario.parallel
    parts = parallel.parts_of_a_row
    yield from _parts(
        scenario,
        parts,
        f"can't be split by `parallel.context: {parallel.context}`: each GPU takes a part from the beginning and one"
        f" from the end, so {parts} parts have to be alike",
    )
    yield from _full_attention(
        scenario, {"context": 1}, "accelerate refuses it, since it would drop the mask"
    )
    if scenario.attention != "sdpa":
        yield Problem(
            f"Context parallel needs scaled_dot_product_attention, and `attention` says {scenario.attention}.",
            "sdpa",
            {"attention": "sdpa"},
            "attention",
        )


def ulysses(scenario: Any) -> Iterator[Problem]:
    """DeepSpeed's Ulysses."""
    parallel, count = scenario.parallel, scenario.parallel.ulysses
    heads = scenario.size("num_attention_heads")
    keys = scenario.size("num_key_value_heads") or heads
    yield from divides(parallel, "ulysses", heads, "the attention heads")
    if keys and keys % count and count % keys:
        yield from divides(parallel, "ulysses", keys, "the heads of keys and values", heads or 0)
    yield from _parts(scenario, count, f"can't be divided among `parallel.ulysses: {count}`")
    if scenario.attention == "eager":
        yield Problem(
            "DeepSpeed refuses `attention: eager` under Ulysses, which would need a mask of whole rows.",
            "sdpa, flash",
            {"attention": "sdpa"},
            "attention",
        )
