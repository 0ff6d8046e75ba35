# SecureCLI-Tuner: will this fine-tuning fit the GPU, and can you prove it?
#
# Results:  results/models/<model>/        the base model: configuration, tokenizer, weights
#           results/dataset/<dataset>/     acquire -> clean -> screen -> split -> encode
#           results/memory/<model>/        scenarios without a rank (full fine-tuning)
#           results/evaluation/<dataset>/  the base model's answers
#           results/<name>-r<rank>/        all that depends on the rank; MODEL_CARD.md at its top
#           results/<name>-sweep/          the runs side by side, where the configuration asks for several
from snakemake.utils import min_version

min_version("9.0")


include: "rules/project.smk"


configfile: PROJECT / "config" / "config.yaml"


report: str(PROJECT / "rules" / "report" / "workflow.rst")


include: PROJECT / "rules/common.smk"


# Of a key that stands twice Snakemake takes the last, and all below the first would be lost without a word.
for given in workflow.configfiles:
    if not str(given).endswith(".json"):
        exit_on_user_error(files.read_yaml, given)


include: PROJECT / "rules/dataset.smk"
include: PROJECT / "rules/memory.smk"
include: PROJECT / "rules/training.smk"
include: PROJECT / "rules/merging.smk"
include: PROJECT / "rules/evaluation.smk"


if EXECUTES:

    include: PROJECT / "rules/execution.smk"


include: PROJECT / "rules/provenance.smk"
include: PROJECT / "rules/documents.smk"
include: PROJECT / "rules/sweep.smk"
include: PROJECT / "rules/export.smk"
include: PROJECT / "rules/publish.smk"


rule all:
    default_target: True
    input:
        each_run(JobPaths.documents),
        [f"{SWEEP}/{name}" for name in ("SWEEP.md", "sweep.html", "documents.json")]
        if RUNS.swept
        else [],
    localrule: True


# Parts of the whole that a person can name: `snakemake --cores 1 gate`.
rule dataset:
    input:
        each_run(f"{DATASET}/splits/check.json"),
    localrule: True


rule memory:
    input:
        each_run(JobPaths.profile_comparisons),
        each_run(JobPaths.unread_answers),
        each_run("results/{run}/memory/training/compare.json"),
        each_run("results/{run}/memory/training/estimate.json"),
    localrule: True


rule gate:
    input:
        each_run("results/{run}/memory/training/gate.json"),
        each_run("results/{run}/memory/run.json"),
    localrule: True


rule train:
    input:
        each_run("results/{run}/memory/run.json"),
        each_run("results/{run}/adapter/adapter_model.safetensors"),
    localrule: True


rule merge:
    input:
        each_run("results/{run}/memory/run.json"),
        each_run("results/{run}/merged-verification.json"),
    localrule: True


onstart:
    before_the_first_job()


rule export:
    input:
        each_run("results/{run}/memory/run.json"),
        each_run(JobPaths.exports),
    localrule: True


# Runs what the models answered, sealed off, and puts the score into the card. Nothing else does so unasked.
rule execute:
    input:
        each_run(JobPaths.executed),
        each_run(JobPaths.documents),
    localrule: True


rule publish:
    input:
        each_run(publication),
    localrule: True


onsuccess:
    after_the_last_job()


onerror:
    after_an_error()
