"""Rules ``draw_*``: figures from JSON, the same bytes from the same numbers.

Stacks have the same colours and one order everywhere, and what matters is written beside the bars.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.common.files import atomic_open, write_report
from dryfit.common.terminal import log
from dryfit.common.text import GIB
from dryfit.engine.components import COLOURS, GROUPS, grouped
from scripts.common.job import job
from scripts.common.reports import CARRIED, carry, gather
from scripts.documents.evaluation import compared_tests
from scripts.documents.memory import GROUP_TITLES, scenario_memory, short_size
from scripts.tasks.text import Task

INK, FAINT = "#222222", "#888888"
GPU_SIZES_GIB = (16, 24, 80)  # of common GPUs, which their boxes call GB
AROUND_THE_PEAK = (
    4,
    1,
)  # widths of a timeline and of its peak, enlarged: the peak alone is narrower than a pixel
PEAK_EVENTS = 12  # recorded before and after the peak, that are enlarged
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same letters
    "font.size": 10,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def _figure(
    width: float, height: float, ratios: Sequence[float] = (1,), below: int = 1
) -> tuple[Any, Any]:
    """A figure with its axes: one, or several beside each other of such widths, or several below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(below, len(ratios), width_ratios=ratios)


def draw_memory(files: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Stacked bars: for each scenario the rule of thumb above the trace, and lines where GPUs end."""
    scenarios = [
        scenario_memory(name, compared)
        for name, compared in zip(names, files["profile"], strict=True)
    ]
    figure, axes = _figure(9, 1.6 + 1.15 * len(scenarios))
    ticks, largest, shown = [], 0.0, set()
    for number, scenario in enumerate(scenarios):
        for offset, answer in ((-0.2, "rule_of_thumb"), (0.2, "trace")):
            left = 0.0
            adapters = scenario["scenario"]["method"] != "full"
            for group, size in grouped(
                scenario["answers"][answer]["components"], adapters=adapters
            ).items():
                axes.barh(
                    number + offset,
                    size / GIB,
                    left=left,
                    height=0.36,
                    color=COLOURS[group],
                    alpha=0.45 if answer == "rule_of_thumb" else 1,
                    edgecolor="white",
                    linewidth=0.5,
                )
                left += size / GIB
                shown.add(group)
            size = scenario["answers"][answer]["peak_allocated_bytes"] or 0
            quoted = f"{size / 1e9:.4g} GB = " if answer == "rule_of_thumb" else ""
            axes.annotate(
                f"{quoted}{short_size(size)}, {answer.replace('_', ' ')}",
                (left, number + offset),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
            largest = max(largest, left)
        ticks.append(scenario["title"].replace(", ", "\n", 1))
    for place, capacity in enumerate(GPU_SIZES_GIB):
        axes.axvline(capacity, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        side = "right" if place == 0 else "left"  # the first two are close to each other
        axes.text(
            capacity,
            -0.62,
            f"{capacity} GiB (“{capacity} GB”) GPU",
            ha=side,
            va="bottom",
            fontsize=8,
        )
    axes.set(xlim=(0, 1.3 * max(largest, 28)), ylim=(len(scenarios) - 0.5, -0.62))
    axes.set_xlabel("GiB (2³⁰ bytes) allocated at the peak")
    axes.set_yticks(range(len(ticks)), ticks)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _legend(figure, [group for group in COLOURS if group in shown])
    return figure


def _legend(figure: Any, groups: Sequence[str] | Mapping[str, str]) -> None:
    """One entry for each component, below everything."""
    from matplotlib.patches import Patch

    patches = [
        Patch(color=COLOURS[group], label=GROUP_TITLES[group].split(" (")[0].split(",")[0])
        for group in groups
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=4, fontsize=9)


def draw_timeline(compared: Mapping[str, Any]) -> Any:
    """What is alive in the course of one training step, by component, with its phases; beside it, the peak enlarged."""
    scenario = scenario_memory("", compared)
    timeline = compared["trace"]["timeline"]
    adapters = scenario["scenario"]["method"] != "full"
    columns, events, allocated = (
        timeline["components"],
        timeline["event"],
        timeline["allocated_bytes"],
    )
    stacks = [
        grouped({name: column[moment] for name, column in columns.items()}, adapters=adapters)
        for moment in range(len(events))
    ]
    groups = [group for group in GROUPS if any(group in stack for stack in stacks)]
    heights = [[stack.get(group, 0) / GIB for stack in stacks] for group in groups]
    peak = max(range(len(events)), key=lambda index: allocated[index])
    height = allocated[peak] / GIB
    # Where nearly all is there before the step begins, what the step does is shown larger, and the cut is named.
    lowest = min(heights[0])
    bottom = 0.985 * lowest if lowest > 0.5 * height else 0.0
    top = height + 0.14 * (height - bottom)
    figure, axes = _figure(9, 4.2, AROUND_THE_PEAK)
    for part in axes:
        part.stackplot(
            events, heights, colors=[COLOURS[group] for group in groups], linewidth=0, step="post"
        )
        part.axhline(height, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        part.set_ylim(bottom, top)
    whole, near = axes
    whole.plot(events[peak], height, "v", color=INK, markersize=6)
    around = events[max(0, peak - PEAK_EVENTS)], events[min(len(events) - 1, peak + PEAK_EVENTS)]
    near.set(xlim=around, yticks=[])
    near.text(around[0], height, f" peak {height:.2f} GiB", va="bottom", fontsize=9)
    near.set_xlabel("the peak, enlarged")
    _name_phases(whole, timeline, top)
    cut = f" (from {bottom:.2f})" if bottom else ""
    whole.set(
        xlim=(0, events[-1]),
        ylabel=f"GiB allocated{cut}",
        xlabel="allocations and frees since the step began",
    )
    tokens = (
        f"{scenario['scenario']['micro_batch']} × {scenario['scenario']['sequence_length']} tokens"
    )
    whole.set_title(f"{scenario['title']}, {tokens}", pad=10)
    _legend(figure, groups)
    return figure


def _name_phases(axes: Any, timeline: Mapping[str, Any], top: float) -> None:
    """A line where each phase begins, and its name where there is room."""
    events, phases = timeline["event"], timeline["phase"]
    shown_until = -1.0
    for start in (i for i in range(len(phases)) if i == 0 or phases[i] != phases[i - 1]):
        if start:
            axes.axvline(events[start], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        if events[start] > shown_until:  # a phase of a few events has no room for its name
            axes.text(events[start], top, f" {phases[start]}", va="top", fontsize=9)
            shown_until = events[start] + 0.09 * events[-1]


def draw_training_curve(files: Mapping[str, Any]) -> Any:
    """Loss of each step, its running mean, the validation losses, and which step's adapter is kept."""
    curve, report = files["curve"], files["training"]
    steps, losses = [row["step"] for row in curve], [row["loss"] for row in curve]
    window = max(1, len(losses) // 15)
    means = [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))
    ]
    figure, axes = _figure(9, 3.6)
    axes.plot(steps, losses, color=COLOURS["adapters"], linewidth=0.9, label="each step")
    axes.plot(
        steps,
        means,
        color=COLOURS["parameters"],
        linewidth=2,
        label=f"mean of the last {window} steps",
    )
    validated = [row for row in curve if "validation_loss" in row]
    axes.plot(
        [row["step"] for row in validated],
        [row["validation_loss"] for row in validated],
        "o-",
        color=COLOURS["optimizer_states"],
        linewidth=1.2,
        markersize=4,
        label=f"validation, {report['validation_rows']} rows",
    )
    kept = report["kept_step"] or report["steps"]
    axes.plot(
        kept,
        report["validation_loss"],
        "D",
        color=COLOURS["optimizer_states"],
        markersize=8,
        label=f"the adapter, step {kept}: {report['validation_loss']:.3f}",
    )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", ylim=(0, None))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(loc="upper right")
    return figure


