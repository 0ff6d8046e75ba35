"""Which smaller steps a deep model's step can be composed from: its layers repeat, as the built modules say.

The whole model is built on ``meta`` without weights to quantize or adapters, and its forward pass runs once. Layers are
alike if all their modules, tensors and plain attributes are, and if their forward passes allocate the same. So it does
not matter what sets two layers apart, or whether the configuration names it. The models with fewer layers are built in
the same way, and have to be what is left of the whole one without some periods in the middle.

A pipeline's stage is a model of its own. Its layers are those of one GPU, and its micro-batches repeat too once the
pipeline is full. So a stage's step is composed from shallow stages, and from steps of few micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dryfit.common.errors import UserError
from dryfit.engine.card import active_simulation
from dryfit.engine.components import WORKSPACES
from dryfit.engine.composed import Composer, SecondSteps
from dryfit.engine.errors import TraceError
from dryfit.engine.launches import FLUSHED_BYTES
from dryfit.engine.periods import Unlike
from dryfit.engine.record import Record
from dryfit.engine.trace import Options, trace_step
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model, notes, skeleton

_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # as configurations write it
_LONGEST_PERIOD = 8
_LONG = 3  # layers of a period that has its neighbours in itself: fewer of them are enough
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
Traced = tuple[Record, dict[str, Any]]  # and what is known of the model
Stepped = Callable[[Scenario, Callable[[Record], bool] | None], Traced]
SHALLOW = range(3)  # periods that the shallow models have more than the first of them
WORTH = 0.65  # of the layers: composing pays if the shallow models have fewer together
_WORTH_OF_STAGES = 0.8  # the same of a pipeline's stage, which takes many micro-batches


@dataclass(frozen=True)
class Depths:
    """How a model's step is composed."""

    # Layers of the model, of the shallowest one, and by how many the others have more.
    whole: int
    first: int
    period: int
    key: str  # what the configuration calls the number of layers

    @property
    def shallow(self) -> list[int]:
        """The layers of the models that are traced; the third one's record is the proof."""
        return [self.first + number * self.period for number in SHALLOW]

    @property
    def more(self) -> int:
        """Periods that the model has more than the second one."""
        return (self.whole - self.shallow[1]) // self.period

    def beyond(self, scenario: Scenario) -> Fraction:
        """The same of the whole model, which may have more than the part that is composed."""
        return Fraction(self.more)

    def pays(self, often: bool) -> bool:
        """Whether composing takes less than tracing the whole step; ``often``: at many sizes, with one proof."""
        return (
            sum(self.shallow[: 2 if often else 3]) <= WORTH * self.whole
            and self.shallow[-1] <= self.whole
        )

    def at(self, scenario: Scenario, layers: int) -> Scenario:
        """The scenario with a shallower model: lists with an entry for each layer lose those before the last one."""
        model = {
            name: [*value[: layers - 1], value[-1]]
            if isinstance(value, list) and len(value) == self.whole
            else value
            for name, value in scenario.model.items()
        }
        return replace(scenario, model={**model, self.key: layers})


@dataclass(frozen=True)
class StageDepths(Depths):
    """The same of the stages that one of a pipeline's GPUs has, in a model whose layers are all alike.

    ``whole`` are the layers of the smallest of its ``own`` stages; the others lose as many. Other GPUs' have one each.
    """

    own: tuple[int, ...] = ()

    def pays(self, often: bool) -> bool:
        return (
            sum(self.shallow) <= max(_WORTH_OF_STAGES, WORTH) * self.whole
            and self.shallow[-1] <= self.whole
        )

    def beyond(self, scenario: Scenario) -> Fraction:
        """The same of the whole model: layers of other GPUs' stages too."""
        second = self.at(scenario, self.shallow[1])
        return Fraction(scenario.model[self.key] - second.model[self.key], len(self.own))

    def at(self, scenario: Scenario, layers: int) -> Scenario:
        """The scenario in which the smallest of the GPU's own stages has so many layers."""
        given = scenario.parallel.layers_of_stages(scenario.model[self.key])
        few = tuple(
            count - self.whole + layers if stage in self.own else 1
            for stage, count in enumerate(given)
        )
        model = {
            name: value[: sum(few)]
            if isinstance(value, list) and len(value) == sum(given)
            else value
            for name, value in scenario.model.items()
        }
        parallel = replace(scenario.parallel, stage_layers=few)
        return replace(scenario, model={**model, self.key: sum(few)}, parallel=parallel)


