"""Models of the Hugging Face Hub by their id: config.json alone is fetched, some 3 KB, and no code is ever loaded.

What ``config/models/index.yaml`` knows is answered from there. Else ``huggingface_hub`` fetches, with its own cache,
token (``HF_TOKEN`` or the one of ``hf auth login``), mirror (``HF_ENDPOINT``) and offline mode (``HF_HUB_OFFLINE``). An
id may end in ``@revision``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.hub_errors import Failure, meaning
from dryfit.data import data_path
from dryfit.scenario.other_models import RUN, by_name, not_a_language_model

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
        parts = _ID.match(text)
        if not parts or text.count("/") > 1 + (parts["revision"] or "").count("/"):
            return None
        return cls(parts["id"], parts["revision"])

    @property
    def short(self) -> str:
        """Without the owner."""
        return self.name.rpartition("/")[2]


def profiled(model: str) -> tuple[str, HubId | None]:
    """What a run calls the model whose memory it profiles, a folder's name; and its id where the Hub has to be asked.

    ``model`` is ``memory.model`` of a configuration: a name in config/models/, or an id.
    """
    hub = (
        None
        if (MODELS / f"{model}.json").is_file()
        else named_repository(model) or HubId.read(model)
    )
    if hub is None:
        return model, None
    if hub.revision is None and (known := catalogued(hub)):
        return known, None
    return re.sub(r"[^a-z0-9._-]+", "-", model.lower().replace("/", "--")), hub


def named_repository(name: str) -> HubId | None:
    """The repository that a name without an account means: of `fetched`, or an id of the catalogue's without it."""
    entry = index()["fetched"].get(name.lower())
    ids = (
        [entry["hub"]]
        if entry
        else [hub for hub in _ids().values() if hub.partition("/")[2].lower() == name.lower()]
    )
    return HubId.read(ids[0]) if ids else None


def repository_of(name: str) -> str:
    """The repository of a model of the catalogue, by which tools load it; any other name as it is."""
    entry = index()["models"].get(name) or index()["fetched"].get(name)
    hub = entry and entry["hub"]
    return (hub if isinstance(hub, str) else hub[0]) if hub else name


@cache
def index() -> dict[str, Any]:
    """What ``config/models/index.yaml`` says."""
    return read_yaml(INDEX)


@cache
def _index() -> tuple[dict[str, str], frozenset[str], tuple[str, ...]]:
    content = index()
    names = {hub.lower(): name for name, entry in content["models"].items() for hub in entry["hub"]}
    return (
        names,
        frozenset(owner.lower() for owner in content["mirrors"]),
        tuple(content["endings"]),
    )


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
    copies = {known.partition("/")[2]: id_ for known, id_ in names.items()}
    return copies.get(short) or (short if (MODELS / f"{short}.json").is_file() else None)


def of_modelscope(text: str) -> tuple[str, str | None] | None:
    """``owner/name`` of an id of ModelScope, ``ms://owner/name`` or of an account that the Hub doesn't have, and the
    Hub's id where the account's models are one other's there; None: it is no id of ModelScope's."""
    name = re.sub(r"^(?:ms|modelscope)://", "", text)
    owner, _, short = name.partition("/")
    accounts = index()["modelscope"]
    if name == text and owner not in accounts:
        return None
    return name, f"{accounts[owner]}/{short}" if accounts.get(owner) else None


def published_dtype(hub: HubId) -> str:
    """The dtype that the config.json of a repository of the catalogue names: ``bfloat16``, ``float16``, ``float32``."""
    by_dtype = index()["dtypes"]
    owner, _, short = hub.name.lower().partition("/")
    is_mirror = owner in _index()[1]
    for dtype in ("float16", "float32"):
        names = [name.lower() for name in by_dtype[dtype]]
        if hub.name.lower() in names or (
            is_mirror and short in [name.partition("/")[2] for name in names]
        ):
            return dtype
    return by_dtype["all_others"]


def is_language_model_alone(name: str) -> bool:
    """Whether the file of a name in config/models/ leaves the other parts of its model out."""
    return bool(index()["models"].get(name, {}).get("language_model"))


