# Functions and names for the rule files; no rules. What needs Snakemake's names is here, the rest in scripts/workflow/.
import re

from snakemake.iocontainers import Wildcards

from scripts.common import contents, digests, files, ledger, locks, outdated
from scripts.common.errors import UserError
from scripts.memory import check_run, cluster
from scripts.settings import configuration, run_scenarios
from scripts.settings.runs import Runs
from scripts.training import describe_model
from scripts.workflow import around_jobs
from scripts.workflow.job_paths import (
    BASE,
    BASE_EVALUATION,
    BENCHMARK,
    DATASET,
    ENCODED,
    FOLDER_NAME,
    MEMORY_PLACE,
    RUN_NAME,
    JobPaths,
    answer_settings,
    project_file,
    project_files,
    source_folder,
)


def explained(function, *arguments, **named):
    """Call a function of the project; an error for people ends Snakemake with the message alone.

    Not with an error of Snakemake's own kind: while it looks for the rule that makes a file it takes such an error
    for "this rule can't", and where an old file of that name lies it would be called up to date.
    """
    try:
        return function(*arguments, **named)
    except UserError as error:
        sys.exit(str(error))


LIVING = locks.Living() if workflow.is_main_process else None
RUNS = explained(Runs, configuration.with_defaults(config))
for run_settings in RUNS.named.values():
    explained(check_run.check, run_settings)
    # Where a run's jobs ran is no part of the run: its documents stay the same.
    place_of_jobs = run_settings.pop("cluster")
    PUBLISH = run_settings.pop("publish")  # nor is where it goes
# The cluster's GPUs, the smallest first; none on one machine.
CLUSTER = explained(cluster.read_map, place_of_jobs["gpus"]) if place_of_jobs["gpus"] else []
if place_of_jobs["container"]:

    container: place_of_jobs["container"]


wildcard_constraints:
    run=RUN_NAME,
    dataset=FOLDER_NAME,
    model=FOLDER_NAME,
    # Not the run's own training step, which has rules of its own.
    scenario=f"(?!training$){FOLDER_NAME}",


# --- from wildcards to settings and paths -----------------------------------------------------------


def by_job(method, *arguments):
    """A function of wildcards for inputs and params: what a method of JobPaths returns for them."""
    return lambda wildcards: explained(lambda: method(JobPaths.of(RUNS, dict(wildcards.items())), *arguments))


def of(pick):
    """The same for a function of the settings that the wildcards name."""
    return by_job(lambda paths: pick(paths.settings))


settings_of = of(lambda settings: settings)


def section(*names):
    """The same for a section of the configuration: ``section("memory", "gate")``."""

    def pick(chosen):
        for name in names:
            chosen = chosen[name]
        return chosen

    return of(pick)


def place(*patterns):
    """An input function: the path, or the paths, with what their run is about filled in."""
    return by_job(lambda paths: paths.fill(*patterns) if len(patterns) > 1 else paths.fill(*patterns)[0])


def each_run(find):
    """An input function for targets: a pattern, or a method of JobPaths, for each run of the configuration."""
    fill = place(find) if isinstance(find, str) else by_job(find)

    def paths(_):
        filled = [fill(Wildcards(fromdict={"run": run})) for run in RUNS.named]
        return [one for some in filled for one in ([some] if isinstance(some, str) else some)]

    return paths


def code(script):
    """The digest of what a job computes with beside its inputs: a param, so that Snakemake runs it again when it differs.

    ``script`` lies below scripts/. When the job's turn comes its inputs are there, and Snakemake asks once more.
    """
    value = digests.code_digest(digests.ROOT / "scripts" / script)
    # Not with a parameter named `input`: Snakemake takes such a value for derived and does not compare it.
    return lambda wildcards, **job: contents.job_digest(value, job["input"])


# The screen's rules: an edited one judges again.
POLICY = project_files("config/screen/*.yaml")

# --- what is run only on request -------------------------------------------------------------------------

