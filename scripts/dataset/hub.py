"""Datasets of the Hugging Face Hub, read as a stream through ``datasets`` and ``huggingface_hub``.

Credentials come from the environment variable HF_TOKEN alone, and go nowhere but to the Hub. HF_ENDPOINT,
HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds) have their usual meaning.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.hub_errors import Failure, meaning
from dryfit.common.terminal import log
from scripts.dataset.sources import SourceRecord, check_columns, guessed, to_records

# A connection that breaks off is taken up again so often by `datasets` (its default is 20), each time after
# five attempts of huggingface_hub's own, 25 s apart from first to last.
_READ_RETRIES = 1
_NOT_READ = (
    "The dataset can't be read from the Hub.",
    "a config and split that the repository has, in files that `datasets` reads by itself",
)


def explain(error: BaseException, source: Mapping[str, Any]) -> UserError:
    """An error of the libraries as one that says what to do."""
    failure = Failure.of(error)
    again = "another try, since nothing was written"
    problem, allowed = meaning(
        failure, "dataset", source["repository"], instead=again, own={"": _NOT_READ}
    )
    found = f"{source['repository']} at {source.get('revision', 'main')}: {type(error).__name__}: {failure.message}"
    return UserError(problem, where="dataset.sources", found=found, allowed=allowed)


def resolve(source: Mapping[str, Any], revisions: dict[str, str]) -> str:
    """The commit that the source's revision stands for now; renews ``revisions``, those of earlier runs.

    A :class:`UserError` when the Hub can't tell, or when the revision has moved and nobody has agreed to that.
    """
    revision = source.get("revision", "main")
    name = f"{source['repository']}@{revision}"
    try:
        from huggingface_hub import HfApi, constants

        api = HfApi(token=os.environ.get("HF_TOKEN") or False)
        timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        commit = api.dataset_info(source["repository"], revision=revision, timeout=timeout).sha
    except Exception as error:
        raise explain(error, source) from None
    before = revisions.get(name, commit)
    if before != commit and not source.get("accept_new_revision", False):
        raise UserError(
            f"The revision {revision!r} of {source['repository']} has moved since the last run.",
            where="dataset.sources",
            found=f"{commit}, where the last run had {before}",
            allowed="the old commit, pinned; or accept_new_revision: true, to go on with the new one",
            write=f"revision: {before}",
        )
    revisions[name] = commit
    log.info("%s is commit %s", name, commit)
    return commit


def read_repository(
    source: Mapping[str, Any],
    commit: str,
    columns: Mapping[str, str] | None,
    *,
    guess: bool = False,
) -> Iterator[SourceRecord]:
    """Records of a dataset repository at a commit, read as a stream.

    A :class:`UserError` when the Hub can't be reached, refuses, breaks off, or lacks the config, split or columns.
    """
    name, split = source["repository"], source.get("split", "train")
    if os.path.isdir(name):  # `datasets` would read it instead of the Hub's
        raise UserError(
            "A local folder has the name of the dataset on the Hub.",
            where="the working directory",
            found=name,
            allowed="another name for the folder; or a source of type files",
        )
    number = 0
    try:
        import datasets

        datasets.config.STREAMING_READ_MAX_RETRIES = _READ_RETRIES
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 1
        datasets.disable_progress_bars()
        token = os.environ.get("HF_TOKEN") or False
        rows = datasets.load_dataset(
            name, source.get("config"), split=split, revision=commit, streaming=True, token=token
        )
        for number, row in enumerate(rows, 1):
            if number == 1:
                if columns is None:
                    columns = (
                        guessed(row) if guess else {"request": "request", "command": "command"}
                    )
                check_columns(row, columns, f"{name}, split {split}")
            yield from to_records(number, row, columns, str(name))
    except UserError:
        raise
    except Exception as error:
        raise explain(error, source) from None
    if not number:
        raise UserError(
            "The dataset has no rows.", where="dataset.sources", found=f"{name} {split}"
        )
