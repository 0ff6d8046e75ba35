"""What went wrong with the Hugging Face Hub, in words that say what to do; for models and datasets, by any library."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from dryfit.common.text import without_secrets


class Failure(NamedTuple):
    """``names`` of the errors' classes, the HTTP ``status`` if an answer came, the ``message``'s first line."""

    names: Collection[str]
    status: int | None
    message: str = "it was not fetched"

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What huggingface_hub, its transport or a library on top of it raised, with what led to it."""
        chain = [error]
        while (step := chain[-1].__cause__ or chain[-1].__context__) and step not in chain:
            chain.append(step)
        names = {kind.__name__ for one in chain for kind in type(one).__mro__}
        statuses = (getattr(getattr(one, "response", None), "status_code", None) for one in chain)
        message = without_secrets((str(error).strip().splitlines() or [""])[0])[:200]
        return cls(names, next(filter(None, statuses), None), message)


# Name of an error or status, what to say, what to do; the first that matches.
_ANSWERED: tuple[tuple[str | int, str, str], ...] = (
    (
        "GatedRepoError",
        "The {what} is gated: its owner wants to know who reads it.",
        "HF_TOKEN in the environment, of an account that has accepted the {what}'s terms on {page}; or an open copy",
    ),
    (
        "RevisionNotFoundError",
        "The repository has no such revision.",
        "a branch, a tag or a commit of {page}",
    ),
    (
        "RepositoryNotFoundError",
        "The Hub has no such {what}, or it is private.",
        "owner/name as on the {what}'s page{nearest}; for a private one HF_TOKEN in the environment",
    ),
    (
        429,
        "The Hub is asked too often (429).",
        "another try in some minutes; HF_TOKEN, which raises the limit{instead}",
    ),
    (
        401,
        "The Hub wants to know who you are (401).",
        "a valid HF_TOKEN in the environment, or none",
    ),
    (
        403,
        "The Hub does not let you read this {what} (403).",
        "HF_TOKEN in the environment, of an account that may",
    ),
    (404, "The Hub has no such {what}, revision or file (404).", "names as on {page}"),
)
_OFFLINE = "HF_HUB_OFFLINE is set, so the Hub is not asked, and the {what} is not in the cache."
_SLOW = (
    "The Hub does not answer in time.",
    "another try, later; or more seconds in HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT{instead}",
)
_NO_NETWORK = (
    "The Hub can't be reached, or the connection broke off.",
    "a network that reaches it, or a mirror in HF_ENDPOINT{instead}",
)
_UNANSWERED: tuple[tuple[str, str, str], ...] = (
    ("OfflineModeIsEnabled", _OFFLINE, "HF_HUB_OFFLINE=0{instead}"),
    (
        "HFValidationError",
        "This can't be the id of a {what}.",
        "owner/name as on the {what}'s page{nearest}",
    ),
    *((name, *_SLOW) for name in ("TimeoutException", "TimeoutError", "ReadTimeout")),
    *(
        (name, *_NO_NETWORK)
        for name in ("TransportError", "ConnectionError", "ProtocolError", "ClientError")
    ),
    *((name, *_NO_NETWORK) for name in ("LocalEntryNotFoundError", "OSError")),
)


def meaning(
    failure: Failure,
    what: str,
    repository: str,
    *,
    instead: str = "",
    nearest: str = "",
    own: Mapping[str | int, tuple[str, str]] | None = None,
) -> tuple[str, str]:
    """What to say of a failure, and what would do.

    Parameters
    ----------
    what
        ``model`` or ``dataset``.
    instead
        What does without the Hub.
    nearest
        Names like the one that was asked for.
    own
        By the name of an error or a status, what only this caller can say; ``""`` for what nothing else explains.
    """
    own = own or {}
    words = {
        "what": what,
        "page": f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}{repository}",
        "instead": f"; or {instead}" if instead else "",
        "nearest": f"; nearest: {nearest}" if nearest else "",
    }
    for name, (said, todo) in own.items():
        if name in failure.names or name == failure.status:
            return said, todo
    for name, said, todo in (*_ANSWERED, *(() if failure.status else _UNANSWERED)):
        if name in failure.names or name == failure.status:
            return said.format(**words), todo.format(**words)
    if failure.status:
        return (
            f"The Hub answers with an error ({failure.status}).",
            "another try, later{instead}".format(**words),
        )
    return own.get(
        "",
        (
            f"The {what} can't be had: {failure.message}",
            "another try, later{instead}".format(**words),
        ),
    )
