"""The description of a field of a scenario: everything about it that more than one module asks.

A field's class attribute is made by :func:`described`, and :func:`fields_of` gives the descriptions of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NamedTuple

from dryfit.common.text import yaml_text
from dryfit.scenario.objectives import OBJECTIVES
from dryfit.scenario.strategies import AXES, NONE

MOST = (
    2**24
)  # of any count: beyond the longest context there is, and sizes of tensors still fit 64 bits
MOST_ELEMENTS = 2**50  # of a buffer: DeepSpeed's files say up to 1e12 where they mean all
ANY = ("*",)  # every value


Said = str | Mapping[Any, str] | Callable[[Any, Mapping[str, Any]], str] | None


class Excluded(NamedTuple):
    """Why a method has no place for a field, and what to write instead."""

    reason: str
    write: str


@dataclass(frozen=True)
class Field:
    """One field of a scenario, or one part of a field that is a mapping."""

    # ``about`` is Markdown for the reference
    name: str
    about: str
    # The values that are allowed, if they can be listed; true, false and null may be among them
    words: tuple[Any, ...] = ()
    least: int | None = None  # the smallest whole number that is allowed
    below: float | None = None  # the field is a number from 0 to below this
    parts: tuple[Field, ...] = ()  # the fields of a mapping
    types: tuple[str, ...] = ()  # what else it may be, as JSON Schema names types
    example: Any = None  # what to write
    default: Any = None  # The value where nothing is written. A mapping's stand with its parts.
    nullable: bool = False  # whether it may be null
    excluded: Mapping[str, Excluded] | None = None  # methods that have no place for the field
    # What an answer's line `for:` says of a value: a text with ``{}`` in its place, a text for each value, or a
    # function of the value and the scenario. None: the name and the value, but for null, false and `none`.
    said: Said = None
    # The values that the analytic estimate describes; :data:`ANY` of them. Where nothing is said: of a field with words
    # its default alone, of any other field all.
    closed_form: tuple[Any, ...] | None = None
    in_training: bool = True  # whether the pipeline's configuration of a training has the field

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
            schema |= {
                "type": ["integer", *null] if null else "integer",
                "minimum": self.least,
                "maximum": MOST,
            }
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
            if "integer" in self.types:  # of elements: no model has more
                schema |= {"minimum": 0, "maximum": MOST_ELEMENTS}
        return schema | {"examples": [self.example]}


def described(about: str, *, parts: type | None = None, **more: Any) -> Any:
    """A field of a dataclass with its :class:`Field`; ``parts``: the dataclass of a mapping's parts.

    The example is the default where no other is given.
    """
    description = Field(
        "",
        about,
        parts=fields_of(parts) if parts else (),
        **{"example": more.get("default"), **more},
    )
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


# --- what it says of fields whose value alone says too little ------------------------------------------

# Adapters' settings that take neither memory nor time.
IDLE = {
    "peft_type",
    "lora_alpha",
    "base_model_name_or_path",
    "inference_mode",
    "auto_mapping",
    "revision",
    "peft_version",
    "task_type",
}


def say_name(name: Any, scenario: Mapping[str, Any]) -> str:
    model = scenario["model"]
    layers = (
        model.get("num_hidden_layers")
        or model.get("n_layer")
        or (model.get("text_config") or {}).get("num_hidden_layers")
    )
    return " ".join(str(name).split()) if name else f"{model.get('model_type')} of {layers} layers"


def say_method(method: str, scenario: Mapping[str, Any]) -> str:
    """The method with its adapters: their kind, rank and layers."""
    lora, adapter, quantization = (
        scenario["lora"],
        scenario["adapter"],
        scenario["quantization"] or {},
    )
    if method == "full":
        return "full fine-tuning"
    kind = str((adapter or {}).get("peft_type") or "LORA").upper()
    if kind != "LORA":
        return f"{kind} on a quantized base" if method == "qlora" else kind
    shown = "QLoRA" if method == "qlora" and quantization.get("type") != "int8" else "LoRA"
    if not lora:
        return shown
    targets = lora["target_modules"]
    on = "all linear layers" if targets == "all-linear" else ", ".join(targets)
    words = [f"{shown} of rank {lora['rank']} on {on}"]
    if lora["dropout"]:
        words.append(f"dropout {lora['dropout']:g}")
    return ", ".join([*words, *beyond_plain_lora(lora)])


def beyond_plain_lora(lora: Mapping[str, Any]) -> list[str]:
    """What adapters have beside rank, alpha, dropout and layers; records of older versions name none of it."""
    words = []
    if lora.get("rslora"):
        words.append("rsLoRA")
    if lora.get("dora"):
        words.append("DoRA")
    start = lora.get("initialization", "default")
    if start != "default":
        words.append(f"{start} start")
    if lora.get("modules_to_save"):
        words.append(f"{', '.join(lora['modules_to_save'])} trained whole")
    for name, what in (("rank_pattern", "ranks"), ("alpha_pattern", "alphas")):
        if lora.get(name):
            words.append(f"other {what} for {', '.join(lora[name])}")
    return words


def say_quantization(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    if not value:
        return ""
    words = ["on a base of LLM.int8" if value["type"] == "int8" else value["type"]]
    words[0] += " double-quantized" if value.get("double") else ""
    words += [f"stored as {value['storage']}"] if value.get("storage", "uint8") != "uint8" else []
    return ", ".join(
        [*words, *([f"computing in {value['compute']}"] if value.get("compute") else [])]
    )


def say_adapter(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    """A PEFT configuration by its keys."""
    kept = {
        key: item
        for key, item in (value or {}).items()
        if key not in IDLE and item not in (None, False, "", [], {})
    }
    return ", ".join(f"{key} {yaml_text(item)}" for key, item in sorted(kept.items()))


def say_images(value: Mapping[str, Any] | None, _: Mapping[str, Any]) -> str:
    if not value or not value.get("height"):
        return ""
    trained = (
        "the vision tower trained too" if value["trained"] == "all" else "the vision tower frozen"
    )
    many = "s" if (value["count"] or 1) > 1 else ""
    return f"{value['count'] or 1} image{many} of {value['height']} x {value['width']} in a row, {trained}"


def say_way(parallel: Mapping[str, Any], *, as_title: bool = False) -> str:
    """The strategy and the mesh: ``fsdp2 x tensor 2 x sequence``; as a title ``FSDP2 x tensor 2 x sequence``."""
    strategy = parallel["strategy"]
    mesh = [f"{axis} {parallel[axis]}" for axis in AXES if parallel.get(axis, 1) > 1]
    mesh += [name for name in ("sequence", "loss") if parallel.get(f"{name}_parallel")]
    if parallel.get("pipeline", 1) > 1:
        mesh.append(f"schedule {parallel['schedule']}")
    if parallel.get("stage_layers"):
        mesh.append(f"layers {'+'.join(map(str, parallel['stage_layers']))}")
    return " x ".join(
        [*([strategy.upper() if as_title else strategy] if strategy != NONE else []), *mesh]
    )


def say_parallel(value: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    if value["gpus"] < 2:
        return ""
    kept = (
        "" if value.get("reshard_after_forward", True) else ", gathered weights kept until backward"
    )
    offload = ", offloaded to the CPU" if value.get("offload", "none") != "none" else ""
    summed = ", gradients summed in fp32" if value.get("reduce_in_fp32") else ""
    summed += ", weights gathered in 8 bits" if value.get("float8_all_gather") else ""
    return f"{say_way(value)} on {value['gpus']} GPUs{kept}{summed}{offload}"


def say_precision(value: str, scenario: Mapping[str, Any]) -> str:
    if value.endswith("-mixed"):
        return value
    return (
        f"{value} under {scenario['autocast']} autocast"
        if scenario["autocast"]
        else f"{value} without autocast"
    )


def say_of_adapters(words: Mapping[str, str]) -> Callable[[Any, Mapping[str, Any]], str]:
    """Describe a value if the method trains adapters; else the description is empty."""
    return lambda value, scenario: "" if scenario["method"] == "full" else words[value]


def say_generations(value: int, scenario: Mapping[str, Any]) -> str:
    return f"{value} answers to a prompt" if OBJECTIVES[scenario["objective"]].grouped else ""


def where_generated(
    say: Callable[[Any, Mapping[str, Any]], str],
) -> Callable[[Any, Mapping[str, Any]], str]:
    """Describe a value if the objective generates rows; else the description is empty."""
    return lambda value, scenario: (
        say(value, scenario) if OBJECTIVES[scenario["objective"]].generates else ""
    )
