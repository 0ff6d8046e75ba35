"""Functions of wildcards, which rules give as inputs, params and resources, for what a command was asked to do.

Standard library, PyYAML and jsonschema only: Snakemake itself calls this.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dryfit.common import device
from dryfit.common.errors import UserError
from scripts.common import code_digests, contents
from scripts.runs import check_configuration, cluster, configuration, run_scenarios
from scripts.runs.job_paths import JobPaths
from scripts.runs.runs import Runs
from scripts.tasks.support import own, registry


def exit_on_user_error(function: Callable, *arguments: Any, **named: Any) -> Any:
    """Call a function of the project; an error for people ends Snakemake with the message alone.

    Not with an error of Snakemake's own kind: while it looks for the rule that makes a file it takes such an error
    for "this rule can't", and where an old file of that name lies it would be called up to date.
    """
    try:
        return function(*arguments, **named)
    except UserError as error:
        sys.exit(str(error))


def asks_for_execution(command: str | None = None) -> bool:
    """Whether a command, without an argument the one of this run, names what is run only on request.

    By the target's name, in a workflow that imports this one behind a prefix, or by the file's.
    """
    words = shlex.split(os.environ["SECURECLI_COMMAND"] if command is None else command)
    return any(re.search(r"(^|_)execute$|/evaluation/execution\.jsonl?$", one) for one in words)


def threads_beside(cores: int | None) -> int:
    """Threads of a job that leaves a core to another: all cores but one, at most eight; None: not on this machine.

    Evaluations and checks of a small model gain little from a second core, and two of them at the same time gain all of
    it.
    """
    return 8 if cores is None else max(1, min(8, cores - 1))


def code(script: str) -> dict[str, Any]:
    """Params with digests of what a job computes with beside its inputs; Snakemake runs it again when one differs.

    ``script`` lies below scripts/. ``code`` is one digest of all, with the inputs that no job makes. ``missing`` says
    which inputs are not there. The others are the modules', so that Snakemake's reason names the one that has changed.
    They repeat their names: Snakemake compares the values of params alone.
    """
    path = code_digests.ROOT / "scripts" / script
    value, modules = code_digests.code_digest(path), code_digests.module_digests(path)

    # Not with a parameter named `input`: Snakemake takes such a value for derived and does not compare it.
    def whole(wildcards: Any, **job: Any) -> str:
        return contents.job_digest(value, job["input"])

    def missing(wildcards: Any, **job: Any) -> str:
        return contents.missing_inputs(job["input"])

    named = {name: f"{name} {digest[:8]}" for name, digest in modules.items()}
    return {"code": whole, "missing": missing, **named}


class JobFunctions:
    """The functions for the runs of a configuration.

    Attributes
    ----------
    runs
        The runs. Their settings leave out where jobs run and where files go, so these change no document.
    publish
        Where a run goes.
    container
        The image that jobs run in, if any.
    gpus
        The cluster's GPUs, the smallest first; none on one machine.
    at_first_plan
        What is called before the paths of a job are given, until it sets itself to None.
    """

    def __init__(
        self, config: Mapping[str, Any], on_this_machine: Callable[[], bool] = lambda: True
    ) -> None:
        """Check a configuration; for all that is wrong a :class:`UserError`.

        ``on_this_machine``: whether the jobs run here, which Snakemake knows when it has read all rules.
        """
        self._on_this_machine = on_this_machine
        self.at_first_plan: Callable[[], None] | None = None
        self.runs = Runs(configuration.with_defaults(config))
        for settings in self.runs.named.values():
            check_configuration.check(settings)
            place, self.publish = settings.pop("cluster"), settings.pop("publish")
        self.container: str | None = place["container"]
        self.gpus = cluster.read_map(place["gpus"]) if place["gpus"] else []

    def from_job(self, method: Callable, *arguments: Any) -> Callable:
        """A function of wildcards for inputs and params: what a method of JobPaths returns for them."""

        def find(wildcards: Any) -> Any:
            if self.at_first_plan:
                self.at_first_plan()
            return exit_on_user_error(
                lambda: method(JobPaths.of(self.runs, dict(wildcards.items())), *arguments)
            )

        return find

    def from_settings(self, pick: Callable[[Mapping[str, Any]], Any]) -> Callable:
        """The same for a function of the settings that the wildcards name."""
        return self.from_job(lambda paths: pick(paths.settings))

    def settings_section(self, *names: str) -> Callable:
        """The same for a section of the configuration: ``settings_section("memory", "gate")``."""

        def pick(chosen: Mapping[str, Any]) -> Any:
            for name in names:
                chosen = chosen[name]
            return chosen

        return self.from_settings(pick)

    def task_part(self, part: str) -> Callable:
        """The same for a part of the task: its options, and digests of its code and of a user's own functions."""
        return self.from_settings(lambda settings: registry.for_job(settings["task"], part))

    def own_metrics(self) -> Callable:
        """The same for the scores where some of them are a user's own functions; else None."""

        def pick(settings: Mapping[str, Any]) -> dict | None:
            param = registry.for_job(settings["task"], "scores")
            return param if any(map(own.is_own, param["options"].get("metrics", ()))) else None

        return self.from_settings(pick)

    def path_of(self, *patterns: str) -> Callable:
        """An input function: the path, or the paths, with what their run is about filled in."""
        return self.from_job(
            lambda paths: paths.fill(*patterns) if len(patterns) > 1 else paths.fill(*patterns)[0]
        )

    def paths_where(self, condition: Callable[[Mapping[str, Any]], Any]) -> Callable:
        """The same for paths of runs whose settings meet a condition; of others none."""

        def paths_of(*patterns: str) -> Callable:
            path = self.path_of(*patterns)
            holds = self.from_settings(condition)
            return lambda wildcards: path(wildcards) if holds(wildcards) else []

        return paths_of

    def each_run(self, find: str | Callable) -> Callable:
        """An input function for targets: a pattern, or a method of JobPaths, for each run of the configuration."""
        fill = self.path_of(find) if isinstance(find, str) else self.from_job(find)

        def paths(_: object) -> list[str]:
            filled = [fill({"run": run}) for run in self.runs.named]
            return [one for some in filled for one in ([some] if isinstance(some, str) else some)]

        return paths

    def names_in_profile(self) -> tuple[list[str], list[str]]:
        """Names of the memory profile's scenarios with a rank, and of those without: a rule's outputs.

        UserError: if they are not the same in each run.
        """
        known: dict[str, tuple[list[str], list[str]]] = {}
        for name in self.runs.named:
            paths = JobPaths.of(self.runs, {"run": name})
            known[name] = tuple(
                list(paths.scenarios_of_profile(with_rank)) for with_rank in (True, False)
            )
        first, *others = known
        for other in others:
            if [set(names) for names in known[other]] != [set(names) for names in known[first]]:
                raise UserError(
                    "Two runs of the sweep differ in the scenarios of their memory profile.",
                    where="sweep in the configuration",
                    found=f"{first}: {known[first]}; {other}: {known[other]}",
                    allowed="scenarios of the same names, with adapters in each run or in none",
                    write="a second --configfile for the runs with another memory.scenarios",
                )
        return known[first]

    def publication(self, paths: JobPaths) -> str:
        """The last file of a publication: the list of what would be published, or with `upload: true` the report."""
        if len(self.runs.named) > 1:
            raise UserError(
                "Only one run can be published at a time: publish names one repository of each kind.",
                where="sweep and lora.rank in the configuration",
                found=list(self.runs.named),
                allowed="a configuration of one run",
                write="lora:\n  rank: 16\nsweep: {}",
            )
        return paths.fill(
            f"results/{{run}}/publish/{'published' if self.publish['upload'] else 'plan'}.json"
        )[0]

    def executes(self) -> bool:
        """Whether the configuration itself asks that answers be run."""
        return any(
            chosen["evaluation"]["execution"] != "none" for chosen in self.runs.named.values()
        )

    # --- what a job asks a cluster for; Snakemake fills the parameter `input` by its name -----------------

    def on_cluster(self, field: str, needed: Callable[[Any], int]) -> Callable:
        """A resource of a job on a GPU, `gres` or `partition`: of the cluster's smallest GPU that holds what is needed.

        ``needed`` takes the job's inputs and returns bytes. The function gives None, which sets nothing, on one machine
        and where the map leaves the field out.
        """
        return lambda wildcards, input: (
            exit_on_user_error(lambda: cluster.smallest(needed(input), self.gpus)).get(field)
            if self.gpus
            else None
        )

    def minutes_of_training(self, wildcards: Any, input: Any) -> int:
        """On one machine nothing ends a job by its time, and a damaged gate is the job's to explain."""
        return exit_on_user_error(cluster.training_minutes, input.gate) if self.gpus else 12 * 60

    def gpus_of_cluster(self, wildcards: Any, input: Any) -> list[Any]:
        """The GPUs that jobs may get on the cluster; it takes `input`, so that another cluster reruns nothing."""
        return [entry["gpu"] for _, entry in self.gpus]

    def gpus_of_this_machine(self, wildcards: Any) -> int | None:
        """So that no job asks which GPU is free while another uses it; a cluster's GPUs are other machines'."""
        return None if self.gpus else self.gpus_of_training(wildcards)

    def gpus_of_training(self, wildcards: Any) -> int:
        return self._gpus(run_scenarios.gpus_of_training)(wildcards)

    def gpu(self, wildcards: Any) -> int:
        """The one GPU of a job that computes with a whole model."""
        return self._gpus(lambda settings: 1)(wildcards)

    def _gpus(self, wanted: Callable[[Mapping[str, Any]], int]) -> Callable:
        """As many as wanted; 0 where a small model computes on the CPU, so that two jobs may share its cores.

        A model inside a wheel is small. Of others two may not fit the host's memory, which is checked
        for one at a time.
        """

        def count(settings: Mapping[str, Any]) -> int:
            place = settings["training"]["device"]
            processor = place == "auto" and self._on_this_machine() and not device.cuda_devices()
            small = settings["model"]["source"]["type"] == "wheel"
            return 0 if small and (processor or place == "cpu") else wanted(settings)

        return self.from_settings(count)


def needed_by_step(input: Any) -> int:
    """Bytes of a training step, by its trace or its gate."""
    return cluster.step_bytes(input.get("trace") or input.gate)


def needed_by_evaluation(input: Any) -> int:
    """Bytes of an evaluation, by the report beside the folder of its weights."""
    folder = input.get("weights") or input.get("base")
    os.stat(folder)  # says that it is missing, if it is; then Snakemake asks again when it is there
    return cluster.evaluation_job_bytes(f"{folder}.json")
