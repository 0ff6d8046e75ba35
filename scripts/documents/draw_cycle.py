"""A reinforcement step's cycle over its phases, by owner, drawn from answers of ``dryfit --json``.

    python -m scripts.documents.draw_cycle docs/images/grpo-cycle.png "awake=ANSWER.json" "asleep=ANSWER.json" ...

A panel for each answer: bars from phase to phase in the order of a cycle, with their seconds, and a line where the card
ends.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.common.text import GIB
from scripts.documents.draw import FAINT, INK, STYLE, save

OWNERS = {  # in the order of a stack, with a colour
    "CUDA_context_bytes": "#bbbbbb",
    "trainer_bytes": "#0072b2",
    "server_weights_bytes": "#e69f00",
    "server_cache_bytes": "#f0d58c",
    "server_activations_bytes": "#cc79a7",
    "CUDA_graphs_bytes": "#009e73",
}


def draw_cycle(answers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Stacked bars of each phase's upper figures, in GiB.

    Parameters
    ----------
    answers
        By the title of their panels, each with ``phases_of_cycle``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, len(answers), sharey=True, squeeze=False)[0]
    shown: dict[str, Any] = {}
    for axes, (title, answer) in zip(panels, answers.items(), strict=True):
        cycle = answer["phases_of_cycle"]
        phases = [phase for phase in cycle["phases"] if phase["card"] == cycle["phases"][0]["card"]]
        for place, phase in enumerate(phases):
            below = 0.0
            for owner, colour in OWNERS.items():
                size = phase["owners"].get(owner, (0, 0))[1] / GIB
                bar = axes.bar(place, size, bottom=below, width=1, color=colour, edgecolor="white", linewidth=0.5)
                below += size
                if size:
                    shown.setdefault(owner, bar)
            axes.text(place, below + 1, f"{below:.1f}", ha="center", fontsize=8)
        axes.axhline(cycle["usable_bytes"] / GIB, color=INK, linewidth=1, linestyle="--")
        axes.set_title(title)
        seconds = (cycle.get("time") or {}).get("seconds_by_phase", {})
        axes.set_xticks(range(len(phases)), [_label(phase["phase"], seconds) for phase in phases], rotation=90)
        axes.tick_params(axis="x", length=0, labelsize=8)
    panels[0].set_ylabel("GiB of the trainer's card")
    panels[0].text(-0.45, cycle["usable_bytes"] / GIB - 3.2, "the card", color=FAINT, fontsize=8)
    names = [owner.removesuffix("_bytes").replace("_", " ") for owner in shown]
    figure.legend(list(shown.values()), names, loc="outside lower center", ncols=len(names))
    return figure


def _label(phase: str, seconds: Mapping[str, float]) -> str:
    """A phase over two lines, with the seconds that it takes in a cycle."""
    takes = f", {seconds[phase]:.2g} s" if phase in seconds else ""
    return phase.replace(" ", "\n", 1) + takes


def main(arguments: Sequence[str]) -> None:
    """Read the answers and write the picture."""
    import matplotlib

    output, *named = arguments
    answers = {title: json.loads(Path(path).read_text(encoding="utf-8")) for title, _, path in
               (item.partition("=") for item in named)}  # fmt: skip
    with matplotlib.rc_context(STYLE):
        save(draw_cycle(answers), output)


if __name__ == "__main__":
    main(sys.argv[1:])
