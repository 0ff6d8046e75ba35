"""Validation loss over rows seen, for settings of the default run and several seeds; never on the test split.

    python -m tests.benchmarks.training_settings --results results --settings 8x120@2e-3 4x200@1e-3 --seeds 42 43 44
    python -m tests.benchmarks.training_settings --draw

Settings are rows per step x steps @ learning rate; all else is the default configuration. What has been measured stands
in docs/training-settings.csv: a line for each time that the loss was looked at, with the CPU seconds that the steps
until then took in one thread. What stands there is not measured again; ``--draw`` draws it.
"""

import argparse
import csv
import io
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MEASURED, FIGURE = ROOT / "docs" / "training-settings.csv", ROOT / "docs" / "images" / "training.png"
COLUMNS = ("rows_per_step", "steps", "learning_rate", "seed", "rows_seen", "validation_loss", "train_cpu_seconds")
LOOKS = 4  # at the validation split in a run, evenly spaced
# Okabe and Ito's colours; the chosen settings in the strongest.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")


class Settings(NamedTuple):
    """What is varied."""

    rows_per_step: int
    steps: int
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.rows_per_step} rows x {self.steps} steps, learning rate {self.learning_rate:g}"


def parse(text: str) -> Settings:
    """``8x120@2e-3``."""
    found = re.fullmatch(r"(\d+)x(\d+)@([\d.e+-]+)", text)
    if not found:
        raise argparse.ArgumentTypeError("rows per step x steps @ learning rate, such as 8x120@2e-3")
    return Settings(int(found[1]), int(found[2]), float(found[3]))


def measure(results: Path, settings: Settings, seed: int) -> list[dict]:
    """Train as rule ``train_adapter`` does, and look at the validation split some times."""
    import torch
    import yaml

    from scripts.common.job import keep_host_memory
    from scripts.settings.run_scenarios import training_loop, training_scenario
    from scripts.settings.scenario import Scenario
    from scripts.training.batches import read_rows
    from scripts.training.model import build_model, build_optimizer
    from scripts.training.packing import common_prefix
    from scripts.training.train import Checkpoint, fit, validation_loss

    torch.set_num_threads(1)
    keep_host_memory()
    chosen = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    base = results / "models" / chosen["model"]["name"]
    scenario = Scenario.from_mapping({**training_scenario(chosen), "model": str(base / "config.json")})
    loop = {
        **training_loop(chosen),
        "rows_per_step": settings.rows_per_step,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "save_every_steps": max(1, settings.steps // LOOKS),
    }
    folder = results / "dataset" / chosen["dataset"]["name"] / "encoded"
    folder = folder / f"{chosen['model']['name']}-{scenario.sequence_length}"
    rows = read_rows(str(folder / "train.parquet"))
    held_out = read_rows(str(folder / "validation.parquet"))[: loop["validation_rows"]]
    torch.manual_seed(seed)
    model = build_model(scenario, "cpu", weights=base, seed=seed)
    optimizer = build_optimizer(model, scenario, learning_rate=settings.learning_rate)
    looked: list[dict] = []

    class Look(Checkpoint):
        """Where a run would keep its state, the validation split is looked at."""

        apart = 0.0  # CPU seconds that looking took

        def save(self, step: int, *state: object) -> None:
            before = time.process_time()
            taken = before - started - self.apart
            looked.append(
                {
                    **settings._asdict(),
                    "seed": seed,
                    "rows_seen": step * settings.rows_per_step,
                    "validation_loss": round(validation_loss(model, held_out, 64, 0), 4),
                    "train_cpu_seconds": round(taken, 1),
                }
            )
            self.apart += time.process_time() - before

    started = time.process_time()
    fit(model, optimizer, rows, scenario, loop, seed, 0, Look(Path("nowhere")), common_prefix(rows))
    return looked


def read() -> list[dict]:
    """What has been measured."""
    if not MEASURED.is_file():
        return []
    with MEASURED.open(newline="") as file:
        return [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]


def write(lines: Iterable[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({name: f"{line[name]:g}" for name in COLUMNS} for line in lines)
    partial = MEASURED.with_suffix(".new")
    partial.write_text(text.getvalue())
    os.replace(partial, MEASURED)


def of(line: dict) -> Settings:
    return Settings(int(line["rows_per_step"]), int(line["steps"]), line["learning_rate"])


def curves(lines: Iterable[dict]) -> dict[Settings, dict[int, list[float]]]:
    """Losses of all seeds by settings and rows seen, the settings that ended lowest first."""
    found: dict[Settings, dict[int, list[float]]] = {}
    for line in lines:
        found.setdefault(of(line), {}).setdefault(int(line["rows_seen"]), []).append(line["validation_loss"])

    def last(settings: Settings) -> float:
        losses = found[settings][max(found[settings])]
        return sum(losses) / len(losses)

    return {settings: found[settings] for settings in sorted(found, key=last)}


def draw(lines: list[dict]) -> None:
    """Mean over the seeds, and the range from the lowest to the highest."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from scripts.documents.draw import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for (settings, losses), colour in zip(curves(lines).items(), COLOURS, strict=False):
            seen = sorted(losses)
            means = [sum(losses[rows]) / len(losses[rows]) for rows in seen]
            seeds = len(losses[seen[-1]])
            label = f"{settings} ({seeds} seed{'s' * (seeds > 1)}): {means[-1]:.3f}"
            axes.plot(seen, means, marker="o", markersize=4, color=colour, label=label)
            low, high = ([pick(losses[rows]) for rows in seen] for pick in (min, max))
            axes.fill_between(seen, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="rows seen", ylabel="validation loss (nats per answer token)", xlim=(0, None))
        axes.legend(fontsize=8)
        figure.savefig(FIGURE, dpi=120, metadata={"Software": None})


def table(lines: list[dict]) -> None:
    """The end of each run, as Markdown."""
    print("| rows a step x steps | learning rate | rows seen | validation loss of each seed | mean | CPU seconds |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for settings, losses in curves(lines).items():
        rows = max(losses)
        ends = [line for line in lines if of(line) == settings and line["rows_seen"] == rows]
        each = ", ".join(f"{line['validation_loss']:.3f}" for line in sorted(ends, key=lambda line: line["seed"]))
        mean = sum(losses[rows]) / len(losses[rows])
        seconds = sum(line["train_cpu_seconds"] for line in ends) / len(ends)
        print(
            f"| {settings.rows_per_step} x {settings.steps} | {settings.learning_rate:g} | {rows} | {each} | {mean:.3f}"
            f" | {seconds:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--settings", type=parse, nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--draw", action="store_true", help="draw what has been measured, and print its table")
    given = parser.parse_args()
    for seed in given.seeds:  # all settings with one seed before the next seed
        for settings in given.settings:
            if not any(of(line) == settings and line["seed"] == seed for line in read()):
                looked = measure(given.results, settings, seed)
                write([*read(), *looked])
                print(looked[-1], flush=True)
    if given.draw:
        draw(read())
        table(read())


if __name__ == "__main__":
    main()