def depths(scenario: Scenario, *, often: bool = False, place: int = 0) -> Depths | None:
    """How a scenario's step is composed; None: it has to be traced whole.

    ``often``: at many sizes, so that the proof counts little. ``place``: which of a pipeline's GPUs.

    A compiler may fuse over layers: its steps are traced whole. DDP sends gradients in buckets, and ZeRO divides all
    weights together: both add up over layers. FSDP1 frees in an order of its own.
    """
    parallel = scenario.parallel
    if scenario.images or scenario.aim.trainer or scenario.compile != "none":
        return None
    if parallel.kind.replicates or parallel.zero_stage or parallel.kind.fsdp == 1:
        return None
    key = next((name for name in _DEPTH if isinstance(scenario.model.get(name), int)), None)
    if key is None:
        return None
    whole, least = scenario.model[key], _least(scenario)
    if parallel.pipeline > 1:
        return _of_stages(scenario, key, least.short, often, place)
    if not Depths(whole, least.short, 1, key).pays(often):
        return None
    with suppress(UserError, TraceError):  # who traces the whole model says what is wrong
        plan = None
        for allocating in (
            False,
            True,
        ):  # the forward pass of a model with loops takes seconds: the second look
            layers = _layers(scenario, whole, allocating=allocating)
            found = layers and _period(layers, least)
            plan = Depths(whole, *found, key) if found else None
            if plan is None or not plan.pays(often):
                return None
        for depth in plan.shallow:
            own = [consists for consists, _ in (*layers[: depth - 1], layers[-1])]
            if [consists for consists, _ in _layers(plan.at(scenario, depth), depth) or ()] != own:
                return None
        return plan
    return None


def _of_stages(
    scenario: Scenario, key: str, least: int, often: bool, place: int
) -> StageDepths | None:
    parallel, count = scenario.parallel, scenario.model[key]
    own = tuple(range(place, parallel.stages, parallel.pipeline))
    given = parallel.layers_of_stages(count)
    plan = StageDepths(min(given[stage] for stage in own), least, 1, key, own)
    if not plan.pays(often):
        return None
    with suppress(UserError, TraceError):
        if len({*(_layers(scenario, count, allocating=True) or (None, 0))}) == 1:
            return plan
    return None


def full_pipeline(scenario: Scenario) -> list[int]:
    """Micro-batches of the steps from which a pipeline's step of more is composed; the third one is the proof.

    Empty: it does not pay, or micro-batches do not repeat one by one. 1F1B begins with a forward pass for each stage
    behind; from the second backward pass on, which finds gradients, all are alike.
    """
    parallel = scenario.parallel
    first = (
        5 * parallel.pipeline - 4
    )  # enough for two and three stages, as tried; the proof decides
    counts = [first + number for number in SHALLOW]
    one_by_one = parallel.pipeline > 1 and parallel.stages == parallel.pipeline
    return counts if one_by_one and sum(counts) <= WORTH * scenario.gradient_accumulation else []


class _ShallowPeriods(NamedTuple):
    """Periods of the shallowest model: of few layers, and of :data:`_LONG` or more."""

    short: int
    long: int


def _least(scenario: Scenario) -> _ShallowPeriods:
    """Its first and last layers are others than those between. So are their neighbours without checkpointing, and where
    parts of the next layer are fetched before it runs. Packages' kernels are tuned in the first layers that run them. A
    pipeline's first backward pass is another than those behind.
    """
    long = 3 if active_simulation() else 2
    if scenario.parallel.divided:
        return _ShallowPeriods(5, 3)
    return _ShallowPeriods(
        (3 if scenario.gradient_checkpointing else 4) + (scenario.parallel.pipeline > 1), long
    )


def _period(layers: Sequence[Hashable], least: _ShallowPeriods) -> tuple[int, int] | None:
    """Layers of the shallowest model, and of a period; None: they don't repeat."""
    whole, found = len(layers), []
    for period in range(1, _LONGEST_PERIOD + 1):
        lead = whole - 1 - period  # the last layer may be another
        while lead > 0 and layers[lead - 1] == layers[lead - 1 + period]:
            lead -= 1
        first = lead + max((least.long if period >= _LONG else least.short) * period, period + 1)
        found.append((first + (whole - first) % period, period))
    first, period = min(found, key=sum)
    return (first, period) if first < whole else None


