"""How far the analytic estimate is from the trace, over a grid of models, methods, precisions, lengths and batches.

python -m validation.analytic [--every N] [--json]      all of it takes about ten minutes
python -m validation.analytic --several 60 --seed 1     steps over several GPUs, drawn at random
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.common.errors import UserError
from dryfit.common.terminal import command, progress
from dryfit.scenario.scenario import Scenario

# Names in config/models/, and architectures in the size that their configuration classes default to.
MODELS: tuple[str | dict[str, Any], ...] = (
    "qwen2.5-coder-0.5b",
    "qwen2.5-coder-1.5b",
    "qwen2.5-coder-7b",
    "llama-3.1-8b",
    "mistral-7b-v0.1",
    "smollm2-1.7b",
    {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
    {"model_type": "gemma2"},
    {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4}
    | {"num_key_value_heads": 1, "head_dim": 256},
    {"model_type": "phi"},
    {"model_type": "phi3"},
    {"model_type": "gpt2"},
    {"model_type": "starcoder2"},
    {"model_type": "qwen3_moe", "num_hidden_layers": 8, "head_dim": 128},
    {"model_type": "mixtral", "num_hidden_layers": 4},
)
EXPERTS = MODELS[-2:]
METHODS = ("full", "lora", "qlora")
SIZES = ({"micro_batch": 1, "sequence_length": 512}, {"micro_batch": 4, "sequence_length": 1024})
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": False},
    {"precision": "fp32"},
    {"precision": "fp16", "attention": "eager"},
    {"attention": "mem_efficient", "gradient_checkpointing": False},
    {"loss": "chunked"},
    {"loop": "manual"},
    {"optimizer": "paged_adamw_8bit", "loss": "chunked", "gradient_checkpointing": False},
    {"gradient_accumulation": 4, "optimizer": "adamw_fused"},
    {"precision": "bf16-mixed"},
    {"kbit_preparation": "peft"},
    {"lora": {"rank": 64, "alpha": 64, "dropout": 0.0, "target_modules": "all-linear"}, "adapter_precision": "bf16"},
    {"lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}},
    {"autocast": "bf16", "gradient_checkpointing": False},
    {"autocast": "bf16", "kbit_preparation": "trl"},
)


def grid(models: Sequence[str | dict[str, Any]] = MODELS) -> Iterator[Scenario]:
    """All scenarios of the grid whose fields go together."""
    for model in models:
        for method in METHODS:
            for size in SIZES:
                for variant in VARIANTS:
                    adapters = {"lora", "adapter_precision", "kbit_preparation"} & set(variant)
                    mixed = "mixed" in variant.get("precision", "")
                    capped = model == {"model_type": "gemma2"} and variant.get("attention") == "mem_efficient"
                    trl = variant.get("kbit_preparation") == "trl" and method != "qlora"
                    if (method == "full" and adapters) or (method == "qlora" and mixed) or capped or trl:
                        continue
                    dropout = variant.get("lora", {}).get("dropout")
                    if model in EXPERTS and (
                        "precision" in variant or variant.get("kbit_preparation") == "peft" or dropout
                    ):
                        continue  # experts are compared in bf16 alone, and PEFT has no dropout for them
                    yield Scenario.from_mapping({"model": model, "method": method, **size, **variant})


def drawn(count: int, seed: int) -> Iterator[Scenario]:
    """Steps of dense decoders over several GPUs, drawn at random from what the estimate describes."""
    draw, accepted = random.Random(seed), 0
    while accepted < count:
        method, strategy = draw.choice(METHODS), draw.choice(("ddp", "fsdp2", "fsdp2"))
        fields: dict[str, Any] = {
            "model": draw.choice([model for model in MODELS if model not in EXPERTS]),
            "method": method,
            "sequence_length": draw.choice((256, 512, 1024, 1500, 2048, 4096)),
            "micro_batch": draw.choice((1, 1, 2, 4, 8)),
            "precision": draw.choice(("bf16", "bf16", "fp32")),
            "attention": draw.choice(("sdpa", "sdpa", "eager", "mem_efficient")),
            "gradient_checkpointing": draw.choice((True, True, False)),
            "gradient_accumulation": draw.choice((1, 1, 4)),
            "loop": draw.choice(("trainer", "trainer", "manual")),
            "optimizer": draw.choice(("adamw", "adamw", "adamw_fused")),
            "parallel": {"strategy": strategy, "gpus": draw.choice((2, 3, 4, 8))},
        }
        if strategy == "fsdp2":
            fields["parallel"]["reshard_after_forward"] = draw.choice((True, True, False))
        if method == "qlora" and strategy == "fsdp2" and draw.random() < 0.6:
            fields["quantization"] = {"storage": fields["precision"]}
        if method != "full":
            fields["lora"] = {"rank": draw.choice((8, 16, 64)), "target_modules": "all-linear"}
            fields["adapter_precision"] = draw.choice(("fp32", "base"))
        if strategy == "ddp":
            fields["loss"] = draw.choice(("full", "chunked"))
            fields["autocast"] = draw.choice((None, None, "bf16"))
        if fields["model"] == {"model_type": "gemma2"} and fields["attention"] == "mem_efficient":
            continue  # this attention can't cap its scores
        try:
            scenario = Scenario.from_mapping(fields)
            analytic_estimate(scenario, blocks=False)
        except (UserError, NotDescribed):  # lengths beyond the model's positions, dtypes that don't go together
            continue
        accepted += 1
        yield scenario


def errors(scenarios: Iterable[Scenario]) -> Iterator[dict[str, Any]]:
    """For each scenario both peaks and the analytic estimate's error, in all and by phase, as shares of the trace."""
    from dryfit.tracing.trace import trace

    for scenario in scenarios:
        estimated, traced = analytic_estimate(scenario), trace(scenario, timeline=False)
        yield {
            "scenario": describe(scenario),
            "analytic_bytes": estimated["peak_allocated_bytes"],
            "trace_bytes": traced["peak_allocated_bytes"],
            "error": estimated["peak_allocated_bytes"] / traced["peak_allocated_bytes"] - 1,
            "by_phase": {
                phase: estimated["phases"][phase] / traced["phases"][phase] - 1
                for phase in ("forward", "backward", "optimizer")
            },
        }


