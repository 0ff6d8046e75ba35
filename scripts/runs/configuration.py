"""The configuration: checked against ``config/schema.yaml``, its errors for people, its reference for readers.

``python -m scripts.runs.configuration --write-reference`` renews ``config/README.md``.
Only what a bare Snakemake brings is imported: PyYAML and jsonschema.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dryfit.common.errors import UserError
from dryfit.common.schema import allowed, as_typed, coerced, validate, yaml_lines
from dryfit.scenario import fields
from scripts.common.code_digests import ROOT
from scripts.tasks.support import registry
from scripts.tasks.text import Task

SCHEMA = ROOT / "config" / "schema.yaml"
REFERENCE = ROOT / "config" / "README.md"
# What each type of dataset source needs, and what it may have, beside type, license and attribution.
DATASET_KEYS = {
    "embedded": (("seed", "pairs"), ("programs", "intents", "known")),
    "examples": (("requirement", "sha256"), ("programs",)),
    "files": (("paths",), ("columns", "format")),
    "hub": (("repository",), ("accept_new_revision", "columns", "config", "revision", "split")),
}
# What each type of model source needs beside type and dtype.
SOURCE_KEYS = {
    "wheel": ("requirement", "sha256", "file", "hub_id"),
    "hub": ("repository", "revision"),
    "folder": ("path",),
}


@cache
def read_schema() -> dict:
    """The schema as a mapping, with the fields of scenarios where a section says ``x-fields: training`` or ``all``."""
    schema = yaml.load(
        SCHEMA.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    for section in schema["properties"].values():
        if kind := section.get("x-fields"):
            own = section.get("properties", {})
            step = {
                one.name: one.schema()
                for one in fields.FIELDS
                if (one.in_training if kind == "training" else not one.name.startswith("model"))
            }
            section["properties"] = {
                name: {**form, **own.get(name, {})} for name, form in step.items()
            } | {name: form for name, form in own.items() if name not in step}
    return schema


def check(config: dict) -> dict:
    """Return the configuration with keys sorted and numbers of the schema's type.

    Equal settings have equal text afterwards, whatever the order of their keys and however a number was
    written, so Snakemake's comparison of params finds only real changes.

    UserError: naming the key, the value found, what is allowed, and the line to write.
    """
    validate(config, read_schema())
    config = {**config, "task": registry.checked(config["task"])}
    task = registry.task(config["task"])
    if wrong := [*_of_task(config, task), *_contradictions(config)]:
        raise UserError.several(wrong)
    return coerced(
        {**config, "prompt": {"system": config["prompt"]["system"] or task.system}}, read_schema()
    )


def typed(
    config: Mapping[str, Any], given: Mapping[str, Any], schema: Mapping[str, Any] | None = None
) -> dict:
    """The configuration with the types of what ``--config`` gave: Snakemake turns numbers within a mapping into text.

    ``given``: what the command line says, as Snakemake has read it. What stands in a file keeps the type that it has
    there.
    """
    forms = (read_schema() if schema is None else schema).get("properties", {})
    read = {}
    for key in given.keys() & forms.keys() & config.keys():
        if isinstance(given[key], Mapping) and isinstance(config[key], Mapping):
            read[key] = typed(config[key], given[key], forms[key])
        elif given[key] == config[key]:
            read[key] = as_typed(given[key], forms[key])
    return {**config, **read}


def _of_task(config: dict, task: Task) -> Iterator[UserError]:
    """What the task of a configuration has no place for."""
    dataset = config["dataset"]
    for key in ("sources", "external_test", "test"):
        for entry in dataset[key]:
            if entry["type"] not in ("files", "hub", *task.source_types):
                yield UserError(
                    f"The task {task.name} has no source of type {entry['type']}.",
                    where=f"dataset.{key} in the configuration",
                    found=entry["type"],
                    allowed=", ".join(("files", "hub", *task.source_types)),
                    write="dataset:\n  sources: [{type: files, license: unknown, paths: [data/pairs.jsonl]}]",
                )
    benchmark = dataset["benchmark"]
    if benchmark is None:
        return
    if ("path" in benchmark) == ("requirement" in benchmark) or (
        "requirement" in benchmark and not task.executes
    ):
        yield UserError(
            "A benchmark is a file of yours" + (", or a package" if task.executes else "") + ".",
            where="dataset.benchmark in the configuration",
            found=benchmark,
            allowed="path" + (", or requirement and sha256" if task.executes else ""),
            write="dataset:\n  benchmark: {path: data/benchmark.jsonl, license: unknown, requests: null}",
        )
    elif "path" in benchmark and not Path(benchmark["path"]).is_file():
        yield UserError(
            "The file of the benchmark isn't there.",
            where="dataset.benchmark.path in the configuration",
            found=benchmark["path"],
            allowed="JSON lines, JSON, CSV or Parquet, relative to the working directory",
        )


def _defaults() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))


def with_defaults(
    config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration over the project's own, mapping by mapping; a list replaces the whole list.

    Snakemake does this for its command line. A workflow that imports this one as a module gives its configuration
    instead of ours, and need only say what differs.
    """
    if defaults is None:
        defaults = _defaults()
    merged = dict(defaults)
    for key, value in config.items():
        known = merged.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        merged[key] = with_defaults(value, known) if both else value
    return merged


