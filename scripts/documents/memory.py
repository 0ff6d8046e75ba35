"""What documents say of memory: answers side by side, the verdict, what fits which GPU."""

from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

from dryfit.analytic.estimate import ADAM_STATES, LORA_SHARE
from dryfit.engine import components
from dryfit.engine.components import grouped
from dryfit.scenario.nested_fields import Parallel
from dryfit.scenario.optimizers import OPTIMIZERS
from scripts.documents.traced_values import mark_sources, sourced

# What the groups of memory components are called.
GROUP_TITLES = {
    "parameters": "Parameters (weights, quantization state)",
    "adapters": "Adapters, with their gradients and optimizer states",
    "gradients": "Gradients",
    "optimizer_states": "Optimizer states",
    "activations": "Activations",
    "logits": "Logits and loss",
    "several_gpus": "Unsharded weights and buffers of collectives (several GPUs)",
    "temporaries": "Temporaries",
    "overhead": "Overhead (workspaces, rounding of blocks)",
}

METHODS = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}

LARGEST_TERMS = 10  # of the analytic estimate, that documents show

MEASURED_ON = {"cpu": "CPU"}  # else the GPU's name

ROWS = sourced(10_000, "scripts/documents/memory.py", "ROWS")  # that hours are given for
TICKS = sourced(
    tuple(64 * 4**power for power in range(9)), "scripts/documents/memory.py", "TICKS"
)  # tokens of a row
ANSWERS = ("rule_of_thumb", "analytic", "trace", "measurement")

# What people quote beside the rule of thumb (:mod:`dryfit.analytic.estimate`), and what it is made of.
QUOTES = sourced(
    {
        "parameters": 7_000_000_000,  # that the range is quoted for
        "qlora_gb": (12, 16),
        "cards_gb": (16, 24),  # commodity GPUs
        "adapter_share": float(LORA_SHARE),
        "packed_bytes": 0.5,  # of a 4-bit weight
        "half_bytes": 2,  # of a 16-bit number
        "moment_bytes": 4,  # of one of Adam's two
        "state_bytes": ADAM_STATES,
    },
    "scripts/documents/memory.py",
    "QUOTES",
)

WEIGHTS = sourced(
    {
        components.WEIGHTS_4BIT: "4-bit weights of the linear layers",
        components.WEIGHTS_8BIT: "8-bit weights of the linear layers",
        components.QUANTIZATION_STATE: "scales of their blocks",
        components.weights("bf16"): "bf16 weights (embeddings, output head, norms, biases)",
        components.weights("fp16"): "fp16 weights (embeddings, output head, norms, biases)",
        components.weights("fp32"): "fp32 weights and buffers",
    },
    "scripts/documents/memory.py",
    "WEIGHTS",
)

LORA_PARTS = {
    components.ADAPTERS: "weights",
    components.GRADIENTS: "gradients",
    components.OPTIMIZER_STATES: "optimizer states",
}


def read(
    files: Mapping[str, Any], settings: Mapping[str, Any], paths: Mapping[str, Any]
) -> dict[str, Any]:
    """What templates know of memory: the profile, the run's own step, the gate, as far as the inputs are there."""
    context: dict[str, Any] = {}
    if "profile" in files:
        named = zip(settings["scenarios"], files["profile"], strict=True)
        profile = [scenario_memory(name, compared) for name, compared in named]
        first = profile[0]["scenario"]
        context = {
            "profile": profile,
            "sections": sections(profile),
            "profile_title": model_title(first["model_name"], first["model"]),
            "feasibility": feasibility(files["plan"]) if "plan" in files else None,
            "longest_rows": longest_rows(files["plan"]) if "plan" in files else None,
            "lora_or_qlora": lora_or_qlora(files["plan"], files["profile"][0].get("gpu"))
            if "plan" in files
            else None,
            "several_gpus": several_gpus(files.get("plan", {}).get("several_gpus"), profile),
            "validation": next(
                iter(files.get("validation", [])), None
            ),  # a list of one report or none
            "sources": [
                sourced(str(path), str(path))
                for name in ("profile", "plan", "validation")
                for path in as_list(paths.get(name))
            ],
        }
    if "training_memory" in files:
        context["step"] = scenario_memory("training", files["training_memory"])
    if "gate" in files:
        context["gate"] = gate_summary(files["gate"])
    return context


