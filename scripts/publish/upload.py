"""Rule ``upload_publication``: the repositories that were listed, each in one commit.

Large files go first; a repository shows nothing of them until its commit, which holds all of it. After an upload that
broke off the same command goes on: what the Hub has already is not sent again, and a repository that was finished stays
as it is. The token comes from HF_TOKEN in the environment alone, and goes nowhere but to the Hub.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, sha256_file, write_report
from dryfit.common.hub_errors import Failure, meaning
from dryfit.common.terminal import log
from dryfit.common.text import without_secrets
from scripts.common.job import job

TYPES = {"adapter": "model", "dataset": "dataset", "merged": "model"}
NO_RIGHT = {
    403: (
        "The token may not write there (403).",
        "HF_TOKEN of an account that may, with the right to write",
    )
}
MESSAGE = "Publish a run of SecureCLI-Tuner"


def upload(kind: str, planned: dict[str, Any], token: str) -> str:
    """Bring one repository to what was planned, in one commit; returns the commit's id."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository = HfApi(token=token), planned["repository"]
    place = {"repo_id": repository, "repo_type": TYPES[kind]}
    api.create_repo(**place, private=planned["private"], exist_ok=True)
    files = [CommitOperationAdd(file["path"], file["file"]) for file in planned["files"]]
    return api.create_commit(**place, operations=files, commit_message=MESSAGE).oid


def is_public(kind: str, planned: dict[str, Any], token: str) -> bool:
    """Whether the repository is there already and everybody may see it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return (
            not HfApi(token=token).repo_info(planned["repository"], repo_type=TYPES[kind]).private
        )
    except RepositoryNotFoundError:  # not there, or not for this token, as the upload will say
        return False


def main(plan: str, output: str) -> None:
    """Upload each repository of the plan; none where one that is to be private is there and public."""
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
                    write=f"rm {plan}    # then the same command again: it is listed again",
                )
    done: dict[str, Any] = {}
    for kind, planned in repositories.items():
        with _broken_off(kind, repositories, done):
            seen = planned["private"] and is_public(kind, planned, token)
        if seen:
            raise UserError(
                "The repository exists and is public; nothing was uploaded.",
                where=f"publish.{kind}",
                found=f"private: true, and {planned['repository']} is public",
                allowed="another repository, or this one made private in its settings on the Hub",
                write="private: false    # if everybody may see it",
            )
    for kind, planned in repositories.items():
        with _broken_off(kind, repositories, done):
            commit = upload(kind, planned, token)
        done[kind] = {"commit": commit, "repository": planned["repository"]}
        log.info("%s: %s is commit %s", kind, planned["repository"], commit)
    write_report(output, {"published": done}, Path(plan))


@contextmanager
def _broken_off(kind: str, repositories: dict[str, Any], done: dict[str, Any]) -> Iterator[None]:
    """An error of the Hub or of the way to it says which repositories are published and which are not."""
    try:
        yield
    except Exception as error:
        problem, allowed = meaning(
            Failure.of(error), TYPES[kind], repositories[kind]["repository"], own=NO_RIGHT
        )
        published = (
            ", ".join(f"{one['repository']} at {one['commit']}" for one in done.values())
            or "nothing"
        )
        left = ", ".join(
            f"{name} ({one['repository']})"
            for name, one in repositories.items()
            if name not in done
        )
        raise UserError(
            f"The upload to {repositories[kind]['repository']} broke off."
            f" Published: {published}. Not published: {left}.",
            where=f"publish.{kind}",
            found=f"{problem} {type(error).__name__}: {without_secrets(' '.join(str(error).split()))}"[
                :400
            ],
            allowed=allowed,
            write="the same command again: it goes on, and what the Hub has already is not sent again",
        ) from None


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.plan, snakemake.output.published)
