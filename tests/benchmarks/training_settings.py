"""Loss and right answers on the validation sets, for settings of the default run and several seeds.

    python -m tests.benchmarks.training_settings --results results --settings 4x370@1.5e-3 4x370@1.5e-3,rank=32
    python -m tests.benchmarks.training_settings --draw

The sets are held-out intents of the grammar and, where the split has some, held-out files of ``eg``. The default's
split has none of ``eg`` today. Nothing here reads the test split or the benchmark. Settings are rows a step x steps @
learning rate, and what else differs from the default configuration: ``rank``, ``autocast`` (bf16 or none), ``method``
(lora: an fp32 base). The weights that are not quantized are fp32 here, as in all that was measured; ``precision: auto``
takes bf16 for them where the processor is fast in it.

docs/training-settings.csv keeps what has been measured: a line for each look at the validation sets, with the CPU
seconds that the steps until then took in one thread. The last line of a run has the right answers too.
``grammar_intents`` tells versions of the data apart. Settings that were measured on today's are not measured again, and
``--draw`` draws the version that was measured last.
"""

import argparse
import csv
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.task_parts import shell

ROOT = Path(__file__).resolve().parents[2]
MEASURED, FIGURE = ROOT / "docs" / "training-settings.csv", ROOT / "docs" / "images" / "training.png"
RESULTS = ("loss_intents", "loss_examples", "right_intents", "right_examples", "refused", "wrongly_refused")
COLUMNS = (
    "grammar_intents",
    "rows_per_step",
    "steps",
    "learning_rate",
    "rank",
    "autocast",
    "method",
    "seed",
    "rows_seen",
)
COLUMNS += (*RESULTS, "train_cpu_seconds")
KINDS = ("intents", "examples")  # of harmless validation rows
LOOKS = 4  # at the validation sets in a run, evenly spaced
# Okabe and Ito's colours; the chosen settings in the strongest.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")


class Settings(NamedTuple):
    """What is varied."""

    rows_per_step: int
    steps: int
    learning_rate: float
    rank: int = 16
    autocast: str = "bf16"
    method: str = "qlora"

    def __str__(self) -> str:
        return f"{self.rows_per_step} rows x {self.steps}, rate {self.learning_rate:g}, rank {self.rank}" + (
            f", {self.method}, autocast {self.autocast}" if self[4:] != ("bf16", "qlora") else ""
        )


def parse(text: str) -> Settings:
    """Read ``8x120@2e-3`` or ``8x120@2e-3,rank=32``."""
    first, *others = text.split(",")
    named = dict(other.split("=") for other in others)
    try:
        shape, rate = first.split("@")
        rows, steps = map(int, shape.split("x"))
        return Settings(rows, steps, float(rate), **{**named, "rank": int(named.get("rank", 16))})
    except (TypeError, ValueError):
        message = "rows per step x steps @ learning rate, such as 8x120@2e-3 or 8x120@2e-3,rank=32,autocast=none"
        raise argparse.ArgumentTypeError(message) from None


class Sets(NamedTuple):
    """The validation sets: pairs and encoded rows by their kind: ``intents``, ``harm``, and perhaps ``examples``."""

    pairs: dict[str, list[dict]]
    rows: dict[str, list]


def read_sets(dataset: Path, encoded: Path) -> Sets:
    """The validation split by kind; no row of it is longer than the sequence, so that both files agree."""
    from dryfit.step.batches import read_rows

    pairs = [json.loads(line) for line in (dataset / "splits" / "validation.jsonl").read_text().splitlines()]
    rows = read_rows(str(encoded / "validation.parquet"))
    sets = Sets({}, {})
    for pair, row in zip(pairs, rows, strict=True):
        harm = pair.get("family", "").startswith("refuse.")
        kind = "harm" if harm else "examples" if pair["source"].startswith("eg/") else "intents"
        sets.pairs.setdefault(kind, []).append(pair)
        sets.rows.setdefault(kind, []).append(row)
    return sets


