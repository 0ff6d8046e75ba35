"""What a configuration of another tool says about memory, key by key.

A tool's keys stand in ``dryfit/data/readers/<tool>.yaml`` with the version that they were read from. Each key of a
file is one of four: understood (it sets a field of the scenario), not described (it decides memory, and the answer errs
by it, in a direction that is said), without effect on memory, or unknown. Nothing is dropped without a word.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import yaml_text
from dryfit.data import data_path
from dryfit.scenario.fields import BY_NAME

TABLES = data_path("readers")
TOO_HIGH, TOO_LOW, EITHER_WAY = "too high", "too low", "either way"


@dataclass(frozen=True)
class Remark:
    """A setting that decides memory and is not described: which way the answer errs by it, and why."""

    key: str
    value: Any
    errs: str  # TOO_HIGH, TOO_LOW or EITHER_WAY
    why: str
    bound: str | None = (
        None  # what the answer is wrong by at most, as dryfit.planner.omissions knows it
    )

    def __str__(self) -> str:
        direction = {
            TOO_HIGH: "the answer is too high",
            TOO_LOW: "the answer is too low",
            EITHER_WAY: "either way",
        }[self.errs]
        return f"{self.key}: {self.why}; {direction}"


@dataclass(frozen=True)
class Keys:
    """A tool's table."""

    tool: str
    version: str
    understood: Mapping[str, str]  # their key to the scenario's fields
    not_described: Mapping[
        str, tuple[str, ...]
    ]  # which way the answer errs, why, and what bounds it if that is known
    harmless: tuple[str, ...]  # patterns

    def kind(self, key: str) -> str:
        """``understood``, ``not described``, ``harmless`` or ``unknown``."""
        if key in self.understood:
            return "understood"
        if self.remark(key):
            return "not described"
        return (
            "harmless" if any(fnmatchcase(key, pattern) for pattern in self.harmless) else "unknown"
        )

    def remark(self, key: str) -> tuple[str, ...] | None:
        """Which way the answer errs by a key, why, and what bounds it."""
        if key in self.not_described:
            return self.not_described[key]
        patterns = (
            pattern
            for pattern in self.not_described
            if "*" in pattern and fnmatchcase(key, pattern)
        )
        return next((self.not_described[pattern] for pattern in patterns), None)

    def nearest(self, key: str) -> str | None:
        """The known key that a slip may have meant."""
        known = [*self.understood, *self.not_described]
        return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.8)), None)


@cache
def keys(*names: str) -> Keys:
    """The tables of dryfit/data/readers/, several as one; tool and version are the first one's."""
    read = [read_yaml(TABLES / f"{name}.yaml") for name in names]
    remarks = {
        key: tuple(remark)
        for table in reversed(read)
        for key, remark in table["not_described"].items()
    }
    understood = {
        key: sets for table in reversed(read) for key, sets in table["understood"].items()
    }
    return Keys(
        tool=read[0]["tool"],
        version=read[0]["version"],
        understood=understood,
        not_described={key: remark for key, remark in remarks.items() if key not in understood},
        harmless=tuple(" ".join(table["does_not_matter"] for table in read).split()),
    )


@dataclass
class Reading:
    """A file of another tool, read: the scenario's fields, and what each key was used for."""

    tool: str
    version: str
    file: Path
    fields: dict[str, Any] = field(default_factory=dict)
    understood: dict[str, str] = field(default_factory=dict)  # their key to the scenario's field
    remarks: list[Remark] = field(default_factory=list)
    unknown: dict[str, str | None] = field(default_factory=dict)  # key to the nearest that is known
    notes: list[str] = field(default_factory=list)
    own: Mapping[str, Any] = field(default_factory=dict)  # the file's keys and values
    table: Keys | None = None
    # Fields that the file leaves open and no default stands for, and why: the asker has to name them.
    needs: dict[str, str] = field(default_factory=dict)
    # Fields that an older version of the tool sets otherwise where the file says nothing, and which versions those are.
    older: dict[str, Any] = field(default_factory=dict)
    older_is: str = ""
    guesses_gpus: bool = False  # the file divides a step, and nobody says among how many GPUs
    pads: bool = False  # whether the tool pads the rows of a batch, which then carries a mask
    line: str = "{key}: {value}"  # how the file writes a setting

    def pad(self, fields: dict[str, Any]) -> None:
        """Give a step the mask of padded rows: a batch of several rows has one, a row alone and FlashAttention none."""
        if not self.pads:
            return
        rows = fields.get("micro_batch")
        if isinstance(rows, int) and rows > 1 and fields.get("attention") != "flash":
            fields["attention_mask"] = "padding"
        else:
            fields.pop("attention_mask", None)

    def in_own_words(self, error: UserError) -> UserError:
        """An error of a scenario's field as one of the file's key that set it, with the line to write there."""
        if error.parts:
            return UserError.several([self.in_own_words(part) for part in error.parts])
        key = self.key_of(error.field) if error.field else None
        if key is None:
            return error
        value: Any = error.change
        for part in (error.field or "").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        plain = isinstance(value, (int, float, list)) and not isinstance(value, bool)
        write = (
            self.line.format(key=key, value=yaml_text(value))
            if plain or error.field == "model"
            else None
        )
        return error.with_values(where=f"{self.file}: {key}", write=write)

    def key_of(self, field: str) -> str | None:
        """The file's key that sets a field; one that its tool has, where the file has none."""
        known = {**(self.table.understood if self.table else {}), **self.understood}
        for keys_of in (self.understood, known):
            for key, said in keys_of.items():
                if field in said.partition(" (")[0].split(", "):
                    return key
        return None

    def approximates(
        self, key: str, value: Any, errs: str, why: str, bound: str | None = None
    ) -> None:
        """Note a setting that is not described."""
        self.remarks.append(Remark(key, value, errs, why, bound))

    def set(self, **fields: Any) -> None:
        """Set fields of the scenario; None is left out."""
        self.fields |= {name: value for name, value in fields.items() if value is not None}

    def to_mapping(self) -> dict[str, Any]:
        """For programs."""
        return {
            "tool": self.tool,
            "version": self.version,
            "file": str(self.file),
            "understood": self.understood,
            "not_described": [
                {"key": one.key, "value": one.value, "errs": one.errs, "why": one.why}
                for one in self.remarks
            ],
            "unknown": sorted(self.unknown),
            "notes": self.notes,
        }


