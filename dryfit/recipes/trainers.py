"""Files of programs that train images, as settings of a recipe: kohya's sd-scripts, diffusers' examples, ai-toolkit.

A program's options stand in ``dryfit/data/recipes/trainers.yaml``, with the version that they were read from. Each
option of a file is one of five: it sets a setting of the recipe; it takes more memory than any recipe says, then it is
named and the step is never said to fit; it changes memory otherwise, then the file is refused with its name; it has no
effect on memory; or it is unknown, then it is said.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import closest, yaml_text
from dryfit.data import data_path
from dryfit.readers.shell import beside as file_beside
from dryfit.readers.shell import commands, is_known, options
from dryfit.recipes.models import OtherModel, find
from dryfit.recipes.recipe import recipe

SUFFIXES = (".sh", ".toml", ".txt", ".yaml", ".yml")


@dataclass(frozen=True)
class TrainerFile:
    """A training as its file says it.

    Attributes
    ----------
    tool, program
        Whose program it starts, and its name.
    model, recipe
        The model, and the recipe that trains it.
    given
        Settings of the recipe by name.
    beside
        What takes memory too and no recipe has, in words.
    notes
        What is taken otherwise than the file has it, and options that nobody knows here.
    """

    tool: str
    program: str
    model: OtherModel
    recipe: str
    given: Mapping[str, Any]
    beside: tuple[str, ...]
    notes: tuple[str, ...]


@cache
def _tools() -> dict[str, dict[str, Any]]:
    return read_yaml(data_path("recipes", "trainers.yaml"))


def read(what: str) -> TrainerFile | None:
    """The training that a file describes; None: it is no file of a program that the table has.

    ``what`` is a script that starts such a program, the TOML that sd-scripts takes as ``--config_file``, or the YAML of
    ai-toolkit.

    Raises
    ------
    UserError
        If the file can't be read, or one of its options decides memory and no recipe has it.
    """
    path = Path(what)
    if path.suffix not in SUFFIXES or not path.is_file():
        return None
    if path.suffix in (".yaml", ".yml"):
        process = _process(path)
        return process and _training("ai-toolkit", _architecture(process, path), _flat(process, path), path)
    if path.suffix == ".toml":
        own = _toml(path)
        if not {"pretrained_model_name_or_path", "network_module"} & set(own):
            return None
        return _training("sd-scripts", _program_of(own, path), own, path)
    for command in commands(path.read_text(encoding="utf-8", errors="replace")):
        for tool, table in _tools().items():
            names = [(place, Path(word).name) for place, word in enumerate(command.words)]
            found = next(((place, name) for place, name in names if name in table["programs"]), None)
            if found:
                place, program = found
                before, own = (options(words, path) for words in (command.words[:place], command.words[place + 1 :]))
                launch = {key: before[key] for key in ("mixed_precision",) if key in before}  # accelerate's own
                if before.get("multi_gpu") or before.get("num_processes", 1) != 1:
                    launch["num_processes"] = before.get("num_processes", 2)
                return _training(tool, program, {**launch, **own}, path)
    return None


def _parsed(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises
    ------
    UserError
        If it is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "The file can't be read as TOML.", where=path, found=str(error), allowed="TOML, as sd-scripts reads it"
        ) from None


def _toml(path: Path) -> dict[str, Any]:
    """The options of a TOML file; sd-scripts reads those of all sections as one."""
    flat: dict[str, Any] = {}
    for key, value in _parsed(path).items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _program_of(own: Mapping[str, Any], path: Path) -> str:
    """The program that a TOML is meant for, by the network's module or the model's name."""
    module, model = str(own.get("network_module", "")), str(own.get("pretrained_model_name_or_path", "")).lower()
    for part, program in (("flux", "flux"), ("sd3", "sd3"), ("xl", "sdxl")):
        if part in module or part in model:
            return f"{program}_train_network.py"
    if "v1-5" in model or "v1.5" in model or "sd15" in model:
        return "train_network.py"
    raise UserError(
        "The file does not say which program of sd-scripts takes it.", where=path,
        found=f"pretrained_model_name_or_path: {own.get('pretrained_model_name_or_path')}",
        allowed="a script (.sh) whose line starts the program with `--config_file`",
        write=f"accelerate launch sdxl_train_network.py --config_file {path.name}",
    )  # fmt: skip


def _process(path: Path) -> dict[str, Any] | None:
    """The training of a file of ai-toolkit; None: it is another tool's file, or no YAML."""
    try:
        content = read_yaml(path)
    except (OSError, ValueError, UserError):
        return None
    config = content.get("config") if isinstance(content, dict) and content.get("job") == "extension" else None
    processes = config.get("process") if isinstance(config, dict) else None
    return next((one for one in processes or () if isinstance(one, dict) and "model" in one), None)