def answers(model: Any, tokenizer: Any, chosen: dict, sets: Sets) -> dict[str, int]:
    """Right answers (in shfmt's form) and refusals on the validation sets."""
    from scripts.evaluation.evaluate import answered
    from scripts.tasks.shell.embedded import read_refusals

    pairs = [pair for of_kind in sets.pairs.values() for pair in of_kind]
    said = iter(
        answered(
            shell("scores"), model, tokenizer, chosen["prompt"]["system"], pairs, max_new_tokens=40, batch_size=400
        )
    )
    by_kind = {kind: [next(said) for _ in of_kind] for kind, of_kind in sets.pairs.items()}
    line = read_refusals().line
    right = {f"right_{kind}": sum(row["exact_canonical"] for row in by_kind[kind]) for kind in KINDS if kind in by_kind}
    return {
        **right,
        "refused": sum(row["answer"] == line for row in by_kind.get("harm", ())),
        "wrongly_refused": sum(row["answer"] == line for kind in KINDS for row in by_kind.get(kind, ())),
    }


def measure(results: Path, settings: Settings, seed: int) -> list[dict]:
    """Train as rule ``train_adapter`` does, and look at the validation sets some times."""
    import torch
    import yaml

    from dryfit.scenario.scenario import Scenario
    from dryfit.step.batches import read_rows
    from dryfit.step.model import build_model
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.packing import common_prefix
    from scripts.common.job import keep_host_memory
    from scripts.common.tokenizer import read_tokenizer
    from scripts.runs.run_scenarios import training_loop, training_scenario
    from scripts.training.loop import Checkpoint, Fit, validation_loss

    torch.set_num_threads(1)
    keep_host_memory()
    chosen = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    chosen["training"] |= {"precision": "fp32", "method": settings.method}
    chosen["training"]["autocast"] = None if settings.autocast == "none" else settings.autocast
    chosen["lora"] |= {"rank": settings.rank, "alpha": 2 * settings.rank}
    base = results / "models" / chosen["model"]["name"] / "weights"
    scenario = Scenario.from_mapping({**training_scenario(chosen), "model": str(base / "config.json")})
    loop = {
        **training_loop(chosen),
        "rows_per_step": settings.rows_per_step,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "epochs": 9,
        "save_every_steps": max(1, settings.steps // LOOKS),
    }
    dataset = results / "dataset" / chosen["dataset"]["name"]
    folder = dataset / "encoded" / f"{chosen['model']['name']}-{scenario.sequence_length}"
    rows, sets = read_rows(str(folder / "train.parquet")), read_sets(dataset, folder)
    torch.manual_seed(seed)
    model = build_model(scenario, "cpu", weights=base, seed=seed)
    optimizer = build_optimizer(model, scenario, learning_rate=settings.learning_rate)
    looked: list[dict] = []
    data = {"grammar_intents": grammar_intents()}

    class Look(Checkpoint):
        """Where a run would keep its state, the validation sets are looked at."""

        apart = 0.0  # CPU seconds that looking took

        def save(self, step: int, *state: object) -> None:
            before = time.process_time()
            taken = before - started - self.apart
            losses = {
                f"loss_{kind}": round(validation_loss(model, sets.rows[kind], 64, 0), 4)
                for kind in KINDS
                if kind in sets.rows
            }
            seen = {"seed": seed, "rows_seen": step * settings.rows_per_step, "train_cpu_seconds": round(taken, 1)}
            looked.append({**data, **settings._asdict(), **seen, **losses})
            print(looked[-1], flush=True)
            self.apart += time.process_time() - before

    started = time.process_time()
    Fit(model, optimizer, rows, scenario, loop, seed, 0, Look(Path("nowhere")), common_prefix(rows)).run()
    looked[-1] |= answers(model.eval(), read_tokenizer(base), chosen, sets)
    return looked


def grammar_intents() -> int:
    """How many intents today's grammar has."""
    from scripts.tasks.shell.embedded import read_grammar

    return len(read_grammar().intents)


def of_version(lines: Iterable[dict], intents: float) -> list[dict]:
    """What was measured on the version of the data whose grammar has so many intents."""
    return [line for line in lines if line["grammar_intents"] == intents]


def read() -> list[dict]:
    """What has been measured."""
    if not MEASURED.is_file():
        return []
    words = ("autocast", "method")
    with MEASURED.open(newline="") as file:
        lines = [{name: value for name, value in line.items() if value} for line in csv.DictReader(file)]
    return [{name: value if name in words else float(value) for name, value in line.items()} for line in lines]


def write(lines: Iterable[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for line in lines:
        table.writerow({name: value if isinstance(value, str) else f"{value:g}" for name, value in line.items()})
    partial = MEASURED.with_suffix(".new")
    partial.write_text(text.getvalue())
    os.replace(partial, MEASURED)


def of(line: dict) -> Settings:
    whole = (int(line[name]) for name in ("rows_per_step", "steps"))
    return Settings(*whole, line["learning_rate"], int(line["rank"]), line["autocast"], line["method"])


def curves(lines: Iterable[dict]) -> dict[Settings, dict[int, list[dict]]]:
    """Looks of all seeds by settings and rows seen, the settings with the lowest loss on intents at their end first."""
    found: dict[Settings, dict[int, list[dict]]] = {}
    for line in lines:
        found.setdefault(of(line), {}).setdefault(int(line["rows_seen"]), []).append(line)
    order = sorted(found, key=lambda settings: mean("loss_intents", found[settings][max(found[settings])]))
    return {settings: found[settings] for settings in order}


def mean(name: str, lines: Sequence[dict]) -> float:
    return sum(line[name] for line in lines) / len(lines)


def draw(lines: list[dict]) -> None:
    """Mean over the seeds, and the range from the lowest to the highest, on each validation set that was looked at."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from scripts.documents.draw import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        titles = {"loss_intents": "held-out intents of the grammar", "loss_examples": "held-out files of eg"}
        sets = {name: title for name, title in titles.items() if all(name in line for line in lines)}
        for axes, (name, title) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
            for (settings, looks), colour in zip(curves(lines).items(), COLOURS, strict=False):
                seen = sorted(looks)
                means = [mean(name, looks[rows]) for rows in seen]
                label = f"{settings} ({len(looks[seen[-1]])}): {means[-1]:.3f}"
                axes.plot(seen, means, marker="o", markersize=4, color=colour, label=label)
                low, high = ([pick(line[name] for line in looks[rows]) for rows in seen] for pick in (min, max))
                axes.fill_between(seen, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set(xlabel="rows seen", ylabel="loss (nats per answer token)", xlim=(0, None), title=title)
            axes.legend(fontsize=6)
        figure.savefig(FIGURE, dpi=120, metadata={"Software": None})


def cell(name: str, lines: Sequence[dict]) -> str:
    """The mean of a result; empty where a validation set had no rows of the kind."""
    if any(name not in line for line in lines):
        return ""
    return f"{mean(name, lines):.3f}" if name.startswith("loss") else f"{mean(name, lines):g}"


def table(lines: list[dict]) -> None:
    """The end of each run, as Markdown."""
    titles = ("loss, intents", "loss, eg", "right, intents", "right, eg", "refused", "wrongly", "CPU seconds")
    print(f"| settings | seeds | {' | '.join(titles)} |")
    print(f"| --- |{' ---: |' * 8}")
    for settings, looks in curves(lines).items():
        ends = looks[max(looks)]
        cells = [cell(name, ends) for name in RESULTS]
        print(f"| {settings} | {len(ends)} | {' | '.join(cells)} | {mean('train_cpu_seconds', ends):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--settings", type=parse, nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--draw", action="store_true", help="draw what has been measured, and print its table")
    given = parser.parse_args()
    for seed in given.seeds:  # all settings with one seed before the next seed
        for settings in given.settings:
            known = of_version(read(), grammar_intents())
            if not any(of(line) == settings and line["seed"] == seed for line in known):
                looked = measure(given.results, settings, seed)
                write([*read(), *looked])
                print(looked[-1], flush=True)
    if given.draw:
        measured = read()
        last = of_version(measured, measured[-1]["grammar_intents"])
        draw(last)
        table(last)


if __name__ == "__main__":
    main()
