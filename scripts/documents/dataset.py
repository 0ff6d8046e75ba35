"""What documents say of the dataset: how many rows each stage kept, and why it removed the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read(files: Mapping[str, Any]) -> dict[str, Any]:
    """What templates know of the dataset: its stages and licences."""
    if "encode" not in files:
        return {}
    sources = files["acquire"]["sources"]
    return {
        "stages": dataset_stages(files),
        "unknown_licenses": [item["name"] for item in sources if is_unknown(item["license"])],
        "embedded_data": any(item["type"] == "embedded" for item in sources),
    }


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
