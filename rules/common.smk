# Functions and names for the rule files; no rules. Standard library, PyYAML and jsonschema only.
from snakemake.exceptions import WorkflowError

from scripts.common import digests, settings
from scripts.common.errors import UserError

try:
    SETTINGS = settings.check(config)
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
    """The memory profile's scenarios by name: scenario_defaults, the adapter's settings, then what differs."""
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
    return scenarios


def documents(run):
    """What a run is for: the card and the documents beside it."""
    return [
        f"results/{run}/MODEL_CARD.md",
        f"results/{run}/docs/memory-profile.md",
        f"results/{run}/docs/publication.md",
    ]


def show_where_the_card_lies():
    """The last lines of a run that a person sees."""
    for path in documents(RUN):
        if Path(path).is_file():
            print(f"  {path}", file=sys.stderr)
