"""Which variants are recorded: sets of options that people take, and models that the catalogue has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from dryfit.common.errors import UserError
from dryfit.derived.families import ModelFamily
from dryfit.derived.form import NoRecord, StepKey
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY, Capability
from dryfit.scenario.scenario import Scenario

# By name, beside the defaults of a scenario's fields. `trl`: what TRL's scripts set, which the command line asks about.
OPTIONS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "trl": {"loss": "chunked", "optimizer": "adamw_fused"},
    "not_checkpointed": {"gradient_checkpointing": False},
    "fp32_states": {"optimizer_state_precision": "fp32"},  # for full fine-tuning in 16 bits
}
BEFORE_8 = "trl_before_8"  # the same as `trl` on a GPU of an older compute capability
METHODS: dict[str, Mapping[str, Any]] = {
    "qlora": {
        "autocast": "bf16",
        "precision": "fp32",
        "adapter_precision": "bf16",
        "quantization": {"double": False},
    },
    "lora": {"precision": "bf16-mixed"},
    "full": {"precision": "bf16-mixed"},
}  # and what TRL's scripts set for each

ALIKE = (
    "rope",
    "sliding",
)  # of what a model is beside numbers: the family's other models with the same events
LENGTHS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Variant:
    """What one record is made for."""

    called: str  # of :data:`OPTIONS`, or :data:`BEFORE_8`
    # As :class:`dryfit.derived.form.StepKey` has them
    settings: Mapping[str, Any]
    flags: Mapping[str, Any]
    particular: Mapping[str, Any]

    @property
    def capability(self) -> Capability:
        """The compute capability that is taught."""
        return (7, 5) if self.flags.get("before_8") else DEFAULT_CAPABILITY

    def __str__(self) -> str:
        told = [name if on is True else f"{name} {on}" for name, on in self.flags.items() if on]
        return ", ".join(
            [self.called, self.settings["method"], *told, *map(str, self.particular.items())]
        )


def variants_of(family: ModelFamily) -> Iterator[Variant]:
    """All that is recorded of a family: each step of the catalogue's models that has a key of its own."""
    seen = set()
    models = family.catalogue()
    all_options = [*OPTIONS.items(), (BEFORE_8, OPTIONS["trl"])]
    for rows, (called, options), method, length, name in product(
        (1, 2), all_options, METHODS, LENGTHS, models
    ):
        settings = {"method": method, **options, **(METHODS[method] if "loss" in options else {})}
        if rows > 1 and ("e" in family.keys or family.exact_length):
            continue
        if called == "fp32_states" and method != "full":  # what adapters train has fp32 states
            continue
        step = {"model": name, "sequence_length": length, "micro_batch": rows, **settings}
        try:
            asked = StepKey.of(
                Scenario.from_mapping(step, {}), (7, 5) if called == BEFORE_8 else None
            )
        except (NoRecord, UserError):  # or it has not so many positions
            continue
        particular = {key: value for key, value in asked.particular.items() if key not in ALIKE}
        if (key := asked.key(particular)) not in seen:
            seen.add(key)
            yield Variant(called, settings, asked.flags, particular)
