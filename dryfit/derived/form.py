"""Records of a family, and which of them answers a scenario: inside of what was taught and checked, else none.

``data/records/FAMILY.zip`` holds ``record.json``, which says with which versions of which packages it was recorded and
which variant answers which key, and a file for each variant. A key is the digest of everything that may change a
step's events: all fields of the scenario but numbers, what of the model is no number, and what numbers decide beyond
sizes. What a variant was not recorded for has another key, so it is found nowhere.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dryfit.common.files import digest, sha256_file
from dryfit.common.versions import STACK, versions
from dryfit.data import data_path
from dryfit.derived.arrivals import arrived
from dryfit.derived.families import ModelFamily, Numbers, family_of
from dryfit.derived.layers import CHUNK, Composition, Kinds, Layers, UnknownOrder, is_made
from dryfit.derived.sizes import Inexact, by_rule, chunks, last_chunk, value, with_rounded
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY, Capability
from dryfit.engine.loading_rules import ORDERS
from dryfit.scenario.fields import MICRO_BATCHES, scenario_defaults
from dryfit.scenario.scenario import Scenario

FORMAT = 1
# Fields that are numbers, or that decide about no event: the GPU and the allocator, which only replay them.
_APART = ("allocator", "gpu", "micro_batch", "model", "model_name", "sequence_length")
MODERN: Capability = (8, 0)  # before it bf16 has other kernels of attention
_BUFFERS = (
    "inv_freq",
    "embed_scale",
    "e_score_correction_bias",
    "layer_scalar",
)  # are no parameters


class NoRecord(Exception):
    """Why no record answers a scenario. ``is_unusable``: there is one, and something is wrong with it."""

    def __init__(self, reason: str, *, is_unusable: bool = False) -> None:
        super().__init__(reason)
        self.is_unusable = is_unusable


@dataclass(frozen=True)
class StepKey:
    """A scenario as records have it."""

    family: ModelFamily
    numbers: Numbers
    kinds: Kinds
    # What decides a step's events beside numbers: of the scenario, of the model, and by numbers
    settings: Mapping[str, Any]
    particular: Mapping[str, Any]
    flags: Mapping[str, Any]

    @classmethod
    def of(cls, scenario: Scenario, capability: Capability | None = None) -> StepKey:
        """Take a scenario apart, on a GPU of this compute capability.

        NoRecord: if no record could answer it.
        """
        family = family_of(scenario.model)
        if family is None:
            raise NoRecord("no records of this architecture")
        try:
            model = family.plain(scenario.model)
            particular = family.particular(model)
            numbers = family.numbers(model) | {
                "b": scenario.micro_batch,
                "s": scenario.sequence_length,
            }
            kinds = family.kinds(model)
            if any(numbers[symbol] % multiple for symbol, multiple in family.multiples.items()):
                particular = None
        except (KeyError, TypeError, ZeroDivisionError):
            particular = None
        if particular is None:
            raise NoRecord("a configuration beyond what was recorded")
        settings = {
            name: part for name, part in scenario.to_mapping().items() if name not in _APART
        }
        if not scenario.has_wider_states:  # the states are in fp32 anyway
            settings["optimizer_state_precision"] = None
        settings["gradient_accumulation"] = min(scenario.gradient_accumulation, MICRO_BATCHES)
        if scenario.lora:
            numbers["r"] = scenario.lora.rank
            settings["lora"] = {
                name: part
                for name, part in settings["lora"].items()
                if name not in ("alpha", "rank", "rslora")  # the scale is the same at any size
            }
        settings = _unusual(settings, scenario_defaults())
        flags: dict[str, Any] = family.flags(model, numbers)
        if scenario.lora and "E" in family.keys and scenario.lora.scale == 1:
            flags["unscaled"] = (
                True  # PyTorch's baddbmm, which adapts experts, leaves a factor of 1 out
            )
        if scenario.loss == "chunked":
            flags["one_left"] = last_chunk(numbers) == 1
            if family.exact_length:
                flags["chunks"] = chunks(numbers)
            elif (count := chunks(numbers)) > 1:
                flags["in_chunks"], numbers["c"] = True, count
        if capability and capability < MODERN:
            flags["before_8"] = True
        return cls(family, numbers, kinds, settings, particular, flags)

    def key(self, particular: Mapping[str, Any] | None = None) -> str:
        """The digest of what decides the events; of another model's particulars, if they are given."""
        particular = self.particular if particular is None else particular
        return digest({"settings": self.settings, "particular": particular, "flags": self.flags})


