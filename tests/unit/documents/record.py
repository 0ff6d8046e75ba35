"""Keep what the documents of a finished tiny run were made from, as ``record.json`` beside this file.

    snakemake --cores 2 --configfile config/test.yaml tests/config/executed.yaml
    python -m tests.unit.documents.record

Tests of documents read the record, and so what rules write. Long lists in it are thinned: a timeline to a few points
with the peak among them, the planner's rows to two GPUs, the refusals to the first, and the profile's scenarios to
three; the test of scenario B adds the others.
"""

import json
from pathlib import Path
from typing import Any

from scripts.common.reports import carried_by, gather
from scripts.runs.alone import jobs

RECORD = Path(__file__).with_name("record.json")
CONFIGURATIONS = [Path("config/test.yaml"), Path("tests/config/executed.yaml")]
POINTS = 10  # of a timeline
GPUS = ("rtx-4090", "t4")
SCENARIOS = ("full-fp32", "full-bf16", "qlora")


def thinned(value: Any) -> Any:
    """The same content with shorter lists."""
    if isinstance(value, list):
        return [thinned(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "timeline" in value:
        value = {**value, "timeline": few_points(value["timeline"])}
    if "harmful" in value and isinstance(value["harmful"], list):
        value = {**value, "harmful": value["harmful"][:1]}
    if "feasibility" in value:
        value = {
            **value,
            "feasibility": [row for row in value["feasibility"] if row["gpu"] in GPUS],
        }
    return {key: thinned(item) for key, item in value.items()}


def with_few_scenarios(content: dict[str, Any], settings: dict[str, Any]) -> None:
    """Keep three scenarios in the profile and in the settings."""
    profiles = zip(settings["scenarios"], content["profile"], strict=True)
    content["profile"] = [profile for name, profile in profiles if name in SCENARIOS]
    settings["scenarios"] = list(SCENARIOS)
    memory = settings["configuration"]["memory"]
    memory["scenarios"] = {name: memory["scenarios"][name] for name in SCENARIOS}


def few_points(timeline: dict[str, Any]) -> dict[str, Any]:
    """A timeline of some points, with the peak among them."""
    allocated = timeline["allocated_bytes"]
    step = max(1, len(allocated) // POINTS)
    kept = sorted({*range(0, len(allocated), step), allocated.index(max(allocated))})

    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pick(item) for key, item in value.items()}
        return [value[point] for point in kept] if isinstance(value, list) else value

    return pick(timeline)


def read_by_documents(
    *configurations: Path,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]:
    """Of a finished run: paths and contents of what its documents read, by name; their settings and figures."""
    (job,) = (job for job in jobs(*configurations) if job.rule.name == "render_documents")
    paths, contents = carried_by(job.input.collected)
    own = {"record": job.input.record, "profile": paths["profile"]}  # with their timelines
    return (
        paths | own,
        contents | gather(own),
        dict(job.params.settings.items()),
        list(job.input.figures),
    )


def main() -> None:
    """Write the record of the run in the working directory."""
    _, content, settings, _ = read_by_documents(*CONFIGURATIONS)
    with_few_scenarios(content, settings)
    text = json.dumps(
        {"files": thinned(content), "settings": settings}, ensure_ascii=False, sort_keys=True
    )
    RECORD.write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
