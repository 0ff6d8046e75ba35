"""JSON Schema in, the corrected line out: the one checker of what a person writes in YAML.

A schema's ``examples`` say what to write; ``x-elsewhere`` holds what other tools call its keys, and ``x-confused`` what
to say of words that mean something else. Every wrong key of a file is reported at once. Only what a bare Snakemake
brings is imported: PyYAML and jsonschema.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from functools import cache, reduce
from operator import getitem
from typing import Any

import yaml

from dryfit.common.errors import UserError
from dryfit.common.text import closest, yaml_text

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$")
_SMALL = 3  # keys: so small a mapping is shown whole
_YES_OR_NO = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
_TYPES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "keys below it",
    "null": "null",
}
_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "pattern": "of the form {}",
    "maxLength": "at most {} characters",
}


@cache
def _validator() -> Any:
    """The validator's class: JSON Schema, but stricter in three points in which a slip would get through.

    A ``$`` at a pattern's end is the end of the text (Python's also stands before a line break), 16.0 is no whole
    number (a folder would be called r16.0), and infinity and "not a number" are no numbers. A tuple is a list.
    """
    from jsonschema import Draft202012Validator, ValidationError, validators

    def pattern(validator: Any, form: str, text: Any, schema: dict) -> Iterator[Any]:
        if validator.is_type(text, "string") and not re.search(re.sub(r"\$$", r"\\Z", form), text):
            yield ValidationError(f"{text!r} is not of the form {form}")

    def whole(_: Any, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def number(_: Any, value: Any) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    def listed(_: Any, value: Any) -> bool:
        return isinstance(value, list | tuple)

    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": whole, "number": number, "array": listed}
    )
    return validators.extend(Draft202012Validator, {"pattern": pattern}, type_checker=types)


def problems(value: Any, schema: dict, where: object, within: str | None = None) -> list[UserError]:
    """What is wrong with a value, in the order in which it stands there.

    ``where``: what to call the place in messages. ``within``: the key that the value stands under, if it is part of a
    file.
    """
    if within:
        value, schema = {within: value}, {"properties": {within: schema}}
    found: dict[tuple, UserError] = {}
    for error in _validator()(schema).iter_errors(value):
        while error.context:  # of several alternatives, the one that went the farthest
            error = max(error.context, key=lambda inner: len(inner.absolute_path))
        for explained in _explained(error, value, where):
            found.setdefault((_position(error.absolute_path, value), explained.problem), explained)
    return [found[key] for key in sorted(found)]


def validate(value: Any, schema: dict, where: object = "the configuration") -> None:
    """Check a value against a schema.

    UserError: for all that is wrong, each with the line to write.
    """
    if wrong := problems(value, schema, where):
        raise UserError.several(wrong)


def as_typed(value: Any, schema: dict) -> Any:
    """Text, or a list of texts, as what YAML reads in it, where the schema takes that and no text; else as it is."""
    if isinstance(value, list):
        read: Any = [yaml.safe_load(one) if isinstance(one, str) else one for one in value]
    elif isinstance(value, str):
        read = yaml.safe_load(value)
    else:
        return value
    valid = _validator()(schema).is_valid
    return read if valid(read) and not valid(value) else value


def _position(path: Iterable[Any], value: Any) -> tuple[int, ...]:
    places = []
    for part in path:
        places.append(part if isinstance(part, int) else list(value).index(part))
        value = value[part]
    return tuple(places)


def _explained(error: Any, value: Any, where: object) -> Iterator[UserError]:
    """One of jsonschema's errors as messages that say what to write."""
    path = [str(part) for part in error.absolute_path]
    rule, schema, found, name = error.validator, error.schema, error.instance, ".".join(path)
    if "propertyNames" in error.absolute_schema_path:
        simple = re.sub(r"[^a-z0-9._-]+", "-", found.lower()).strip(".-") or "another"
        example = schema.get("examples", [simple])[0]
        problem = f"A name under {name} can't be used."
        yield UserError(
            problem,
            where=where,
            found=found,
            allowed=allowed(schema),
            write=yaml_lines(path, example, {}),
        )
    elif rule in ("minItems", "uniqueItems"):
        twice = [item for index, item in enumerate(found) if item in found[:index]]
        unique = [item for index, item in enumerate(found) if item not in found[:index]]
        examples = [
            example for example in schema.get("examples", [["..."]]) if isinstance(example, list)
        ]
        yield UserError(
            f"{name} names {twice[0]!r} twice." if twice else f"{name} is an empty list.",
            where=where,
            found=found,
            allowed=allowed(schema),
            write=yaml_lines(
                path[:-1], path[-1], unique or examples[-1] if examples or unique else "..."
            ),
        )
    elif rule == "additionalProperties" and "properties" in schema:
        known = sorted(schema["properties"])
        for unknown in (key for key in found if key not in schema["properties"]):
            close = schema.get("x-elsewhere", {}).get(unknown) or closest(unknown, known)
            *parents, key = close.split(".") if close else [None]
            hint = f"; did you mean `{'.'.join([*path, close])}`?" if close else "."
            form = reduce(
                lambda above, part: above.get("properties", {}).get(part, {}),
                [*parents, key],
                schema,
            )
            meant = _example(form) if found[unknown] in (None, {}) else found[unknown]
            yield UserError(
                f"Unknown key: {'.'.join([*path, str(unknown)])}{hint}",
                where=where,
                found=unknown,
                allowed=", ".join(known),
                write=yaml_lines([*path, *parents], key, meant)
                if key
                else "nothing here: remove the key",
                field=".".join([*path, str(unknown)]),
                change=_nested([*path, *parents, key], meant) if key else None,
            )
    elif rule == "required":
        for missing in (key for key in schema["required"] if key not in found):
            form = schema["properties"][missing]
            write = yaml_lines(path, missing, form.get("examples", ["..."])[0])
            problem = f"A key is missing: {'.'.join([*path, missing])}."
            change = _nested([*path, missing], form.get("examples", ["..."])[0])
            yield UserError(problem, where=where, allowed=allowed(form), write=write, change=change)
    else:
        yield _wrong_value(error, value, where)


