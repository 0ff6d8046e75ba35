"""Right answers and executed score against minutes of training, at the checkpoints of one run.

    python -m tests.benchmarks.training_minutes --results results --config config/cpu-hour.yaml --states kept \\
        --unseen results/dataset/*/splits/train.jsonl --execute
    python -m tests.benchmarks.training_minutes --draw

``--states`` has a folder for each checkpoint, a copy of ``results/<run>/checkpoints/<digest>``, called
``<step>-<CPU seconds>``. Each answers the grammar's validation rows of the configuration's dataset, as far as no
training split of ``--unseen`` has their intent: so runs on different data answer the same. ``--execute`` runs its
answers to the benchmark too. docs/training-minutes.csv keeps what has been measured.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from tests.task_parts import shell

ROOT = Path(__file__).resolve().parents[2]
MEASURED, FIGURE = ROOT / "docs" / "training-minutes.csv", ROOT / "docs" / "images" / "training-minutes.png"
COLUMNS = ("run", "steps", "rows_seen", "train_cpu_seconds", "loss", "right", "program", "refused", "intents")
COLUMNS += ("executed_right", "executed")
COLOURS = {"smollm2-135m": "#0072B2", "smollm2-135m-hour": "#D55E00"}


def unseen_rows(dataset: Path, training: list[Path], most: int) -> list[dict]:
    """Validation rows of the grammar whose intent, and what is held together with it, no training split has."""
    seen: set[str | None] = set()
    for path in training:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        seen |= {row.get(key) for row in rows for key in ("intent", "family")}
    rows = [json.loads(line) for line in (dataset / "splits" / "validation.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["source"] == "embedded" and not row.get("family", "").startswith("refuse.")]
    return [row for row in rows if not {row["intent"], row.get("family")} - {None} & seen][:most]


def load(results: Path, chosen: dict) -> tuple[Any, Any]:
    """The model before its first step, and its tokenizer."""
    import torch

    from dryfit.scenario.scenario import Scenario
    from dryfit.step.model import build_model
    from scripts.common.tokenizer import read_tokenizer
    from scripts.runs.run_scenarios import training_scenario

    torch.set_num_threads(1)
    base = results / "models" / chosen["model"]["name"] / "weights"
    scenario = Scenario.from_mapping({**training_scenario(chosen), "model": str(base / "config.json")})
    return build_model(scenario, "cpu", weights=base, seed=chosen["run"]["seed"]), read_tokenizer(base)


def executed(model: Any, tokenizer: Any, system: str, benchmark: Path) -> dict[str, int]:
    """Right among the benchmark's decidable tasks."""
    from dryfit.common.files import read_json, read_jsonl
    from scripts.evaluation.evaluate import answered
    from scripts.tasks.shell.execution.execute import execute
    from scripts.tasks.shell.execution.sandbox import State

    tasks = list(read_jsonl(benchmark / "tasks.jsonl"))
    rows = answered(shell("scores"), model, tokenizer, system, tasks, max_new_tokens=40, batch_size=256)
    states = {name: State(**state) for name, state in read_json(benchmark / "states.json").items()}
    tuned = execute(tasks, states, {"base": rows, "tuned": rows}, 2)[1]["tuned"]
    return {"executed_right": tuned["count"], "executed": tuned["n"]}


def measure(results: Path, chosen: dict, states: list[Path], rows: list[dict], execute: bool) -> None:
    """A line for each checkpoint that has none."""
    import torch

    from dryfit.step.quantized import without_noise
    from scripts.evaluation.evaluate import answered
    from scripts.tasks.shell.embedded import read_refusals

    model, tokenizer = load(results, chosen)
    run, system, refusal = chosen["run"]["name"], chosen["prompt"]["system"], read_refusals().line
    benchmark = results / "dataset" / chosen["dataset"]["name"] / "benchmark"
    for folder in states:
        steps, seconds = map(int, folder.name.split("-"))
        if any((known["run"], known["steps"]) == (run, steps) for known in read()):
            continue
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["trained"]
        with torch.no_grad(), without_noise(model):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[name])
            said = answered(shell("scores"), model, tokenizer, system, rows, max_new_tokens=40, batch_size=256)
            score = executed(model, tokenizer, system, benchmark) if execute else {}
        seen = {"run": run, "steps": steps, "rows_seen": steps * chosen["training"]["rows_per_step"]}
        right = {
            "loss": sum(row["loss_sum"] for row in said) / sum(row["answer_tokens"] for row in said),
            "right": sum(row["exact_canonical"] for row in said),
            "program": sum(row["program"] for row in said),
            "refused": sum(row["answer"] == refusal for row in said),
            "intents": len(rows),
        }
        write([*read(), {**seen, "train_cpu_seconds": seconds, **right, **score}])
        print(read()[-1], flush=True)


def read() -> list[dict]:
    """What has been measured."""
    if not MEASURED.is_file():
        return []
    with MEASURED.open(newline="") as file:
        return [
            {name: value if name == "run" else float(value) for name, value in line.items() if value}
            for line in csv.DictReader(file)
        ]


def write(lines: list[dict]) -> None:
    with MEASURED.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for line in sorted(lines, key=lambda line: (line["run"], line["steps"])):
            table.writerow({name: value if name == "run" else f"{value:.5g}" for name, value in line.items()})


def draw(lines: list[dict]) -> None:
    """Unseen intents answered exactly, and answers right when run, against CPU minutes of training."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from scripts.documents.draw import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = {
            "intents": ("right", "unseen intents answered exactly"),
            "executed": ("executed_right", "InterCode-ALFA, right when run"),
        }
        for axes, (count, (right, title)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for run, colour in COLOURS.items():
                points = [line for line in lines if line["run"] == run and right in line]
                minutes = [line["train_cpu_seconds"] / 60 for line in points]
                shares = [100 * line[right] / line[count] for line in points]
                axes.plot(minutes, shares, marker="o", markersize=4, color=colour, label=run)
                for line, x, y in zip(points, minutes, shares, strict=True):
                    axes.annotate(
                        f"{line['rows_seen']:,.0f} rows", (x, y), (6, -8), textcoords="offset points", fontsize=6
                    )
            axes.set(xlabel="CPU minutes of training", ylabel="%", xlim=(0, None), ylim=(0, None), title=title)
            axes.legend(fontsize=7)
        figure.savefig(FIGURE, dpi=120, metadata={"Software": None})


def main() -> None:
    import yaml

    from scripts.runs.configuration import with_defaults

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--config", type=Path, default=ROOT / "config" / "config.yaml")
    parser.add_argument("--states", type=Path)
    parser.add_argument("--dataset", type=Path, help="whose validation rows are asked; default: the configuration's")
    parser.add_argument("--unseen", type=Path, nargs="+", default=[])
    parser.add_argument("--most", type=int, default=200, help="rows that are asked")
    parser.add_argument("--execute", action="store_true")
    parser.add_argument("--draw", action="store_true", help="draw what has been measured")
    given = parser.parse_args()
    if given.states:
        chosen = with_defaults(yaml.safe_load(given.config.read_text()))
        states = sorted(given.states.iterdir(), key=lambda folder: int(folder.name.split("-")[0]))
        rows = unseen_rows(
            given.dataset or given.results / "dataset" / chosen["dataset"]["name"], given.unseen, given.most
        )
        measure(given.results, chosen, states, rows, given.execute)
    if given.draw:
        draw(read())


if __name__ == "__main__":
    main()
