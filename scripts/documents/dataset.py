"""What documents say of the dataset: how many rows each stage kept, and why it removed the others."""

from collections.abc import Mapping
from typing import Any

from scripts.documents.traced_values import plain
from scripts.tasks.text import Task

# Stages of cleaning as people say them.
CLEANING = {
    "validate": "Validate",
    "exact_duplicates": "Remove exact duplicates",
    "near_duplicates": "Remove near duplicates",
}


def read(files: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What templates know of the dataset: its stages and licences."""
    if "encode" not in files:
        return {}
    sources = files["acquire"]["sources"]
    return {
        "stages": dataset_stages(files, task),
        "unknown_licenses": [item["name"] for item in sources if is_unknown(item["license"])],
        "embedded_data": any(item["type"] == "embedded" for item in sources),
    }


def dataset_stages(reports: Mapping[str, Any], task: Task) -> list[dict[str, Any]]:
    """How many rows went into each stage and came out, and why the others did not."""
    acquire, clean, screen, split, encode = (
        reports[key] for key in ("acquire", "clean", "screen", "split", "encode")
    )
    stages: list[dict[str, Any]] = []

    def stage(title: str, rows: int, removed: int, kept: int, reasons: Mapping[str, int]) -> None:
        by_count = sorted(reasons.items(), key=lambda item: (-item[1], plain(item[0])))
        stages.append(
            {"stage": title, "rows": rows, "removed": removed, "kept": kept, "reasons": by_count}
        )

    read, rejected = acquire["rows"], acquire["rejected"]
    stage("Acquire", read + rejected, rejected, read, acquire["reasons"])
    left = clean["rows"]
    for name in clean["stages"]:
        before, left = left, left - clean["removed"][name]
        title = {**CLEANING, task.check_stage: task.check_title()}.get(
            name, name.replace("_", " ").capitalize()
        )
        stage(title, before, clean["removed"][name], left, clean["reasons"][name])
    dangerous = {
        f"dangerous: {category.replace('_', ' ')}": count
        for category, count in screen["categories"].items()
    }
    if screen["unparsable"]:
        dangerous["the screen could not parse it"] = screen["unparsable"]
    judged, harmless = screen["rows"], screen["kept"]
    if task.screens:
        stage("Screen for danger", judged, judged - harmless, harmless, dangerous)
    asked, kept = split["rows"], split["kept"]
    stage("Decontaminate against external test sets", asked, asked - kept, kept, split["reasons"])
    parts = encode["splits"]
    rows, encoded = (sum(part[key] for part in parts.values()) for key in ("rows", "kept"))
    too_long = {
        f"longer than the sequence length ({name})": part["overlong"]
        for name, part in parts.items()
        if part["overlong"]
    }
    stage("Encode", rows, rows - encoded, encoded, too_long)
    return stages


def is_unknown(license: str) -> bool:
    """Whether a licence was given as unknown."""
    return license.strip().lower() in ("unknown", "none", "?")