def _contradictions(config: dict) -> Iterator[UserError]:
    """What no single key can show."""
    shares = {name: config["dataset"]["split"][name] for name in ("train", "validation", "test")}
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        scaled = {name: round(share / total, 3) for name, share in shares.items()}
        scaled["train"] = round(1 - scaled["validation"] - scaled["test"], 3)
        yield UserError(
            f"The shares of dataset.split add up to {total:g}, not to 1.",
            where="the configuration",
            found=shares,
            allowed="three shares that add up to 1",
            write=yaml_lines(["dataset"], "split", scaled),
        )
    if sum(entry["type"] == "examples" for entry in config["dataset"]["sources"]) > 1:
        yield UserError(
            "There are two sources of type examples, and the run fetches one.",
            where="dataset.sources in the configuration",
            allowed="one of them",
        )
    for key in ("sources", "external_test", "test"):
        for entry in config["dataset"][key]:
            needed, possible = DATASET_KEYS[entry["type"]]
            known = ["type", "license", "attribution", *needed, *possible]
            wrong = [name for name in needed if name not in entry] or [
                name for name in entry if name not in known
            ]
            if wrong:
                missing = wrong[0] not in entry
                yield UserError(
                    f"A source of type {entry['type']} {'needs' if missing else 'has no'} {wrong[0]}.",
                    where=f"dataset.{key} in the configuration",
                    found=dict(entry),
                    allowed=", ".join(known),
                    write=f"{wrong[0]}: ..." if missing else f"nothing here: remove {wrong[0]}",
                )
        for path in (path for entry in config["dataset"][key] for path in entry.get("paths", [])):
            if re.search("[{}]", path):
                yield UserError(
                    "A path of the dataset holds a brace, which stands for a wildcard in Snakemake.",
                    where=f"dataset.{key} in the configuration",
                    found=path,
                    allowed="paths without { and }: rename the file, or link to it under another name",
                    write=f"paths: [{re.sub('[{}]', '', path)}]",
                )
    if config["evaluation"]["execution"] != "none" and not can_execute(config):
        yield nothing_to_execute()
    publish = config["publish"]
    if publish["adapter"] and publish["adapter"] == publish["merged"]:
        yield UserError(
            "publish.adapter and publish.merged are one repository: the second's README.md would replace the first's.",
            where="the configuration",
            found=publish["adapter"],
            allowed="a repository for each",
            write=yaml_lines(["publish"], "merged", f"{publish['merged']}-merged"),
        )
    if wrong := _of_another_model(config["model"]):
        yield wrong
    source = config["model"]["source"]
    for key in SOURCE_KEYS[source["type"]]:
        if key not in source:
            yield UserError(
                f"model.source.{key} is missing: a source of type {source['type']} needs it.",
                where="the configuration",
                allowed=", ".join(SOURCE_KEYS[source["type"]]),
                write=yaml_lines(["model", "source"], key, "..."),
            )


