"""Which variants are recorded: sets of options that people take, and models that the catalogue has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from dryfit.derived.families import ModelFamily
from dryfit.derived.form import NoRecord, StepKey
from dryfit.scenario.scenario import Scenario

# By name, beside the defaults of a scenario's fields. `trl`: what TRL's scripts set, which the command line asks about.
OPTIONS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "trl": {"loss": "chunked", "optimizer": "adamw_fused"},
    "not_checkpointed": {"gradient_checkpointing": False},
}
METHODS: dict[str, Mapping[str, Any]] = {
    "qlora": {"autocast": "bf16", "precision": "fp32", "adapter_precision": "bf16", "quantization": {"double": False}},
    "lora": {"precision": "bf16-mixed"},
    "full": {"precision": "bf16-mixed"},
}  # and what TRL's scripts set for each

ALIKE = ("rope", "sliding")  # of what a model is beside numbers: the family's other models with the same events
CHUNKS = (2, 4, 8)  # of a loss in chunks: rows of 512, 1,024 and 2,048 tokens


@dataclass(frozen=True)
class Variant:
    """What one record is made for.

    Attributes
    ----------
    called
        Of :data:`OPTIONS`.
    settings, flags, particular
        As :class:`dryfit.derived.form.StepKey` has them.
    """

    called: str
    settings: Mapping[str, Any]
    flags: Mapping[str, Any]
    particular: Mapping[str, Any]

    def __str__(self) -> str:
        told = [name if on is True else f"{name} {on}" for name, on in self.flags.items() if on]
        return ", ".join([self.called, self.settings["method"], *told, *map(str, self.particular.items())])


def models_of(family: ModelFamily) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Flags and particulars of the catalogue's models of a family, with one row and with several."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for rows, name in product((1, 2), family.catalogue()):
        step = {"model": name, "method": "lora", "sequence_length": 512, "micro_batch": rows}
        try:
            asked = StepKey.of(Scenario.from_mapping(step, {}))
        except NoRecord:
            continue
        particular = {key: value for key, value in asked.particular.items() if key not in ALIKE}
        if (one := (dict(asked.flags), particular)) not in found:
            found.append(one)
    return found


def variants_of(family: ModelFamily) -> Iterator[Variant]:
    """All that is recorded of a family."""
    for (flags, particular), (called, options), method in product(models_of(family), OPTIONS.items(), METHODS):
        settings = {"method": method, **options, **(METHODS[method] if called == "trl" else {})}
        if settings.get("loss") != "chunked":
            yield Variant(called, settings, flags, particular)
        elif flags["one_row"]:
            for count in CHUNKS:
                yield Variant(called, settings, {**flags, "chunks": count}, particular)
