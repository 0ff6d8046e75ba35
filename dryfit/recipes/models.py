"""Models that do not continue a text: their configuration, from a folder, the table of known names, or the Hub."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import closest
from dryfit.data import data_path
from dryfit.recipes.recipe import recipes
from dryfit.scenario.hub import HubId, catalogued, fetch_file
from dryfit.scenario.other_models import by_name, is_other_kind

CONFIG, INDEX, SENTENCES = "config.json", "model_index.json", "modules.json"
RUN = "dryfit run train.py"
LIBRARIES = ("diffusers", "transformers")  # whose classes a pipeline may have as parts


@dataclass(frozen=True)
class OtherModel:
    """A model as a recipe takes it."""

    name: str  # what programs call it
    # Its configurations by their paths in the model's folder: ``config.json``, ``transformer/config.json``
    files: Mapping[str, Mapping[str, Any]]
    source: str  # where they come from, in words
    recipe: (
        str | None
    )  # the recipe that trains it, by the table of known models or by its kind; None: there is none
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # settings of the recipe that differ for this model

    @property
    def kind(self) -> str:
        """Its ``model_type``; of a pipeline its ``_class_name``."""
        return str(
            self.files[INDEX]["_class_name"]
            if INDEX in self.files
            else self.files[CONFIG].get("model_type")
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks of each kind its transformer has; none where its configuration does not say."""
        config = next(
            (config for file, config in self.files.items() if file.startswith("transformer/")), {}
        )
        return tuple(
            config[key] for key in ("num_layers", "n_layers", "num_single_layers") if key in config
        )

    @property
    def config(self) -> Mapping[str, Any]:
        return self.files.get(CONFIG, {})


@cache
def known() -> dict[str, dict[str, Any]]:
    """The models whose configuration is kept here, by their ids on the Hub."""
    return read_yaml(data_path("recipes", "models.yaml"))


def known_name(text: str) -> str | None:
    """The id of a known model by its id, its name alone, or what it is called; None: it is none of these."""
    return _names().get(
        text.partition("@")[0].lower().replace("runwayml/", "stable-diffusion-v1-5/")
    )  # its old place


@cache
def _names() -> dict[str, str]:
    names = {
        one: name for name, entry in known().items() for one in entry.get("called", "").split()
    }
    return names | {
        one: name for name in known() for one in (name.lower(), name.lower().partition("/")[2])
    }


def find(what: str) -> OtherModel | None:
    """The model that a word of the command line names; None: it names a model that continues a text, or no model.

    UserError: if it is of another kind, and its configuration can't be had or has parts of its own code.
    """
    path = Path(what).expanduser()
    if path.exists():
        return _in_folder(path, what)
    if (name := known_name(what)) is not None:
        entry = known()[name]
        made = _model(name, entry["files"], entry["source"], entry.get("recipe"))
        return replace(made, settings=entry.get("settings", {}))
    hub = HubId.read(what)
    if hub and hub.name.startswith("timm/"):
        return _model(hub.name, {CONFIG: {"model_type": "timm"}}, "timm's own registry")
    if not (does := by_name(what)) or (hub and catalogued(hub)):
        return None
    return _on_the_hub(hub, what, does) if hub else _refuse_unknown(what, does)


def _in_folder(path: Path, what: str) -> OtherModel | None:
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name not in (CONFIG, INDEX):
        return None

    def read(file: str) -> dict[str, Any] | None:
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else {"modules": content}

    name = folder.resolve().name
    return _from_files(name, read, f"{what}")


def _on_the_hub(hub: HubId, what: str, does: str) -> OtherModel | None:
    def read(file: str) -> dict[str, Any] | None:
        try:
            content = json.loads(fetch_file(hub, file).read_text(encoding="utf-8"))
        except Exception:  # of the network, of the Hub, of a file that isn't there
            return None
        return content if isinstance(content, dict) else {"modules": content}

    found = _from_files(hub.name, read, f"the Hub, {what}")
    return found or _refuse_unknown(what, does)


def _from_files(
    name: str, read: Callable[[str], dict[str, Any] | None], source: str
) -> OtherModel | None:
    """A model from its own files; None: it continues a text, or no file says what it is."""
    if (index := read(INDEX)) is not None and "_class_name" in index:
        parts = {
            key: value for key, value in index.items() if isinstance(value, list) and any(value)
        }
        own = [key for key, (library, _) in parts.items() if library not in LIBRARIES]
        if own:
            raise UserError(
                f"Parts of this pipeline are code of its own, which no recipe runs: {', '.join(own)}.",
                where=source,
                found=index["_class_name"],
                allowed="your training program",
                write=RUN,
            )
        files = {INDEX: index}
        for part in parts:
            if (config := read(f"{part}/{CONFIG}")) is not None:
                files[f"{part}/{CONFIG}"] = config
        return _model(name, files, source)
    config = read(CONFIG)
    if config is None or not is_other_kind(config):
        return None
    if config.get("auto_map") and not _by_kind(config.get("model_type")):
        raise UserError(
            "This model is code of its own, which no recipe runs.",
            where=source,
            found=config.get("model_type"),
            allowed="your training program",
            write=RUN,
        )
    recipe = "bi_encoder" if read(SENTENCES) is not None else None
    return _model(name, {CONFIG: config}, source, recipe)


def _model(
    name: str, files: Mapping[str, Any], source: str, recipe: str | None = None
) -> OtherModel:
    made = OtherModel(name, files, source, recipe)
    if recipe is None:
        made = OtherModel(name, files, source, _ranker(made.config) or _by_kind(made.kind))
    return made


def _ranker(config: Mapping[str, Any]) -> str | None:
    """A model that gives a pair of texts one number is a cross-encoder."""
    architectures = " ".join(map(str, config.get("architectures") or []))
    return (
        "cross_encoder"
        if "SequenceClassification" in architectures and len(config.get("id2label") or ()) == 1
        else None
    )


def _by_kind(kind: object) -> str | None:
    plain = str(kind).replace("_", "-")
    return next(
        (
            one.name
            for one in recipes().values()
            if plain in [each.replace("_", "-") for each in one.kinds]
        ),
        None,
    )


def _refuse_unknown(what: str, does: str) -> None:
    near = closest(what, known())
    raise UserError(
        f"This model {does}, and its configuration is not at hand.",
        where="the command line",
        found=what,
        allowed="a folder with its config.json or model_index.json; the network, to read it from the Hub; a model that"
        f" is known by name, such as {near or next(iter(known()))}; your own program, by dryfit run",
        field="model",
        write=f"dryfit {near}" if near else RUN,
    )
