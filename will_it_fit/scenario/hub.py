"""Models of the Hugging Face Hub by their id: config.json alone is fetched, some 3 KB, and no code is ever loaded.

What ``config/models/index.yaml`` knows is answered from there. Else ``huggingface_hub`` fetches, with its own cache,
token (``HF_TOKEN`` or the one of ``hf auth login``), mirror (``HF_ENDPOINT``) and offline mode (``HF_HUB_OFFLINE``). An
id may end in ``@revision``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_yaml
from will_it_fit.common.secrets import without_secrets
from will_it_fit.data import data_path

MODELS = data_path("models")
INDEX = MODELS / "index.yaml"
_ID = re.compile(r"^(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")


class HubId(NamedTuple):
    """A repository of the Hub, and the revision that was asked for."""

    name: str
    revision: str | None

    @classmethod
    def read(cls, text: str) -> HubId | None:
        """``owner/name`` or ``owner/name@revision``; None for what can't be an id, such as a path."""
        found = _ID.match(text)
        if not found or text.count("/") > 1 + (found["revision"] or "").count("/"):
            return None
        return cls(found["id"], found["revision"])

    @property
    def short(self) -> str:
        """Without the owner."""
        return self.name.rpartition("/")[2]


def profiled(model: str) -> tuple[str, HubId | None]:
    """What a run calls the model whose memory it profiles, a folder's name; and its id where the Hub has to be asked.

    ``model`` is ``memory.model`` of a configuration: a name in config/models/, or an id.
    """
    hub = None if (MODELS / f"{model}.json").is_file() else HubId.read(model)
    if hub is None:
        return model, None
    if hub.revision is None and (known := catalogued(hub)):
        return known, None
    return re.sub(r"[^a-z0-9._-]+", "-", model.lower().replace("/", "--")), hub


@cache
def _index() -> tuple[dict[str, str], frozenset[str], tuple[str, ...]]:
    content = read_yaml(INDEX)
    names = {hub.lower(): name for name, entry in content["models"].items() for hub in entry["hub"]}
    return names, frozenset(owner.lower() for owner in content["mirrors"]), tuple(content["endings"])


def catalogued(hub: HubId) -> str | None:
    """The name in config/models/ of a repository that has the same configuration; None if it isn't known."""
    names, mirrors, endings = _index()
    name = hub.name.lower()
    if name in names:
        return names[name]
    owner, _, short = name.partition("/")
    if owner not in mirrors:
        return None
    for ending in endings:
        short = short.removesuffix(ending)
    copies = {known.partition("/")[2]: found for known, found in names.items()}
    return copies.get(short)


def is_language_model_alone(name: str) -> bool:
    """Whether the file of a name in config/models/ leaves the other parts of its model out."""
    return bool(read_yaml(INDEX)["models"].get(name, {}).get("language_model"))


def nearest(text: str) -> list[str]:
    """Names and Hub ids of the catalogue that are most like a text."""
    names, _, _ = _index()
    wanted = text.lower().partition("@")[0]
    known = {name: name for name in names.values()}
    known |= {hub.partition("/")[2]: name for hub, name in names.items()} if "/" not in wanted else {}
    found = difflib.get_close_matches(wanted, names if "/" in wanted else known, n=3, cutoff=0.5)
    ids = {hub.lower(): hub for entry in read_yaml(INDEX)["models"].values() for hub in entry["hub"]}
    return list(dict.fromkeys(ids.get(name, known.get(name, name)) for name in found))


def on_the_page() -> list[str]:
    """Names of the catalogue that the planner's page offers."""
    return read_yaml(INDEX)["on_the_page"]


def fetch_config(hub: HubId, where: object) -> Path:
    """The configuration's file, fetched if it isn't there.

    Raises
    ------
    UserError
        If the file can't be fetched; the message says why, and what to do.
    """
    return FETCH.get()(hub, where)


