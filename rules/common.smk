# Functions and names for the rule files; no rules. Standard library, PyYAML and jsonschema only.
from snakemake.exceptions import WorkflowError

from scripts.common import digests, settings
from scripts.common.errors import UserError

try:
    SETTINGS = settings.check(settings.with_defaults(config))
except UserError as error:
    raise WorkflowError(str(error))

RUN = f"{SETTINGS['run']['name']}-r{SETTINGS['lora']['rank']}"
DATASET = SETTINGS["dataset"]["name"]
MODEL = SETTINGS["model"]["name"]
# The keys of `training` that belong to a scenario; the others are about the loop around the step.
LOOP_KEYS = {
    "device",
    "epochs",
    "learning_rate",
    "max_grad_norm",
    "max_steps",
    "save_every_steps",
    "validation_rows",
    "warmup_ratio",
    "weight_decay",
}


wildcard_constraints:
    # The rank ends a run's name, so results/dataset/... can never be taken for a run.
    run=r"[a-z0-9][a-z0-9._-]*-r\d+",
    # Names of folders, never paths.
    dataset=r"[a-z0-9][a-z0-9._-]*",
    model=r"[a-z0-9][a-z0-9._-]*",
    # Not the run's own training step, which has rules of its own.
    scenario=r"(?!training$)[a-z0-9][a-z0-9._-]*",


def code(script):
    """Digest of a script (below scripts/), the project modules it imports and its environment's pins."""
    return digests.code_digest(digests.ROOT / "scripts" / script)


def project_file(path):
    """A file of the project as an input; relative in the project's folder, so that moving the folder reruns nothing."""
    return path if Path.cwd() == digests.ROOT else str(digests.ROOT / path)


def gguf_input(wildcards):
    """The GGUF file, for a base model that comes in a wheel."""
    if SETTINGS["model"]["source"]["type"] != "wheel":
        return {}
    return {
        "gguf": f"results/models/{wildcards.model}/source/model.gguf",
        "license": f"results/models/{wildcards.model}/source/LICENSE",
    }


def training_scenario():
    """The run's own training step as a scenario; its model is the prepared config.json."""
    step = {key: value for key, value in SETTINGS["training"].items() if key not in LOOP_KEYS}
    if step["method"] != "qlora":
        step["quantization"] = None
    return {**step, "lora": SETTINGS["lora"]}


def training_loop():
    """Settings of the loop around the training step."""
    return {key: value for key, value in SETTINGS["training"].items() if key in LOOP_KEYS}


def profile_scenarios():
    """The memory profile's scenarios by name: scenario_defaults, the adapter's settings, then what differs.

    From the most costly method and precision to the least, as the seed's scenarios A, B and C.
    """
    memory, scenarios = SETTINGS["memory"], {}
    for name, differences in memory["scenarios"].items():
        scenario = {
            **SETTINGS["scenario_defaults"],
            "model": memory["model"],
            "gpu": memory["gpu"],
            "lora": SETTINGS["lora"],
            **differences,
        }
        if scenario["method"] != "qlora":
            scenario["quantization"] = None
        if scenario["method"] == "full":
            scenario["lora"] = None
        scenarios[name] = scenario
    methods, precisions = ("full", "lora", "qlora"), ("fp32", "bf16-mixed", "fp16-mixed", "bf16", "fp16")

    def cost(item):
        name, scenario = item
        return methods.index(scenario["method"]), precisions.index(scenario["precision"]), name

    try:
        return dict(sorted(scenarios.items(), key=cost))
    except ValueError:
        return scenarios  # a method or precision that does not exist: the rule's script says what does


# The folder that holds the scenarios; the run in it keeps its own constraint.
MEMORY_PLACE = r"memory/[a-z0-9][a-z0-9._-]*|[a-z0-9][a-z0-9._-]*-r\d+/memory"
MEMORY_SCENARIO = r"[a-z0-9][a-z0-9._-]*"


def memory_folder(run, name):
    """Where a scenario of the memory profile lands: under the run if it has adapters, and so a rank."""
    ranked = profile_scenarios()[name]["lora"] is not None
    place = f"{run}/memory" if ranked else f"memory/{SETTINGS['memory']['model']}"
    return f"results/{place}/{name}"


def profile_comparisons(run):
    """The comparisons of all scenarios of the memory profile, in the order of the configuration."""
    return [f"{memory_folder(run, name)}/compare.json" for name in profile_scenarios()]


def memory_scenario(wildcards):
    """The scenario of a job: the run's own training step, or one of the memory profile."""
    if wildcards.scenario == "training":
        card = SETTINGS["memory"]["gate"]["gpu"]
        return {**training_scenario(), "gpu": None if card == "auto" else card}
    return {key: value for key, value in profile_scenarios()[wildcards.scenario].items() if key != "model"}


def memory_model(wildcards):
    """The configuration of a scenario's model: the prepared base model's, or one of config/models/."""
    if wildcards.scenario == "training":
        return f"results/models/{MODEL}/config.json"
    return project_file(f"config/models/{SETTINGS['memory']['model']}.json")


def measurements(wildcards):
    """The measurement, where there is one: of the run's own training step."""
    if wildcards.scenario == "training":
        return {"measure": f"results/{wildcards.place}/training/measure.json"}
    return {}


def source_files(wildcards):
    """Data files that the sources read, so that a changed one reruns; a missing one is the script's to explain."""
    sources = SETTINGS["dataset"]["sources"] + SETTINGS["dataset"]["external_test"]
    paths = [path for source in sources for path in source.get("paths", []) if os.path.exists(path)]
    if any(source["type"] == "embedded" for source in sources):
        paths.append(project_file("config/datasets/embedded.yaml"))
    return paths


def step_comparison(wildcards):
    """The scenario whose step the timeline shows: the profile's last one with adapters, else its last."""
    scenarios = profile_scenarios()
    ranked = [name for name, scenario in scenarios.items() if scenario["lora"] is not None]
    return f"{memory_folder(wildcards.run, (ranked or list(scenarios))[-1])}/compare.json"


def documents(run):
    """What a run is for: the card and the documents beside it."""
    return [
        f"results/{run}/MODEL_CARD.md",
        f"results/{run}/docs/memory-profile.md",
        f"results/{run}/docs/publication.md",
        f"results/{run}/report.html",
    ]


def show_where_the_card_lies():
    """The last lines of a run that a person sees."""
    for path in documents(RUN):
        if Path(path).is_file():
            print(f"  {path}", file=sys.stderr)