def describe(scenario: Scenario) -> str:
    """A scenario in one line."""
    model = scenario.model_name or scenario.model["model_type"]
    parts = [model, scenario.method, scenario.precision, f"{scenario.micro_batch} x {scenario.sequence_length}"]
    parts.append(scenario.attention)
    if not scenario.gradient_checkpointing:
        parts.append("no checkpointing")
    for field, usual in (("loss", "full"), ("loop", "trainer"), ("optimizer", "adamw"), ("kbit_preparation", "none")):
        if getattr(scenario, field) != usual:
            value = getattr(scenario, field)
            parts.append(value if field != "kbit_preparation" else f"prepared by {value.upper()}")
    if scenario.autocast:
        parts.append(f"autocast {scenario.autocast}")
    parallel = scenario.parallel
    if parallel.strategy != "none":
        parts.append(f"{parallel.gpus} GPUs {parallel.strategy}")
        if not parallel.reshard_after_forward:
            parts.append("gathered layers kept")
        if scenario.method == "qlora" and scenario.quantization.storage != "uint8":
            parts.append(f"stored as {scenario.quantization.storage}")
    if scenario.gradient_accumulation > 1:
        parts.append(f"accumulation {scenario.gradient_accumulation}")
    if scenario.lora and scenario.lora.dropout:
        parts.append(f"dropout {scenario.lora.dropout}")
    if scenario.lora and scenario.adapter_precision != "fp32":
        parts.append(f"r {scenario.lora.rank} {scenario.adapter_precision}")
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.analytic", description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th scenario of the grid")
    parser.add_argument("--json", action="store_true", help="all rows as JSON instead of a table")
    parser.add_argument("--several", type=int, default=0, metavar="N", help="instead N random steps over several GPUs")
    parser.add_argument("--seed", type=int, default=1, help="of those")
    options = parser.parse_args(arguments)
    scenarios = list(drawn(options.several, options.seed) if options.several else grid())[:: options.every]
    rows = list(progress(errors(scenarios), "grid", total=len(scenarios), unit="scenarios"))
    if options.json:
        print(json.dumps(rows, sort_keys=True))
        return 0
    rows.sort(key=lambda row: -abs(row["error"]))
    for row in rows[:20]:
        print(f"{100 * row['error']:+7.2f} %  {row['trace_bytes'] / 2**30:9.3f} GiB  {row['scenario']}")
    sizes = [abs(row["error"]) for row in rows]
    print(f"{len(rows)} scenarios: median {100 * statistics.median(sizes):.2f} %, worst {100 * max(sizes):.2f} %")
    return 0


if __name__ == "__main__":
    command(main)
