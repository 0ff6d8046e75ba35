"""A model that continues no text, asked about by name: its recipe's answer, ``--recipe`` and ``--yaml``.

dryfit openai/whisper-large-v3 --gpu t4 -b 8
dryfit black-forest-labs/FLUX.1-dev --gpu 4090 -b 1 --set size=1024
dryfit BAAI/bge-m3 --recipe list
dryfit train_sdxl.sh --gpu 4090      a file of a program that trains images
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dryfit.ask.options import PROGRAM, json_line, split
from dryfit.ask.words import Understood, changed, items, meant, parse, read_as, suggested
from dryfit.cards.gpus import find as card
from dryfit.cards.sentences import of_program, said
from dryfit.common.errors import UserError
from dryfit.common.files import yaml_value
from dryfit.common.kept import kept_or_given
from dryfit.common.text import gib, printable, yaml_text
from dryfit.recipes.models import OtherModel, find
from dryfit.recipes.recipe import Recipe, recipe, recipes

if TYPE_CHECKING:
    from dryfit.recipes.trainers import TrainerFile

_RANK = 16  # of `--method lora` where none is named
_TAKEN = (
    "what",
    "command",
    "gpu",
    "method",
    "sequence_length",
    "micro_batch",
    "set",
    "json",
    "suggest",
    "yaml",
    "fresh",
    "recipe",
)


@dataclass(frozen=True)
class RecipeQuestion:
    """What is asked: a model, its recipe, all settings of that, a card of the catalogue, and the file that says so."""

    model: OtherModel
    recipe: Recipe
    values: Mapping[str, Any]
    assumed: Mapping[str, Any]
    gpu: str | None
    file: TrainerFile | None = None
    read_as: str = ""


def answered(words: Sequence[str]) -> int | None:
    """Answer a line about a model of another kind; the exit status, None where the line is about none.

    UserError: if the line is wrong, or the model can't be had.
    """
    line, wrong = meant(words)
    own = items(split(line)[1])
    named = next((item.value for item in own if not item.name), None)
    chosen = next((item.value for item in own if item.name == "--recipe"), None)
    file = _file(named) if named else None
    model = file.model if file else find(named) if named else None
    if not chosen and (model is None or model.recipe is None):
        return None
    if chosen == "list":
        print("\n".join(_listed(model)))
        return 0
    options = parse(line)
    if model is None:
        raise UserError(
            "Recipes are for models that continue no text.",
            where="--recipe",
            found=named,
            allowed="a model of images, films, speech or classes; without --recipe any model that continues a text",
            write=f"{PROGRAM} openai/whisper-large-v3 --recipe {options.recipe}",
        )
    try:
        asked = question(model, options, file)
    except UserError as error:
        if not error.change or str(error.write).startswith(PROGRAM):
            raise
        line, wrong = changed(line, error.change), [*wrong, error]
        question(model, parse(line), file)  # what is wrong in this line too is shown instead of it
    if not all(isinstance(one, Understood) for one in wrong):
        raise UserError.several(
            [one.with_values(write=shlex.join([PROGRAM, *line]), change=None) for one in wrong]
        )
    if wrong:
        words, asked = line, replace(asked, read_as=read_as(line, asked.gpu))
        if not options.json:
            print(f"{'# ' if options.yaml else ''}Read as: {asked.read_as}", flush=True)
    if options.yaml:
        print(asked.recipe.program({"model": model.name, **asked.values}), end="")
        return 0
    return kept_or_given(
        words, asked, partial(_print, asked, options, words), fresh=bool(options.fresh)
    )


def _file(what: str) -> TrainerFile | None:
    """The training of images that a script or a TOML describes; files of other tools are read elsewhere."""
    if not Path(what).expanduser().is_file():
        return None
    from dryfit.recipes.trainers import read

    return read(what)


def _listed(model: OtherModel | None) -> list[str]:
    """The recipes, a line each; that of the model first and marked."""
    own = model.recipe if model else None
    width = max(map(len, recipes()))
    rows = sorted(recipes().values(), key=lambda one: one.name != own)
    return [f"{'*' if one.name == own else ' '} {one.name:<{width}}  {one.about}" for one in rows]


def question(
    model: OtherModel, options: argparse.Namespace, file: TrainerFile | None = None
) -> RecipeQuestion:
    """What a line asks about a model, or about the training that a file describes.

    UserError: if an option says nothing to a recipe, or a setting is wrong.
    """
    wrong = [
        name
        for name, value in vars(options).items()
        if value not in (None, [], False) and name not in _TAKEN
    ]
    if wrong or len(options.what) > 1:
        name = f"--{wrong[0].replace('_', '-')}" if wrong else options.what[1]
        raise UserError(
            f"{model.name} is answered by a recipe, which does not use {name}.",
            where="the command line",
            found=name,
            allowed="--gpu, --method, -b, -s, --set, --recipe, --json, --suggest, --yaml, --fresh",
            write=f"{PROGRAM} {model.name} --gpu {options.gpu or '4090'}",
        )
    chosen = recipe(options.recipe or (file.recipe if file else model.recipe))
    gpu = card(options.gpu, "--gpu") if options.gpu else None
    if gpu and gpu.count > 1:
        raise UserError(
            "A recipe runs on one GPU.",
            where="--gpu",
            found=options.gpu,
            allowed="one GPU; your program on several",
            write=f"{PROGRAM} run --gpus {gpu.count} --gpu {gpu.name} train.py",
        )
    given = {**(file.given if file else {}), **chosen.checked(_given(chosen, options))}
    own = {name: setting.value for name, setting in chosen.settings.items() if name != "model"}
    own |= {name: value for name, value in model.settings.items() if name in own}
    old = gpu is not None and gpu.capability is not None and gpu.capability < (8, 0)
    if old and own.get("precision") == "bf16" and "fp16" in chosen.settings["precision"].choices:
        own["precision"] = "fp16"  # what such a card computes fast
    assumed = {name: value for name, value in own.items() if name not in given}
    return RecipeQuestion(model, chosen, {**own, **given}, assumed, gpu.name if gpu else None, file)


def _given(chosen: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if options.method:
        lora = options.method != "full"
        rank = chosen.settings["rank"].value if "rank" in chosen.settings else 0
        given["rank"] = (rank or _RANK) if lora else 0
        if options.method == "qlora":
            given["quantization"] = "nf4"
    given |= {
        name: value
        for name in ("sequence_length", "micro_batch")
        if (value := getattr(options, name)) is not None
    }
    if (
        "size" in chosen.settings and "sequence_length" in given
    ):  # `sdxl 1024`: what a length is to an image
        given["size"] = given.pop("sequence_length")
    for text in options.set:
        name, equals, written = text.partition("=")
        if not equals:
            raise UserError(
                "`--set` takes setting=value.",
                where="--set",
                found=text,
                allowed="a setting of the recipe",
                write="--set micro_batch=2",
            )
        given[name.strip().removeprefix("lora.")] = yaml_value(written, "--set")
    return given


def _print(asked: RecipeQuestion, options: argparse.Namespace, words: Sequence[str]) -> int:
    from dryfit.recipes.follow import follow, spared

    beside = asked.file.beside if asked.file else ()
    found = follow(asked.recipe, asked.model, asked.values, asked.gpu, beside)
    found["recipe"] |= {"assumed": dict(asked.assumed)}
    if asked.file:
        found["recipe"]["file"] = {
            name: getattr(asked.file, name) for name in ("tool", "program", "beside", "notes")
        }
    found["sentence"] = of_program(found, asked.model.name)
    wanted = found["gpu"] is not None and found["verdict"] != "fits"
    if options.json:
        if options.suggest:
            tried = (
                spared(asked.recipe, asked.model, asked.values, asked.gpu, found, beside)
                if wanted
                else ()
            )
            found["suggestions"] = [_suggestion(changes, one, words) for changes, one in tried]
        print(json_line(found, asked.read_as))
    else:
        print(printable("\n".join(_lines(found))), flush=True)
        if wanted:
            _print_spared(asked, words, partial(spared, before=found, beside=beside))
    return 0 if found["fits"] or found["gpu"] is None else 1


def _lines(found: Mapping[str, Any]) -> list[str]:
    from dryfit.ask.run_program import text

    told = found["recipe"]
    settings = ", ".join(f"{name} {yaml_text(value)}" for name, value in told["settings"].items())
    first = [found["sentence"], f"recipe {told['name']}: {told['about']}", f"  with {settings}"]
    if told["assumed"]:
        first.append(
            f"  the recipe's own, since the line does not say: {', '.join(told['assumed'])}"
        )
    if file := told.get("file"):
        first.append(
            f"  read from a file of {file['tool']} for {file['program']}, run as diffusers' own step"
        )
        first += [f"  {line}" for line in file["notes"]]
    first += [f"  {line}" for line in told["assumptions"]]
    return [*first, f"  configuration: {told['configuration']}", *text(found)[2:]]


def _print_spared(asked: RecipeQuestion, words: Sequence[str], spared: Any) -> None:
    print("what would need less:", flush=True)
    try:
        for changes, one in spared(asked.recipe, asked.model, asked.values, asked.gpu):
            row = _suggestion(changes, one, words)
            what = ", ".join(
                f"{name.replace('_', ' ')} {yaml_text(value)}" for name, value in changes.items()
            )
            print(
                printable(f"{gib(row['required_bytes']):>12}, {said(row['verdict'])}: {what}"),
                flush=True,
            )
            print(printable(f"{'':14}{row['command']}"), flush=True)
    except KeyboardInterrupt:
        print("stopped: what is shown was found until now", file=sys.stderr)


def _suggestion(
    changes: Mapping[str, Any], one: Mapping[str, Any], words: Sequence[str]
) -> dict[str, Any]:
    return {
        "changes": dict(changes),
        "verdict": one["verdict"],
        "required_bytes": one["trace"]["required_bytes"],
        "command": suggested(words, changes),
    }
