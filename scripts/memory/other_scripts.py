"""What the scripts of TRL, PEFT and axolotl would take in a step's place, by the analytic estimate: in milliseconds."""

from __future__ import annotations

from scripts.ask.readers.asked import LIKE, AskedStep, asked_for
from scripts.common.errors import UserError
from scripts.memory.analytic.estimate import NotDescribed, analytic_estimate
from scripts.memory.gpus import named


def scripts_would_take(asked: AskedStep, where: object = "scenario") -> dict[str, int | None]:
    """The peak with the settings of each tool's scripts, by the analytic estimate; None: not described."""
    found: dict[str, int | None] = {}
    gpu = named(asked.scenario.gpu, where)
    for tool in LIKE if asked.like is None and asked.mapping else ():
        try:
            other = asked_for({**asked.mapping, "like": tool}, where).scenario
            form = analytic_estimate(other, where, capability=gpu.capability if gpu else None, blocks=False)
            found[tool] = form["peak_allocated_bytes"]
        except (NotDescribed, UserError):  # what was named does not go with the tool's settings
            found[tool] = None
    return found