def _wrong_value(error: Any, value: Any, where: object) -> UserError:
    """An error of a key that is known, about what it is set to."""
    path, schema, found = [str(part) for part in error.absolute_path], error.schema, error.instance
    types, name, expected = _types(schema), ".".join(path), allowed(schema)
    problem, example = (
        f"Wrong value for {name}.",
        schema.get("examples", schema.get("enum", ["..."]))[0],
    )
    numeric = bool({"number", "integer"} & set(types))
    if confused := schema.get("x-confused", {}).get(str(found).lower()):
        problem = f"Wrong value for {name}: {confused}"
    elif error.validator == "type" and schema.get("properties") and not isinstance(found, Mapping):
        expected += f": {', '.join(schema['properties'])}"
        example = _example(schema)
    elif found is None:
        problem = f"{name} has no value."
    elif (
        error.validator == "type"
        and "string" in types
        and isinstance(found, bool | int | float | date)
    ):
        problem = f"{name} is text, and YAML reads this as something else: put it in quotes."
        example = {True: "yes", False: "no"}[found] if isinstance(found, bool) else str(found)
    elif numeric and isinstance(found, str) and _NUMBER.match(found):
        problem = f"{name} is text, not a number."
        if isinstance(yaml.safe_load(found), str):
            problem += " YAML reads an exponent as a number only with a point before it and a sign after the e."
        else:
            problem += " Take the quotes away."
        read = (
            int(float(found)) if "integer" in types and float(found).is_integer() else float(found)
        )
        example = read if _validator()(schema).is_valid(read) else example
    elif numeric and isinstance(found, float) and not math.isfinite(found):
        problem = f"{name} must be finite."
    elif isinstance(found, float) and found.is_integer() and "integer" in types:
        example = int(found) if _validator()(schema).is_valid(int(found)) else example
    elif "boolean" in types or "enum" in schema:
        words = {yaml_text(word): word for word in schema.get("enum", (True, False))}
        close = closest(_YES_OR_NO.get(str(found).lower(), str(found).lower()), words)
        example = words[close] if close else example
    if not path:
        return UserError(problem, where=where, found=found, allowed=expected)
    return UserError(
        problem,
        where=where,
        found=found,
        allowed=expected,
        write=_corrected(error.absolute_path, example, value),
        field=name,
        change=_nested(path, example),
    )


def _nested(path: list[str], value: Any) -> dict[str, Any] | None:
    """A value under its keys; None for a place in a list, which has no key."""
    if any(name.isdigit() for name in path):
        return None
    return reduce(lambda inner, name: {name: inner}, reversed(path), value)


def _example(schema: dict) -> Any:
    """A value to show: of a mapping its first key."""
    if schema.get("properties"):
        return dict(
            [
                next(
                    (key, form.get("examples", ["..."])[0])
                    for key, form in schema["properties"].items()
                )
            ]
        )
    return schema.get("examples", ["..."])[0]


def _corrected(path: Iterable[Any], example: Any, value: Any) -> str:
    """The line with the example in its place: a list and a small mapping are shown whole."""
    *parents, key = path
    around = reduce(getitem, parents, value)
    if isinstance(key, int):
        example, (*parents, key) = [*around[:key], example, *around[key + 1 :]], parents
    elif parents and isinstance(parents[-1], str) and len(around) <= _SMALL:
        example, (*parents, key) = {**around, key: example}, parents
    return yaml_lines([str(part) for part in parents], str(key), example)


def _types(schema: dict) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind


def allowed(schema: dict) -> str:
    """What a schema admits, in words."""
    if "enum" in schema:
        return ", ".join(map(yaml_text, schema["enum"]))
    text = " or ".join(_TYPES[kind] for kind in _types(schema)) or "anything"
    return ", ".join(
        [text, *(words.format(schema[key]) for key, words in _LIMITS.items() if key in schema)]
    )


def coerced(value: Any, schema: dict) -> Any:
    """Sort keys; turn whole numbers into floats where the schema says ``number``."""
    if isinstance(value, dict):
        parts = schema.get("properties", {})
        return {key: coerced(value[key], parts.get(key, {})) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [coerced(item, schema.get("items", {})) for item in value]
    if "number" in _types(schema) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def yaml_lines(path: list[str], key: str, value: Any) -> str:
    """The key with its value as YAML, nested under its parents; a number among these is a place in a list."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:e}".split("e")
        text = f"{float(mantissa)}e{int(exponent):+03d}"
    else:
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
        text = text.removesuffix("\n").removesuffix("...").strip()
    lines, mark = [], ""
    for depth, name in enumerate([*path, key]):
        if name.isdigit():
            mark = "- "
            continue
        lines.append(f"{'  ' * (depth - len(mark) // 2)}{mark}{name}:")
        mark = ""
    return "\n".join(lines) + f" {text}"
