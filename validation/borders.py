"""What the feasibility table shows as fitting, against traces of those very steps.

python -m validation.borders --cells 40 --seed 1 [--json FILE]     about a minute a cell

Cells are drawn at random: model, method, GPU, longest row or most rows, with and without expandable segments. The table
finds a border in replays between traces; here the step at the border is traced itself, with the GPU's own kernels, and
so is each larger one up to the first that does not fit. What fits above that fits by luck, and is not asked about.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.cards.gpus import GIB, Gpu, catalogue
from dryfit.common.files import write_text
from dryfit.common.terminal import command, progress
from dryfit.planner.changes import apply, as_method
from dryfit.planner.feasibility import FIELDS
from dryfit.planner.largest_fit import Borders, Traces, by_kernels
from dryfit.scenario.scenario import Scenario

METHODS = ("full", "lora", "qlora")
MODELS = (
    "codellama-7b",
    "gemma-2-2b",
    "gemma-2b",
    "gemma-3-1b",
    "llama-2-7b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b-v0.3",
    "phi-3-mini-4k",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-coder-3b",
    "qwen2.5-coder-7b",
    "smollm2-1.7b",
    "smollm2-360m",
)
FAR = 0.03  # of a GPU: a border that is further below what fits is too careful


def cells(
    seed: int, models: Sequence[Any] = MODELS, gpus: Sequence[Gpu] = ()
) -> Iterator[dict[str, Any]]:
    """Cells without end, drawn at random."""
    draw, gpus = random.Random(seed), gpus or list(catalogue().values())
    while True:
        model, method = draw.choice(models), draw.choice(METHODS)
        scenario = Scenario.from_mapping({"model": model})
        yield {
            "base": apply(
                scenario,
                {**as_method(scenario, method), "micro_batch": 1, "gradient_accumulation": 1},
            ),
            "gpu": draw.choice(gpus),
            "field": draw.choice(FIELDS),
            "expandable": draw.random() < 0.5,
            "gpus": gpus,
        }


def judged(cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """A cell's border and what the trace says; None where the model's positions end it or far too little memory does.

    ``fits``: whether the step at the border fits; ``largest``: the last before the first that does not;
    ``below_bytes``: how much less the border's peak is than that one's; ``too_careful``: that is more than :data:`FAR`.
    """
    base, gpu, field, expandable = (cell[key] for key in ("base", "gpu", "field", "expandable"))
    group = next(group for group in by_kernels(base, cell["gpus"]) if gpu in group)
    capacities = [one.usable_bytes for one in group]
    borders = Borders(
        base, field, group[0].capability, capacities, Traces(group[0].capability)
    ).for_capability(gpu.capability)
    shown = borders.largest(gpu.usable_bytes, expandable=expandable)
    if shown.limited or not borders.has_traced:
        return None
    exact = Traces(gpu.capability)
    place = borders.values.index(shown.value) if shown.value else -1
    answers: dict[int, bool] = {}
    for index in range(max(place, 0), len(borders.values)):
        step = exact(borders.scenario_at(borders.values[index]))
        answers[index] = step.fits(gpu.usable_bytes, expandable_segments=expandable)
        if not answers[index]:
            break
    first_bad = max(answers)
    fits = shown.value == 0 or answers[place]
    required = None
    if shown.value:
        step = exact(borders.scenario_at(shown.value))
        required = step.required_bytes(expandable_segments=expandable, sizes=[gpu.usable_bytes])
    largest = (
        borders.values[first_bad - 1]
        if first_bad > max(place, 0)
        else (shown.value if fits else None)
    )
    below = 0
    if largest and largest != shown.value:
        below = borders.scaled.least_bytes(largest) - (
            borders.scaled.least_bytes(shown.value) if shown.value else 0
        )
    return {
        "model": base.model_name or base.model["model_type"],
        "method": base.method,
        "gpu": gpu.name,
        "field": field,
        "expandable_segments": expandable,
        "shown": shown.value,
        "required_bytes": required,
        "usable_bytes": gpu.usable_bytes,
        "fits": fits,
        "largest": largest,
        "below_bytes": below,
        "too_careful": below > FAR * gpu.total_bytes,
    }


def validate(count: int, drawn: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """So many judged cells; those that say nothing are drawn anew."""
    while count:
        row = judged(next(drawn))
        if row is not None:
            count -= 1
            yield row


def text(row: Mapping[str, Any]) -> str:
    """A cell in one line."""
    words = "fits" if row["fits"] else "DOES NOT FIT"
    if row["largest"] not in (None, row["shown"]):
        words += f", and so does {row['largest']} (+{row['below_bytes'] / GIB:.2f} GiB)"
    words += ": TOO CAREFUL" if row["too_careful"] else ""
    needs = "" if row["required_bytes"] is None else f"{row['required_bytes'] / GIB:.2f} of "
    allocator = "expandable" if row["expandable_segments"] else "default"
    return (
        f"{row['model']:<18}{row['method']:<6}{row['gpu']:<18}{row['field']:<16}{allocator:<11}"
        f"{row['shown']:>7}  {needs}{row['usable_bytes'] / GIB:.2f} GiB  {words}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation.borders", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cells", type=int, default=40, metavar="N", help="how many (40)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all rows, added to the file's other seeds"
    )
    options = parser.parse_args(arguments)
    rows = []
    for row in progress(
        validate(options.cells, cells(options.seed)), "borders", total=options.cells, unit="cells"
    ):
        rows.append(row)
        print(text(row), flush=True)
    unsafe, careful = sum(not row["fits"] for row in rows), sum(row["too_careful"] for row in rows)
    print(
        f"{len(rows)} cells, seed {options.seed}: {unsafe} do not fit, {careful} more than {FAR:.0%} too careful"
    )
    if options.json is not None:
        kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        text_of_all = json.dumps({**kept, str(options.seed): rows}, indent=1, sort_keys=True)
        write_text(options.json, text_of_all + "\n")
    return 0


if __name__ == "__main__":
    command(main)
