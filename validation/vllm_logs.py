"""vLLM's budget by its rules (dryfit/serving/vllm.py) against figures of published logs.

    python -m validation.vllm_logs development      the rows that helped to find the rules
    python -m validation.vllm_logs "held out"       rows that were drawn before any of their figures was read

`validation/data/vllm_logs.csv` has 44 logs, 31 of them with an address. 22 had been read when the draw was made. Of the
other 22, eleven were held out: `random.Random(37).sample` over their ids in alphabetical order. Weights are the log's
own, for many are quantized. A log that leaves out a flag or names no model of the catalogue can't be asked for its
cache.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from dryfit.analytic.setting import describe
from dryfit.common.text import GIB
from dryfit.data import data_path
from dryfit.serving.vllm import Server, serve_defaults
from validation.tables import rows_of

NOTEBOOK = "0.8"  # the version of logs that don't say theirs: the notebooks of those months
DEFAULT_TOKENS = 8192  # of a log that tells no length


def rows(use: str) -> list[dict[str, str]]:
    """The logs for one use."""
    return rows_of("vllm_logs.csv", use=use)


def server(row: Mapping[str, str]) -> Server | None:
    """The engine of a log; None where it says too little."""
    if not (row["catalogued"] and row["total_gib"] and row["weights_gib"]):
        return None
    model = json.loads(data_path(f"models/{row['catalogued']}.json").read_text(encoding="utf-8"))
    exact = re.search(
        r"own utilization ([\d.]+)%", row["flags"]
    )  # Unsloth prints its own with more digits
    version = re.search(r"\d+\.\d+", row["version"])
    number, total = version[0] if version else NOTEBOOK, int(float(row["total_gib"]) * GIB)
    _, requests = serve_defaults(number, total, a100="A100" in row["card"])
    return Server(
        model,
        describe(model).parameter_counts()["total"],
        total,
        float(exact[1]) / 100 if exact else float(row["util"]),
        int(row["max_num_seqs"] or requests),
        int(row["max_model_len"] or DEFAULT_TOKENS),
        int(row["max_num_batched_tokens"] or row["max_model_len"] or DEFAULT_TOKENS),
        weights_bytes=int(float(row["weights_gib"]) * GIB),
        version=number,
    )


def main(use: str) -> None:
    """Print a line for each log that can be asked, and how far the rules are off."""
    shares, inside, asked = [], 0, 0
    for row in rows(use):
        engine = server(row)
        took = float(row["graph_took_gib"]) if row["graph_took_gib"] else None
        line = [f"{row['id']:<40}"]
        if engine and row["kv_gib"]:
            low, high = (size / GIB for size in engine.cache_bytes())
            seen = float(row["kv_gib"])
            nearest = min(max(seen, low), high)
            shares.append(abs(high / seen - 1))
            line.append(
                f"cache {seen:6.2f}  by rule {low:6.2f} to {high:6.2f}  {100 * (high / seen - 1):+5.1f} %"
                f" (outside the range {100 * (nearest / seen - 1):+.1f} %)"
            )
        if took is not None and engine:
            rank = re.search(r"lora_rank=(\d+)", row["flags"])
            packed = "load_in_4bit=True" in row["flags"]
            own = replace(engine, lora_rank=int(rank[1]) if rank else 0, packed=packed)
            low, high = (size / GIB for size in own.graph_bytes())
            asked, inside = asked + 1, inside + (low <= took <= high)
            line.append(f"graphs {took:5.2f} of {low:.2f} to {high:.2f}")
        if len(line) > 1:
            print("  ".join(line))
    if shares:
        print(
            f"cache: {len(shares)} logs, median {100 * median(shares):.1f} %, worst {100 * max(shares):.1f} %"
        )
    print(f"graphs: {inside} of {asked} in their range")


if __name__ == "__main__":
    main(*sys.argv[1:])
