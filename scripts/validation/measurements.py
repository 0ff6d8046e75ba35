"""The trace against what others measured on real cards.

    python -m scripts.validation.measurements                     the T4 rows of config/measurements/public.csv
    python -m scripts.validation.measurements --source a100       the A100 rows (envs/validation-a100.yaml)
    python -m scripts.validation.measurements --measurements config/measurements/held-out.csv --table
    python -m scripts.validation.measurements --json FILE --table

Each row is a training step that somebody ran and measured with ``torch.cuda.max_memory_allocated`` and its relatives.
The row's fields become a scenario, the scenario is traced, and the difference is the row's error. ``--json`` keeps the
figures for the documents, ``--table`` prints them as Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_json, write_json
from scripts.common.job import command, progress
from scripts.memory.gpus import find
from scripts.scenario.scenario import ROOT, Scenario

MEASUREMENTS = ROOT / "config" / "measurements" / "public.csv"
MIB = 2**20
SOURCES = ("t4", "a100")  # first part of a row's id
# How each session on the T4 brought its models to the card, by the parts of a row's id before its number: as the stated
# versions of transformers and peft do, but for two sessions whose figures say otherwise (docs/memory-validation.md).
SESSIONS = {
    "t4-phase3": {"transformers": "5.0.0", "peft": "0.19.1"},
    "t4-final": {"transformers": "5.0.0", "peft": "0.19.1"},
    "t4-sweep": {"transformers": "5.0.0", "peft": "0.19.1"},  # states 5.17.0 and 0.20.0
    "t4-notebook": {"transformers": "5.17.0", "peft": "0.20.0"},  # states 5.0.0 and 0.19.1
}
ORDERS = 9  # how many orders of a threaded loading are replayed; the median counts
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TRL_PREPARATION = "trl-0.13"  # begins the field kbit_preparation of rows that were prepared the way TRL 0.13 does
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# A row's column, the trace's field, and a short name.
STAGES = {
    "resident": ("resident_before_step_mib", "resident_bytes"),
    "forward": ("peak_forward_mib", "forward"),
    "backward": ("peak_backward_mib", "backward"),
    "optimizer": ("peak_optimizer_mib", "optimizer"),
    "allocated": ("peak_allocated_mib", "peak_allocated_bytes"),
    "reserved": ("peak_reserved_mib", "peak_reserved_bytes"),
}


def read_measurements(path: Path = MEASUREMENTS, source: str | None = None) -> list[dict[str, str]]:
    """Read the table of measurements; with ``source`` only the rows whose id begins with it."""
    with open(path, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [row for row in rows if source is None or row["id"].split("-")[0] == source]


def scenario_of(row: Mapping[str, str]) -> Scenario:
    """Return the scenario that a row measured.

    Columns of the table: sizes of the model as in its ``config.json``; ``quantization`` none, nf4 or nf4-double;
    ``kbit_preparation``, ``base_dtype``, ``adapter_dtype``, ``lora_rank``, ``lora_targets``, ``sequence_length``,
    ``micro_batch``, ``gradient_checkpointing``, ``attention``, ``loop``.
    """
    model: dict[str, Any] = {name: int(row[name]) for name in SIZES}
    model |= {
        "model_type": row["architecture"],
        "tie_word_embeddings": row["tie_word_embeddings"] == "True",
        "max_position_embeddings": 8192,  # at least every row's length; no tensor depends on it
    }
    if row["architecture"] == "mistral":  # Mistral-7B-v0.1 has a window of 4,096, as long as the rows' texts
        model["sliding_window"] = None
    mapping: dict[str, Any] = {
        "model": model,
        "method": row["method"],
        "precision": DTYPES[row["base_dtype"]],
        "kbit_preparation": "peft" if row["kbit_preparation"] == "peft" else "none",
        "sequence_length": int(row["sequence_length"]),
        "micro_batch": int(row["micro_batch"]),
        "gradient_checkpointing": row["gradient_checkpointing"] == "True",
        "attention": "flash" if row["attention"] == "flash_attention_2" else row["attention"],
        "optimizer": "adamw",
        "loop": "manual" if row["loop"].startswith("manual") else "trainer",
    }
    if row["method"] != "full":
        mapping["adapter_precision"] = DTYPES[row["adapter_dtype"]]
        mapping["lora"] = {"rank": int(row["lora_rank"]), "target_modules": row["lora_targets"].split()}
    if row["method"] == "qlora":
        mapping["quantization"] = {"type": "nf4", "double": row["quantization"] == "nf4-double"}
    return Scenario.from_mapping(mapping, where=f"{MEASUREMENTS.name}, row {row['id']}")


def validate(rows: Sequence[Mapping[str, str]], orders: int = ORDERS) -> list[dict[str, Any]]:
    """Trace every row and compare.

    Parameters
    ----------
    rows
        Of :func:`read_measurements`.
    orders
        Where several threads loaded the model the order was chance; that many are traced and the medians taken.

    Returns
    -------
    list of dict
        For each row its settings, ``measured_bytes`` and ``predicted_bytes`` by stage, ``error_percent`` of
        ``allocated`` and ``reserved``, ``difference_bytes`` by stage, ``orders`` and, where they are several,
        ``range_bytes``: the lowest and highest prediction.
    """
    known: dict[str, list[dict[str, int]]] = {}
    results = []
    for row in progress(rows, "rows", unit="rows"):
        settings = {key: value for key, value in row.items() if not key.endswith("_mib")}
        settings = {key: value for key, value in settings.items() if key not in ("id", "source", "note")}
        key = json.dumps(settings, sort_keys=True)
        if key not in known:  # some rows repeat others
            known[key] = predictions(row, orders)
        results.append(compare(row, known[key]))
    return results


def predictions(row: Mapping[str, str], orders: int) -> list[dict[str, int]]:
    """Bytes by stage of a traced row, one dict for each order of loading."""
    from scripts.memory.loading import Loader
    from scripts.memory.trace import trace

    scenario = scenario_of(row)
    if row["id"].startswith("a100"):
        with _trainer_of_the_a100(row):
            traced = trace(scenario, capability=(8, 0), loader=Loader(warmup=False), timeline=False)  # 4.48
    else:
        # The script that measured them: with device_map when quantizing, else model.cuda().
        quantized = row["method"] == "qlora"
        loader = Loader.of(**SESSIONS[row["id"].rsplit("-", 1)[0]], moved=not quantized)
        card = find("t4", "the measurements")
        traced = trace(
            scenario,
            capability=card.capability,
            loader=loader,
            timeline=False,
            orders=orders if loader.workers > 1 and quantized else 1,
            capacity_bytes=card.usable_bytes,
            step=_step_of_the_script,
        )
    return [
        {stage: (order | order["phases"])[field] for stage, (_, field) in STAGES.items()}
        | {"required": traced["required_bytes"]}
        for order in traced.get("orders", [traced])
    ]


def _step_of_the_script(model: Any, optimizer: Any, scenario: Scenario) -> Callable[[], None]:
    """A step as `scripts/measure.py` of fitcheck-llm takes it.

    One tensor is input and label, and serves all steps; the model's output lives until the update is done, the
    gradients until the next step begins; nothing is clipped.
    """
    from scripts.training.step import random_batch

    tokens = None

    def step() -> None:
        nonlocal tokens
        optimizer.zero_grad(set_to_none=True)
        if tokens is None:
            tokens = random_batch(scenario, "meta", model.config.get_text_config().vocab_size)["input_ids"]
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()

    return step


def compare(row: Mapping[str, str], predicted: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Put a row's measurement beside its prediction."""
    typical = {stage: int(statistics.median_low([order[stage] for order in predicted])) for stage in STAGES}
    measured = {stage: round(float(row[column]) * MIB) for stage, (column, _) in STAGES.items() if row[column]}
    result = {
        "id": row["id"],
        "model": row["model"],
        "method": row["method"],
        "attention": row["attention"],
        "micro_batch": int(row["micro_batch"]),
        "sequence_length": int(row["sequence_length"]),
        "measured_bytes": measured,
        "predicted_bytes": typical,
        "difference_bytes": {stage: typical[stage] - value for stage, value in measured.items()},
        "error_percent": {
            stage: round(100 * (typical[stage] / measured[stage] - 1), 4)
            for stage in ("allocated", "reserved")
            if stage in measured
        },
        "orders": len(predicted),
    }
    if "outcome" in row:  # whether the run got through: the question that the gate answers
        card = find("t4", "the measurements")
        needed = statistics.median_low([order["required"] for order in predicted])
        result["outcome"], result["required_bytes"] = row["outcome"], int(needed)
        result["fits"] = needed + card.context_bytes <= card.total_bytes
    if len(predicted) > 1:
        result["range_bytes"] = {
            stage: [min(order[stage] for order in predicted), max(order[stage] for order in predicted)]
            for stage in STAGES
        }
    return result


