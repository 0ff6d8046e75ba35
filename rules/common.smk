# Functions and names for the rule files; no rules. Standard library, PyYAML and jsonschema only.
from snakemake.iocontainers import Wildcards

from scripts.common import contents, device, digests, files, ledger, locks, outdated
from scripts.common.errors import UserError
from scripts.documents import terminal_summary
from scripts.execution import sandbox
from scripts.memory import check_run, cluster, disk
from scripts.settings import configuration, run_scenarios
from scripts.settings.runs import Runs
from scripts.training import describe_model


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


# Names of folders, never paths. The rank ends a run's name, so results/dataset/... can never be taken for a run.
FOLDER_NAME = r"[a-z0-9][a-z0-9._-]*"
RUN_NAME = rf"{FOLDER_NAME}-r[1-9]\d*"
# The folder that holds scenarios; the run in it keeps its own constraint.
MEMORY_PLACE = f"memory/{FOLDER_NAME}|{RUN_NAME}/memory"


wildcard_constraints:
    run=RUN_NAME,
    dataset=FOLDER_NAME,
    model=FOLDER_NAME,
    # Not the run's own training step, which has rules of its own.
    scenario=f"(?!training$){FOLDER_NAME}",


# --- from a path to the settings behind it ----------------------------------------------------------


def settings_of(wildcards):
    """The settings that a job's path names: those of its run, or of the dataset and model that runs share."""
    names = dict(wildcards.items())
    if "place" in names:  # of a scenario: in a run, or in the folder of the model that is profiled
        first, _, second = names["place"].partition("/")
        names = {"profiled": second} if first == "memory" else {"run": first}
    if "run" in names:
        return explained(RUNS.of_run, names["run"])
    return explained(RUNS.having, **{kind: names[kind] for kind in ("dataset", "model", "profiled") if kind in names})


def of(pick):
    """A function of wildcards for params and inputs: what ``pick`` takes from the settings that the path names."""
    return lambda wildcards: pick(settings_of(wildcards))


def section(*names):
    """The same for a section of the configuration: ``section("memory", "gate")``."""

    def pick(chosen):
        for name in names:
            chosen = chosen[name]
        return chosen

    return of(pick)


def place(*patterns):
    """An input function: paths with what their run is about filled in, its dataset, model and sequence length."""

    def paths(wildcards):
        chosen = settings_of(wildcards)
        names = {
            "dataset": chosen["dataset"]["name"],
            "model": chosen["model"]["name"],
            "profiled": chosen["memory"]["model"],
            "sequence_length": chosen["training"]["sequence_length"],
        }
        filled = [pattern.format(**{**names, **dict(wildcards.items())}) for pattern in patterns]
        return filled[0] if len(filled) == 1 else filled

    return paths


BASE = "results/models/{model}"
DATASET = "results/dataset/{dataset}"
ENCODED = "results/dataset/{dataset}/encoded/{model}-{sequence_length}"
BENCHMARK = "results/dataset/{dataset}/benchmark"
EXAMPLES = "results/dataset/{dataset}/examples"
BASE_EVALUATION = "results/evaluation/{dataset}/{model}"


def each_run(path):
    """An input function for targets: ``path``, a pattern or an input function, for each run of the configuration."""
    fill = place(path) if isinstance(path, str) else path

    def paths(_):
        filled = [fill(Wildcards(fromdict={"run": run})) for run in RUNS.named]
        return [one for some in filled for one in ([some] if isinstance(some, str) else some)]

    return paths


def code(script):
    """Digest of a script (below scripts/), the project modules it imports and its environment's pins.

    With them the digest of what the job reads and no other job makes, as data of the user, tables and templates. As a param:
    Snakemake runs a job again when the value differs from the one that its outputs were made with. A
    missing input makes it differ too. Without that, an output whose input a failed job (or a person) has removed
    would pass as new. When the job's turn comes its inputs are there, and Snakemake asks for the value once more.
    """
    value = digests.code_digest(digests.ROOT / "scripts" / script)

    # Not with a parameter named `input`: Snakemake takes such a value for derived and does not compare it.
    def of_job(wildcards, **job):
        missing = [path for path in job["input"] if not os.path.exists(path) and not path.startswith(".snakemake/")]
        given = [path for path in job["input"] if not path.startswith(("results/", ".snakemake/"))]
        reads = f"{value}, reads {contents.given_digest(given)}" if given else value
        return f"{reads}, without {', '.join(missing)}" if missing else reads

    return of_job


