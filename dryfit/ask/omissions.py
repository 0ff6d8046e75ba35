"""What an answer leaves out of another tool's file, in bytes where they are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.setting import describe
from dryfit.cards.verdict import Omission
from dryfit.readers.reading import TOO_HIGH, TOO_LOW, Reading
from dryfit.scenario.scenario import Scenario


def omissions(readings: Iterable[Reading], scenario: Scenario, answer: Mapping[str, Any]) -> Iterator[Omission]:
    """What the files of a question say and a scenario can't.

    Parameters
    ----------
    answer
        With the trace or the analytic estimate, whose parts bound what is missing.
    """
    for reading in readings:
        for remark in reading.remarks:
            size = bound_bytes(remark.bound, scenario, answer)
            yield Omission(remark.key, 0 if remark.errs == TOO_HIGH else size, 0 if remark.errs == TOO_LOW else size)


def bound_bytes(kind: str | None, scenario: Scenario, answer: Mapping[str, Any]) -> int | None:
    """At most so many bytes; None where nothing can be said.

    Parameters
    ----------
    kind
        What the setting touches: ``states``, ``activations``, ``logits``, ``frozen`` (gradients and states), ``int8``,
        ``head_fp32``, ``masters`` (fp32 copies and states), ``step`` (all that is not resident).
    """
    shown = answer.get("trace") or answer.get("analytic")
    if kind is None or not shown:
        return None
    parts = shown["components"]
    if kind == "states":
        return parts.get("optimizer_states", 0)
    if kind == "activations":
        return parts.get("activations", 0)
    if kind == "logits":
        return parts.get("logits_and_loss", 0)
    if kind == "masters":  # 8 bytes a number beside states of 4 bytes in bf16: as much again in fp32, and the copy
        return 2 * parts.get("optimizer_states", 0)
    if kind == "frozen":
        return parts.get("optimizer_states", 0) + parts.get("gradients", 0)
    if kind == "step":
        return shown["peak_allocated_bytes"] - shown["resident_bytes"]
    try:
        counts = describe(scenario.model).parameter_counts()
    except NotDescribed:
        return None
    if kind == "int8":
        return counts["linear"]
    return 2 * (counts["embeddings"] + counts.get("output_head", 0))