def _download(hub: HubId, where: object) -> Path:
    """The file in huggingface_hub's cache."""
    try:
        import huggingface_hub as library
        from huggingface_hub import constants, utils
    except ImportError:
        raise UserError(
            "The package huggingface_hub is not installed, which fetches a model's configuration.",
            where=where,
            found=hub.name,
            allowed="the package, or a path to the model's config.json",
            write="pip install huggingface_hub",
        ) from None
    utils.disable_progress_bars()
    place = {"repo_id": hub.name, "filename": "config.json", "revision": hub.revision}
    try:
        if not constants.HF_HUB_OFFLINE:
            # One question without repetitions: a download would try for half a minute where there is no network.
            library.get_hf_file_metadata(library.hf_hub_url(**place), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(library.hf_hub_download(**place))
    except Exception as error:
        cached = library.try_to_load_from_cache(**place)
        if isinstance(cached, str):
            return Path(cached)
        raise _explained(error, hub, where) from None


# Who fetches. Where this code runs in a web page, the browser does.
FETCH: ContextVar[Callable[[HubId, object], Path]] = ContextVar("FETCH", default=_download)


# What the libraries' errors mean, the first that matches: name of an error or status, what to say, what to do.
_TERMS = (
    "HF_TOKEN in the environment, of an account that has accepted the terms on {page}; or an open copy of the model"
)
_NO_NETWORK = ("The Hub can't be reached.", "a network that reaches it, or a mirror in HF_ENDPOINT; or {file}")
_MEANINGS: tuple[tuple[str | int, str, str], ...] = (
    ("GatedRepoError", "The model is gated: its owner wants to know who reads it.", _TERMS),
    ("RevisionNotFoundError", "The repository has no such revision.", "a branch, a tag or a commit of {page}"),
    (
        "RepositoryNotFoundError",
        "The Hub has no such model, or it is private.",
        "owner/name as on the model's page{nearest}; for a private one HF_TOKEN in the environment",
    ),
    (
        "RemoteEntryNotFoundError",
        "The repository has no config.json: it holds no model of transformers (an adapter, perhaps, GGUF files, or a"
        " diffusion model).",
        'the model that it was made from; for one of diffusers the engine: docs/memory-core.md, "A diffusion model"',
    ),
    (
        429,
        "The Hub is asked too often (429).",
        "another try in some minutes; HF_TOKEN, which raises the limit; or {file}",
    ),
    (401, "The Hub wants to know who you are (401).", "a valid HF_TOKEN in the environment, or none"),
    (
        "OfflineModeIsEnabled",
        "HF_HUB_OFFLINE is set, so the Hub is not asked, and the configuration is not in the cache.",
        "HF_HUB_OFFLINE=0; or {file}",
    ),
    ("HFValidationError", "This can't be the id of a model.", "owner/name as on the model's page{nearest}"),
    *((name, *_NO_NETWORK) for name in ("TransportError", "LocalEntryNotFoundError", "ConnectionError", "OSError")),
)


def _explained(error: BaseException, hub: HubId, where: object) -> UserError:
    """What went wrong with the Hub, by what huggingface_hub raised."""
    chain = [error]
    while (step := chain[-1].__cause__ or chain[-1].__context__) and step not in chain:
        chain.append(step)
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    status = next(filter(None, (getattr(getattr(one, "response", None), "status_code", None) for one in chain)), None)
    message = without_secrets((str(error).strip().splitlines() or [""])[0])[:200]
    return explained(names, status, hub, where, message)


def explained(
    names: Collection[str], status: int | None, hub: HubId, where: object, message: str = "it was not fetched"
) -> UserError:
    """What went wrong with the Hub, in words that say what to do.

    Parameters
    ----------
    names
        What huggingface_hub calls the errors.
    status
        The HTTP status, if an answer came.
    """
    near = nearest(hub.name)
    words = {
        "page": f"https://huggingface.co/{hub.name}",
        "file": f"the path of a config.json, saved from https://huggingface.co/{hub.name}/raw/main/config.json",
        "nearest": f"; nearest: {', '.join(near)}" if near else "",
    }
    problem = f"The Hub answers with an error ({status})." if status else f"No configuration: {message}"
    allowed = "another try, later; or {file}"
    for meaning, said, todo in _MEANINGS:
        if meaning in names or meaning == status:
            problem, allowed = said, todo
            break
        if status and meaning == "HFValidationError":  # an answer came, so the network is there
            break
    return UserError(
        problem,
        where=where,
        found=f"{hub.name}@{hub.revision}" if hub.revision else hub.name,
        allowed=allowed.format(**words),
        change={"model": near[0] if near else "config.json"},
    )