def _unusual(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the defaults: a field that is new and left alone changes no key."""
    found = {}
    for name, part in values.items():
        usual = defaults.get(name)
        if isinstance(part, Mapping) and isinstance(usual, Mapping):
            found |= {name: own} if (own := _unusual(part, usual)) else {}
        elif part != usual:
            found[name] = part
    return found


class Form:
    """One variant of a family's record.

    ``content``: what :mod:`dryfit.recorder.teaching` writes.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.told: list[list[str]] = content["told"]
        self._layers = Layers(content["program"], content["templates"], content["choices"])

    @cached_property
    def _gradients(self) -> list[int]:
        """How many gradients each template makes."""
        own = {place for place, about in enumerate(self.told) if about[0] == "gradients"}
        counted = lambda event: is_made(event) and event[1] in own  # noqa: E731
        return [sum(map(counted, template)) for template in self.content["templates"]]

    def covers(self, numbers: Mapping[str, int], capability: Capability) -> bool:
        """Whether numbers and the GPU's kernels lie inside of what was taught and checked."""
        ranges = self.content["ranges"]
        within = all(
            name in ranges and ranges[name][0] <= count <= ranges[name][1]
            for name, count in numbers.items()
        )
        return within and list(capability) in self.content["capabilities"]

    def check_order(self, kinds: Kinds) -> None:
        """UnknownOrder: if the layers come in an order that was not recorded."""
        for item in self.content["program"]:
            if item[0] == "pass":
                for layer in range(len(kinds)):
                    self._layers.choose(item[1], kinds, layer)

    def compose(
        self, kinds: Kinds, numbers: Mapping[str, int], capability: Capability
    ) -> list[Composition]:
        """The events of a step, loading included: in each order that is tried, where chance decides about that.

        UnknownOrder: if the layers come in an order that was not recorded.
        """
        known = with_rounded(numbers, capability)
        chunked = CHUNK * numbers.get("c", 0)
        known["T"] = self._trained(kinds, chunked)
        values = [value(expression, known) for expression in self.content["sizes"]]
        rules = self.content["rules"]
        by_number: dict[int, int] = {}

        def size_of(number: int) -> int:
            if number >= 0:
                return values[number]
            if number not in by_number:
                name, fixed, slot, arguments = rules[-1 - number]
                taken = [values[place] for place in arguments]
                by_number[number] = (
                    1 if name == "warm" else by_rule(name, fixed, slot, taken, capability)
                )
            return by_number[number]

        composed = self._layers.compose(kinds, size_of, chunked)
        if any(rule[0] == "warm" for rule in rules):
            composed.events[0] = composed.events[0][0], self._warming(composed)
        if "arrivals" not in self.content:
            return [composed]
        arrivals, workers = dict(self.content["arrivals"]), self.content["workers"]
        orders = range(ORDERS if workers > 1 else 1)
        return [arrived(composed, arrivals, numbers["E"], workers, order) for order in orders]

    def _trained(self, kinds: Kinds, chunked: Kinds) -> int:
        """How many tensors are trained: gradients that the second step makes."""
        step, count = None, 0
        for item in self.content["program"]:
            if item[0] == "mark":
                step = item[2]
            elif step == 1 and item[0] == "g":
                count += self._gradients[item[2]]
            elif step == 1:
                passed = chunked if item[0] == "loop" else kinds
                chosen = (
                    self._layers.choose(item[1], passed, layer) for layer in range(len(passed))
                )
                count += sum(
                    self._gradients[template] for template in chosen if template is not None
                )
        return count

    def _warming(self, composed: Composition) -> int:
        """Bytes of the block that transformers allocates and frees before loading: all weights, in halves."""
        total = 0
        for identity, size in composed.events[: composed.marks[0][2]]:
            if identity > 0:
                component, _, name = self.told[composed.about[identity - 1][0]]
                if component.startswith("weights") and not name.endswith(_BUFFERS):
                    total += size
        return total // 2 * 2

    def formula(self, number: int) -> str:
        """A size in a formula: ``2·b·s·h``."""
        if number < 0:
            return f"by the rules of {self.content['rules'][-1 - number][0]}"
        terms, width = self.content["sizes"][number]
        text = " + ".join(
            "·".join(
                [
                    str(factor) if divisor == 1 else f"{factor}/{divisor}",
                    *(symbol if power == 1 else f"{symbol}^{power}" for symbol, power in powers),
                ]
            )
            for factor, divisor, powers in terms
        )
        return f"⌈{text}⌉ to {width}" if width > 1 else text


class Records:
    """A family's records in a file.

    Raises
    ------
    NoRecord
        If there is no file, or it can't be used: damaged, of another format, for other versions of the packages that
        are installed or another code of the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise NoRecord("no records of this architecture")
        index = self._read("record.json")
        if index.get("format") != FORMAT:
            self._unusable(f"it has format {index.get('format')}, and this version reads {FORMAT}")
        self.versions: dict[str, str] = index["versions"]
        installed = versions(STACK)
        for name in STACK:
            own, here = self.versions[name], (installed[name] or "").partition("+")[0]
            if here and here != own:
                self._unusable(f"it was recorded with {name} {own}, and {here} is installed")
        if (found := find_spec("transformers")) is not None and found.origin:
            folder = Path(found.origin).parent
            for file, own in index["code"].items():
                if not (folder / file).is_file() or sha256_file(folder / file) != own:
                    self._unusable(f"transformers' {file} is not the one that it was recorded with")
        self._members: dict[str, str] = index["members"]
        self._forms: dict[str, Form] = {}

    def form(self, key: str) -> Form:
        """The variant that answers a key."""
        member = self._members.get(key)
        if member is None:
            raise NoRecord("settings, a model or numbers beyond what was recorded")
        if member not in self._forms:
            self._forms[member] = Form(self._read(f"{member}.json"))
        return self._forms[member]

    def _read(self, member: str) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(self.path) as file:
                return json.loads(file.read(member))
        except (
            OSError,
            EOFError,
            KeyError,
            ValueError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise self._unusable(f"it is damaged ({type(error).__name__}: {error})") from error

    def _unusable(self, why: str) -> NoRecord:
        raise NoRecord(f"the record {self.path.name} is not used: {why}", is_unusable=True)


@cache
def _opened(path: Path) -> Records | NoRecord:
    try:
        return Records(path)
    except NoRecord as error:
        return error


def records_of(family: str) -> Records:
    """The records of a family, read once.

    NoRecord: as :class:`Records`.
    """
    found = _opened(data_path("records", f"{family}.zip"))
    if isinstance(found, NoRecord):
        raise found
    return found


def form_of(scenario: Scenario, capability: Capability | None = None) -> tuple[Form, StepKey]:
    """The variant of a record that answers a scenario on a GPU of this compute capability.

    NoRecord: if none does, with the reason.
    """
    asked = StepKey.of(scenario, capability)
    form = records_of(asked.family.name).form(asked.key())
    if not form.covers(asked.numbers, capability or DEFAULT_CAPABILITY):
        raise NoRecord("numbers or a GPU beyond what was checked")
    try:
        form.check_order(asked.kinds)
    except UnknownOrder as error:
        raise NoRecord(str(error)) from error
    return form, asked


def composed_step(
    scenario: Scenario, capability: Capability | None = None
) -> tuple[Form, list[Composition]]:
    """A scenario's step from its family's record, in each order of loading that is tried.

    NoRecord: if no record answers it, with the reason.
    """
    form, asked = form_of(scenario, capability)
    try:
        return form, form.compose(asked.kinds, asked.numbers, capability or DEFAULT_CAPABILITY)
    except Inexact as error:
        raise NoRecord(str(error)) from error