def project_file(path):
    """A file of the project as an input; relative in the project's folder, so that moving the folder reruns nothing."""
    return path if Path.cwd() == digests.ROOT else str(digests.ROOT / path)


# The screen's rules: an edited one judges again.
POLICY = [
    project_file(f"config/screen/{path.name}") for path in sorted((digests.ROOT / "config/screen").glob("*.yaml"))
]


# What the embedded data is made from.
GRAMMAR = [
    project_file(f"config/datasets/embedded/{path.name}")
    for path in sorted((digests.ROOT / "config/datasets/embedded").glob("*.yaml"))
]


# The models that the planner knows.
MODELS = [
    project_file(f"config/models/{path.name}") for path in sorted((digests.ROOT / "config/models").glob("*.json"))
]


# --- inputs that depend on the settings --------------------------------------------------------------


def source_files(wildcards):
    """Data files, so that a changed one reruns; a missing one of the user's own is the script's to explain."""
    dataset = settings_of(wildcards)["dataset"]
    sources = dataset["sources"] + dataset["external_test"]
    return GRAMMAR + [path for source in sources for path in source.get("paths", []) if os.path.exists(path)]


def examples_input(wildcards):
    """The pairs of a package, where a source of the configuration names one."""
    if configuration.examples_source(settings_of(wildcards)) is None:
        return {}
    names = ("examples.json", "pairs.jsonl", "LICENSE")
    made, pairs, *unread = place(*(f"{EXAMPLES}/{name}" for name in names))(wildcards)
    return {"examples": made, "example_pairs": pairs, "unread_examples": unread}


def source_folder(chosen, patterns):
    """What matching files of a base model's own folder hold; None for a model from elsewhere."""
    source = chosen["model"]["source"]
    return contents.folder_digest(source["path"], patterns) if source["type"] == "folder" else None


def benchmark_input(wildcards):
    """The benchmark's tasks, where the configuration names one: they are taken out of the data."""
    if settings_of(wildcards)["dataset"]["benchmark"] is None:
        return {}
    names = ("benchmark.json", "tasks.jsonl", "states.json", "LICENSE")
    made, tasks, *unread = place(*(f"{BENCHMARK}/{name}" for name in names))(wildcards)
    # Asked for so that they are made again when they are missing.
    return {"benchmark": made, "tasks": tasks, "unread": unread}


def asked(chosen, benchmark=False):
    """The settings that answers depend on: for the held-out requests, or for those of the benchmark."""
    names = ("batch_size", "max_new_tokens", "requests")
    answering = {name: chosen["evaluation"][name] for name in names} | {"harmful": not benchmark}
    return {**answering, "requests": chosen["dataset"]["benchmark"]["requests"]} if benchmark else answering


def on_benchmark(path):
    """An input function: a file of the run's evaluation on the benchmark; nothing where the configuration has none."""
    return lambda wildcards: place(path)(wildcards) if settings_of(wildcards)["dataset"]["benchmark"] else []


def by_execution(path):
    """The same for a file of the evaluation by execution; nothing where it is not asked for."""
    executed = lambda wildcards: settings_of(wildcards)["evaluation"]["execution"] != "none"
    return lambda wildcards: place(path)(wildcards) if executed(wildcards) else []


def evaluated_besides(wildcards):
    """What is known of a run beside its answers to held-out requests, for its record."""
    paths = [on_benchmark("results/{run}/evaluation/benchmark/comparison.json")(wildcards)]
    paths += [by_execution(f"results/{{run}}/evaluation/execution.{kind}")(wildcards) for kind in ("json", "jsonl")]
    return [path for path in paths if path]


def gguf_input(wildcards):
    """The GGUF file, for a base model that comes in a wheel."""
    if settings_of(wildcards)["model"]["source"]["type"] != "wheel":
        return {}
    source = f"results/models/{wildcards.model}/source"
    return {"gguf": f"{source}/model.gguf", "license": f"{source}/LICENSE"}


# --- the memory's scenarios --------------------------------------------------------------------------


def profile(wildcards):
    """The scenarios of the memory profile, by name."""
    return run_scenarios.profile_scenarios(settings_of(wildcards))


def profile_comparison(wildcards, name):
    """Where a scenario of the profile lands: under the run if it has adapters, and so a rank."""
    ranked = profile(wildcards)[name]["lora"] is not None
    return place(
        f"results/{{run}}/memory/{name}/compare.json" if ranked else f"results/memory/{{profiled}}/{name}/compare.json"
    )(wildcards)


