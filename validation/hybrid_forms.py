"""The closed form of models whose layers are of several kinds, against their traces.

python -m validation.hybrid_forms --draw --seed 1 --each 4          questions drawn at random, as CSV
python -m validation.hybrid_forms --questions FILE --append ROWS    what the form and the trace say of each

A question is a family, its sizes (those of the class in transformers, or of a model of the catalogue with one period of
its layers), a method, a length, rows, checkpointing, and whose kernels run. ``validation/data/hybrid-held-out.csv`` was
drawn with seed 35 before a formula of these families was written, and traced once, when they were finished.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.common.errors import UserError
from dryfit.common.files import read_json
from dryfit.common.terminal import command, progress
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario
from validation.families import FAMILIES, default_model
from validation.tables import rows_of

CAPABILITY = (9, 0)
# Models of the catalogue by family: their names, and the layers that a question takes of them.
CATALOGUE = {
    "qwen3_5_text": ("qwen3.5-9b", range(1, 5)),
    "qwen3_5_moe_text": ("qwen3.6-35b-a3b", range(1, 5)),
    "qwen3_next": ("qwen3-next-80b-a3b", range(1, 5)),
    "gemma4_text": ("gemma-4-31b", range(2, 7)),
    "gpt_oss": ("gpt-oss-20b", range(4)),
    "lfm2": ("lfm2-1.2b", range(4)),
    "nemotron_h": ("nemotron-3-nano-30b-a3b", range(3, 7)),
    "glm4_moe_lite": ("glm-4.7-flash", range(4)),
    "deepseek_v3": ("deepseek-v3", range(1, 5)),
    "olmo3": ("olmo-3.1-32b", range(1, 5)),
    "llama4_text": ("llama-4-scout", range(4)),
    "deepseek_v32": ("deepseek-v3.2", range(2, 5)),
    "glm_moe_dsa": ("glm-5", range(2, 5)),
}
PACKAGES = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "kimi_linear"), "causal-conv1d fla"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "causal-conv1d"),
    **dict.fromkeys(("nemotron_h", "granitemoehybrid", "falcon_h1", "bamba", "mamba2"), "causal-conv1d mamba-ssm"),
}
# In the order in which people use them: the first are drawn more often.
FIRST = (
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "gemma4_text", "gpt_oss", "lfm2", "lfm2_moe", "nemotron_h",
    "granitemoehybrid", "glm4_moe", "glm4_moe_lite", "deepseek_v3", "kimi_linear", "falcon_h1", "bamba",
)  # fmt: skip
QUESTION = ("family", "sizes", "method", "precision", "sequence_length", "micro_batch", "checkpointing", "packages",
            "rank", "optimizer", "attention")  # fmt: skip
COLUMNS = (*QUESTION, "resident_trace", "peak_form", "peak_trace")


def drawn(seed: int, each: int) -> Iterator[dict[str, Any]]:
    """Questions: ``each`` of every family that is used most, and half as many, rounded up, of the others."""
    draw = Random(seed)
    for family in FAMILIES:
        for _ in range(each if family in FIRST else -(-each // 2)):
            packages = PACKAGES.get(family, "")
            yield {
                "family": family,
                "sizes": draw.choice(("default", CATALOGUE[family][0])) if family in CATALOGUE else "default",
                "method": draw.choice(("full", "lora", "qlora")),
                "precision": draw.choice(("bf16", "bf16", "bf16", "bf16-mixed")),
                "sequence_length": draw.choice((256, 512, 1000, 1024, 2048, 3000, 4096, 8192)),
                "micro_batch": draw.choice((1, 1, 2, 3)),
                "checkpointing": draw.choice((1, 0)),
                "packages": draw.choice(("", packages)),
                "rank": draw.choice((8, 16, 64)),
                "optimizer": draw.choice(("adamw", "adamw_fused", "adamw_8bit")),
                "attention": draw.choice(("sdpa", "sdpa", "sdpa", "eager")),
            }


def model_of(family: str, sizes: str) -> dict[str, Any]:
    """A family's configuration with few layers."""
    if sizes == "default":
        return default_model(family)
    whole, layers = read_json(MODELS / f"{sizes}.json"), CATALOGUE[family][1]
    return few_layers(whole.get("text_config", whole), layers)


