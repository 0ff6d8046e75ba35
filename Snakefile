# SecureCLI-Tuner: will this fine-tuning fit the GPU, and can you prove it?
#
# Results:  results/models/<model>/        the base model: configuration, tokenizer, weights
#           results/dataset/<dataset>/     acquire -> clean -> screen -> split -> encode
#           results/memory/<model>/        scenarios without a rank (full fine-tuning)
#           results/evaluation/<dataset>/  the base model's answers
#           results/<name>-r<rank>/        all that depends on the rank; MODEL_CARD.md at its top
import os
import subprocess
import sys
import tempfile

from snakemake.utils import min_version

min_version("9.0")


def project_folder():
    """Where the project's files lie. Read out of a git repository (`module:`), they are unpacked beside the results."""
    here = workflow.current_basedir
    if here.is_local:
        return Path(here.get_path_or_uri(secret_free=True)).resolve()
    repository = here.repo_path if hasattr(here, "repo_path") else here.hosted_repo.repo_clone
    git = ["git", "-C", str(repository)]
    commit = subprocess.run([*git, "rev-parse", here.ref], check=True, capture_output=True, text=True).stdout.strip()
    folder = Path(".snakemake", "securecli-tuner", commit).resolve()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=folder.parent)
        archive = subprocess.run([*git, "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", partial], input=archive, check=True)
        os.rename(partial, folder)
    return folder


PROJECT = project_folder()
sys.path.insert(0, str(PROJECT))  # for `scripts` here, and in the scripts of the jobs
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))


configfile: PROJECT / "config" / "config.yaml"


include: PROJECT / "rules/common.smk"
include: PROJECT / "rules/dataset.smk"
include: PROJECT / "rules/memory.smk"
include: PROJECT / "rules/training.smk"
include: PROJECT / "rules/merging.smk"
include: PROJECT / "rules/evaluation.smk"
include: PROJECT / "rules/documents.smk"


rule all:
    default_target: True
    input:
        documents(RUN),
    localrule: True


# Parts of the whole that a person can name: `snakemake --cores 1 gate`.
rule dataset:
    input:
        f"results/dataset/{DATASET}/splits/check.json",
    localrule: True


rule memory:
    input:
        profile_comparisons(RUN),
        f"results/{RUN}/memory/training/compare.json",
    localrule: True


rule gate:
    input:
        f"results/{RUN}/memory/training/gate.json",
    localrule: True


rule train:
    input:
        f"results/{RUN}/adapter/adapter_model.safetensors",
    localrule: True


rule merge:
    input:
        f"results/{RUN}/merged-verification.json",
    localrule: True


onsuccess:
    show_where_the_card_lies()