def _of_another_model(model: Mapping[str, Any]) -> UserError | None:
    """The error of a ``model`` section whose source is another model's, and whose card would be the default model's."""
    usual = _defaults()["model"]
    if _whose(model["source"]) in (_whose(usual["source"]), usual["title"]):
        return None
    kept = [key for key in ("name", "title", "license") if model[key] == usual[key]]
    if not {"name", "title"} & set(kept):  # many models have the same licence
        return None
    own = {"name": "my-model", "title": "My-Model", "license": "the model's licence"}
    return UserError(
        f"model.source is another model than {usual['title']}, and model.{', model.'.join(kept)} would be that one's:"
        " the model card would have a false title or licence.",
        where="model in the configuration",
        found={key: model[key] for key in kept},
        allowed="name, title and license of the model that the source holds",
        write=yaml_lines(["model"], kept[0], own[kept[0]]),
    )


def _whose(source: Mapping[str, Any]) -> str:
    """The model of a source: its id, or its folder's name."""
    key = {"wheel": "hub_id", "hub": "repository", "folder": "path"}[source["type"]]
    name = str(source.get(key, ""))
    return Path(name).name if source["type"] == "folder" else name


def can_execute(config: Mapping[str, Any]) -> bool:
    """Whether there is a benchmark whose answers can be run: a package of the task's, with file systems."""
    return "requirement" in (config["dataset"]["benchmark"] or {})


def benchmark_source(config: Mapping[str, Any], *keys: str) -> dict | None:
    """What to read a benchmark from, or None without one."""
    keys = keys or ("requirement", "sha256", "path", "format", "columns")
    benchmark = config["dataset"]["benchmark"]
    return benchmark and {key: benchmark[key] for key in keys if key in benchmark}


def nothing_to_execute() -> UserError:
    """The error of a run whose answers can't be executed: only a benchmark has a file system for them."""
    return UserError(
        "There are no answers to run: without a benchmark there is no file system to run them in.",
        where="the configuration",
        found="dataset.benchmark: null",
        allowed="a benchmark; or evaluation.execution: none, and no target named execute",
        write=yaml_lines(["evaluation"], "execution", "none"),
    )


def model_source(config: dict) -> dict:
    """``model.source`` with the keys of its own type alone, so that left-over keys of another rerun nothing."""
    source = config["model"]["source"]
    return {
        key: source[key]
        for key in sorted(source)
        if key in {*SOURCE_KEYS[source["type"]], "type", "dtype"}
    }


def examples_source(config: dict) -> dict | None:
    """What to fetch for the source of type ``examples``, or None without one."""
    sources = [entry for entry in config["dataset"]["sources"] if entry["type"] == "examples"]
    return {key: sources[0][key] for key in ("requirement", "sha256")} if sources else None


def reference() -> str:
    """``config/README.md``: a table of every key for each section of the schema."""
    lines = [
        "# Configuration reference",
        "",
        "Made from `config/schema.yaml` by `python -m scripts.runs.configuration --write-reference`;",
        "edit that file.",
        "`config/config.yaml` holds a value for each key. A file of your own needs only what differs:",
        "`snakemake --cores 1 --configfile my.yaml`.",
        "",
        "What the screen refuses is set in `config/screen/`; its `README.md` shows how to add and test a rule.",
    ]
    shown: set[int] = set()
    for name, section in read_schema()["properties"].items():
        lines += ["", f"## `{name}`", "", section["description"], ""]
        rows = list(_rows(section, name, shown))
        if rows:
            lines += ["| key | allowed | what it does |", "| --- | --- | --- |", *rows]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _rows(schema: dict, path: str, shown: set[int]) -> Iterator[str]:
    """A row for each key; what two lists have in common (a YAML anchor) is told with the first."""
    for key, inner in schema.get("properties", {}).items():
        name = f"{path}.{key}"
        cells = [f"`{name}`", allowed(inner), inner["description"]]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield from _rows(inner, name, shown)
        items = inner.get("items", {})
        if "properties" in items and id(items) not in shown:
            shown.add(id(items))
            yield from _rows(items, f"{name}[]", shown)


if __name__ == "__main__":
    from dryfit.common.terminal import command

    def main() -> None:
        if sys.argv[1:] != ["--write-reference"]:
            raise UserError(
                "Nothing to do.",
                allowed="--write-reference",
                write=f"python -m {Path(__file__).stem} ...",
            )
        REFERENCE.write_text(reference(), encoding="utf-8")

    command(main)