def summary(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and worst error by source and statistic, with the row that is worst."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_source.setdefault(result["id"].split("-")[0], []).append(result)
    table: dict[str, Any] = {}
    for source, rows in sorted(by_source.items()):
        table[source] = {"rows": len(rows)}
        for stage in ("allocated", "reserved"):
            errors = {row["id"]: row["error_percent"][stage] for row in rows if stage in row["error_percent"]}
            if errors:
                worst = max(errors, key=lambda name: abs(errors[name]))
                table[source][stage] = {
                    "median_percent": round(statistics.median(map(abs, errors.values())), 4),
                    "worst_percent": abs(errors[worst]),
                    "worst_row": worst,
                }
        judged = [row for row in rows if "outcome" in row]
        if judged:
            right = sum(row["fits"] == (row["outcome"] == "ran") for row in judged)
            table[source]["verdicts"] = {"right": right, "rows": len(judged)}
    return table


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: one table by source, one by row."""
    lines = ["| source | rows | allocated: median, worst | reserved: median, worst |", "| --- | ---: | --- | --- |"]
    for source, entry in report["summary"].items():
        cells = []
        for stage in ("allocated", "reserved"):
            found = entry.get(stage)
            cells.append(
                f"{found['median_percent']:.3f} %, {found['worst_percent']:.3f} % ({found['worst_row']})"
                if found
                else "not measured"
            )
        lines.append(f"| {source} | {entry['rows']} | {cells[0]} | {cells[1]} |")
    for verdicts in (entry["verdicts"] for entry in report["summary"].values() if "verdicts" in entry):
        lines += ["", f"Fits the card or runs out of memory: {verdicts['right']} of {verdicts['rows']} right."]
    lines += [
        "",
        "| row | model | method | attention | tokens | allocated, MiB | traced | error "
        "| reserved, MiB | traced | error |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        cells = [
            row["id"],
            row["model"].split("/")[-1],
            row["method"],
            row["attention"],
            f"{row['micro_batch']} x {row['sequence_length']}",
        ]
        for stage in ("allocated", "reserved"):
            if stage in row["error_percent"]:
                cells += [
                    f"{row['measured_bytes'][stage] / MIB:.2f}",
                    f"{row['predicted_bytes'][stage] / MIB:.2f}",
                    f"{row['error_percent'][stage]:+.3f} %",
                ]
            else:
                cells += [row.get("outcome", ""), f"{row['predicted_bytes'][stage] / MIB:.2f}", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@contextmanager
def _trainer_of_the_a100(row: Mapping[str, str]) -> Iterator[None]:
    """Do what the trainer of the A100 rows did and no scenario can say.

    All of them ran the package flash-attn. The benchmark trains its quantized models with ``fp16: True``, so under
    autocast although the weights are 16 bits wide; the others without (scripts/benchmarks/scenarios.yaml of
    foundation-model-stack/fms-acceleration).

    TRL 0.13 prepares a 4-bit model with peft's ``prepare_model_for_kbit_training`` and then casts embeddings and head
    back to bf16 (trl/trainer/utils.py, ``peft_module_casting_to_bf16``), so that only the norms stay fp32.
    """
    import torch

    from scripts.memory import trace as module
    from scripts.training import step as training

    originals = module.build_model, module.attention_name, training.autocast_dtype

    def build_model(*args: Any, **kwargs: Any) -> Any:
        model = originals[0](*args, **kwargs)
        if row["kbit_preparation"].startswith(TRL_PREPARATION):
            for parameter in model.parameters():
                if parameter.dim() == 1 and parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.float()
        return model

    module.attention_name = lambda *_: "flash_attention_2"
    if row["method"] == "qlora":
        module.build_model, training.autocast_dtype = build_model, lambda _: torch.bfloat16
    try:
        yield
    finally:
        module.build_model, module.attention_name, training.autocast_dtype = originals


def _older_transformers() -> None:
    """Give transformers 4.48 the names that the project's modules expect of 5.x."""
    if version("transformers") >= "5":
        return
    import types

    import torch
    import transformers.processing_utils  # puts another object in the place of `transformers`: has to come first

    transformers = sys.modules["transformers"]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class AttentionInterface:
        @staticmethod
        def register(name: str, function: Any) -> None:
            ALL_ATTENTION_FUNCTIONS[name] = function

        def __getitem__(self, name: str) -> Any:
            return ALL_ATTENTION_FUNCTIONS[name]

    class AttentionMaskInterface:
        @staticmethod
        def register(name: str, function: Any) -> None:
            """Masks are made elsewhere."""

        def __getitem__(self, name: str) -> None:
            return None

    masks = types.ModuleType("transformers.masking_utils")
    masks.AttentionMaskInterface = AttentionMaskInterface
    masks.flash_attention_mask = masks.sdpa_mask = None
    sys.modules[masks.__name__] = transformers.masking_utils = masks
    transformers.AttentionInterface = AttentionInterface

    from transformers.models.mistral.modeling_mistral import MistralModel

    MistralModel._update_causal_mask = lambda *_: None  # as with flash_attention_2 and no padding

    # Autocast contexts are made for the device's type, and refuse meta.
    enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda kind=None: False if kind in (None, "meta") else enabled(kind)
    original = Bnb4BitHfQuantizer._process_model_before_weight_loading
    Bnb4BitHfQuantizer._process_model_before_weight_loading = lambda self, model, device_map=None, **kwargs: original(
        self, model, device_map, [], **kwargs
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.validation.measurements", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--source", choices=SOURCES, default="t4", help="whose measurements (default: t4)")
    parser.add_argument(
        "--measurements", type=Path, default=MEASUREMENTS, metavar="FILE", help="another table of the same columns"
    )
    parser.add_argument("--rows", nargs="+", metavar="ID", help="only these rows")
    parser.add_argument("--orders", type=int, default=ORDERS, help=f"orders of a threaded loading (default: {ORDERS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report; rows of other sources in it stay")
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    arguments = parser.parse_args()
    rows = read_measurements(arguments.measurements, arguments.source)
    if arguments.rows:
        unknown = set(arguments.rows) - {row["id"] for row in rows}
        if unknown:
            raise UserError(
                "There is no such row.",
                where=arguments.measurements,
                found=", ".join(sorted(unknown)),
                allowed=f"{rows[0]['id']} ... {rows[-1]['id']}",
            )
        rows = [row for row in rows if row["id"] in arguments.rows]
    _older_transformers()
    results = validate(rows, arguments.orders)
    report = {
        "rows": results,
        "summary": summary(results),
        "versions": {
            arguments.source: {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
        },
    }
    if arguments.json:
        if arguments.json.exists():
            old = read_json(arguments.json)
            kept = [row for row in old["rows"] if row["id"].split("-")[0] != arguments.source]
            report["rows"] = sorted(kept + results, key=lambda row: row["id"], reverse=True)
            report["summary"] = summary(report["rows"])
            report["versions"] = old["versions"] | report["versions"]
        write_json(arguments.json, report)
    if arguments.table:
        print(markdown(report), end="")
    elif not arguments.json:
        print(json.dumps(report, indent=2, sort_keys=True))
    return 0


if __name__ == "__main__":
    command(main)