def profile_comparisons(wildcards):
    """The comparisons of all scenarios of the memory profile, in the order of the profile."""
    return [profile_comparison(wildcards, name) for name in profile(wildcards)]


def step_comparison(wildcards):
    """The scenario whose step the timeline shows: the profile's last one with adapters, else its last."""
    scenarios = profile(wildcards)
    ranked = [name for name, scenario in scenarios.items() if scenario["lora"] is not None]
    return profile_comparison(wildcards, (ranked or list(scenarios))[-1])


def memory_scenario(wildcards):
    """The scenario of a job: the run's own training step, or one of the memory profile."""
    if wildcards.scenario == "training":
        return run_scenarios.gated_scenario(settings_of(wildcards))
    scenarios = profile(wildcards)
    if wildcards.scenario not in scenarios:
        sys.exit(f"memory.scenarios has no {wildcards.scenario}; it has {', '.join(scenarios)}.")
    return {key: value for key, value in scenarios[wildcards.scenario].items() if key != "model"}


def memory_model(wildcards):
    """The configuration of a scenario's model: one of config/models/, or the prepared base model's, which is sealed."""
    memory_scenario(wildcards)  # a scenario that the configuration does not know stops here
    if wildcards.scenario == "training":
        config, description = place(f"{BASE}/config.json", f"{BASE}/description.json")(wildcards)
        return {"config": config, "description": description}
    return {"config": profiled_model(wildcards)}


def profiled_model(wildcards):
    """The configuration of the model that the memory profile is about."""
    return project_file(place("config/models/{profiled}.json")(wildcards))


def measurements(wildcards):
    """The measurement, where there is one: of the run's own training step, when one process can take it."""
    if wildcards.scenario == "training" and run_scenarios.gpus_of_training(settings_of(wildcards)) == 1:
        return {"measure": f"results/{wildcards.place}/training/measure.json"}
    return {}