def few_layers(model: Mapping[str, Any], layers: range) -> dict[str, Any]:
    """A configuration with some of its layers."""
    kept = dict(model, num_hidden_layers=len(layers))
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if model.get(key):
            kept[key] = [model[key][index] for index in layers]
    if pattern := model.get("hybrid_override_pattern"):
        kept["hybrid_override_pattern"] = "".join(pattern[index] for index in layers)
    if "first_k_dense_replace" in model:
        kept["first_k_dense_replace"] = sum(index < model["first_k_dense_replace"] for index in layers)
    return kept


def scenario_of(question: Mapping[str, Any]) -> Scenario:
    """The step that a question is about."""
    method = question["method"]
    fields: dict[str, Any] = {
        "model": model_of(question["family"], question["sizes"]),
        "method": method,
        "precision": question["precision"],
        "sequence_length": int(question["sequence_length"]),
        "micro_batch": int(question["micro_batch"]),
        "gradient_checkpointing": bool(int(question["checkpointing"])),
        "packages": question["packages"].split(),
        "optimizer": question["optimizer"],
        "attention": question["attention"],
    }
    if method != "full":
        fields["lora"] = {"rank": int(question["rank"]), "target_modules": "all-linear"}
    return Scenario.from_mapping(fields)


def compared(question: Mapping[str, Any]) -> dict[str, Any]:
    """What the form and the trace say; empty where the form does not describe the step."""
    from dryfit.tracing.trace import trace

    nothing = {"resident_trace": "", "peak_form": "", "peak_trace": ""}
    try:
        scenario = scenario_of(question)
    except UserError:  # longer than the model's positions
        return {**question, **nothing}
    try:
        form = analytic_estimate(scenario, capability=CAPABILITY)["peak_allocated_bytes"]
    except NotDescribed:
        form = ""
    try:
        traced = trace(scenario, capability=CAPABILITY, timeline=False)
    except UserError:  # a package that is not installed, or a kernel that the step can't take
        traced = {"resident_bytes": "", "peak_allocated_bytes": ""}
    return {**question, "resident_trace": traced["resident_bytes"], "peak_form": form,
            "peak_trace": traced["peak_allocated_bytes"]}  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Median, worst and how many lie within 5 %, of the peak and of what the step adds to the weights."""
    known = [{key: int(row[key]) for key in COLUMNS[-3:]} for row in rows if row["peak_form"] and row["peak_trace"]]
    if not known:
        return "no row is described"
    lines = [f"{len(known)} of {len(rows)} questions are described and traced"]
    for what, without in (("peak", 0), ("peak without the weights", 1)):
        off = [
            abs(row["peak_form"] - row["peak_trace"]) / (row["peak_trace"] - without * row["resident_trace"])
            for row in known
        ]
        within = sum(each <= 0.05 for each in off)
        lines.append(f"{what}: median {statistics.median(off):.2%}, worst {max(off):.2%}, {within} within 5 %")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.hybrid_forms", description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="print questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, default=4, help="questions of each family that is used most")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="questions to trace, as CSV")
    parser.add_argument("--append", type=Path, metavar="FILE", help="where the rows go")
    options = parser.parse_args(arguments)
    if options.draw:
        import sys

        writer = csv.DictWriter(sys.stdout, QUESTION, lineterminator="\n")
        writer.writeheader()
        writer.writerows(drawn(options.seed, options.each))
        return 0
    questions, rows = rows_of(options.questions.resolve()), []
    with options.append.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for question in progress(questions, "questions", total=len(questions), unit="questions"):
            rows.append(compared(question))
            writer.writerow(rows[-1])
            file.flush()
    print(summary(rows))
    return 0


if __name__ == "__main__":
    command(main)
