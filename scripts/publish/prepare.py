"""Rule ``prepare_publication``: what would be published, and whether it may be.

For each repository that the configuration names (adapter, merged model, dataset) a card of its own, and a list of every
file with its size and digest: the dry run, which needs no network. Nothing is listed for a model that
fails ``publish.thresholds``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import (
    atomic_folder,
    read_folder,
    read_report,
    sha256_file,
    write_report,
    write_text,
)
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.documents.card import base_model_id
from scripts.documents.context import marked, titled
from scripts.documents.dataset import is_unknown
from scripts.documents.render import render
from scripts.documents.traced_values import collect, dump_yaml, sourced
from scripts.tasks.support import registry

MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def check(
    publish: Mapping[str, Any], comparison: Mapping[str, Any], verified: Mapping[str, Any]
) -> None:
    """Refuse what the configuration's thresholds don't let through.

    UserError: naming each threshold that does not hold, with what was found.
    """
    asked, tuned = publish["thresholds"], comparison["tuned"]
    failed = [] if verified["passed"] else ["the merge did not pass its verification"]
    for metric in asked["better"]:
        if comparison[metric]["verdict"] != "better":
            failed.append(f"{metric} is not better than the base's by more than its interval")
    if tuned["exact"]["share"] < asked["least_exact"]:
        failed.append(
            f"{tuned['exact']['share']:.3f} of the answers are exact, asked for are {asked['least_exact']}"
        )
    if "danger" in tuned and tuned["danger"]["share"] > asked["most_danger"]:
        failed.append(
            f"{tuned['danger']['share']:.3f} of the answers are dangerous, allowed are {asked['most_danger']}"
        )
    if failed:
        raise UserError(
            "This run is not published: it fails publish.thresholds.",
            where="publish.thresholds in the configuration",
            found="; ".join(failed),
            allowed="a run that reaches the thresholds, or other thresholds",
        )


def check_licences(acquired: Mapping[str, Any]) -> None:
    """Refuse to publish data whose licence nobody knows."""
    unknown = [row["name"] for row in acquired["sources"] if is_unknown(row["license"])]
    if unknown:
        raise UserError(
            "The dataset is not published: the licence of some of it is unknown.",
            where="dataset.sources in the configuration",
            found=", ".join(unknown),
            allowed="a licence for each source, or no repository for the dataset",
            write="publish:\n  dataset: null",
        )


def metadata(context: Mapping[str, Any]) -> dict[str, Any]:
    """The cards' YAML blocks, and the names that the adapter's code loads."""
    from huggingface_hub import DatasetCardData, ModelCardData
    from markupsafe import Markup

    base, publish, words = context["base_model"], context["publish"], context["words"]
    adapter = ModelCardData(
        base_model=base,
        datasets=[publish["dataset"]] if publish["dataset"] else None,
        language=["en"],
        library_name="peft",
        license=context["description"]["license"],
        pipeline_tag="text-generation",
        tags=[*words["tags"], "lora", "peft"],
    ).to_dict()
    if base:
        adapter["base_model_relation"] = "adapter"
    dataset = DatasetCardData(
        language=["en"],
        license=sorted({licence.lower() for licence in context["acquire"]["licenses"]}),
        pretty_name=f"{context['dataset']}: {words['pairs']}",
        tags=words["tags"],
        task_categories=["text-generation"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"path": f"data/{split}.jsonl", "split": split} for split in SPLITS],
            }
        ],
    ).to_dict()
    return {
        "adapter_metadata": Markup(collect(dump_yaml(adapter))[0]),
        "dataset_metadata": Markup(collect(dump_yaml(dataset))[0]),
        "quoted_base": Markup(json.dumps(base or "folder-of-the-base")),
        "quoted_repository": Markup(json.dumps(publish["adapter"])),
    }


def main(
    inputs: Mapping[str, Any],
    output: str,
    publish: Mapping[str, Any],
    about: Mapping[str, Any],
    templates: Path,
) -> None:
    """Check, write the cards, list the files."""
    reports = {
        name: read_report(inputs[name])
        for name in ("acquire", "comparison", "description", "split", "training", "verification")
    }
    manifest = read_folder(Path(inputs["merged"], MANIFEST))
    read_report(inputs["training"], inputs["adapter"], inputs["settings"])
    read_report(inputs["split"], *inputs["splits"])
    check(publish, reports["comparison"], reports["verification"])
    merged, adapter = Path(inputs["merged"]), Path(inputs["adapter"]).parent
    run, folder = Path(inputs["card"]).parent, Path(output).parent / "cards"
    splits = dict(zip(SPLITS, map(Path, inputs["splits"]), strict=True))
    context = {name: sourced(report, inputs[name]) for name, report in reports.items()}
    task = registry.task(about["task"])
    context["words"] = {**marked(task.words()), **task.options.get("words", {})}
    context["description"] = titled(context["description"], about["model"])
    context |= {"base_model": base_model_id(reports["description"]), "publish": publish, **about}
    context |= metadata(context)
    wanted: dict[str, dict[str, Path]] = {}
    with atomic_folder(folder) as cards:
        if publish["adapter"]:
            write_text(
                cards / "adapter" / "README.md",
                render(templates / "ADAPTER_CARD.md.j2", context)[0],
            )
            wanted["adapter"] = {name: adapter / name for name in ADAPTER}
            wanted["adapter"]["README.md"] = folder / "adapter" / "README.md"
        if publish["merged"]:
            shown = [*run.glob("figures/*.png"), *run.glob("docs/*.md")]  # what the card links to
            wanted["merged"] = {name: merged / name for name in [*manifest["sha256"], MANIFEST]}
            wanted["merged"] |= {str(path.relative_to(run)): path for path in shown}
            wanted["merged"]["README.md"] = Path(inputs["card"])
        if publish["dataset"]:
            check_licences(reports["acquire"])
            write_text(
                cards / "dataset" / "README.md",
                render(templates / "DATASET_CARD.md.j2", context)[0],
            )
            wanted["dataset"] = {f"data/{split}.jsonl": path for split, path in splits.items()}
            wanted["dataset"]["README.md"] = folder / "dataset" / "README.md"
    if not wanted:
        raise UserError(
            "The configuration names no repository to publish to.",
            where="publish in the configuration",
            allowed="a repository for the adapter, the merged model, the dataset, or several of them",
            write="publish:\n  adapter: <owner>/<name>",
        )
    plan = {}
    for kind, files in wanted.items():
        listed = [
            {
                "bytes": path.stat().st_size,
                "file": str(path),
                "path": name,
                "sha256": sha256_file(path),
            }
            for name, path in sorted(files.items())
        ]
        plan[kind] = {"files": listed, "private": publish["private"], "repository": publish[kind]}
    write_report(output, {"repositories": plan})
    for kind, repository in plan.items():
        total = sum(file["bytes"] for file in repository["files"])
        log.info(
            "%s -> %s: %d files, %s bytes",
            kind,
            repository["repository"],
            len(repository["files"]),
            f"{total:,}",
        )
        for file in repository["files"]:
            log.info("  %15s  %s", f"{file['bytes']:,}", file["path"])


if __name__ == "__main__":
    with job(snakemake):
        named = {
            name: value if isinstance(value, str) else list(value)
            for name, value in snakemake.input.items()
        }
        settings = snakemake.params.settings
        main(
            named,
            snakemake.output.plan,
            settings["publish"],
            settings["about"],
            Path(named["templates"][0]).parent,
        )
