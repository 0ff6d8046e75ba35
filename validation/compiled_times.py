"""How long compiled steps take on H100: records of modded-nanogpt, and torchtitan's Llama 3.1 8B with compiled layers.

    python -m validation.compiled_times CHECKOUT            every row; CHECKOUT: of KellerJordan/modded-nanogpt
    python -m validation.compiled_times --draw              which rows were drawn to stay unread
    python -m validation.compiled_times --table             the rows that are kept

A record runs whole, as :mod:`validation.modded_nanogpt` runs it; what is launched between its last two updates is one
step. Its log says a step's mean over the whole training, without validation. ``validation/data/compiled_times.csv``
keeps the rows. While this was made, only the rows that were not drawn were looked at. Needs
the extra `run` (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.terminal import command
from validation.modded_nanogpt import GPUS, OPENED, TO_ITS_END, Checkout, run_beside_its_files
from validation.tables import FOLDER, markdown, rows_of

TABLE = FOLDER / "compiled_times.csv"
TORCHTITAN = ("torchtitan-8-compiled", "torchtitan-128-compiled")
SEED = 5  # of the draw, before any time was read
# How many keys a query of FlexAttention sees in the mean: documents, which end a window earlier, are left out. The
# programs' window grows linearly from one block of 128 tokens to 1,792, so it is 960 in the mean of a training. In the
# two later programs, 8 of 12 layers see half a window (`block_masks`), but one of all layers has no attention.
WINDOW = 960
ATTENDED = dict.fromkeys(OPENED, WINDOW) | {
    "2025-01-16_Sub3Min": WINDOW * 2 / 3,
    "2025-01-26_BatchSize": WINDOW * 2 / 3,
}


def drawn() -> list[str]:
    """The rows whose times nobody had read when this was made."""
    rows = sorted([*OPENED, *TORCHTITAN])
    return sorted(random.Random(SEED).sample(rows, len(rows) // 2))


def seconds_of_program(path: Path, attended_keys: float) -> dict[str, Any]:
    """Run a program to its end on eight simulated H100; the time of its last update, and what it consists of."""
    from dryfit.hours.step_time import kernel_time, simulate, speed_of
    from dryfit.program.child import simulated_machine, torchrun_variables
    from dryfit.program.request import ProgramRequest

    asked = ProgramRequest(str(path), gpus=GPUS, torchrun=True, gpu="h100-80gb", steps=TO_ITS_END)
    os.environ.update(torchrun_variables(GPUS))
    sys.argv = [str(path)]
    with simulated_machine(asked, attended_keys) as running:
        runpy.run_path(str(path), run_name="__main__")
        running.loop.end()
    update, speed = (
        running.tracker.costs.between(*running.loop.launches[-2:]),
        speed_of("h100-80gb"),
    )
    seconds, busy = simulate(update, speed)
    kernels: dict[str, list[float]] = {}
    for index in update.calls:
        operator = update.operators[index]
        entry = kernels.setdefault(
            f"{operator.name} {operator.shape or operator.bytes} {operator.dtype}", [0, 0.0]
        )
        entry[0] += 1
        entry[1] += kernel_time(operator, speed)[0]
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:25]
    return {
        "seconds": seconds,
        "busy": busy,
        "launches": len(update.calls),
        "kernels": dict(longest),
    }


def trace_record(checkout: Checkout, record: str) -> dict[str, Any]:
    """The same in a process of its own."""
    source = checkout.source(checkout.find(record))
    done = run_beside_its_files(source, "validation.compiled_times", str(ATTENDED[record]))
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of_torchtitan(gpus: int) -> float:
    """Of a step of torchtitan's with compiled layers, on its H100 of 500 W."""
    from dataclasses import replace

    from dryfit.hours.step_time import simulate, speed_of
    from validation.times import MEMORY_OF_TORCHTITAN
    from validation.torchtitan import step_of_torchtitan

    report = step_of_torchtitan(gpus, costs=True, compiled=True)
    speed = replace(speed_of("h100-80gb"), memory_bytes_per_second=MEMORY_OF_TORCHTITAN)
    return simulate(report.costs, speed)[0]


def kept() -> list[dict[str, str]]:
    """The rows of the table: ``measured_seconds`` and ``predicted_seconds`` of a step, and whether it was unread."""
    return rows_of(TABLE)


def table() -> str:
    """The kept rows as Markdown."""
    return markdown(("step", "rows", "predicted, s:", "measured, s:", ":"), map(_cells, kept()))


def _cells(row: Mapping[str, str]) -> list[str]:
    seconds = [
        float(row[name]) if row[name] else None
        for name in ("predicted_seconds", "measured_seconds")
    ]
    error = f"{100 * (seconds[0] / seconds[1] - 1):+.1f} %" if None not in seconds else ""
    return [
        row["id"],
        row["known"],
        *("" if value is None else f"{value:.4g}" for value in seconds),
        error,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path)
    parser.add_argument("--only", nargs="*", help="rows by name")
    parser.add_argument(
        "--draw", action="store_true", help="name the rows that were drawn to stay unread"
    )
    parser.add_argument("--table", action="store_true", help="print the rows that are kept")
    parser.add_argument(
        "--program", nargs=2, help="run one program here, with the keys that a query sees"
    )
    asked = parser.parse_args()
    if asked.program:
        print(json.dumps(seconds_of_program(Path(asked.program[0]), float(asked.program[1]))))
    elif asked.draw:
        print("\n".join(drawn()))
    elif asked.table:
        print(table())
    else:
        if asked.checkout is None:
            parser.error(
                "name a checkout: git clone https://github.com/KellerJordan/modded-nanogpt"
            )
        for name in asked.only or [*OPENED, *TORCHTITAN]:
            if name in TORCHTITAN:
                print(name, seconds_of_torchtitan(int(name.split("-")[1])), flush=True)
            else:
                print(
                    name,
                    json.dumps(trace_record(Checkout(asked.checkout), name), indent=1),
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    command(main)
