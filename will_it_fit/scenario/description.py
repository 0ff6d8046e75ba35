"""The description of a field of a scenario: everything about it that more than one module asks.

A field's class attribute is made by :func:`described`, and :func:`fields_of` gives the descriptions of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NamedTuple

from will_it_fit.common.errors import yaml_text

MOST = 2**24  # of any count: beyond the longest context there is, and sizes of tensors still fit 64 bits
ANY = ("*",)  # every value


Said = str | Mapping[Any, str] | Callable[[Any, Mapping[str, Any]], str] | None


class Excluded(NamedTuple):
    """Why a method has no place for a field, and what to write instead."""

    reason: str
    write: str


@dataclass(frozen=True)
class Field:
    """One field of a scenario, or one part of a field that is a mapping.

    Attributes
    ----------
    name, about
        ``about`` is Markdown for the reference.
    words
        The values that are allowed, if they can be listed; true, false and null may be among them.
    least
        The smallest whole number that is allowed.
    below
        The field is a number from 0 to below this.
    parts
        The fields of a mapping.
    types
        What else it may be, as JSON Schema names types.
    example
        What to write.
    default
        The value where nothing is written. A mapping's stand with its parts.
    nullable
        Whether it may be null.
    excluded
        Methods that have no place for the field.
    closed_form
        The values that the analytic estimate describes; :data:`ANY` of them. Where nothing is said: of a field with
        words its default alone, of any other field all.
    in_training
        Whether the pipeline's configuration of a training has the field.
    said
        What an answer's line `for:` says of a value: a text with ``{}`` in its place, a text for each value, or a
        function of the value and the scenario. None: the name and the value, but for null, false and `none`.
    """

    name: str
    about: str
    words: tuple[Any, ...] = ()
    least: int | None = None
    below: float | None = None
    parts: tuple[Field, ...] = ()
    types: tuple[str, ...] = ()
    example: Any = None
    default: Any = None
    nullable: bool = False
    excluded: Mapping[str, Excluded] | None = None
    said: Said = None
    closed_form: tuple[Any, ...] | None = None
    in_training: bool = True

    def in_closed_form(self, value: Any) -> bool:
        """Whether the analytic estimate describes a value of the field."""
        described = self.closed_form or ((self.default,) if self.words else ANY)
        return described == ANY or value in described

    @property
    def is_boolean(self) -> bool:
        return self.words == (True, False)

    def schema(self) -> dict[str, Any]:
        """The field as JSON Schema."""
        schema: dict[str, Any] = {"description": self.about}
        null = ["null"] if self.nullable else []
        if self.is_boolean:
            schema |= {"type": "boolean"}
        elif self.words:
            schema |= {"enum": [*self.words, *([None] if self.nullable else [])]}
        elif self.least is not None:
            schema |= {"type": ["integer", *null] if null else "integer", "minimum": self.least, "maximum": MOST}
        elif self.below is not None:
            schema |= {"type": "number", "minimum": 0, "exclusiveMaximum": self.below}
        elif self.parts:
            schema |= {
                "type": ["object", *null] if null else "object",
                "additionalProperties": False,
                "properties": {part.name: part.schema() for part in self.parts},
            }
        else:
            schema |= {"type": [*self.types, *null]}
        return schema | {"examples": [self.example]}


def described(about: str, *, parts: type | None = None, **more: Any) -> Any:
    """A field of a dataclass with its :class:`Field`; ``parts``: the dataclass of a mapping's parts.

    The example is the default where no other is given.
    """
    description = Field("", about, parts=fields_of(parts) if parts else (), **{"example": more.get("default"), **more})
    default = MISSING if parts else more.get("default", None if more.get("nullable") else MISSING)
    return field(default=default, metadata={"description": description})


def switch(about: str, on: str | None = None, *, default: bool = False, **more: Any) -> Any:
    """A field that is true or false; ``on``: what the line `for:` says where it is true."""
    said = more if on is None else {"said": {True: on, False: ""}, **more}
    return described(about, words=(True, False), default=default, **said)


def fields_of(kind: type) -> tuple[Field, ...]:
    """The descriptions of a dataclass's fields, in their order."""
    return tuple(replace(one.metadata["description"], name=one.name) for one in fields(kind))


# --- the line of an answer that says what it is about ------------------------------------------------

_QUIET = (None, False, "none")  # what is off goes without saying
SAID_BY_OTHERS = ""  # a field that another one's words tell with theirs


def said(field: Field, value: Any, scenario: Mapping[str, Any]) -> str:
    """What the line `for:` says of a field's value; "" where that goes without saying."""
    how = field.said
    if callable(how):
        return how(value, scenario)
    if how is None and field.parts and isinstance(value, Mapping):
        parts = (said(part, value.get(part.name), scenario) for part in field.parts)
        return ", ".join(filter(None, parts))
    if isinstance(how, Mapping) and value in how:
        return how[value]
    if any(value is quiet for quiet in _QUIET) or value == "none" or how == SAID_BY_OTHERS:
        return ""
    return how.format(value) if isinstance(how, str) else f"{field.name} {yaml_text(value)}"


def goes_without_saying(field: Field, value: Any, scenario: Mapping[str, Any]) -> bool:
    """Whether a value is what nobody would name: something that is off."""
    return value is None or (field.said != SAID_BY_OTHERS and not said(field, value, scenario))