class FileValues:
    """A file's settings. What is asked for has to be in the table of what is understood."""

    def __init__(self, mapping: Mapping[str, Any], table: Keys) -> None:
        self.mapping, self.table = mapping, table

    def __call__(self, key: str, default: Any = None) -> Any:
        """A value, or the default where it is left out or null."""
        if key not in self.table.understood:
            raise LookupError(f"{key} is not among what {self.table.tool}'s table calls understood")
        value = self.mapping.get(key)
        return default if value is None else value

    def __contains__(self, key: str) -> bool:
        return self.mapping.get(key) is not None

    def items(self) -> Iterator[tuple[str, Any]]:
        yield from self.mapping.items()


def begin(mapping: Mapping[str, Any], table: Keys, file: Path) -> tuple[FileValues, Reading]:
    """Sort a file's keys; the fields are the reader's to set."""
    reading = Reading(table.tool, table.version, file, own=mapping, table=table)
    for key, value in mapping.items():
        kind = table.kind(str(key))
        if kind == "understood" and value is not None:
            reading.understood[key] = table.understood[key]
        elif kind == "not described" and is_on(value):
            reading.approximates(key, value, *table.remark(key))
        elif kind == "unknown":
            reading.unknown[str(key)] = table.nearest(str(key))
    return FileValues(
        {key: checked(str(key), value, file) for key, value in mapping.items()}, table
    ), reading


# What kind of value the tools take for their keys.
_WHOLE = """sequence_len micro_batch_size gradient_accumulation_steps lora_r lora_alpha world_size dp_shard_size
    dp_replicate_size tensor_parallel_size context_parallel_size sequence_parallel_degree expert_parallel_size
    sequence_parallel_size fsdp_version cutoff_len per_device_train_batch_size quantization_bit lora_rank oft_rank
    oft_block_size max_length global_batch_size max_seq_length num_generations max_completion_length max_prompt_length
    num_processes""".split()
_MAPPINGS = """bnb_config_kwargs gradient_checkpointing_kwargs fsdp_config peft_config quant_config dist_config
    kernel_config optim_config lora_rank_pattern deepspeed_config zero_optimization""".split()
_TEXTS = """base_model model_name_or_path model adapter finetuning_type stage optimizer optim attn_implementation
    flash_attn pref_loss rl oft_target bnb_4bit_quant_type quantization_type quantization_method
    revision_of_model model_revision distributed_type""".split()
_NAMES = "loss_type lora_target_modules lora_target plugins fsdp lora_modules_to_save additional_target".split()
KINDS = {
    **dict.fromkeys(_WHOLE, "a whole number"),
    **dict.fromkeys(("lora_dropout", "module_dropout"), "a number"),
    **dict.fromkeys(_MAPPINGS, "keys below it"),
    **dict.fromkeys(_TEXTS, "text"),
    **dict.fromkeys(_NAMES, "text, or a list of texts"),
}
_EXAMPLES = {
    "a whole number": 1,
    "a number": 0.05,
    "text": "...",
    "keys below it": "{...}",
    "text, or a list of texts": "...",
}
_LENGTHS = ("sequence_len", "cutoff_len", "max_length", "max_seq_length")
# Keys that may also be switched off, or on, instead of being given a value.
_SWITCHES = {"loss_type", "rl", "fsdp", "deepspeed", "adapter", "optimizer"}


def checked(key: str, value: Any, file: object, kind: str | None = None) -> Any:
    """A tool's value, a number that stands there as text as one.

    UserError: if the value is not of the kind that the key takes.
    """
    kind = kind or KINDS.get(key)
    if value is None or kind is None or (key in _SWITCHES and value is False):
        return value
    if kind == "a whole number" and isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        return int(value)
    number = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    texts = isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )
    if {
        "a whole number": number and value == int(value),
        "a number": number,
        "keys below it": isinstance(value, Mapping),
        "text": isinstance(value, str),
        "text, or a list of texts": texts,
    }[kind]:
        return int(value) if kind == "a whole number" else value
    raise UserError(
        f"`{key}` takes {kind}.",
        where=f"{file}: {key}",
        found=value,
        allowed=kind,
        write=f"{key}: {2048 if key in _LENGTHS else _EXAMPLES[kind]}",
    )


def is_on(value: Any) -> bool:
    """Whether a setting asks for something."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value > 1  # sizes: 1 divides nothing
    return bool(value) and str(value).lower() not in ("none", "no", "false")


def allowed(field_name: str, word: Any) -> bool:
    """Whether the scenario knows a word for a field."""
    known = BY_NAME.get(field_name)
    return known is not None and word in known.words


def knows(field_name: str) -> bool:
    """Whether the scenario has a field."""
    return field_name in BY_NAME
