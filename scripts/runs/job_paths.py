"""What a job's wildcards name: the settings behind them, and the paths of what the job reads.

Rules call this in their input functions, with a bare Snakemake: standard library, PyYAML and jsonschema only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.scenario.hub import profiled
from scripts.common import contents
from scripts.common.code_digests import ROOT
from scripts.runs import configuration, run_scenarios
from scripts.runs.runs import Runs
from scripts.tasks.support import registry

# Names of folders, never paths. The rank ends a run's name, so results/dataset/... can never be taken for a run.
FOLDER_NAME = r"[a-z0-9][a-z0-9._-]*"
RUN_NAME = rf"{FOLDER_NAME}-r[1-9]\d*"

BASE = "results/models/{model}"
DATASET = "results/dataset/{dataset}"
ENCODED = "results/dataset/{dataset}/encoded/{model}-{sequence_length}"
BENCHMARK = "results/dataset/{dataset}/benchmark"
EXAMPLES = "results/dataset/{dataset}/examples"
BASE_EVALUATION = "results/evaluation/{dataset}/{model}"
EXECUTION = "results/{run}/evaluation/execution.json"  # and the rows behind it, in execution.jsonl


def project_file(path: str) -> str:
    """A file of the project as an input; relative in the project's folder, so that moving the folder reruns nothing."""
    return path if Path.cwd() == ROOT else str(ROOT / path)


def project_files(pattern: str) -> list[str]:
    """The same for each file of the project that matches."""
    return [project_file(path.relative_to(ROOT).as_posix()) for path in sorted(ROOT.glob(pattern))]


def source_folder(settings: Mapping[str, Any], patterns: tuple[str, ...]) -> str | None:
    """A digest of the matching files in a base model's own folder; None for a model from elsewhere."""
    source = settings["model"]["source"]
    return contents.folder_digest(source["path"], patterns) if source["type"] == "folder" else None


