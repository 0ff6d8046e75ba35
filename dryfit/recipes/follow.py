"""A recipe run over the simulated card with a model's configuration, and what to change where it does not fit."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.program.answer import answer, of_ranks
from dryfit.program.process import run
from dryfit.program.request import ProgramRequest
from dryfit.recipes.models import OtherModel
from dryfit.recipes.recipe import MODEL, Recipe

# Values of a spare: half of what it is, at least 1; what the line asked for; all blocks that may wait on the host, and
# then as few as do.
HALVED, GIVEN, MOST = "halved", "given", "most"
BLOCKS = "blocks_swapped"
# How much of a card a step that fits takes, so that its verdict is not TOO CLOSE.
_FILLED = 0.95
# Models whose positions begin behind the id of padding, 1 (transformers' create_position_ids_from_input_ids).
_FROM_THE_PADDING, _RESERVED = (
    ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "data2vec-text"),
    2,
)
# Kinds of errors that a program raises where its sizes don't go together.
_SIZES = ("ValueError", "RuntimeError", "IndexError", "AssertionError")


def check(recipe: Recipe, model: OtherModel, values: Mapping[str, Any]) -> None:
    """What can be known before the program runs.

    UserError: if the recipe's package is missing, or the model can't take a size.
    """
    if recipe.package and find_spec(recipe.package) is None:
        raise UserError(
            f"The recipe {recipe.name} needs the package {recipe.package}, which is not installed.",
            where="--recipe",
            allowed="the package; another recipe, see --recipe list",
            write=f'pip install "dryfit[{recipe.extra}]"',
        )
    for name, other in recipe.needs.items():
        if values[name] and not values[other]:
            raise UserError(
                f"`{name}` of the recipe {recipe.name} needs `{other}`: what is trained stays on the card.",
                where="--set",
                found=f"{name}={values[name]}, {other}={values[other]}",
                field=name,
                allowed=f"{name}=0, or another {other}",
                write=f"--set {name}=0",
            )
    for name, key in recipe.limits.items():
        most = _most(model, key)
        if most is not None and values[name] > most:
            raise UserError(
                f"{model.name} takes a {name.replace('_', ' ')} of {most:,} at most.",
                where="--set",
                found=f"{name}={values[name]}",
                allowed=f"1 to {most}: its configuration's {key}",
                field=name,
                write=f"--set {name}={most}",
            )


def _most(model: OtherModel, key: str) -> int | None:
    """The largest value that a key of the model's configuration allows; None: nothing bounds it."""
    most = model.config.get(key)
    if (
        not isinstance(most, int) or model.config.get("position_biased_input") is False
    ):  # of DeBERTa: no table
        return None
    return most - _RESERVED if model.kind.replace("_", "-") in _FROM_THE_PADDING else most


def follow(
    recipe: Recipe,
    model: OtherModel,
    values: Mapping[str, Any],
    gpu: str | None,
    beside: Sequence[str] = (),
) -> dict[str, Any]:
    """The answer of :func:`dryfit.program.answer.answer`, with ``recipe`` beside it.

    ``values`` are all settings of the recipe but the model's name; ``gpu`` is a card of the catalogue. ``beside``: what
    takes memory too and is not followed, in words.

    UserError: as :func:`check`; or if the program came to no update.
    """
    check(recipe, model, values)
    text = recipe.program({MODEL: model.name, **values})
    batch = values.get("micro_batch", 1), values.get("sequence_length", 16)
    asked = ProgramRequest(
        f"{recipe.name}.py", gpu=gpu, batch=batch, in_place=True, runs_out=False, recipe=True
    )
    with tempfile.TemporaryDirectory(prefix="dryfit-recipe-") as place, chdir(place):
        for name, content in {
            f"{model.name}/{file}": content for file, content in model.files.items()
        }.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(json.dumps(content), encoding="utf-8")
        Path(asked.program).write_text(text, encoding="utf-8")
        with open("output.txt", "w+", encoding="utf-8") as output:
            found = run(asked, output, label=f"{model.name}, recipe {recipe.name}")
    # What a recipe is: no weights, no data, batches of one size.
    found |= {
        "made_up": {"weights": [], "data": []},
        "written": [],
        "not_followed": list(beside),
        "adds": list(beside),
    }
    try:
        answered = of_ranks({0: answer(asked, found)})
    except UserError as error:
        raise _in_our_words(error, found, recipe, model, values) from None
    chosen = {"name": recipe.name, "about": recipe.about, "assumptions": recipe.assumptions}
    told = {
        "model": model.name,
        "settings": dict(values),
        "configuration": model.source,
        "program": text,
    }
    return answered | {"recipe": chosen | told}


