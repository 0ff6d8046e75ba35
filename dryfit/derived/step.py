"""A step's memory by the derived form: peaks, components and terms, and whether a card suffices."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from statistics import median_low
from typing import Any

from dryfit.cards.gpus import usable_sizes
from dryfit.derived.families import family_of
from dryfit.derived.form import Form, NoRecord, StepKey, composed_step, form_of, records_of
from dryfit.derived.layers import Composition
from dryfit.engine.capacities import Capacities, capacities, served_at
from dryfit.engine.components import ROUNDING
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY, Capability
from dryfit.engine.replay import Events, replay
from dryfit.scenario.scenario import Scenario

PHASES = ("forward", "backward", "optimizer")
_OUTSIDE = {
    "inputs": "forward",
    "between": "optimizer",
}  # of the step's own code, counted where it takes the most


class DerivedStep:
    """A step whose allocations are known one by one, as the trace has them.

    Attributes
    ----------
    orders
        Its events, for each order of loading that is possible.
    """

    def __init__(
        self,
        form: Form,
        orders: Sequence[Composition],
        capability: Capability,
        *,
        expandable_segments: bool,
    ) -> None:
        composed = orders[0]
        self._form, self._composed, self._expandable = form, composed, expandable_segments
        self._capability = capability
        self.orders = [Events.of(each.events) for each in orders]
        trail: list[int] = []
        marks = [("load", 0), ("steps", composed.marks[0][2])]
        run = replay(self.orders[0], marks, expandable_segments=expandable_segments, trail=trail)
        others = [
            replay(events, expandable_segments=expandable_segments) for events in self.orders[1:]
        ]
        trail.append(run.allocated_bytes)
        begin = composed.marks[0][2]
        self.resident_bytes = trail[begin]
        reserved = [each.peak_reserved_bytes for each in (run, *others)]
        self.peak_reserved_bytes, self._most_reserved_bytes = median_low(reserved), max(reserved)
        tops = self._tops(trail)
        self.phases = {"load": run.spans[0].peak_allocated_bytes} | {
            name: trail[top] for name, top in tops.items()
        }
        self.phase = max(tops, key=lambda name: trail[tops[name]])
        self._top = tops[self.phase]
        self.peak_allocated_bytes = trail[self._top]

    def _tops(self, trail: Sequence[int]) -> dict[str, int]:
        """The event before which each phase of the last step has the most allocated."""
        marks = self._composed.marks
        last = marks[-1][1] - 1
        ends = [at for *_, at in marks[1:]]
        tops: dict[str, int] = {}
        for named in (dict(zip(PHASES, PHASES, strict=True)), _OUTSIDE):
            inside = max((trail[top] for top in tops.values()), default=-1)
            found: dict[str, int] = {}
            for (phase, step, first), end in zip(marks, ends, strict=False):
                if step == last and phase in named:
                    top = max(range(first, end + 1), key=trail.__getitem__)
                    name = named[phase]
                    if name not in found or trail[top] > trail[found[name]]:
                        found[name] = top
            tops |= {name: top for name, top in found.items() if trail[top] > inside}
        return tops

    @cached_property
    def capacities(self) -> Capacities:
        """On which cards it is served: of those of the catalogue with the same kernels each one is replayed."""
        sizes = list(usable_sizes(self._capability))
        return Capacities.of_all(
            capacities(events, expandable_segments=self._expandable, sizes=sizes)
            for events in self.orders
        )

    @property
    def required_bytes(self) -> int:
        """From there on every card suffices, without its CUDA context."""
        return self.capacities.required_bytes

    def fits(self, usable_bytes: int) -> bool:
        """Whether a card with so many bytes suffices; one with less than is required may, by luck."""
        if not self.peak_allocated_bytes <= usable_bytes < self._most_reserved_bytes:
            return usable_bytes >= self._most_reserved_bytes
        return all(
            served_at(usable_bytes, each, expandable_segments=self._expandable)[2]
            for each in self.orders
        )

    @cached_property
    def terms(self) -> list[dict[str, Any]]:
        """What is alive at the peak, alike tensors together, the largest first."""
        alive: dict[int, int] = {}
        for identity, size in self._composed.events[: self._top]:
            if identity > 0:
                alive[identity] = size
            elif identity < 0:
                alive.pop(-identity, None)
        sizes: Counter[tuple[str, str, str]] = Counter()
        times: Counter[tuple[str, str, str]] = Counter()
        for identity, size in alive.items():
            about, number = self._composed.about[identity - 1]
            component, module, operator = self._form.told[about]
            named = component, in_words(module, operator), self._form.formula(number)
            sizes[named] += size
            times[named] += 1
        rows = [
            {
                "component": component,
                "what": what,
                "formula": formula,
                "times": times[component, what, formula],
                "bytes": size,
            }
            for (component, what, formula), size in sizes.items()
            if size
        ]
        rounding = self.peak_allocated_bytes - sum(row["bytes"] for row in rows)
        if rounding:
            rows.append(
                {
                    "component": ROUNDING,
                    "what": "blocks larger than their tensors",
                    "formula": "",
                    "times": 1,
                    "bytes": rounding,
                }
            )
        return sorted(rows, key=lambda row: (-row["bytes"], row["what"], row["formula"]))

    @property
    def components(self) -> dict[str, int]:
        """Bytes at the peak by component."""
        found: Counter[str] = Counter()
        for term in self.terms:
            found[term["component"]] += term["bytes"]
        return dict(sorted(found.items()))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON, as the analytic estimate has them."""
        return {
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "phase": self.phase,
            "phases": self.phases,
            "resident_bytes": self.resident_bytes,
            "components": self.components,
            "terms": self.terms,
        }