# Asked for by the target's name, in a workflow that imports this one behind a prefix, or by the file's.
EXECUTE = workflow.is_main_process and any(
    re.search(r"(^|_)execute$|/evaluation/execution\.jsonl?$", one) for one in sys.argv[1:]
)
# What a path of this workflow is called in the importing one.
PREFIXED = workflow.modifier.modify_path
# Where a job runs in a process of its own, this has been decided before.
EXECUTES = (
    EXECUTE
    or not workflow.is_main_process
    or any(chosen["evaluation"]["execution"] != "none" for chosen in RUNS.named.values())
)

# --- what comes first ----------------------------------------------------------------------------------

# The rules that a run's price and its gate wait for go first. Each of their jobs holds one of the profile's `before_gate`;
# the download of the weights takes all of them, and so comes after the verdict, however many cores there are.
FIRST = 100
ALL_BEFORE_GATE = 1000

# --- what a job asks a cluster for -------------------------------------------------------------------


def on_cluster(field, needed):
    """A resource of a job on a GPU, `gres` or `partition`: of the smallest of the cluster's that holds what is needed.

    ``needed`` takes the job's inputs and returns bytes. None, which sets nothing, on one machine and where the map
    leaves the field out.
    """
    return lambda wildcards, input: explained(cluster.smallest, needed(input), CLUSTER).get(field) if CLUSTER else None


def needed_by_step(input):
    return explained(cluster.step_bytes, input.get("trace") or input.gate)


def minutes_of_training(wildcards, input):
    """On one machine nothing ends a job by its time, and a damaged gate is the job's to explain."""
    return explained(cluster.training_minutes, input.gate) if CLUSTER else 12 * 60


def needed_by_evaluation(input):
    return explained(cluster.evaluation_job_bytes, input.weights)


def gpus_of_cluster(wildcards, input):
    """The GPUs that jobs on the cluster may get; with a parameter named `input`, so that the place reruns nothing."""
    return [entry["gpu"] for _, entry in CLUSTER]


def gpus_of_this_machine(wildcards):
    """So that no job asks which GPU is free while another uses it; a cluster's GPUs are other machines'."""
    return None if CLUSTER else run_scenarios.gpus_of_training(settings_of(wildcards))


def publication(paths):
    """The last file of a publication: the list of what would be published, or with `upload: true` the upload's report."""
    if len(RUNS.named) > 1:
        raise UserError(
            "Only one run can be published at a time: publish names one repository of each kind.",
            where="sweep and lora.rank in the configuration",
            found=list(RUNS.named),
            allowed="a configuration of one run",
            write="lora:\n  rank: 16\nsweep: {}",
        )
    return paths.fill(f"results/{{run}}/publish/{'published' if PUBLISH['upload'] else 'plan'}.json")


# --- before and after the jobs -----------------------------------------------------------------------

# Here and not before the first job: there may be none.
if workflow.is_main_process and not {"--touch", "-t"} & set(sys.argv):
    known = each_run(JobPaths.stages)(None)
    explained(outdated.refuse_unrecorded, known)
    explained(ledger.refuse_damaged, sorted({outdated.folder_of(path) for path in known}))


def plain(jobs):
    """Snakemake's jobs as the project's own."""
    return [
        around_jobs.Job(
            job.rule.name, dict(job.wildcards.items()), [*map(str, job.output)], "gpu" in job.rule.resources
        )
        for job in jobs
    ]


def before_the_first_job():
    if workflow.is_main_process:
        LIVING.record()
    if workflow.is_main_process and not workflow.touch:
        planned = list(workflow.dag.needrun_jobs())
        done = [str(path) for job in workflow.dag.jobs if job not in planned for path in job.output]
        explained(around_jobs.before_the_first, plain(planned), done, RUNS, bool(workflow.local_exec))


def after_an_error():
    if workflow.is_main_process and not workflow.touch:
        around_jobs.name_outdated()


def after_the_last_job():
    if workflow.is_main_process and not workflow.touch:
        around_jobs.name_outdated(around_jobs.results_of(plain(workflow.dag.needrun_jobs(exclude_finished=False))))
        # Inputs too: a score that is kept is no job's output.
        made = {str(path) for job in workflow.dag.jobs for path in (*job.output, *job.input)}
        lines = list(around_jobs.summary(RUNS, made))
        if lines:
            print("", *lines, "", sep="\n", file=sys.stderr)
