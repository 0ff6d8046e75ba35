"""Any two finished runs side by side: settings that differ, what they came to, whether requests tell them apart.

    python -m scripts.sweep results/one-r16 results/two-r8

A sweep declares its runs and has SWEEP.md; these two need not know of each other. They may lie in other working
directories. Differences are paired, over the requests that both were asked. Standard output is Markdown; ``--json``
prints the values.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_report
from dryfit.common.terminal import command
from scripts.common.code_digests import ROOT
from scripts.documents.render import render
from scripts.sweep.summarize import difference, outcome, read_outcome

TEMPLATE = ROOT / "config" / "templates" / "two-runs.md.j2"
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

    Returns ``settings``: the values of each setting that differs, by dotted name, None where a run has none.
    ``points``: as a sweep's summary has them. ``requests``: how many both were asked. ``difference``: the second run
    minus the first over these, loss in nats per token and share of exact answers, with 95 % intervals; None without
    any.
    """
    one, other = leaves(first["configuration"]), leaves(second["configuration"])
    differing = sorted(
        key for key in {*one, *other} if one.get(key) != other.get(key) and key != "run.name"
    )
    rows = [
        {(row["request"], row["command"]): row for row in run["answers"]} for run in (first, second)
    ]
    both = [key for key in rows[0] if key in rows[1]]
    return {
        "difference": difference(*([of[key] for key in both] for of in reversed(rows)))
        if both
        else None,
        "points": [outcome("first", first, {}), outcome("second", second, {})],
        "requests": len(both),
        "settings": {key: [one.get(key), other.get(key)] for key in differing},
    }


def page(names: tuple[str, str], compared: Mapping[str, Any]) -> str:
    settings = {
        key: [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        for key, values in compared["settings"].items()
    }
    return render(TEMPLATE, {**compared, "names": names, "settings": settings})[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sweep", description="Compare two finished runs."
    )
    parser.add_argument(
        "runs", nargs=2, type=Path, metavar="RUN", help="a run's folder, results/<name>-r<rank>"
    )
    parser.add_argument("--json", action="store_true", help="print the values")
    options = parser.parse_args()
    first, second = options.runs
    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    compared = compare(read_run(first), read_run(second))
    print(json.dumps(compared, indent=2) if options.json else page(names, compared))
    return 0


if __name__ == "__main__":
    command(main)
