"""Any two finished runs side by side: settings that differ, what they came to, whether requests tell them apart.

    python -m scripts.sweep results/one-r16 results/two-r8

A sweep declares its runs and has SWEEP.md; these two need not know of each other. They may lie in other working
directories. Differences are paired, over the requests that both were asked. Standard output is Markdown; ``--json``
prints the values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_report
from dryfit.common.terminal import command
from dryfit.common.text import gib
from scripts.sweep.summarize import difference, outcome, read_outcome

PATHS = {  # of what a run came to, in its folder
    "adapter": "adapter/adapter_model.safetensors",
    "answers": "evaluation/answers.jsonl",
    "comparison": "evaluation/comparison.json",
    "gate": "memory/training/gate.json",
    "memory": "memory/training/compare.json",
    "metrics": "evaluation/metrics.json",
    "training": "training.json",
}


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run's folder says of it; each file must be what its step wrote."""
    if not (folder / "provenance.json").is_file():
        raise UserError(
            "No finished run lies in this folder.",
            where=folder,
            allowed="a run's folder with its provenance.json, such as results/smollm2-135m-r16",
        )
    run = read_outcome({name: folder / path for name, path in PATHS.items()})
    return {**run, "configuration": read_report(folder / "provenance.json")["configuration"]}


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The settings of a configuration by their dotted names."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    inner = [leaves(one, f"{name}.{key}" if name else str(key)) for key, one in value.items()]
    return {key: one for part in inner for key, one in part.items()}


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two runs of :func:`read_run`.

    Returns
    -------
    dict
        ``settings``: the values of each setting that differs, by dotted name, None where a run has none. ``points``:
        as a sweep's summary has them. ``requests``: how many both were asked. ``difference``: the second run minus the
        first over these, loss in nats per token and share of exact answers, with 95 % intervals; None without any.
    """
    one, other = leaves(first["configuration"]), leaves(second["configuration"])
    differing = sorted(key for key in {*one, *other} if one.get(key) != other.get(key) and key != "run.name")
    rows = [{(row["request"], row["command"]): row for row in run["answers"]} for run in (first, second)]
    both = [key for key in rows[0] if key in rows[1]]
    return {
        "difference": difference(*([of[key] for key in both] for of in reversed(rows))) if both else None,
        "points": [outcome("first", first, {}), outcome("second", second, {})],
        "requests": len(both),
        "settings": {key: [one.get(key), other.get(key)] for key in differing},
    }


def lines(names: tuple[str, str], compared: Mapping[str, Any]) -> list[str]:
    """The comparison as Markdown."""
    points = compared["points"]

    def row(title: str, show: Any) -> str:
        return f"| {title} | {show(points[0])} | {show(points[1])} |"

    settings = compared["settings"].items()
    said = [f"# {names[0]} and {names[1]}", "", f"| | {names[0]} | {names[1]} |", "| --- | --- | --- |"]
    said += [f"| `{key}` | {_shown(one)} | {_shown(other)} |" for key, (one, other) in settings]
    said += [] if settings else ["| settings | the same | the same |"]
    said += [
        row("loss, nats per token", lambda run: _interval(run["loss"], "mean")),
        row("exact answers", lambda run: f"{run['exact']['count']} of {run['exact']['n']}, {_percent(run['exact'])}"),
        row(
            "against its base: loss, exact",
            lambda run: ", ".join(run["verdict_to_the_base"][k] for k in ("loss", "exact")),
        ),
        row("peak, predicted", lambda run: gib(run["predicted_peak_bytes"])),
        row("peak, measured", _measured),
        row("training", lambda run: f"{run['train_wall_seconds']:,.0f} s, {run['tokens_per_second']:,.0f} tokens/s"),
        row("adapter", lambda run: f"{run['adapter_bytes'] / 1e6:,.1f} MB, {run['trainable_parameters']:,} parameters"),
        "",
    ]
    change = compared["difference"]
    if change is None:
        return [*said, "The two were asked no request in common, so nothing is paired."]
    exact = {key: 100 * value for key, value in change["exact"].items()}
    told = {True: "The interval does not reach over zero", False: "The interval reaches over zero"}
    loss = change["loss"]
    return [
        *said,
        f"Over the {compared['requests']} requests that both were asked, {names[1]} minus {names[0]}:",
        f"- loss {loss['difference']:+.3f} [{loss['low_95']:+.3f}, {loss['high_95']:+.3f}]. "
        f"{told[loss['low_95'] > 0 or loss['high_95'] < 0]}.",
        f"- exact answers {exact['difference']:+.1f} [{exact['low_95']:+.1f}, {exact['high_95']:+.1f}] points. "
        f"{told[exact['low_95'] > 0 or exact['high_95'] < 0]}.",
        "",
        "Each run was trained once: the intervals are about the requests, not about the seed.",
    ]


def _shown(value: Any) -> str:
    return "not there" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", r"\|")


def _interval(value: Mapping[str, float], key: str) -> str:
    return f"{value[key]:.3f} [{value['low_95']:.3f}, {value['high_95']:.3f}]"


def _percent(value: Mapping[str, float]) -> str:
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value[key] for key in ("share", "low_95", "high_95")))


def _measured(run: Mapping[str, Any]) -> str:
    size = run["measured_peak_bytes"]
    return "not measured" if size is None else f"{gib(size)} ({run['measured_on']})"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.sweep", description="Compare two finished runs.")
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="a run's folder, results/<name>-r<rank>")
    parser.add_argument("--json", action="store_true", help="print the values")
    options = parser.parse_args()
    first, second = options.runs
    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    compared = compare(read_run(first), read_run(second))
    print(json.dumps(compared, indent=2) if options.json else "\n".join(lines(names, compared)))
    return 0


if __name__ == "__main__":
    command(main)