def as_list(given: Any) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def step_hours(time: Mapping[str, Any] | None, step: Mapping[str, Any]) -> dict[str, Any] | None:
    """A step's time, with the hours for :data:`ROWS` of its length."""
    if time is None:
        return None
    at_once = Parallel(**step["parallel"]).rows_at_once
    hours = ROWS / (step["micro_batch"] * step["gradient_accumulation"] * at_once) / 3600
    ends = time["range"] and [hours * end for end in time["range"]]
    return {**time, "rows": ROWS, "hours": hours * time["seconds_per_step"], "hours_range": ends}


def scenario_memory(name: str, compared: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario's answers side by side: in all, by component, and how far each is from the trace."""
    scenario = compared["scenario"]
    method = scenario["method"]
    answers = {answer: _answer(compared, answer) for answer in ANSWERS}
    trace, thumb = (
        answers[answer]["peak_allocated_bytes"] for answer in ("trace", "rule_of_thumb")
    )
    measured = answers["measurement"]
    parts = {
        answer: grouped(answers[answer]["components"], adapters=method != "full")
        for answer in ANSWERS
    }
    rule = parts["rule_of_thumb"]
    rows = [
        {
            "group": group,
            "label": label,
            "by_answer": {answer: parts[answer].get(group) for answer in ANSWERS},
            "rule_minus_trace": rule.get(group, 0) - parts["trace"].get(group, 0),
        }
        for group, label in GROUP_TITLES.items()
        if any(parts[answer].get(group) for answer in ANSWERS)
    ]
    return {
        "allocators": compared.get("allocators") or {},
        "answers": answers,
        "before_temporaries": _before_temporaries(answers, parts["trace"]),
        "states": _states(scenario, answers),
        "analytic_terms": answers["analytic"].get("terms", [])[:LARGEST_TERMS],
        # A measurement on the CPU is set against the trace of the same step on the CPU.
        "differences": {
            answer: compared["differences"].get(f"{answer}_to_trace", {}).get("share")
            for answer in ANSWERS
            if answer != "trace"
        },
        "errors_cancel": _errors_cancel(rows),
        "evidence": (compared.get("evidence") or {}).get("text"),
        "verdict": compared.get("verdict"),
        "fits": compared.get("fits"),
        "gpu": compared.get("gpu"),
        "headroom_bytes": compared.get("headroom_bytes"),
        "measured_time": measured.get("time"),
        "time": step_hours(compared.get("time"), scenario),
        "measured_on": MEASURED_ON.get(
            measured.get("target"), (measured.get("device") or {}).get("name")
        ),
        "method_title": METHODS[method],
        "name": name,
        "parameters": compared["trace"]["parameters"],
        "trainable_parameters": compared["trace"]["trainable_parameters"],
        "rows": rows,
        "rule_excess_bytes": None if thumb is None else thumb - trace,
        "same_device_trace": measured.get("trace_on_the_same_device"),
        "scenario": scenario,
        "suggestions": compared.get("suggestions") or [],
        "title": f"{METHODS[method]}, {precision_title(scenario)}",
        "versions": compared["versions"],
        "weights": _parts(compared["trace"], WEIGHTS),
        "adapter_rows": [
            {
                "label": title,
                "by_answer": {
                    answer: answers[answer]["components"].get(part) for answer in ANSWERS
                },
            }
            for part, title in (LORA_PARTS if method != "full" else {}).items()
        ],
        "worst_row": max(rows, key=lambda row: abs(row["rule_minus_trace"])),
    }


def _states(scenario: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, int] | None:
    """Why the rule's optimizer states differ from the trace's, where these have 16 bits and the rule's have 32.

    ``setting_bytes``: the other half of each number; ``count_bytes``: the rest, the rule's own count of parameters.
    """
    rule, traced = (
        answers[name]["components"].get(components.OPTIMIZER_STATES)
        for name in ("rule_of_thumb", "trace")
    )
    if (
        not _in_16_bits(scenario)
        or has_fp32_states(scenario)
        or not OPTIMIZERS[scenario["optimizer"]].elementwise
        or not rule
        or not traced
    ):
        return None
    return {"setting_bytes": traced, "count_bytes": rule - 2 * traced}


def _in_16_bits(scenario: Mapping[str, Any]) -> bool:
    """Whether all weights are trained, in 16 bits."""
    return scenario["method"] == "full" and scenario["precision"] in ("bf16", "fp16")


def has_fp32_states(scenario: Mapping[str, Any]) -> bool:
    """Whether the optimizer keeps fp32 states for weights of 16 bits: the step that the rule of thumb's B counts."""
    return _in_16_bits(scenario) and scenario.get("optimizer_state_precision") == "fp32"


def _before_temporaries(
    answers: Mapping[str, Any], traced: Mapping[str, int]
) -> dict[str, float] | None:
    """The traced peak without its temporaries, and how far the rule of thumb, which counts none, is from it."""
    thumb = answers["rule_of_thumb"]["peak_allocated_bytes"]
    if thumb is None or not traced.get("temporaries"):
        return None
    left = answers["trace"]["peak_allocated_bytes"] - traced["temporaries"]
    return {"bytes": left, "rule_share": thumb / left - 1}


def _errors_cancel(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rule is nearer to the trace in all than in its lines: a tenth of the largest error or less."""
    errors = [row["rule_minus_trace"] for row in rows]
    return 10 * abs(sum(errors)) <= max(map(abs, errors))


def _answer(compared: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One of the four answers; ``peak_allocated_bytes`` None, and a reason, when it was not given."""
    empty = {
        "components": {},
        "required_bytes": None,
        "peak_reserved_bytes": None,
    }  # a CPU reserves nothing
    if compared[name] is None:
        return {**empty, "peak_allocated_bytes": None, "reason": compared["reasons"][name]}
    return {**empty, **compared[name]}


def _parts(trace: Mapping[str, Any], titles: Mapping[str, str]) -> list[tuple[str, int]]:
    components_at_peak = trace["components"]
    return [
        (title, components_at_peak[name])
        for name, title in titles.items()
        if components_at_peak.get(name)
    ]


def precision_title(scenario: Mapping[str, Any]) -> str:
    """A scenario's precision as people write it."""
    precision = scenario["precision"].upper().replace("-MIXED", " mixed")
    if scenario["method"] == "qlora":
        double = " with double quantization" if scenario["quantization"]["double"] else ""
        return f"{scenario['quantization']['type'].upper().replace('INT8', 'LLM.int8')}{double}, {precision}"
    if has_fp32_states(scenario):
        return f"{precision} with {scenario['optimizer_state_precision'].upper()} states"
    return precision


def sections(scenarios: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those that the memory profile has a section for, each the first of its kind, or None; and the others.

    The rule of thumb's B has weights and gradients in 16 bits and states in fp32. Where no scenario is that step, the
    one wholly in 16 bits stands for it. ``other_readings``: what else people call fine-tuning in 16 bits.
    """
    full = [each for each in scenarios if each["scenario"]["method"] == "full"]
    wide = [each for each in full if has_fp32_states(each["scenario"])]
    narrow = _of_precision(full, "bf16", "fp16")
    narrow = [each for each in narrow if each not in wide]
    mixed = _of_precision(full, "bf16-mixed", "fp16-mixed")
    second = [*wide, *narrow]
    chosen = {
        "A": _first(_of_precision(full, "fp32")),
        "B": _first(second),
        "C": _first([each for each in scenarios if each["scenario"]["method"] == "qlora"]),
    }
    other_readings = [*narrow[:1], *mixed[:1]] if wide else mixed[:1]
    shown = [each for each in (*chosen.values(), *other_readings) if each is not None]
    names = [scenario["name"] for scenario in shown]
    return {
        **chosen,
        "b_has_fp32_states": bool(wide),
        "narrow": _first(narrow) if wide else None,
        "mixed": _first(mixed),
        "other_readings": other_readings,
        "quotes": QUOTES,
        "others": [scenario for scenario in scenarios if scenario["name"] not in names],
    }


def _of_precision(
    scenarios: Sequence[Mapping[str, Any]], *precisions: str
) -> list[Mapping[str, Any]]:
    return [each for each in scenarios if each["scenario"]["precision"] in precisions]


def _first(scenarios: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return scenarios[0] if scenarios else None


def feasibility(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's rows as one line for each GPU, and how the need grows with the rank."""
    gpus: dict[str, dict[str, Any]] = {}
    methods = list(dict.fromkeys(row["method"] for row in plan["feasibility"]))
    for row in plan["feasibility"]:
        gpu = gpus.setdefault(
            row["gpu"], {"gpu": row["gpu"], "total_gib": row["total_gib"], "by_method": {}}
        )
        gpu["by_method"][row["method"]] = row
    scenario = plan["scenario"]
    same = (scenario["sequence_length"], scenario["micro_batch"])
    return {
        "gpus": list(gpus.values()),
        "method_title": METHODS[scenario["method"]],
        "methods": [(method, METHODS[method]) for method in methods],
        "ranks": [
            row for row in plan["sweep"] if (row["sequence_length"], row["micro_batch"]) == same
        ],
        "scenario": scenario,
        "verified": all(row["verified"] for row in plan["feasibility"]),
    }


def longest_rows(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's rows as a map: by method, for each GPU how far along an axis of lengths a row fits.

    ``end``: the longest row of all, where the axis ends; ``ticks``: lengths with their place on it; ``own``: what was
    traced for the profile's own GPU; by method ``cells``, each with its planner's ``row``, and ``too_small``, the rows
    of GPUs that hold no row at all. Places are shares of the axis in per cent, on a logarithmic scale from the first of
    :data:`TICKS`: ``fits``, and ``expandable``, as much further as a row fits with expandable segments alone.
    """
    rows = plan["feasibility"]
    reached = [
        (row["largest_sequence_length"], row["expandable_segments"]["largest_sequence_length"])
        for row in rows
    ]
    end = max([4 * TICKS[0], *map(max, reached)])

    def place(length: int) -> float:
        return 100 * log2(length / TICKS[0]) / log2(end / TICKS[0]) if length > TICKS[0] else 0.0

    methods: dict[str, dict[str, Any]] = {}
    for row, (plain, expandable) in zip(rows, reached, strict=True):
        method = methods.setdefault(
            row["method"], {"title": METHODS[row["method"]], "cells": [], "too_small": []}
        )
        if not plain and not expandable:
            method["too_small"].append(row)
            continue
        more = max(place(expandable) - place(plain), 0.0)
        method["cells"].append({"row": row, "fits": place(plain), "expandable": more})
    return {
        "end": end,
        "methods": methods,
        "own": list((plan["largest"] or {}).items()),
        "ticks": [(tick, place(tick)) for tick in TICKS if tick <= end],
    }


def lora_or_qlora(plan: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The planner's rows that decide between LoRA and QLoRA: on the profile's GPU, and the first GPU that holds each.

    None where the planner has not asked for both.
    """
    decision: dict[str, Any] = {}
    for method in ("lora", "qlora"):
        rows = [row for row in plan["feasibility"] if row["method"] == method]
        if not rows:
            return None
        named = next((row for row in rows if gpu is not None and row["gpu"] == gpu["name"]), None)
        decision[method] = {
            "named": named,
            "smallest": next((row for row in rows if row["fits"]), None),
        }
    both = decision["lora"]["named"], decision["qlora"]["named"]
    return {**decision, "gpu": gpu["title"] if all(both) else None, "scenario": plan["scenario"]}


def several_gpus(
    answer: Mapping[str, Any] | None, profile: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The planner's answer on how many GPUs full fine-tuning fits, with the scenarios' titles; None if not asked."""
    if answer is None:
        return None
    titles = {scenario["name"]: scenario["title"] for scenario in profile}
    kinds = {kind["gpu"]: kind for kind in answer["gpus"]}
    return {
        "counts": answer["counts"],
        "gpus": [kind for kind in answer["gpus"] if any(kind["first"].values())],
        "scenarios": [
            {
                "first": first and {"gpus": first["gpus"], "title": kinds[first["gpu"]]["title"]},
                "name": name,
                "needs": answer["scenarios"][name],
                "title": title,
            }
            for name, title in titles.items()
            if name in answer["scenarios"]
            for first in [answer["first"][name]]
        ],
    }


def gate_summary(gate: Mapping[str, Any]) -> dict[str, Any]:
    """What the gate decided: ``state`` is fits, overridden or not checked."""
    gpu = gate.get("gpu")
    if gpu is None:
        state = "not checked"
    else:
        state = "overridden" if gate["overridden"] and not gate["fits"] else "fits"
    return {
        "gpu": gpu["label"] if gpu else None,
        "headroom_bytes": gate["headroom_bytes"],
        "reason": gate["reason"],
        "required_bytes": gate["required_bytes"],
        "state": state,
        "suggestions": gate["suggestions"],
        "usable_bytes": gpu["usable_bytes"] if gpu else None,
    }


def short_size(size: float | None) -> str:
    """Bytes as GiB, with as many digits as such a figure is read with."""
    if size is None:
        return "nothing"
    return f"{size / 2**30:.{1 if size >= 1e11 else 2}f} GiB"


def model_title(name: str | None, model: Mapping[str, Any]) -> str:
    """A model's file name as people write it: ``qwen2.5-coder-7b`` is Qwen2.5-Coder-7B."""
    if not name:
        return str(model["model_type"])
    parts = [
        part.upper() if part[:1].isdigit() else part[:1].upper() + part[1:]
        for part in name.split("-")
    ]
    return mark_sources("-".join(parts), name)
