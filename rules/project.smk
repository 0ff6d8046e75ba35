# PROJECT: the folder of the project's files. Where Snakemake reads this out of a git repository (`module:` with a URL),
# they are unpacked beside the results once for each commit, since scripts import modules of the project.
import os
import shlex
import subprocess
import sys
import tempfile

if workflow.current_basedir.is_local:
    PROJECT = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).resolve().parent
else:
    here = workflow.current_basedir
    repository = here.repo_path if hasattr(here, "repo_path") else here.hosted_repo.repo_clone
    git = ["git", "-C", str(repository)]
    commit = subprocess.run(
        [*git, "rev-parse", here.ref], check=True, capture_output=True, text=True
    ).stdout.strip()
    PROJECT = Path(".snakemake", "securecli-tuner", commit).resolve()
    if not PROJECT.exists():
        PROJECT.parent.mkdir(parents=True, exist_ok=True)
        unpacked = tempfile.mkdtemp(
            dir=PROJECT.parent
        )  # a name of Snakemake's own, such as partial, would replace it
        archive = subprocess.run([*git, "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", unpacked], input=archive, check=True)
        os.rename(unpacked, PROJECT)

sys.path.insert(0, str(PROJECT))
# What was asked for, for provenance: jobs inherit it, and have command lines of their own.
if workflow.is_main_process:
    os.environ.update(SECURECLI_COMMAND=shlex.join(["snakemake", *sys.argv[1:]]))
