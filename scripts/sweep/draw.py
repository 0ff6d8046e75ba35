"""Rule ``draw_sweep``: quality, memory, time and size of each run of a sweep, from its summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.common.files import read_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.documents.draw import COLOURS, INK, STYLE, save

BLUE, ORANGE, GREEN = COLOURS["parameters"], COLOURS["gradients"], COLOURS["activations"]


def label(settings: Mapping[str, Any]) -> str:
    """What a run varies, for an axis: ``rank 8``, one setting a line."""
    return "\n".join(
        f"{key.rpartition('.')[2].replace('_', ' ')} {text(value)}"
        for key, value in settings.items()
    )


def text(value: Any) -> str:
    """A value as short as it can be told."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return (
            ", ".join(map(text, value)) if len(value) < 4 else f"{text(value[0])}, … ({len(value)})"
        )
    return f"{value}"


def axis(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[str], str]:
    """Places, labels and title of the common axis: by size where one number is varied, else one place a run."""
    varied = [point["varied"] for point in points]
    keys = {key for settings in varied for key in settings}
    values = [value for settings in varied for value in settings.values()]
    if len(keys) == 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    ):
        (key,) = keys
        order = sorted(settings[key] for settings in varied)
        places = [float(order.index(settings[key])) for settings in varied]
        return (
            places,
            [text(settings[key]) for settings in varied],
            key.rpartition(".")[2].replace("_", " "),
        )
    return (
        [float(place) for place in range(len(points))],
        [label(settings) or "as configured" for settings in varied],
        "",
    )


def panel(
    points: Sequence[Mapping[str, Any]], title: str, unit: str, series: Sequence[tuple]
) -> Any:
    """A figure with a line for each series: name, colour, marker, a function to a value or (value, low, high)."""
    from matplotlib.figure import Figure

    places, names, what = axis(points)
    figure = Figure(figsize=(max(5.5, 1.1 * len(points) + 1.5), 3.4), layout="constrained")
    axes = figure.add_subplot()
    order = sorted(range(len(points)), key=lambda index: places[index])
    for number, (name, colour, marker, read) in enumerate(series):
        rows = [(places[index], read(points[index])) for index in order]
        rows = [
            (place, value if isinstance(value, tuple) else (value,) * 3)
            for place, value in rows
            if value is not None
        ]
        if not rows:
            continue
        at, middle = [place for place, _ in rows], [value[0] for _, value in rows]
        # A negative difference is a rounding error.
        below = [max(0.0, mean - low) for _, (mean, low, _) in rows]
        above = [max(0.0, high - mean) for _, (mean, _, high) in rows]
        style = {
            "linestyle": "-" if what else "none",
            "linewidth": 1.2,
            "elinewidth": 1.6,
            "capsize": 3,
        }
        if number:  # seldom far from the first: seen through it
            style |= {
                "linestyle": "none",
                "markerfacecolor": "none",
                "markersize": 11,
                "markeredgewidth": 1.6,
            }
        axes.errorbar(
            at, middle, yerr=[below, above], marker=marker, color=colour, label=name, **style
        )
    axes.set_title(title)
    axes.set(xlabel=what, ylabel=unit)
    axes.set_xticks(places, names, fontsize=10 if what else 8)
    axes.margins(x=0.12, y=0.15)
    if not any(isinstance(read(point), tuple) for _, _, _, read in series for point in points):
        axes.set_ylim(0, 1.15 * axes.dataLim.y1)  # sizes and times: their proportions show
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if len(series) > 1:
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def trade(points: Sequence[Mapping[str, Any]]) -> Any:
    """Loss against memory, the runs that no other beats filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        at, loss = point["predicted_peak_bytes"] / 2**30, point["loss"]
        axes.plot([at, at], [loss["low_95"], loss["high_95"]], color=BLUE, linewidth=1.4, alpha=0.6)
        face = "white" if point["beaten_by"] else BLUE
        axes.plot(at, loss["mean"], "o", color=BLUE, markerfacecolor=face, markersize=8)
        name = label(point["varied"]).replace("\n", ", ") or point["run"]
        axes.annotate(
            name,
            (at, loss["mean"]),
            xytext=(8, 5),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    axes.set_title("Filled: no other run beats it")
    axes.set(xlabel="GiB (2³⁰ bytes) at the predicted peak", ylabel="loss (nats per answer token)")
    axes.margins(x=0.2, y=0.15)
    axes.grid(color="#dddddd", linewidth=0.6)
    return figure


def figures(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def loss(point: Mapping[str, Any]) -> tuple[float, float, float]:
        return point["loss"]["mean"], point["loss"]["low_95"], point["loss"]["high_95"]

    def exact(point: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(100 * point["exact"][key] for key in ("share", "low_95", "high_95"))

    def there(point: Mapping[str, Any]) -> float:
        return point["predicted_for_the_measured_bytes"] / 2**30

    def measured(point: Mapping[str, Any]) -> float | None:
        return point["measured_peak_bytes"] / 2**30 if point["measured_peak_bytes"] else None

    device = points[0]["measured_on"]
    memory = [("predicted", BLUE, "o", lambda point: point["predicted_peak_bytes"] / 2**30)]
    if device:
        memory.append((f"measured ({device})", ORANGE, "s", measured))
    if device and points[0]["predicted_for_the_measured_bytes"]:
        memory[0] = ("predicted for a GPU", *memory[0][1:])
        memory.append((f"predicted for the {device}", ORANGE, "x", there))
    return {
        "loss": panel(
            points,
            "Loss, with 95 % intervals",
            "nats per answer token",
            [("tuned", BLUE, "o", loss)],
        ),
        "exact": panel(
            points,
            "Exact answers, with 95 % intervals",
            "% of the requests",
            [("tuned", GREEN, "o", exact)],
        ),
        "memory": panel(points, "Peak of the training step", "GiB (2³⁰ bytes)", memory),
        "time": panel(
            points,
            "Training",
            "seconds",
            [("time", ORANGE, "o", lambda point: point["train_wall_seconds"])],
        ),
        "size": panel(
            points,
            "Adapter",
            "MiB",
            [("size", BLUE, "o", lambda point: point["adapter_bytes"] / 2**20)],
        ),
        "trade": trade(points),
    }


def main(summary: str, outputs: Mapping[str, str]) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = figures(read_report(summary)["points"])
        for name, path in outputs.items():
            save(drawn[name], path)
            log.info("%s", path)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.summary, dict(snakemake.output.items()))