def merging_comparison(wildcards):
    """What merging changed, and the answers that it was told from; nothing where the configuration does not ask."""
    asked = settings_of(wildcards)["merging"]["compare_requests"]
    return (
        [f"results/{wildcards.run}/evaluation/{name}" for name in ("merging.json", "as-trained.jsonl")] if asked else []
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
    leaves the field out. Snakemake asks again when the inputs are there.
    """
    return lambda wildcards, input: explained(cluster.smallest, needed(input), CLUSTER).get(field) if CLUSTER else None


def report_of_stage(path):
    """A stage's report, sealed as it is."""
    os.stat(path)  # says which file is missing, where one is; then Snakemake asks again when it is there
    return explained(files.read_report, path)


def needed_by_step(input):
    """Bytes that the allocator needs for the training step, from its trace or its gate."""
    answer = report_of_stage(input.get("trace") or input.gate)
    return answer.get("trace", answer)["required_bytes"]


def needed_by_evaluation(input):
    """Bytes that an evaluation may need, by its weights: its job is asked for before anything is traced."""
    written = report_of_stage(input.weights)  # of the base, by file; of a merged model, in all
    weights = written.get("bytes") or sum(entry["bytes"] for entry in written["files"].values())
    return cluster.evaluation_bytes(weights)


def gpus_of_cluster(wildcards, input):
    """The GPUs that jobs on the cluster may get; with a parameter named `input`, so that the place reruns nothing."""
    return [entry["gpu"] for _, entry in CLUSTER]


def gpus_of_this_machine(wildcards):
    """Who asks what is free of a machine's GPUs doesn't run beside who uses them; a cluster's are other machines'."""
    return None if CLUSTER else run_scenarios.gpus_of_training(settings_of(wildcards))


# --- targets -----------------------------------------------------------------------------------------


def documents(wildcards):
    """What a run is for: the card, the documents beside it, and where it all came from."""
    names = ["MODEL_CARD.md", "docs/memory-profile.md", "docs/publication.md", "report.html", "planner.html"]
    names += ["documents.json", "provenance.json", "bill-of-materials.cdx.json", "ro-crate-metadata.json"]
    return [f"results/{wildcards.run}/{name}" for name in names]


def exports(wildcards):
    """The merged model for other programs: in the type of its weights, which changes nothing, and in eight bits."""
    chosen = settings_of(wildcards)
    dtype = chosen["merging"]["dtype"] or chosen["model"]["source"]["dtype"]
    exact = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    return [f"results/{wildcards.run}/export/{kind}/model.gguf" for kind in (exact, "q8_0")]


def stages_of(wildcards):
    """What each stage of a run has written last, and its documents."""
    shared = [f"{DATASET}/acquire.json", f"{DATASET}/splits/check.json", f"{BASE}/description.json"]
    shared += [f"{BASE}/weights.json", f"{ENCODED}/encode.json", f"{BASE_EVALUATION}/metrics.json"]
    own = ["memory/training/compare.json", "training.json", "merged/manifest.json", "evaluation/metrics.json"]
    return place(*shared, *(f"results/{{run}}/{name}" for name in own))(wildcards) + documents(wildcards)


# Here and not before the first job: there may be none.
if workflow.is_main_process and not {"--touch", "-t"} & set(sys.argv):
    known = each_run(stages_of)(None)
    explained(outdated.refuse_unrecorded, known)
    explained(ledger.refuse_damaged, sorted({outdated.folder_of(path) for path in known}))


def publication(wildcards):
    """What is published of a run: the list of it, and with `upload: true` what came of the upload."""
    if len(RUNS.named) > 1:
        sys.exit("publish names one repository for each kind, and the configuration asks for several runs: choose one.")
    return f"results/{wildcards.run}/publish/{'published' if PUBLISH['upload'] else 'plan'}.json"


# --- before and after the jobs -----------------------------------------------------------------------


def planned_outputs(jobs):
    """Outputs of jobs in the folders of results, and those of them that are documents."""
    outputs = [(job, path) for job in jobs for path in map(str, job.output) if path.startswith("results/")]
    return [path for _, path in outputs], [path for job, path in outputs if "render_" in job.rule.name]


def planned_writes(jobs):
    """What the jobs will write, by run, of the runs that may be refused; the base models, which runs share, first."""
    found = {}
    for job in jobs:
        if job.rule.name in disk.RULES:
            chosen, names = settings_of(job.wildcards), dict(job.wildcards.items())
            one = found.setdefault(names.get("run", chosen["model"]["name"]), (chosen, [], []))
            one[1].append(disk.RULES[job.rule.name])
            one[2].extend([names["type"]] if "type" in names else [])
    written = [
        disk.Planned(name, check_run.sizes(chosen), stages, exports)
        for name, (chosen, stages, exports) in found.items()
        if not chosen["memory"]["gate"]["override"]
    ]
    return sorted(written, key=lambda one: "base model" not in one.stages)


def before_the_first_job():
    """Check what can be known now, while nothing has been touched; then let no old document pass for a new one."""
    if not workflow.is_main_process:
        return
    LIVING.record()
    if workflow.touch:
        return
    jobs = list(workflow.dag.needrun_jobs())
    if workflow.local_exec:  # on a cluster, this machine is not the one that computes
        asking = ("gate_memory", "price_run")  # what would fit; a laptop may ask for another machine
        for job in (job for job in jobs if "gpu" in job.rule.resources and job.rule.name not in asking):
            chosen = settings_of(job.wildcards)
            gpus = run_scenarios.gpus_of_training(chosen) if job.rule.name == "train_adapter" else 1
            explained(device.refuse_missing, chosen["training"]["device"], gpus)
        if any(job.rule.name == "execute_answers" for job in jobs):  # not found out after hours of training
            explained(sandbox.must_work)
    explained(disk.refuse_full, planned_writes(jobs))
    current = [str(path) for job in workflow.dag.jobs if job not in jobs for path in job.output]
    outdated.before(*planned_outputs(jobs), current)


def name_outdated(made=()):
    """Bring the marks up to date, and say where they are."""
    if workflow.is_main_process and not workflow.touch:
        for mark in outdated.after(made):
            print(f"{mark} names files that were made from what is another by now.", file=sys.stderr)


def after_the_last_job():
    """Nothing that was made is outdated any more. Then what a person wanted to know."""
    if not workflow.is_main_process or workflow.touch:
        return
    name_outdated(planned_outputs(workflow.dag.needrun_jobs(exclude_finished=False))[0])
    made = {str(path) for job in workflow.dag.jobs for path in job.output}
    lines = [
        line
        for run in RUNS.named
        for line in terminal_summary.run_lines(run, profile_comparisons(Wildcards(fromdict={"run": run})), made)
    ]
    lines += terminal_summary.sweep_lines(f"results/{RUNS.name}-sweep/sweep.json", made)
    if lines:
        print("", *lines, "", sep="\n", file=sys.stderr)