def draw_evaluation(files: Mapping[str, Any]) -> Any:
    """Right answers to each test, a line for each rival and the tuned model, with their Wilson intervals."""
    tests = compared_tests(files["comparison"], Task({}))
    figure, panels = _figure(9, 0.9 + 1.8 * len(tests), below=len(tests))
    panels = [panels] if len(tests) == 1 else list(panels)
    for axes, test in zip(panels, tests, strict=True):
        looks = [
            (row["label"], row["right"], COLOURS["optimizer_states"]) for row in test["rivals"]
        ]
        looks.append(("the tuned model", test["right"], COLOURS["parameters"]))
        for number, (_, score, colour) in enumerate(looks):
            low, high = 100 * score["low_95"], 100 * score["high_95"]
            axes.plot([low, high], [number] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(100 * score["share"], number, "o", color=colour, markersize=7)
            axes.text(
                high + 1.2, number, f"{score['count']} of {score['n']}", va="center", fontsize=9
            )
        axes.set_yticks(range(len(looks)), [textwrap.fill(label, 36) for label, _, _ in looks])
        axes.set(xlim=(0, 115), ylim=(len(looks) - 0.5, -0.5), xticks=range(0, 101, 20))
        axes.set_title(test["title"], loc="left", fontsize=10)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("right answers, % of the test's requests; 95 % intervals")
    return figure


def save(figure: Any, path: str) -> None:
    """Write a figure as PNG, without the version of the library that drew it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_open(path, "wb") as handle:
        handle.write(buffer.getvalue())


def main(inputs: Mapping[str, Any], names: Sequence[str], outputs: Mapping[str, str]) -> None:
    """Draw each named output; ``drawn`` is the report that carries the memory profile and seals its figures."""
    import matplotlib

    files = gather({name: value for name, value in inputs.items() if name != "unread"})
    figures = {name: path for name, path in outputs.items() if name != "drawn"}
    with matplotlib.rc_context(STYLE):
        for name, path in figures.items():
            if name == "memory":
                figure = draw_memory(files, names)
            elif name == "timeline":
                figure = draw_timeline(files["step"])
            elif name == "training_curve":
                figure = draw_training_curve(files)
            else:
                figure = draw_evaluation(files)
            save(figure, path)
            log.info("%s", path)
    if "drawn" in outputs:
        carried = carry(profile=inputs["profile"])
        for entry in carried["profile"]:  # megabytes, which the figure shows and no text prints
            del entry["content"]["trace"]["timeline"]
        write_report(outputs["drawn"], {CARRIED: carried}, *figures.values())


if __name__ == "__main__":
    with job(snakemake):
        main(
            dict(snakemake.input.items()),
            snakemake.params.get("figures", {}).get("scenarios", []),
            dict(snakemake.output.items()),
        )
