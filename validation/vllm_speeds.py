"""How fast vLLM decodes by the roofline (dryfit/serving/roofline.py) against published figures.

    python -m validation.vllm_speeds development     Qwen2.5 of 1.5B, 3B and 7B on an A100: the constants were fitted
    python -m validation.vllm_speeds "held out"      0.5B, 14B, 32B and 72B of the same table, read once after that
    python -m validation.vllm_speeds seen            three others, which were seen before the constants were chosen

`validation/data/vllm_speeds.csv` has one answer at once in each row, for nobody publishes batches with all settings.
Which models of the table are held out was drawn by `random.Random(37).sample` before any figure was read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from statistics import median

from dryfit.analytic.setting import describe
from dryfit.cards.gpus import find
from dryfit.data import data_path
from dryfit.hours.step_time import speed_of
from dryfit.serving.roofline import generating
from dryfit.serving.vllm import Server, release
from dryfit.tracing.cycle_time import rates_of
from validation.tables import rows_of

GAP_BEFORE_V1_SECONDS = (
    1.86e-3  # between two passes, where the scheduler ran before the card: fitted with the others
)


def rows(use: str) -> list[dict[str, str]]:
    """The figures for one use."""
    return rows_of("vllm_speeds.csv", use=use)


def seconds_per_token(row: Mapping[str, str]) -> float:
    """By the roofline, prompts included."""
    model = json.loads(data_path(f"models/{row['model']}.json").read_text(encoding="utf-8"))
    gpu, at_once, answer = find(row["gpu"]), int(row["rows"]), int(row["answer_tokens"])
    parameters, cards = describe(model).parameter_counts()["total"], int(row["tp"])
    engine = Server(
        model, parameters, gpu.total_bytes, 0.9, at_once, 32_768, 8192, tensor_parallel=cards
    )
    rates = rates_of(speed_of(gpu.name), gpu.capability)
    made = generating(
        engine,
        rates,
        rows=at_once,
        prompts=at_once,
        prompt=int(row["prompt_tokens"]),
        answer=answer,
    )
    gap = GAP_BEFORE_V1_SECONDS if row["version"] and release(row["version"]) < (0, 8) else 0.0
    return made.seconds / answer + gap


def main(use: str) -> None:
    """Print a line for each figure, and how far the roofline is off."""
    errors = []
    for row in rows(use):
        seen, found = float(row["milliseconds_per_token"]), 1000 * seconds_per_token(row)
        errors.append(found / seen - 1)
        print(
            f"{row['id']:<28} {seen:7.2f} ms a token  by the roofline {found:7.2f}  {100 * errors[-1]:+6.1f} %"
        )
    sizes = sorted(map(abs, errors))
    print(f"{len(errors)} rows, median {100 * median(sizes):.1f} %, worst {100 * sizes[-1]:.1f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
