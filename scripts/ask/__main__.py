"""``dryfit`` in a checkout: the library's command, which here reads a run's settings too.

python -m scripts.ask config/qwen2.5-coder-7b.yaml --gpu 4090
"""

from collections.abc import Mapping
from typing import Any

from dryfit import readers
from dryfit.ask.command import run


def step_of_a_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The step that the gate asks about, of the model that the memory profile is about, as fields of a scenario."""
    from scripts.runs.configuration import check, with_defaults
    from scripts.runs.run_scenarios import training_step_as_gated

    settings = check(with_defaults(given))
    return {**training_step_as_gated(settings), "model": settings["memory"]["model"]}


readers.step_of_a_run = step_of_a_run

if __name__ == "__main__":
    run()