@dataclass(frozen=True)
class JobPaths:
    """The paths that one job reads, or that one target asks for."""

    names: Mapping[str, str]  # the wildcards' values
    # Those of the run that the wildcards name, or of the dataset and the model that runs share
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, runs: Runs, names: Mapping[str, str]) -> JobPaths:
        """Find the settings that the wildcards name.

        UserError: if the configuration has no such run, dataset or model.
        """
        if "run" in names:
            return cls(names, runs.of_run(names["run"]))
        shared = ("dataset", "model", "profiled")
        return cls(names, runs.having(**{kind: names[kind] for kind in shared if kind in names}))

    def fill(self, *patterns: str) -> list[str]:
        """Paths with the wildcards filled in, and the run's dataset, model and sequence length."""
        values = {
            "dataset": self.settings["dataset"]["name"],
            "model": self.settings["model"]["name"],
            "profiled": profiled(self.settings["memory"]["model"])[0],
            "sequence_length": self.settings["training"]["sequence_length"],
        }
        return [pattern.format(**{**values, **self.names}) for pattern in patterns]

    # --- the dataset and the base model ------------------------------------------------------------

    def source_files(self) -> list[str]:
        """Data files, so that a changed one reruns; the script explains a missing one."""
        dataset = self.settings["dataset"]
        sources = dataset["sources"] + dataset["external_test"] + dataset["test"]
        given = [path for source in sources for path in source.get("paths", [])]
        return self.policy("sources") + [path for path in given if os.path.exists(path)]

    def policy(self, part: str = "screening") -> list[str]:
        """The project's files that a part of the task reads, so that an edited one reruns."""
        patterns = registry.task(self.settings["task"]).project_files.get(part, ())
        return [path for pattern in patterns for path in project_files(pattern)]

    def benchmark_file(self) -> list[str]:
        """A benchmark's own file; where it comes as a package, the project's files beside it."""
        path = self.settings["dataset"]["benchmark"].get("path")
        if path is None:
            return self.policy("benchmark")
        return [path] if os.path.exists(path) else []

    # --- the memory's scenarios --------------------------------------------------------------------

    def profile(self) -> dict[str, dict[str, Any]]:
        """The scenarios of the memory profile, by name."""
        return run_scenarios.profile_scenarios(self.settings)

    def profile_comparison(self, name: str) -> str:
        """Where a scenario of the profile lands: under the run if it has adapters, and so a rank."""
        ranked = self.profile()[name]["lora"] is not None
        pattern = "results/{run}/memory/" if ranked else "results/memory/{profiled}/"
        return self.fill(f"{pattern}{name}/compare.json")[0]

    def profile_comparisons(self) -> list[str]:
        """The comparisons of all scenarios of the memory profile, in the order of the profile."""
        return [self.profile_comparison(name) for name in self.profile()]

    def step_comparison(self) -> str:
        """The scenario whose step the timeline shows: the profile's last one with adapters, else its last."""
        scenarios = self.profile()
        ranked = [name for name, scenario in scenarios.items() if scenario["lora"] is not None]
        return self.profile_comparison((ranked or list(scenarios))[-1])

    def scenarios_of_profile(self, with_rank: bool) -> dict[str, dict[str, Any]]:
        """The profile's scenarios with adapters, and so a rank, or those without, by name and without their model."""
        return {
            name: {key: value for key, value in scenario.items() if key != "model"}
            for name, scenario in self.profile().items()
            if (scenario["lora"] is not None) == with_rank
        }

    def unread_answers(self) -> list[str]:
        """Answers of the profile that no job reads, as inputs, so that a missing one is made again."""
        folders = [os.path.dirname(path) for path in self.profile_comparisons()]
        return [f"{folder}/{kind}.json" for folder in folders for kind in ("estimate", "trace")]

    def step_config(self) -> str:
        """The configuration of the prepared base model, for the run's own training step.

        UserError: if the job's scenario is another one: no job makes those of the memory profile alone.
        """
        name = self.names["scenario"]
        if name != "training":
            raise UserError(
                f"The memory profile has no scenario of this name: {name}.",
                where="memory.scenarios in the configuration",
                found=name,
                allowed=", ".join(self.profile()),
                write=f"memory:\n  scenarios:\n    {name}: {{method: qlora, precision: bf16}}",
            )
        return self.fill(f"{BASE}/config.json")[0]

    def profiled_config(self) -> str:
        """The configuration of the model that the memory profile is about: of config/models/, or the Hub's."""
        if self.profiled_description():
            return self.fill("results/memory/{profiled}/config.json")[0]
        return project_file(self.fill("config/models/{profiled}.json")[0])

    def profiled_description(self) -> list[str]:
        """What seals the Hub's configuration; none of a model of config/models/."""
        return (
            self.fill("results/memory/{profiled}/fetched.json")
            if profiled(self.settings["memory"]["model"])[1]
            else []
        )

    # --- what the configuration may leave out ------------------------------------------------------

    def executed(self) -> str:
        """The score of the answers that were run.

        UserError: if the configuration has no benchmark: held-out requests have no file system to run in.
        """
        if not configuration.can_execute(self.settings):
            raise configuration.nothing_to_execute()
        return self.fill(EXECUTION)[0]

    def by_execution(self, asked: bool, prefixed: Callable[[str], str] = str) -> str | list[str]:
        """The same as an input: where the command or the configuration asks for it, or where it is there already.

        One that is there is kept: no job makes it again unasked, since nothing that a model wrote is run unasked.
        ``prefixed``: what a path is called on the disk, in a workflow that imports this one behind a prefix.
        """
        if asked or self.settings["evaluation"]["execution"] != "none":
            return self.executed()
        kept = self.fill(EXECUTION)[0]
        return (
            kept
            if configuration.can_execute(self.settings) and os.path.exists(prefixed(kept))
            else []
        )

    def more_evaluations(self, asked: bool, prefixed: Callable[[str], str] = str) -> list[str]:
        """What judged the run's answers beside their text."""
        summary = self.by_execution(asked, prefixed)
        return [summary, f"{summary}l"] if summary else []

    def merging_comparison(self) -> list[str]:
        """What merging changed, and the answers behind it; none where the configuration does not ask for it."""
        names = (
            ("merging.json", "as-trained.jsonl")
            if self.settings["merging"]["compare_requests"]
            else ()
        )
        return self.fill(*(f"results/{{run}}/evaluation/{name}" for name in names))

    # --- targets -----------------------------------------------------------------------------------

    def documents(self) -> list[str]:
        """What a run is for: the card and the documents beside it, which are made from all others."""
        names = (
            "MODEL_CARD.md",
            "docs/details.md",
            "docs/publication.md",
            "report.html",
            "documents.json",
        )
        return self.fill(*(f"results/{{run}}/{name}" for name in names))

    def exports(self) -> list[str]:
        """The merged model for other programs: in the type of its weights, which changes nothing, and in eight bits."""
        dtype = self.settings["merging"]["dtype"] or self.settings["model"]["source"]["dtype"]
        exact = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
        return self.fill(*(f"results/{{run}}/export/{kind}/model.gguf" for kind in (exact, "q8_0")))

    def stages(self) -> list[str]:
        """What each stage of a run writes last, and the run's documents."""
        shared = (
            f"{DATASET}/acquire.json",
            f"{DATASET}/splits/check.json",
            f"{BASE}/description.json",
        )
        shared += (
            f"{BASE}/weights.json",
            f"{ENCODED}/encode.json",
            f"{BASE_EVALUATION}/metrics.json",
        )
        own = (
            "memory/training/compare.json",
            "training.json",
            "merged.json",
            "evaluation/metrics.json",
        )
        own += ("provenance.json",)
        return self.fill(*shared, *(f"results/{{run}}/{name}" for name in own)) + self.documents()
