"""Rule ``upload_publication``: the repositories that were listed, each in one commit.

Large files go first; a repository shows nothing of them until its commit, which holds all of it. After an upload that
broke off the same command goes on: what the Hub has already is not sent again, and a repository that was finished stays
as it is. The token comes from HF_TOKEN in the environment alone, and goes nowhere but to the Hub.
"""

import os
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_report, sha256_file, write_report
from scripts.common.job import job, log
from scripts.common.secrets import without_secrets

TYPES = {"adapter": "model", "dataset": "dataset", "merged": "model"}
MESSAGE = "Publish a run of SecureCLI-Tuner"


def upload(kind: str, planned: dict[str, Any], token: str) -> str:
    """Bring one repository to what was planned, in one commit; returns the commit's id."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository = HfApi(token=token), planned["repository"]
    place = {"repo_id": repository, "repo_type": TYPES[kind]}
    api.create_repo(**place, private=planned["private"], exist_ok=True)
    files = [CommitOperationAdd(file["path"], file["file"]) for file in planned["files"]]
    return api.create_commit(**place, operations=files, commit_message=MESSAGE).oid


def main(plan: str, output: str) -> None:
    """Upload each repository of the plan; on an error say which are published and which are not."""
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError(
            "Publishing needs a token of the Hub, with the right to write.",
            where="HF_TOKEN in the environment",
            found="nothing",
            write="export HF_TOKEN=...    # from the settings of your account; it is written nowhere",
        )
    repositories = read_report(plan)["repositories"]
    for planned in repositories.values():
        for file in planned["files"]:
            if sha256_file(file["file"]) != file["sha256"]:
                raise UserError(
                    "A file has changed since it was listed; nothing was uploaded.",
                    where=file["file"],
                    write=f"rm {plan}    # then the same command again: it is listed anew",
                )
    done: dict[str, Any] = {}
    for kind, planned in repositories.items():
        try:
            commit = upload(kind, planned, token)
        except Exception as error:
            names = {name: repositories[name]["repository"] for name in repositories}
            published = ", ".join(f"{names[name]} at {done[name]['commit']}" for name in done) or "nothing"
            left = ", ".join(f"{name} ({names[name]})" for name in repositories if name not in done)
            raise UserError(
                f"The upload to {planned['repository']} broke off. Published: {published}. Not published: {left}.",
                where=f"publish.{kind}",
                found=f"{type(error).__name__}: {without_secrets(' '.join(str(error).split()))}"[:400],
                allowed="a network that reaches the Hub, and a token that may write there",
                write="the same command again: it goes on, and what the Hub has already is not sent again",
            ) from None
        done[kind] = {"commit": commit, "repository": planned["repository"]}
        log.info("%s: %s is commit %s", kind, planned["repository"], commit)
    write_report(output, {"published": done}, Path(plan))


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.plan, snakemake.output.published)
