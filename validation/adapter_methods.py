"""Which of PEFT's methods can be traced, and why not the others: each is tried on a small decoder.

    python -m validation.adapter_methods             print the table
    python -m validation.adapter_methods --write     put it into docs/memory-core.md

A method that can be traced is also trained for two steps on the CPU and measured, to the byte.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.terminal import command, progress
from dryfit.scenario.scenario import Scenario

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "memory-core.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 300,
}
# What methods need that have no defaults for it, or whose defaults are too large for a small model.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 8},
    "FOURIERFT": {"n_frequency": 100},
    "PREFIX_TUNING": {"num_virtual_tokens": 8},
    "PROMPT_TUNING": {"num_virtual_tokens": 8},
    "P_TUNING": {"num_virtual_tokens": 8, "encoder_hidden_size": 32},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 100},
}


def methods() -> list[str]:
    """Names of the methods that the installed PEFT knows."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def attempt(method: str) -> tuple[str, str]:
    """Whether a method is traced (``yes`` or ``no``), and a remark."""
    from dryfit.tracing.measure import measure
    from dryfit.tracing.trace import trace

    fields = {
        "method": "lora",
        "sequence_length": 64,
        "micro_batch": 2,
        "gradient_checkpointing": False,
    }
    adapter = {"peft_type": method, **OPTIONS.get(method, {})}
    scenario = Scenario.from_mapping({"model": MODEL, "adapter": adapter, **fields})
    try:
        trace(scenario, timeline=False)
        predicted = trace(scenario, "cpu", timeline=False)
    except UserError as error:
        return "no", error.problem.split("\n")[0].split(" You may have run")[0]
    measured = measure(scenario, "cpu", timeline=False)
    if predicted["phases"] == measured["phases"]:
        return "yes", "on a CPU to the byte"
    difference = predicted["peak_allocated_bytes"] / measured["peak_allocated_bytes"] - 1
    return "yes", f"on a CPU {100 * difference:+.2f} %"


def table() -> str:
    """All methods as Markdown, a row for each result."""
    rows: dict[tuple[str, str], list[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in progress(methods(), "methods", unit="methods"):
            rows.setdefault(attempt(method), []).append(method)
    lines = [
        f"| {', '.join(names)} | {traced} | {remark} |" for (traced, remark), names in rows.items()
    ]
    title = f"PEFT {version('peft')}, on a decoder of two layers:"
    return "\n".join([title, "", "| methods | traced | |", "| --- | --- | --- |", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation.adapter_methods", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--write", action="store_true", help=f"renew the table in {PAGE.relative_to(ROOT)}"
    )
    options = parser.parse_args()
    text = table()
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)
        PAGE.write_text(new, encoding="utf-8")
        print(f"{PAGE.relative_to(ROOT)}: renewed", file=sys.stderr)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    command(main)