_PARTS = (  # of a module's name, and what people call it
    ("embed_tokens", "embeddings"),
    ("lm_head", "output head"),
    ("q_proj", "queries' projection"),
    ("k_proj", "keys' projection"),
    ("v_proj", "values' projection"),
    ("o_proj", "attention's output projection"),
    ("qkv_proj", "queries', keys' and values' projection"),
    ("gate_up_proj", "MLP's gate and up projection"),
    ("gate_proj", "MLP's gate projection"),
    ("up_proj", "MLP's up projection"),
    ("down_proj", "MLP's down projection"),
    ("act_fn", "MLP's activation function"),
    ("experts", "experts"),
    ("mlp.gate", "router"),
    ("mixer.gate", "router"),
    ("in_proj", "mixer's input projection"),
    ("out_proj", "mixer's output projection"),
    ("conv", "convolution"),
    ("linear_attn", "delta rule"),
    ("mixer", "mixer"),
    ("self_attn", "attention"),
    ("mlp", "MLP"),
    ("norm", "norms"),
    ("rotary_emb", "rotary embedding"),
    ("layers", "layers' residual stream"),
)


def in_words(module: str, operator: str) -> str:
    """A tensor by the module that it belongs to and what made it: ``MLP's up projection, mm``."""
    told = next((words for part, words in _PARTS if part in module), "the step itself")
    made = operator.removeprefix("aten::").replace("lora_A", "adapter").replace("lora_B", "adapter")
    return f"{told}, {made}" if made else told


def derived_step(scenario: Scenario, capability: Capability | None = None) -> DerivedStep:
    """The step, from its family's record.

    NoRecord: if no record answers it, with the reason.
    """
    asked = StepKey.of(scenario)
    key = json.dumps([asked.key(), asked.numbers, "".join(asked.kinds)], sort_keys=True)
    return _derived(
        _Same(key, scenario),
        capability or DEFAULT_CAPABILITY,
        scenario.allocator.expandable_segments,
    )


@dataclass(frozen=True)
class _Same:
    """A scenario that is the same as another one with its key."""

    key: str
    scenario: Scenario = field(compare=False)


@lru_cache(maxsize=32)
def _derived(same: _Same, capability: Capability, expandable: bool) -> DerivedStep:
    form, orders = composed_step(same.scenario, capability)
    return DerivedStep(form, orders, capability, expandable_segments=expandable)


def if_recorded(scenario: Scenario, capability: Capability | None = None) -> DerivedStep | None:
    """The step where a record answers it, else None."""
    try:
        return derived_step(scenario, capability)
    except NoRecord:
        return None


def is_recorded(scenario: Scenario, capability: Capability | None = None) -> bool:
    """Whether a record covers the step's numbers and options, which takes a millisecond."""
    try:
        form_of(scenario, capability)
    except NoRecord:
        return False
    return True


def recorded_with(scenario: Scenario) -> dict[str, str]:
    """The versions of the packages that a scenario's record was made with."""
    return records_of(family_of(scenario.model).name).versions


def why_unusable(scenario: Scenario) -> str | None:
    """What is wrong with the records of a scenario's family; None: nothing, or there are none."""
    family = family_of(scenario.model)
    try:
        if family:
            records_of(family.name)
    except NoRecord as error:
        return str(error) if error.is_unusable else None
    return None
