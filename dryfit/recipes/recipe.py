"""Recipes: training programs as people write them, whose first assignments are their settings.

A recipe is a file of ``dryfit/data/recipes`` and a row of its table, ``recipes.yaml``. The program's text says the
rest: the first line of its docstring what it does, the items below what is assumed, the assignments behind its imports
which settings it has, and the comment behind each one what it means: ``a | b`` are all values that it takes.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import closest, yaml_text
from dryfit.data import data_path

FOLDER = data_path("recipes")
MODEL = "model"  # the setting that names the model
# What the trainers call weights in 8 bits with scales.
_QUANTO = ("int8", "qint8", "qfloat8", "int8-quanto", "fp8-quanto", "optimum-quanto")
# What the command line and scenarios call a setting, where a recipe calls it otherwise.
ALSO = {
    "lora.rank": "rank",
    "batch_size": "micro_batch",
    "resolution": "size",
    "image_size": "size",
}


@dataclass(frozen=True)
class RecipeSetting:
    """A setting of a recipe: its value, what its comment says, and where the value stands (line, first, last)."""

    name: str
    value: Any
    about: str
    place: tuple[int, int, int]

    @property
    def choices(self) -> list[str]:
        return self.about.split(" | ") if " | " in self.about else []


@dataclass(frozen=True)
class Recipe:
    """A training program with settings."""

    # Of its file
    name: str
    text: str
    kinds: Sequence[str]  # ``model_type`` or ``_class_name`` of the models that it trains
    # The package beside transformers that it needs, and the extra that brings it; None: none
    package: str | None
    extra: str | None
    limits: Mapping[str, str]  # settings with the key of the model's configuration that bounds them
    multiples: Mapping[str, int]  # settings with what they have to be a multiple of
    needs: Mapping[str, str]  # settings with another one that must not be off beside them
    # Changes for a step that does not fit, in the order in which they are tried, each beside those before it
    spares: Sequence[Mapping[str, Any]]

    @property
    def about(self) -> str:
        return self._docstring.partition("\n")[0]

    @property
    def assumptions(self) -> list[str]:
        items = re.split(r"\n- ", self._docstring)[1:]
        return [" ".join(item.split()) for item in items]

    @property
    def _docstring(self) -> str:
        return ast.get_docstring(ast.parse(self.text)) or ""

    @property
    def settings(self) -> dict[str, RecipeSetting]:
        """The settings by name, the model's name among them."""
        lines, found = self.text.splitlines(), {}
        body = iter(ast.parse(self.text).body)
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
                continue
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
                break
            name, value = node.targets[0].id, node.value
            about = lines[node.lineno - 1][value.end_col_offset :].strip().removeprefix("#").strip()
            place = node.lineno - 1, value.col_offset, value.end_col_offset
            found[name] = RecipeSetting(name, value.value, about, place)
        return found

    def checked(self, given: Mapping[str, Any], where: object = "--set") -> dict[str, Any]:
        """Settings as they were given, by this recipe's names.

        UserError: if it has no such setting, or a value is of another kind.
        """
        own, found = self.settings, {}
        for asked, value in given.items():
            name = ALSO.get(asked, asked)
            if name not in own or name == MODEL:
                known = [each for each in own if each != MODEL]
                near = closest(name, known)
                raise UserError(
                    f"The recipe {self.name} has no setting `{asked}`.",
                    where=where,
                    found=f"{asked}={yaml_text(value)}",
                    field=asked,
                    allowed=", ".join(f"{each} ({own[each].value})" for each in known),
                    write=f"--set {near}={yaml_text(value)}" if near else None,
                )
            found[name] = self._value(own[name], value, where)
        return found

    def _value(self, setting: RecipeSetting, value: Any, where: object) -> Any:
        kind, name = type(setting.value), setting.name
        least = 1 if setting.value and "; 0 " not in setting.about else 0
        allowed = ", ".join(setting.choices) or {bool: "true, false", str: "a word"}.get(
            kind,
            f"a whole number from {least} on"
            + (f", a multiple of {m}" if (m := self.multiples.get(name)) else ""),
        )
        if setting.choices and value is None and "none" in setting.choices:
            value = "none"
        if "quanto" in setting.choices and value in _QUANTO:
            value = "quanto"
        sound = type(value) is kind and (not setting.choices or value in setting.choices)
        if sound and kind is int:
            sound = value >= least and not value % self.multiples.get(name, 1)
        if not sound:
            near = _nearest_value(setting, value, self.multiples.get(name, 1))
            raise UserError(
                f"`{name}` of the recipe {self.name} does not take {yaml_text(value)}.",
                where=where,
                found=f"{name}={yaml_text(value)}",
                allowed=allowed,
                field=name,
                write=f"--set {name}={yaml_text(near)}",
            )
        return value

    def program(self, values: Mapping[str, Any]) -> str:
        """The program's text with other values of settings; its first line names where it comes from."""
        lines, own = self.text.splitlines(), self.settings
        for name, value in values.items():
            line, first, last = own[name].place
            lines[line] = f"{lines[line][:first]}{_python(value)}{lines[line][last:]}"
        return "\n".join(lines) + "\n"


def _nearest_value(setting: RecipeSetting, value: Any, multiple: int) -> Any:
    if setting.choices:
        return closest(value, setting.choices) or setting.value
    if type(setting.value) is int and type(value) is int and value > multiple > 1:
        return value // multiple * multiple
    return setting.value


def _python(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


_PART = (
    r"^from parts\.(\w+) import .*\n"  # what several recipes have; it stands in the program itself
)


def _whole(text: str) -> str:
    """A program with its parts in place, which may have parts too: each of them once, and each import.

    Items of a part's docstring that begin with a setting of the program stand in the program's docstring.
    """
    placed: set[str] = set()
    items: list[str] = []

    def part(found: re.Match[str]) -> str:
        if found[1] in placed:
            return ""
        placed.add(found[1])
        own = (FOLDER / "parts" / f"{found[1]}.py").read_text(encoding="utf-8")
        parsed = ast.parse(own)
        told = re.split(r"\n(?=- )", ast.get_docstring(parsed) or "")[1:]
        items.extend(f"{item}\n" for item in told if f"\n{item[2:].partition(':')[0]} = " in text)
        behind = "\n".join(own.splitlines()[parsed.body[0].end_lineno :])
        return re.sub(_PART, part, f"{behind}\n", flags=re.M)

    lines: list[str] = []
    for line in re.sub(_PART, part, text, flags=re.M).splitlines():
        if not (line.startswith(("import ", "from ")) and line in lines):
            lines.append(line)
    whole = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines) + "\n")
    return whole.replace('"""\n', f'{"".join(items)}"""\n', 1)


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name, in the order of the table."""
    found = {}
    for name, row in read_yaml(FOLDER / "recipes.yaml").items():
        text = _whole((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
        found[name] = Recipe(
            name,
            text,
            row["kinds"],
            row.get("package"),
            row.get("extra"),
            row.get("limits", {}),
            row.get("multiples", {}),
            row.get("needs", {}),
            row.get("spares", []),
        )
    return found


def recipe(name: str) -> Recipe:
    """A recipe by name.

    UserError: if there is no such recipe.
    """
    plain = name.replace("-", "_").lower()
    if plain not in recipes():
        near = closest(plain, recipes())
        raise UserError(
            "There is no such recipe.",
            where="--recipe",
            found=name,
            allowed=", ".join(recipes()),
            write=f"--recipe {near or 'list'}",
        )
    return recipes()[plain]