def _layers(
    scenario: Scenario, count: int, *, allocating: bool = False
) -> list[tuple[Hashable, Hashable]] | None:
    """What each layer of a scenario's model consists of and, if that is asked, allocates.

    None: the model has no list of so many layers, or they share weights.
    """
    model = build_model(scenario, "meta") if _names_layers(scenario) else skeleton(scenario)
    lists = [
        part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    owners: dict[int, int] = {}
    for index in range(count):
        for tensor in (tensor for part in lists for tensor in part[index].parameters()):
            if owners.setdefault(id(tensor), index) != index:  # layers that share weights
                return None
    if not lists:
        return None
    consist = _without_index(
        [tuple(_described(part[index]) for part in lists) for index in range(count)]
    )
    allocates = _allocating(model, scenario, lists) if allocating else [None] * count
    return list(zip(consist, allocates, strict=True))


def _allocating(
    model: nn.Module, scenario: Scenario, lists: Sequence[nn.ModuleList]
) -> list[Hashable]:
    """By layer, the bytes of each allocation of its forward pass in order.

    Raises :class:`TraceError` if the forward pass can't be followed.
    """
    spans: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(lists[0]))}
    begun: list[int] = []

    def begin(*_: Any) -> None:
        begun.append(_get_current_dispatch_mode().now())

    def end(index: int) -> None:
        spans[index].append((begun.pop(), _get_current_dispatch_mode().now()))

    for layers in lists:
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(lambda *_, index=index: end(index))
    shape = scenario.micro_batch, scenario.sequence_length

    def step():
        return model(torch.empty(shape, dtype=torch.long, device="meta"), use_cache=False) and None

    record = trace_step(
        model, None, step, options=Options(steps=1, report=lambda tracker, *_, **__: tracker)
    )
    tensors = {
        identity for identity, component in record.components.items() if component != WORKSPACES
    }
    # What Triton's benchmarks clear is the first layer's alone, whose kernels are tuned.
    of_layers = lambda identity, size: identity in tensors and size != FLUSHED_BYTES  # noqa: E731
    return [
        tuple(
            size
            for first, last in found
            for known, size in record.events[first:last]
            if of_layers(known, size)
        )
        for found in spans.values()
    ]


def _names_layers(scenario: Scenario) -> bool:
    """Whether adapters may be others in some layers than in the rest."""
    if scenario.lora is None:
        return scenario.adapter is not None
    lora = scenario.lora
    names = [lora.target_modules, *(lora.rank_pattern or ()), *(lora.modules_to_save or ())]
    return any(map(str.isdigit, str(names)))


def _described(layer: nn.Module) -> dict[tuple[str, str], Hashable]:
    """By module and name: classes, tensors and plain attributes."""
    found: dict[tuple[str, str], Hashable] = {}
    for path, module in layer.named_modules():
        found[path, ""] = type(module).__qualname__
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[path, name] = tuple(tensor.shape), tensor.dtype, tensor.requires_grad
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN) and not name.startswith("_"):
                found[path, name] = value
            elif isinstance(value, (list, tuple)) and all(
                isinstance(item, _PLAIN) for item in value
            ):
                found[path, name] = tuple(value)
    return found


def _without_index(layers: list[tuple[dict[tuple[str, str], Any], ...]]) -> list[Hashable]:
    """The same without numbers that count the layers, or those layers that have such a module."""

    def counts(part: int, key: tuple[str, str]) -> bool:
        values = {
            index: layer[part][key] for index, layer in enumerate(layers) if key in layer[part]
        }
        whole = all(type(value) is int for value in values.values())
        return (
            whole
            and len(values) > 1
            and len({value - index for index, value in values.items()}) == 1
        )

    keys = {(part, key) for layer in layers for part, found in enumerate(layer) for key in found}
    index = {(part, key) for part, key in keys if counts(part, key)}
    return [
        tuple(
            frozenset(item for item in found.items() if (part, item[0]) not in index)
            for part, found in enumerate(layer)
        )
        for layer in layers
    ]


def size_apart(scenario: Scenario) -> Scenario:
    """The same for all scenarios whose model and optimizer are built alike."""
    return replace(scenario, sequence_length=1, micro_batch=1, gradient_accumulation=1, gpu=None)


Plans = dict[Hashable, Depths | None]