def _architecture(process: Mapping[str, Any], path: Path) -> str:
    """Which row of the table is meant: ``model.arch``, or the older form of it."""
    model, rows = process["model"], _tools()["ai-toolkit"]["programs"]
    older = {"is_flux": "flux", "is_v3": "sd3", "is_xl": "sdxl"}
    others = next((key for key in model if key.startswith("is_") and key != "is_v_pred" and model[key]), "sd1")
    named = model.get("arch") or older.get(others, others)
    plain = str(named).partition(":")[0]
    if plain not in rows:
        raise UserError(
            f"No recipe trains the architecture {named} of ai-toolkit.", where=path, found=f"arch: {named}",
            field="arch", allowed=", ".join(rows), write="dryfit run train.py",
        )  # fmt: skip
    return plain


def _flat(process: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A file of ai-toolkit as options ``section.key``, and by sd-scripts' names where the rules are shared."""
    own = {key: value for key, value in process.items() if not isinstance(value, dict | list)}
    sections = [(name, part) for name, part in process.items() if isinstance(part, dict)]
    own |= {f"{name}.{key}": value for name, part in sections for key, value in part.items()}
    datasets = [one for one in process.get("datasets", ()) if isinstance(one, dict)]
    own |= {f"datasets.{key}": value for one in datasets for key, value in one.items()}
    sides = [one.get("resolution", 512) for one in datasets] or [512]
    sides = [side for each in sides for side in (each if isinstance(each, list) else [each])]
    disk = ("cache_latents", "cache_latents_to_disk")
    texts = [own.get(key) for key in ("train.cache_text_embeddings", "train.unload_text_encoder")]
    own["pretrained_model_name_or_path"] = own.pop("model.name_or_path", None)
    own["resolution"] = max(sides, key=lambda side: _area(side, path))
    own["cache_latents"] = bool(datasets) and all(any(one.get(key) for key in disk) for one in datasets)
    own["cache_text_encoder_outputs"] = any(texts) or own.get("datasets.cache_text_embeddings", False)
    own["quantization"] = own.get("model.qtype", "qfloat8") if own.get("model.quantize") else False
    own["ema"] = bool((own.pop("train.ema_config", None) or {}).get("use_ema"))
    drawn = own.get("sample.prompts") or own.get("sample.samples")
    if drawn and not own.get("train.disable_sampling"):
        own["samples"] = max(own.get("sample.width", 512), own.get("sample.height", 512))
    if own.get("model.quantize") and own.get("model.quantize_te") is False and not own["cache_text_encoder_outputs"]:
        own["quantized_model_alone"] = True
    return own


def _training(tool: str, program: str, own: dict[str, Any], path: Path) -> TrainerFile:
    table = _tools()[tool]
    row = table["programs"][program]
    notes: list[str] = []
    own = {**_file(own.pop("config_file", None), path), **own}
    own |= _dataset(own.pop("dataset_config", None), path)
    own = {**table.get("defaults", {}), **row.get("defaults", {}), **own}
    _refuse(own, table, row, path)
    chosen = recipe(row["recipe"])
    given: dict[str, Any] = {}
    for key, value in own.items():
        name = table["settings"].get(key)
        if name == "size" and "height" in chosen.settings:
            side = _side(value, chosen.multiples["height"], notes, path)
            given |= {"height": side, "width": side}
        elif name in chosen.settings:
            given[name] = _value(name, value, key, path)
        elif name == "precision" and value != "bf16":
            raise UserError(
                f"The recipe {chosen.name} computes in bf16.", where=path, found=f"{key}={yaml_text(value)}", field=key,
                allowed="bf16", write=f"{key}=bf16",
            )  # fmt: skip
    if own.get("use_8bit_adam"):  # beside `optimizer AdamW` too
        given["optimizer"] = "adamw_8bit"
    if "size" in given:
        given["size"] = _side(given["size"], chosen.multiples["size"], notes, path)
    given |= row.get("always", {})
    for key, changed in table.get("changes", {}).items():
        given |= {name: value for name, value in changed.items() if own.get(key) and name in chosen.settings}
    given |= _cached(own, table, row, path)
    adds = {
        key: what
        for key, what in table["adds"].items()
        if own.get(key) and key not in (*chosen.settings, *row.get("has", ()))
    }
    adds |= {key: what for key, what in table.get("unless", {}).items() if not own.get(key) and not _texts_first(own)}
    if own.pop("num_processes", None):
        adds["num_processes"] = "what several GPUs exchange"
    known = {
        *table["settings"],
        *table["read"],
        *table["adds"],
        *table["without_recipe"],
        *row.get("without_recipe", {}),
    }
    for key in own.keys() - known:
        if not any(fnmatchcase(key, pattern) for pattern in table["no_memory"].split()):
            near = closest(key, known)
            notes.append(f"{key}: not known here" + (f"; {near} is" if near else ""))
    model, beside = _model(own, row["model"], notes), tuple(dict.fromkeys(adds.values()))
    return TrainerFile(table["name"], program, model, chosen.name, chosen.checked(given, path), beside, tuple(notes))


def _file(named: Any, path: Path) -> dict[str, Any]:
    """The TOML beside a script that its line names."""
    if named is None:
        return {}
    name = str(named) if Path(str(named)).suffix else f"{named}.toml"
    found = file_beside(path, name) if is_known(name) else None
    if found is None:
        raise UserError("The script names a file that is not there.", where=path, found=name, allowed="the file beside")
    return _toml(found)


def _dataset(named: Any, path: Path) -> dict[str, Any]:
    """Batch and size of the largest dataset of ``--dataset_config``."""
    if named is None:
        return {}
    found = file_beside(path, str(named)) if is_known(str(named)) else None
    if found is None:
        raise UserError(
            "The size of the images stands in a file that is not there.", where=path, found=f"dataset_config {named}",
            allowed="the file beside the script",
        )  # fmt: skip
    content = _parsed(found)
    datasets = [{**content.get("general", {}), **each} for each in content.get("datasets", [])]
    sizes = [each for each in datasets if "resolution" in each]
    largest = max(sizes, key=lambda each: _area(each["resolution"], found), default={})
    batches = [each["batch_size"] for each in datasets if "batch_size" in each]
    return ({"resolution": largest["resolution"]} if largest else {}) | (
        {"train_batch_size": max(batches)} if batches else {}
    )


def _refuse(own: Mapping[str, Any], table: Mapping[str, Any], row: Mapping[str, Any], path: Path) -> None:
    """Refuse options that decide memory and that no recipe has, by name."""
    without = {**table["without_recipe"], **row.get("without_recipe", {})}
    if not own.get("cache_latents") and not own.get("cache_latents_to_disk"):
        without |= table.get("without_cache", {})
    met = [key for key, why in without.items() if own.get(key) not in (None, False, 0, "")]
    if met:
        key = met[0]
        raise UserError(
            f"`{key}` decides memory, and no recipe has it: {without[key]}.", where=path,
            found=", ".join(f"{each}={yaml_text(own[each])}" for each in met), field=key,
            allowed="the file without it; your program over the simulated card", write="dryfit run train.py",
        )  # fmt: skip


def _value(name: str, value: Any, key: str, path: Path) -> Any:
    """An option's value as the recipe's setting has it."""
    if name == "optimizer":
        plain = str(value).rpartition(".")[2].lower()
        kinds = {"adamw8bit": "adamw_8bit", "adamw": "adamw", "": "adamw", "true": "adamw_8bit", "false": "adamw",
                 "adafactor": "adafactor"}  # fmt: skip
        if plain not in kinds:
            raise UserError(
                f"No recipe has the optimizer {value}.", where=path, found=f"{key}={value}", field=key,
                allowed="AdamW, AdamW8bit, Adafactor", write=f"{key}=AdamW8bit",
            )  # fmt: skip
        return kinds[plain]
    if name == "precision":
        return {"no": "fp32", "False": "fp32", "float32": "fp32"}.get(str(value), str(value).lower())
    if name == "quantization":
        return value if isinstance(value, str) else "fp8" if value else "none"
    return value


def _area(resolution: Any, path: Path) -> int:
    """The pixels of ``1024``, ``"1024,768"`` or ``[1024, 768]``."""
    parts = resolution if isinstance(resolution, list) else re.split(r"[,x]", str(resolution))
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise UserError(
            "The size of the images can't be read.", where=path, found=f"resolution={yaml_text(resolution)}",
            allowed="a number of pixels, or width and height", write="resolution=1024", field="resolution",
        )  # fmt: skip
    return sides[0] * sides[-1]


def _side(resolution: Any, multiple: int, notes: list[str], path: Path) -> int:
    """The side of the square that holds as many pixels; buckets of other shapes hold no more."""
    area = _area(resolution, path)
    side = next(side for side in range(multiple, area + multiple, multiple) if side * side >= area)
    if side * side != area:
        notes.append(f"images of {yaml_text(resolution)} pixels are taken as {side} x {side}")
    return side


def _cached(own: Mapping[str, Any], table: Mapping[str, Any], row: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Which of latents and embeddings of texts are computed before the training."""
    latents = any(own.get(key) for key in ("cache_latents", "cache_latents_to_disk"))
    texts = row.get("texts_first", False) or _texts_first(own)
    if "cached" not in recipe(row["recipe"]).settings:
        if not (latents and texts):
            raise UserError(
                f"The recipe {row['recipe']} has latents and embeddings of texts at hand, and the file does not.",
                where=path, allowed=f"{table['caching']}; your program over the simulated card",
                write="dryfit run train.py",
            )  # fmt: skip
        return {}
    both = {(False, False): "none", (True, False): "latents", (False, True): "texts", (True, True): "all"}
    return {"cached": both[latents, texts]}


def _texts_first(own: Mapping[str, Any]) -> bool:
    """Whether the embeddings of texts are computed before the training."""
    keys = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "pre_compute_text_embeddings")
    return any(own.get(key) for key in keys)


def _model(own: Mapping[str, Any], usual: str, notes: list[str]) -> OtherModel:
    """The model that the file names, where its configuration is known; else the program's own."""
    named = str(own.get("pretrained_model_name_or_path", usual))
    try:
        model = find(named)
    except UserError:
        model = None
    if model is None or model.recipe is None:
        notes.append(f"{named} is taken as {usual}")
        model = find(usual)
    assert model is not None
    return model
