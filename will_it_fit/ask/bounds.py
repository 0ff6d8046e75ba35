"""By how much an answer may be wrong for a setting that it does not describe: the parts that the setting touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from will_it_fit.analytic.decoder import NotDescribed, describe
from will_it_fit.scenario.scenario import Scenario


def bound_bytes(kind: str | None, scenario: Scenario, answer: Mapping[str, Any]) -> int | None:
    """At most so many bytes; None where nothing can be said.

    Parameters
    ----------
    kind
        What the setting touches: ``states``, ``activations``, ``logits``, ``frozen`` (gradients and states), ``int8``,
        ``head_fp32``, ``step`` (all that is not resident).
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