class Composed:
    """Records of one step at whatever length and number of rows, composed from shallow models where that is proven.

    Parameters
    ----------
    often
        Whether many sizes will be asked.
    place
        Which of a pipeline's GPUs it is.
    plans
        How steps are composed, as far as that is known already; for GPUs with other kernels too.
    """

    def __init__(self, *, often: bool = False, place: int = 0, plans: Plans | None = None) -> None:
        self._often, self._place, self._plans = often, place, {} if plans is None else plans
        self.outputs: dict[
            tuple, Any
        ] = {}  # what the traces of the shallow models know of operators together
        self._plan: tuple[Scenario, Depths | None] | None = None
        self._proven: dict[tuple[int, int], Composer] = {}
        self._seen: dict[
            tuple[int, int], list[_Size]
        ] = {}  # by the events, sizes at which both models were traced
        self._second_steps = SecondSteps()

    def record(self, scenario: Scenario, stepped: Stepped) -> Traced | None:
        """The record of a scenario's step, and what is known of its model; None: it has to be traced whole.

        ``stepped``: the same of a scenario that is traced, until its first steps are enough.
        """
        counts = full_pipeline(scenario)
        if not counts:
            return self._of_layers(scenario, stepped)
        with suppress(UserError, Unlike):
            steps = (replace(scenario, gradient_accumulation=count) for count in counts)
            (few, about), (many, _), (proof, _) = [
                self._of_layers(s, stepped) or stepped(s, None) for s in steps
            ]
            composer = Composer(few, many)
            if composer.proven_by(proof):
                return composer.at(scenario.gradient_accumulation - counts[1]), about
        return self._of_layers(scenario, stepped)

    def _of_layers(self, scenario: Scenario, stepped: Stepped) -> Traced | None:
        like = size_apart(scenario)
        if self._plan is None or self._plan[0] != like:
            plan = self._planned(scenario, like)
            self._plan, self._proven, self._seen = (like, plan), {}, {}
            self._second_steps = SecondSteps()
        plan = self._plan[1]
        if plan is None:
            return None
        with suppress(UserError, Unlike):
            once = partial(self._second_steps.traced, stepped, size=_extent(scenario))
            traced = once if self._often else partial(stepped, enough=None)
            shorter, few = traced(plan.at(scenario, plan.shallow[0]))
            between = self._between(scenario, shorter, few)
            longer, many = between or traced(plan.at(scenario, plan.shallow[1]))
            known = self._known(shorter, longer)
            if known is None:
                known = _proven(
                    shorter, longer, lambda: stepped(plan.at(scenario, plan.shallow[2]), None)[0]
                )
                self._proven[known.structure] = known
            if not between:
                self._seen.setdefault(known.structure, []).append(
                    _Size(_extent(scenario), known, few, many)
                )
            return known.at(plan.more), _about(few, many, plan.beyond(scenario), scenario)
        self._plan = like, None  # other sizes of this step won't be composed either
        return None

    def _planned(self, scenario: Scenario, like: Scenario) -> Depths | None:
        plan = partial(depths, scenario, often=self._often, place=self._place)
        if active_simulation():  # packages' kernels depend on the card
            return plan()
        key = repr(like), self._often, self._place
        if key not in self._plans:
            self._plans[key] = plan()
        return self._plans[key]

    def _between(
        self, scenario: Scenario, shorter: Record, few: dict[str, Any]
    ) -> tuple[Record, dict[str, Any]] | None:
        """The second shallow model's record and what is known of it, between two sizes at which it was traced.

        None: there are no such sizes, or something grows with both the layers and the size.
        """
        extent = _extent(scenario)
        for sizes in self._seen.values():
            for first, last in itertools.combinations(sizes, 2):
                within = all(
                    min(low, high) <= one <= max(low, high)
                    for low, one, high in zip(first.extent, extent, last.extent, strict=True)
                )
                if within and first.few == few == last.few and first.many == last.many:
                    with suppress(Unlike):
                        if first.composer.grows_like(last.composer):
                            return first.composer.longer_than(shorter), first.many
        return None

    def _known(self, shorter: Record, longer: Record) -> Composer | None:
        for proven in self._proven.values():
            with suppress(Unlike):
                return Composer(shorter, longer, proven)
        return None


def _proven(shorter: Record, longer: Record, third: Callable[[], Record]) -> Composer:
    proof = None
    for in_order in (False, True):
        with suppress(Unlike):
            known = Composer(shorter, longer, in_order=in_order)
            proof = third() if proof is None else proof
            if known.proven_by(proof):
                return known
    raise Unlike("no third record is its proof")


@dataclass(frozen=True)
class _Size:
    """A size at which the first two shallow models were traced, and what is known of them."""

    extent: tuple[int, ...]
    composer: Composer
    few: dict[str, Any]
    many: dict[str, Any]


def _extent(scenario: Scenario) -> tuple[int, ...]:
    """The numbers in which scenarios of one plan differ (:func:`size_apart`)."""
    return scenario.sequence_length, scenario.micro_batch, scenario.gradient_accumulation


def _about(
    few: dict[str, Any], many: dict[str, Any], more: Fraction, scenario: Scenario
) -> dict[str, Any]:
    """What is known of the deep model: numbers grow with the layers. Notes that do are taken from the model itself."""
    found = {
        name: int(value + (value - few[name]) * more)
        for name, value in many.items()
        if isinstance(value, int)
    }
    same = few["notes"] == many["notes"]
    return found | {
        "notes": many["notes"] if same else notes(build_model(scenario, "meta"), scenario)
    }
