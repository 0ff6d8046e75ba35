"""litgpt's own recipes against the peaks that its table of them states.

    python -m validation.litgpt_hub CHECKOUT              every row of validation/data/litgpt.csv
    python -m validation.litgpt_hub CHECKOUT --write      the same, kept in validation/data/litgpt.json
    python -m validation.litgpt_hub --table               the kept rows as Markdown, nothing is traced

CHECKOUT is Lightning-AI/litgpt at commit 00af8b0d, and the package ``lightning`` is installed. litgpt's own model runs
through the loop of its ``finetune/lora.py`` and ``full.py``: nothing in it is ours, and nothing was fitted.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dryfit.common.files import read_json, read_yaml, write_json
from dryfit.common.terminal import command, progress
from dryfit.engine.bitsandbytes_layers import keep_paged_states_outside, quantize_4bit
from dryfit.engine.patching import device_lists, patched
from dryfit.engine.trace import Options, trace_step
from validation.rows import FOLDER

TABLE, REPORT = FOLDER / "litgpt.csv", FOLDER / "litgpt.json"
CAPABILITY = (8, 6)  # of the A10G
TORCH, BITSANDBYTES = "2.3.0", "0.42.0"  # pyproject.toml of litgpt at the rows' commits
MICRO_BATCHES = 2  # gradients are alive in the second, as in all that follow
# Sliding windows came to Mistral and Phi-3 with litgpt's be8b28da of September 2024, after these rows were measured.
WITHOUT_WINDOW = ("mistral-7b", "phi-3")
# Fewer bytes than weights, gradients and two moments of these models take alone: they can't be of a step with AdamW.
IMPOSSIBLE = ("llama-3.2-1B/full", "llama-3.2-3B/full", "phi-3/full")


def traced_bytes(row: Mapping[str, str], checkout: Path) -> int:
    """The peak of a recipe's step; ``checkout`` is importable."""
    lightning = import_module("lightning")
    folder, method = row["config"].split("/")
    recipe = read_yaml(checkout / "config_hub" / "finetune" / f"{row['config']}.yaml")
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision=None if method == "qlora" else "bf16-true")
    if method == "qlora":
        plugins = import_module("lightning.fabric.plugins")
        plugin = plugins.BitsandbytesPrecision(recipe["quantize"].removeprefix("bnb."), torch.bfloat16)
        fabric._precision = fabric._strategy._precision = plugin  # Fabric takes it on a GPU alone
    code = import_module("litgpt.model" if method == "full" else "litgpt.lora")
    lora = {key: value for key, value in recipe.items() if key.startswith("lora_")} if method != "full" else {}
    config = code.Config.from_name(Path(recipe["checkpoint_dir"]).name, **lora)
    if folder in WITHOUT_WINDOW:
        config.sliding_window_size = None
    with fabric.init_module(), torch.device("meta"):
        model = code.GPT(config)
    if method != "full":
        code.mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model, move_to_device=False)
    quantize_4bit(model, torch.float16)
    tokens = int(row["sequence_length"])
    with torch.device("meta"):
        model.max_seq_length = tokens
        batch = [torch.empty(int(row["micro_batch"]), tokens, dtype=torch.long) for _ in range(2)]
    optimizer = _optimizer(model, method)
    options = Options(capability=CAPABILITY, torch_version=TORCH, bitsandbytes_version=BITSANDBYTES)
    return trace_step(model, optimizer, _step(fabric, model, optimizer, method), batch, options).peak_allocated_bytes


def _optimizer(model: torch.nn.Module, method: str) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if method != "qlora":
        with patched(device_lists("cuda")):
            return torch.optim.AdamW(trained)
    from bitsandbytes.optim import PagedAdamW

    optimizer = PagedAdamW(trained)  # finetune/lora.py
    keep_paged_states_outside(optimizer)
    return optimizer


def _step(fabric: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, method: str) -> Callable:
    chunked_cross_entropy = import_module("litgpt.utils").chunked_cross_entropy

    def step(batch: list[torch.Tensor]) -> None:
        inputs, targets = batch
        for _ in range(MICRO_BATCHES):
            if method == "full":
                logits = model(inputs)
                loss = chunked_cross_entropy(logits[..., :-1, :], targets[..., 1:])
            else:
                logits = model(inputs, lm_head_chunk_size=128)
                logits[-1] = logits[-1][..., :-1, :]
                loss = chunked_cross_entropy(logits, targets[..., 1:])
            fabric.backward(loss / 8)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(row: Mapping[str, str], predicted: int) -> dict[str, Any]:
    """A row beside its prediction; an error only where a figure was published that can be."""
    published = row["peak_allocated_gb"]
    measured = published != "OOM" and row["config"] not in IMPOSSIBLE
    error = round(100 * (predicted / 1e9 / float(published) - 1), 2) if measured else None
    note = "" if measured else ("24 GB were too few" if published == "OOM" else "less than the states alone")
    return {"config": row["config"], "published_gb": published, "predicted_bytes": predicted, "error": error,
            "note": note}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Kept rows as Markdown."""
    lines = ["| recipe | published, GB | traced, GB | error |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        told = row["note"] if row["error"] is None else f"{row['error']:+.2f} %"
        lines.append(f"| {row['config']} | {row['published_gb']} | {row['predicted_bytes'] / 1e9:.2f} | {told} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Errors by method, in words."""
    lines = []
    for method in ("lora", "qlora", "full"):
        errors = sorted(abs(r["error"]) for r in rows if r["error"] is not None and r["config"].endswith(f"/{method}"))
        if errors:
            lines.append(
                f"{method}: {len(errors)} rows, median {statistics.median(errors):.2f} %, worst {errors[-1]:.2f} %"
            )
    return "; ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        kept = read_json(REPORT)["rows"]
        print(table(kept), summary(kept), sep="\n\n")
        return
    if arguments.checkout is None:
        parser.error("a checkout of litgpt is needed, or --table")
    sys.path.insert(0, str(arguments.checkout))
    with TABLE.open(encoding="utf-8") as file:
        wanted = list(csv.DictReader(file))
    rows = []
    for row in progress(wanted, "rows"):
        rows.append(compare(row, traced_bytes(row, arguments.checkout)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if arguments.write:
            write_json(REPORT, {"rows": rows})
    print(summary(rows))


if __name__ == "__main__":
    command(main)
