"""What one command checks before its first job, and says after its last. Standard library, PyYAML and jsonschema."""

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common import device
from dryfit.common.errors import UserError
from dryfit.common.files import read_json, write_jsonl, write_report
from scripts.common import disk, outdated
from scripts.common.machine import refuse_missing_trackers
from scripts.documents import terminal_summary
from scripts.runs import check_configuration, run_scenarios
from scripts.runs.job_paths import BASE_EVALUATION, EXECUTION, JobPaths
from scripts.runs.runs import Runs
from scripts.runs.training_backends import refuse_missing_trl
from scripts.tasks.support import registry

ANSWERS = (
    f"{BASE_EVALUATION}/answers.jsonl",
    "results/{run}/evaluation/answers.jsonl",
)  # what a score is about
ASK_WHAT_FITS = ("gate_memory", "check_resources")  # a laptop may ask them about another machine


class Job(NamedTuple):
    """A job that Snakemake plans: its rule, the values of its wildcards, its outputs, and whether it asks for a GPU."""

    rule: str
    names: Mapping[str, str]
    outputs: Sequence[str]
    takes_gpu: bool


def results_of(jobs: Iterable[Job]) -> list[str]:
    return [path for job in jobs for path in job.outputs if path.startswith("results/")]


def planned_writes(jobs: Iterable[Job], runs: Runs) -> list[disk.Planned]:
    """What the jobs will write, by run, of the runs that may be refused; the base models, which runs share, first."""
    by_run: dict[str, tuple[Mapping, list[str], list[str]]] = {}
    for job in jobs:
        if job.rule in disk.RULES:
            settings = JobPaths.of(runs, job.names).settings
            one = by_run.setdefault(
                job.names.get("run", settings["model"]["name"]), (settings, [], [])
            )
            one[1].append(disk.RULES[job.rule])
            one[2].extend([job.names["type"]] if "type" in job.names else [])
    written = [
        disk.Planned(name, check_configuration.sizes(settings), stages, exports)
        for name, (settings, stages, exports) in by_run.items()
        if not settings["memory"]["gate"]["override"]
    ]
    return sorted(written, key=lambda one: "base model" not in one.stages)


def before_the_first(
    planned: Sequence[Job],
    done: Iterable[str],
    runs: Runs,
    on_this_machine: bool,
    own_packages: bool = True,
) -> None:
    """Refuse what this machine can't do, while nothing has been touched; then remove or mark what will be outdated.

    Parameters
    ----------
    on_this_machine
        Whether the jobs run here; a cluster's machines are others.
    own_packages
        Whether they run with the packages of this environment; else each job says what it lacks.

    Raises
    ------
    UserError
        If the machine has no GPU, no sandbox, no package or no room on its disk for a job that needs it.
    """
    for job in planned:
        if job.rule == "train_adapter":
            training = JobPaths.of(runs, job.names).settings["training"]
            refuse_missing_trl(training, own_packages)
            if own_packages:
                refuse_missing_trackers(training["report_to"])
    if on_this_machine:
        for job in planned:
            if job.takes_gpu and job.rule not in ASK_WHAT_FITS:
                settings = JobPaths.of(runs, job.names).settings
                gpus = (
                    run_scenarios.gpus_of_training(settings) if job.rule == "train_adapter" else 1
                )
                device.refuse_missing(settings["training"]["device"], gpus)
        for job in planned:
            if job.rule == "execute_answers":  # not found out after hours of training
                options = JobPaths.of(runs, job.names).settings["task"]
                registry.task(options, "benchmark").must_execute()
    disk.refuse_full(planned_writes(planned, runs))
    documents = results_of(job for job in planned if "render_" in job.rule)
    outdated.before(results_of(planned), documents, done)
    for score in drop_scores(results_of(planned), runs):
        print(
            f"{score}: the answers will be made again, so their score is dropped.", file=sys.stderr
        )
        print("`snakemake execute` with the same arguments runs the new answers.", file=sys.stderr)


def drop_scores(planned: Collection[str], runs: Runs) -> list[str]:
    """Empty the score of each run whose answers will be made again, but not run again; returns what was emptied.

    The file stays, since the documents read it. It gets a time before all others, so that its rule would make it again.
    """
    dropped = []
    for run in runs.named:
        score, *answers = JobPaths.of(runs, {"run": run}).fill(EXECUTION, *ANSWERS)
        if score in planned or not set(answers) & set(planned) or not os.path.exists(score):
            continue
        if "dropped" not in read_json(score):
            write_jsonl(f"{score}l", [])
            write_report(score, {"dropped": True}, f"{score}l")
            os.utime(score, (1, 1))
            dropped.append(score)
    return dropped


def record_what_jobs_ran_with(persistence: Any) -> None:
    """Let Snakemake record a job's params as they are when it has run.

    Snakemake keeps what it compared while it planned, although it asks for the params once more when the job's turn
    comes. An input that another job was still to make would stay missing in the record, and the next plan would make
    all of it again.
    """
    of_class = type(persistence)._params.__wrapped__
    persistence._params = lambda job: of_class(persistence, job)


def refuse_unrecorded(paths: Iterable[str], persistence: Any) -> None:
    """Raise where Snakemake does not know what a result was made with: it would go by the times of files alone.

    What a killed job has left will be made again, so it needs no record.
    """
    from snakemake.io import IOFile

    there = [path for path in paths if os.path.exists(path)]
    unknown = [path for path in there if persistence.metadata(IOFile(path)) is None]
    unknown = [path for path in unknown if not persistence._filter_incomplete_keys([path])]
    if unknown:
        remove = f"rm {' '.join(unknown)}" if len(unknown) <= 5 else "mv results results.before"
        raise UserError(
            "Snakemake has no record of what a result was made with, so it could not see that it is of other settings.",
            where=", ".join(unknown[:5])
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""),
            found="no readable record in .snakemake",
            allowed="results together with the .snakemake of the runs that made them; or the steps run again",
            write=f"{remove}    # then the same command again; if they are this version's and whole:"
            " snakemake --cores 1 --touch --forceall",
        )


def name_edited(documents: Sequence[str]) -> None:
    """Print which documents are not as they were written; a person may go on with one, so it is no error."""
    if documents:
        names = ", ".join(documents[:5]) + (
            f" and {len(documents) - 5} more" if len(documents) > 5 else ""
        )
        print(
            f"Edited since they were written, or damaged: {names}. `rm` one to have it written again.",
            file=sys.stderr,
        )


def name_outdated(made: Collection[str] = ()) -> None:
    """Bring the lists of outdated files up to date, and print where they are."""
    for mark in outdated.after(made):
        print(
            f"{mark} names files whose inputs or settings have changed since they were made.",
            file=sys.stderr,
        )


def summary(runs: Runs, made: Collection[str]) -> Iterator[str]:
    """The lines that end a command: each run's, then the sweep's."""
    for run in runs.named:
        comparisons = JobPaths.of(runs, {"run": run}).profile_comparisons()
        card = f"results/{run}/MODEL_CARD.md"
        has_card = card in made and Path(card).is_file()
        yield from terminal_summary.run_lines(
            run, comparisons, terminal_summary.reader(made), has_card
        )
    yield from terminal_summary.sweep_lines(f"results/{runs.name}-sweep/sweep.json", made)