def _in_our_words(
    error: UserError,
    found: Mapping[str, Any],
    recipe: Recipe,
    model: OtherModel,
    values: Mapping[str, Any],
) -> UserError:
    """An error of the libraries as one of sizes that don't go together, where it is of a kind that they raise then."""
    if found.get("kind") not in _SIZES:
        return error
    sizes = ", ".join(f"{name} {value}" for name, value in values.items() if type(value) is int)
    said = next(
        filter(None, map(str.strip, str(found.get("text", "")).splitlines())), error.problem
    )
    return UserError(
        f"{model.name} can't take such a step: {said.rstrip('.')}.",
        where=f"recipe {recipe.name}",
        found=sizes,
        allowed="sizes that go with its configuration; the recipe's own are in --yaml",
    )


def spared(
    recipe: Recipe,
    model: OtherModel,
    values: Mapping[str, Any],
    gpu: str,
    before: Mapping[str, Any],
    beside: Sequence[str] = (),
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Changes for a step that does not fit (its answer is ``before``), and the answers, until it fits.

    Each change stands beside those before it.
    """
    changes: dict[str, Any] = {}
    for spare in recipe.spares:
        now, last = {**values, **changes}, before
        told = {
            HALVED: lambda name, now=now: max(1, now[name] // 2),
            GIVEN: values.get,
            MOST: lambda _: _most_blocks(model),
        }
        new = {name: told[value](name) if value in told else value for name, value in spare.items()}
        off = any(new.get(name) and not now[other] for name, other in recipe.needs.items())
        if off or all(now.get(name) == value for name, value in new.items()):
            continue
        changes = {
            name: value for name, value in {**changes, **new}.items() if value != values.get(name)
        }
        before = follow(recipe, model, {**values, **changes}, gpu, beside)
        if MOST in spare.values() and before["verdict"] == "fits":
            fewer = _as_few(now[BLOCKS], new[BLOCKS], last, before)
            if fewer < new[BLOCKS]:
                with_fewer = follow(
                    recipe, model, {**values, **changes, BLOCKS: fewer}, gpu, beside
                )
                if with_fewer["verdict"] == "fits":
                    changes, before = changes | {BLOCKS: fewer}, with_fewer
        yield dict(changes), before
        if before["verdict"] == "fits":
            return


def _most_blocks(model: OtherModel) -> int:
    """How many blocks of a transformer may wait on the host, as ``parts/block_swap.py`` counts; 0: nobody knows.

    All but two of a kind may. Of two kinds, half of the number wait of the first, and as many of the second.
    """
    counts = [count - 2 for count in model.blocks]
    return max((count * (len(counts) - place) for place, count in enumerate(counts)), default=0)


def _as_few(now: int, most: int, without: Mapping[str, Any], waiting: Mapping[str, Any]) -> int:
    """The fewest blocks with which a step fits, by what each of those between two answers spares."""
    required = [answered["trace"]["required_bytes"] for answered in (without, waiting)]
    missing = required[0] - _FILLED * without["gpu"]["usable_bytes"]
    return min(most, now + max(1, ceil(missing * (most - now) / max(1, required[0] - required[1]))))