_SIZES = re.compile(r"(?<![a-z0-9])a?\d+(?:\.\d+)?[bm](?![a-z0-9])")
# What a name has beside family and sizes: how a model was tuned, and when; how its weights were packed.
_TUNED = re.compile(r"[-_. ]+(?:instruct|chat|base|it|pt|hf|\d{4})(?=$|[-_. ])")
_PACKED = re.compile(
    r"[-_. ]+(awq|gptq|gguf|exl2|aqlm|hqq|mlx|bnb|w4a16|fp8|nvfp4|(?:int|q)[2-8](?:_0|_k_[sml])?|[48]-?bits?)"
    r"(?=$|[-_. ])"
)


def packed(name: str) -> str:
    """How the weights of a repository are packed, by what its name ends in: ``gptq, int4``; "" for nothing."""
    return ", ".join(_PACKED.findall(name.lower()))


def _parts(name: str) -> tuple[str, set[str], set[str]]:
    """A model's family, the numbers of its version, and its sizes: of ``gemma-3-12b-it`` gemma-3, 3 and 12b."""
    plain = _TUNED.sub("", _PACKED.sub("", name))
    family = _SIZES.sub("", plain).strip("-_. ")
    return family, set(re.findall(r"\d+(?:\.\d+)?", family)), set(_SIZES.findall(plain))


def _continue(versions: set[str], others: set[str]) -> bool:
    """Whether each version is there, or one that continues it: 3 and 3.5, not 3 and 4."""
    return all(any(f"{other}.".startswith(f"{one}.") for other in others) for one in versions)


def nearest(text: str) -> list[str]:
    """Names and Hub ids of the catalogue that are most like a text: of its size and its family's version.

    Another size is another question: nothing is near ``gemma-3-9b-it`` as long as the catalogue has no 9b of it. A text
    without a version is nearest to the newest.
    """
    names, known = _index()[0], _spoken()
    wanted = text.lower().partition("@")[0]
    family, versions, sizes = _parts(wanted)
    alike = {name: _parts(name) for name in (names if "/" in wanted else known)}
    alike = {
        name: one for name, one in alike.items() if sizes <= one[2] and _continue(versions, one[1])
    }
    bare = {
        name: one[0] if versions else re.sub(r"-?\d[\d.x]*b?$", "", one[0])
        for name, one in alike.items()
    }
    likeness = {
        name: difflib.SequenceMatcher(None, family, one).ratio() for name, one in bare.items()
    }
    newest = {name: sorted(map(float, one[1]), reverse=True) for name, one in alike.items()}
    near = sorted(
        (name for name in alike if likeness[name] >= 0.6), key=newest.__getitem__, reverse=True
    )
    near.sort(key=lambda name: -likeness[name])
    return list(dict.fromkeys(_as_written(known.get(name, name)) for name in near))[:3]


@cache
def _spoken() -> dict[str, str]:
    """What the catalogue's models are called without an account, with the name, or the id where that is another one's.

    An id where its family is another one: a distilled model.
    """
    names = _index()[0]
    shorts = {hub.partition("/")[2]: hub for hub in names}
    known = {
        short: names[hub] if _parts(names[hub])[0] in _parts(short)[0] else hub
        for short, hub in shorts.items()
    }
    return known | {name: name for name in (*names.values(), *index()["fetched"])}


@cache
def _ids() -> dict[str, str]:
    """The catalogue's ids, with their capital letters, by those in small ones."""
    return {hub.lower(): hub for entry in index()["models"].values() for hub in entry["hub"]}


def _as_written(name: str) -> str:
    """An id of the catalogue with its capital letters; a name as it is."""
    return _ids().get(name, name)


def called(text: str) -> str | None:
    """The one model that a text names, whatever stands between its words: ``llama3 8b``, ``qwen 2.5 7b instruct``.

    A text without a version names the newest, if all versions at hand have the same layers: ``mistral 7b``. One without
    a size names the only model of its family: ``mistral nemo``. None: it names no model, or several.
    """
    dated = re.search(
        r"-(\d{4})(?![\d.])", text
    )  # else a card or a length that stands behind the name
    if "/" in text or (dated and not any(dated[0] in name for name in _spoken())):
        return None
    wanted, keys = _key(text.lower()), {name: _key(name) for name in _spoken()}
    if not any(wanted[1:]):
        of_family = {_spoken()[name] for name, key in keys.items() if key[0] == wanted[0] != ()}
        return _as_written(of_family.pop()) if len(of_family) == 1 else None
    named = {_spoken()[name] for name, key in keys.items() if key == wanted}
    if not named and not wanted[1]:
        named = {name for name in _index()[0].values() if keys[name][::2] == wanted[::2]}
        if len({*map(_layers, named)}) == 1:
            named = {max(named, key=lambda name: sorted(map(float, keys[name][1])))}
    return _as_written(named.pop()) if len(named) == 1 else None


