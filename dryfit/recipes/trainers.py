"""Files of programs that train images, as settings of a recipe: what each option means is a row of a table.

A program's options stand in ``dryfit/data/recipes/trainers.yaml``, with the version that they were read from. Each
option of a file is one of six: it sets a setting of the recipe; it takes more memory than any recipe says, then it is
named and the step is never said to fit; it takes less, then it is said; it changes memory otherwise, then the file is
refused with its name; it has no effect on memory; or it is unknown, then it is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.text import closest, yaml_text
from dryfit.recipes.models import OtherModel, find
from dryfit.recipes.recipe import Recipe, recipe
from dryfit.recipes.trainer_files import Options, area, tools, written

_LATENTS = ("cache_latents", "cache_latents_to_disk")
_TEXTS = (
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "pre_compute_text_embeddings",
)
# OneTrainer's ring buffer is up to a tenth larger than the part of the weights that stays (LayerOffloadConductor.py).
_RING_BUFFER = 1.1


@dataclass(frozen=True)
class TrainerFile:
    """A training as its file says it."""

    # Whose program it starts, and its name
    tool: str
    program: str
    # The model, and the recipe that trains it
    model: OtherModel
    recipe: str
    given: Mapping[str, Any]  # settings of the recipe by name
    beside: tuple[str, ...]  # what takes memory too and no recipe has, in words
    notes: tuple[
        str, ...
    ]  # what is taken otherwise than the file has it, and options that nobody knows here


def read(what: str) -> TrainerFile | None:
    """The training that a file describes; None: it is no file of a program that the table has.

    UserError: if the file can't be read, or one of its options decides memory and no recipe has it.
    """
    path = Path(what)
    found = written(path)
    if found is None:
        return None
    table = tools()[found.tool]
    return TrainerReading(table, table["programs"][found.program], found.options, path).training(
        found.program
    )


class TrainerReading:
    """A file's options beside the rows of their tool and program."""

    def __init__(
        self, table: Mapping[str, Any], row: Mapping[str, Any], own: Options, path: Path
    ) -> None:
        self.table, self.row, self.path = table, row, path
        self.own: Options = {**table.get("defaults", {}), **row.get("defaults", {}), **own}
        self.recipe: Recipe = recipe(row["recipe"])
        self.notes: list[str] = []
        self.without = {**table["without_recipe"], **row.get("without_recipe", {})}

    def training(self, program: str) -> TrainerFile:
        self._refuse()
        model = self._model()
        given = self._settings(model) | self.row.get("always", {})
        for changed in (
            each for key, each in self.table.get("changes", {}).items() if self.own.get(key)
        ):
            given |= {
                name: value for name, value in changed.items() if name in self.recipe.settings
            }
        given |= self._cached()
        done = (*self.recipe.settings, *self.row.get("has", ()))
        adds = [
            what for key, what in self.table["adds"].items() if self._is_on(key) and key not in done
        ]
        if self.own.get("num_processes"):
            adds.append("what several GPUs exchange")
        less = self.table.get("less", {})
        self.notes += [f"{key}: {what}" for key, what in less.items() if self._is_on(key)]
        self._name_unknown()
        checked = self.recipe.checked(given, self.path)
        beside = tuple(dict.fromkeys(adds))
        return TrainerFile(
            self.table["name"], program, model, self.recipe.name, checked, beside, tuple(self.notes)
        )

    def _is_on(self, key: str) -> bool:
        return _is_on(self.own.get(key))

    def _refuse(self) -> None:
        """Refuse options that decide memory and that no recipe has, by name."""
        without = {**self.without}
        if not any(self.own.get(key) for key in _LATENTS):
            without |= self.table.get("without_cache", {})
        for key, (only, why) in self.table.get("only", {}).items():
            if self._is_on(key) and str(self.own[key]) not in str(only).split():
                without[key] = why
        for key, name in self.table["settings"].items():
            needed = name in ("quantization", "blocks_swapped") and name not in self.recipe.settings
            if needed and _is_on(self._value(name, key)):
                without[key] = f"the recipe {self.recipe.name} has no {name}"
        met = [key for key in without if self._is_on(key)]
        if met:
            key = met[0]
            raise UserError(
                f"`{key}` decides memory, and no recipe has it: {without[key]}.",
                where=self.path,
                found=", ".join(f"{each}={yaml_text(self.own[each])}" for each in met),
                field=key,
                allowed="the file without it; your program over the simulated card",
                write="dryfit run train.py",
            )

    def _settings(self, model: OtherModel) -> dict[str, Any]:
        chosen, given = self.recipe, {}
        for key, name in self.table["settings"].items():
            if key not in self.own:
                continue
            value = self.own[key]
            if name == "size":
                names = ("height", "width") if "height" in chosen.settings else ("size",)
                given |= dict.fromkeys(names, self._side(value, chosen.multiples[names[0]]))
            elif name in chosen.settings:
                now = self._value(name, key)
                given[name] = (
                    _blocks(model, now)
                    if name == "blocks_swapped" and isinstance(now, float)
                    else now
                )
            elif name == "checkpoints" and self._value(name, key) == "host":
                self.notes.append(
                    f"{key}: the recipe {chosen.name} keeps checkpoints on the card, which takes no less"
                )
            elif name == "precision" and self._value(name, key) == "fp16":  # as many bytes
                self.notes.append(
                    f"{key}: {value} is taken as bf16, which takes more below compute capability 8.0"
                )
                # beside fp16 the tools keep trained adapters in fp32
                given |= (
                    {"adapter_precision": "fp32"} if "adapter_precision" in chosen.settings else {}
                )
            elif name == "precision" and self._value(name, key) not in ("bf16", None):
                raise UserError(
                    f"The recipe {chosen.name} computes in bf16.",
                    where=self.path,
                    found=f"{key}={yaml_text(value)}",
                    field=key,
                    allowed=(bf16 := self._word(name, "bf16")),
                    write=f"{key}={bf16}",
                )
        if self.own.get("use_8bit_adam"):  # beside `optimizer AdamW` too
            given["optimizer"] = "adamw_8bit"
        return {name: value for name, value in given.items() if value is not None}

    def _value(self, name: str, key: str) -> Any:
        """An option's value as the setting has it; what is taken as another one is said.

        UserError: if the table has values of this setting, and not this one.
        """
        value, known = self.own.get(key), self.table.get("values", {}).get(name)
        if known is None or value is None:
            return value
        plain = str(value).rpartition(".")[2].lower()
        taken = self.table.get("at_most", {}).get(name, {})
        for word, other in taken.items():
            if word.lower() == plain:
                note = f"{key}: {value} is taken as {other}, which takes no less"
                self.notes += [note] if note not in self.notes else []
                return other
        found = [each for word, each in known.items() if word.lower() == plain]
        if not found:
            raise UserError(
                f"No recipe has the {name.replace('_', ' ')} {value}.",
                where=self.path,
                field=key,
                found=f"{key}={yaml_text(value)}",
                allowed=", ".join(filter(None, [*known, *taken])),
                write=f"{key}={next(iter(known))}",
            )
        return found[0]

    def _word(self, name: str, value: Any) -> str:
        """How the tool writes a setting's value."""
        words = self.table.get("values", {}).get(name, {})
        return next((word for word, each in words.items() if each == value), str(value))

    def _side(self, resolution: Any, multiple: int) -> int:
        """The side of the square that holds as many pixels; buckets of other shapes hold no more."""
        pixels = area(resolution, self.path)
        side = next(
            side for side in range(multiple, pixels + multiple, multiple) if side * side >= pixels
        )
        if side * side != pixels:
            self.notes.append(
                f"images of {yaml_text(resolution)} pixels are taken as {side} x {side}"
            )
        return side

    def _cached(self) -> dict[str, Any]:
        """Which of latents and embeddings of texts are computed before the training."""
        latents = any(self.own.get(key) for key in _LATENTS)
        texts = self.row.get("texts_first", False) or any(self.own.get(key) for key in _TEXTS)
        if "cached" in self.recipe.settings:
            both = {
                (False, False): "none",
                (True, False): "latents",
                (False, True): "texts",
                (True, True): "all",
            }
            if (value := both[latents, texts]) in self.recipe.settings["cached"].choices:
                return {"cached": value}
        if not (latents and texts):
            raise UserError(
                f"The recipe {self.recipe.name} has latents at hand, and the file does not.",
                where=self.path,
                allowed=f"{self.table['caching']}; your program over the simulated card",
                write="dryfit run train.py",
            )
        return {}

    def _name_unknown(self) -> None:
        table = self.table
        parts = ("settings", "read", "adds", "less", "only", "without_cache", "changes")
        known = {*self.without, *(key for part in parts for key in table.get(part, ()))}
        for key in sorted(self.own.keys() - known):
            if not any(fnmatchcase(key, pattern) for pattern in table["no_memory"].split()):
                near = closest(key, known)
                self.notes.append(f"{key}: not known here" + (f"; {near} is" if near else ""))

    def _model(self) -> OtherModel:
        """The model that the file names, where its configuration is known; else the program's own.

        UserError: if it is not known, and the program trains models of several sizes.
        """
        named, usual = self.own.get("pretrained_model_name_or_path"), self.row["model"]
        name = str(named or "")
        for each in (
            Path(name).name,
            f"{Path(name).name}-Diffusers",
            name,
            usual if named is None else "",
        ):
            try:
                found = find(each) if each else None
            except UserError:
                continue
            if found is not None and found.recipe == self.recipe.name:
                return found
        if self.row.get("sizes"):
            raise UserError(
                f"The configuration of {name or 'the model'} is not at hand, and this program trains several sizes.",
                where=self.path,
                found=name or "no model",
                allowed=", ".join(self.row["sizes"]),
                write="dryfit run train.py",
            )
        self.notes.append(f"{name} is taken as {usual}")
        model = find(usual)
        assert model is not None
        return model


def _is_on(value: Any) -> bool:
    return bool(value) and value != "none"


def _blocks(model: OtherModel, fraction: float) -> int:
    """Blocks on the host, where a fraction of the weights lies there and a ring buffer holds the rest.

    With two kinds of blocks, as FLUX has, the recipe counts half of one kind and as many of the other.
    """
    away = max(0.0, 1 - _RING_BUFFER * (1 - fraction))
    counts = model.blocks
    return int(away * max(count * (len(counts) - place) for place, count in enumerate(counts)))