def _key(name: str) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """What two spellings of a model's name share: the words of its family, the versions and the sizes."""
    family, versions, sizes = _parts(name)
    words = tuple(word for word in re.findall("[a-z]+", family) if word != "v")
    return words, frozenset(versions), frozenset(sizes)


def _layers(name: str) -> tuple[int, ...]:
    """The sizes of a model of the catalogue that decide its memory; of the vocabulary the magnitude."""
    config = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    keys = (
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return (*(config.get(key, 0) for key in keys), round(4 * log2(config["vocab_size"])))


def _is_copy(name: str, other: str) -> bool:
    """Whether names are of one family and version: a model, and its copy or its packed weights."""
    return (
        _parts(name.lower().rpartition("/")[2])[:2] == _parts(other.lower().rpartition("/")[2])[:2]
    )


def likely_id(text: str) -> str | None:
    """The Hub's id that a model's bare name may have: under the account of its family, whatever the size."""
    if "/" in text or " " in text:
        return None
    wanted, versions, _ = _parts(text.lower())
    for entry in index()["models"].values():
        for hub in entry["hub"]:
            owner, _, name = hub.partition("/")
            family, others, _ = _parts(name.lower())
            if family == wanted and others == versions:
                return f"{owner}/{text}"
    return None


def fetch_config(hub: HubId, where: object) -> Path:
    """The configuration's file, fetched if it isn't there.

    UserError: if the file can't be fetched; the message says why, and what to do.
    """
    return FETCH.get()(hub, where)


def fetch_file(hub: HubId, file: str) -> Path:
    """A file of a repository; from the cache where the Hub does not give it. Raises what huggingface_hub does."""
    import huggingface_hub as library
    from huggingface_hub import constants, utils

    utils.disable_progress_bars()
    place = {"repo_id": hub.name, "filename": file, "revision": hub.revision}
    try:
        if not constants.HF_HUB_OFFLINE:
            # One question without repetitions: a download would try for half a minute where there is no network.
            library.get_hf_file_metadata(
                library.hf_hub_url(**place), timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        return Path(library.hf_hub_download(**place))
    except Exception:
        cached = library.try_to_load_from_cache(**place)
        if isinstance(cached, str):
            return Path(cached)
        raise


def _download(hub: HubId, where: object) -> Path:
    try:
        return fetch_file(hub, "config.json")
    except ImportError:
        raise UserError(
            "The package huggingface_hub is not installed, which fetches a model's configuration.",
            where=where,
            found=hub.name,
            allowed="the package, or a path to the model's config.json",
            write="pip install huggingface_hub",
        ) from None
    except Exception as error:
        raise explained(Failure.of(error), hub, where) from None


# Who fetches. Where this code runs in a web page, the browser does.
FETCH: ContextVar[Callable[[HubId, object], Path]] = ContextVar("FETCH", default=_download)


_NO_MODEL = (
    "The repository has no config.json: it holds no model of transformers (an adapter, perhaps, GGUF files, or a"
    " diffusion model).",
    f"the model that it was made from; for one of diffusers your training program: {RUN}",
)


def explained(failure: Failure, hub: HubId, where: object) -> UserError:
    """Why a model's configuration could not be had, in words that say what to do."""
    near = nearest(hub.name)
    if not near and (does := by_name(hub.name)):
        return not_a_language_model(hub.name, where, does)
    problem, allowed = meaning(
        failure,
        "model",
        hub.name,
        instead=f"the path of a config.json, saved from https://huggingface.co/{hub.name}/raw/main/config.json",
        nearest=", ".join(near),
        own={"RemoteEntryNotFoundError": _NO_MODEL},
    )
    return UserError(
        problem,
        where=where,
        found=f"{hub.name}@{hub.revision}" if hub.revision else hub.name,
        allowed=allowed,
        field="model",
        # A Hub that is not reached may have the model: only another copy of it is as good.
        change={"model": near[0]}
        if near and (failure.status or _is_copy(near[0], hub.name))
        else None,
    )
