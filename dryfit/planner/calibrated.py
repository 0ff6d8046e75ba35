"""Required bytes of a step and of those like it: the analytic estimate, corrected by traces.

The analytic estimate answers in milliseconds and is within a few per cent; the trace is exact and takes seconds. Where
only the weights of layers are described, layers that are alike stand in for them: that is rough, and traces correct it.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from itertools import product
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate, weights_bytes
from dryfit.analytic.hybrids import Hybrid
from dryfit.analytic.parameters import parameter_count
from dryfit.analytic.setting import describe
from dryfit.cards.gpus import Gpu
from dryfit.common.errors import UserError
from dryfit.derived.step import if_recorded
from dryfit.engine.components import GRADIENTS, OPTIMIZER_STATES
from dryfit.hours.step_time import speeds
from dryfit.planner.changes import Changes, apply
from dryfit.scenario.model import EXPERT_COUNTS
from dryfit.scenario.nested_fields import Parallel
from dryfit.scenario.objectives import SUPERVISED
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import DIVIDED, REPLICATED, WEIGHTS


class CalibratedEstimator:
    """Required bytes of scenarios: the analytic estimate, corrected by what traces showed.

    What a GPU must have lies above the peak, since segments are left half used; by how much depends on sizes in no
    simple way. Between traced scenarios the difference is interpolated over the analytic estimate's peak.

    Parameters
    ----------
    scenario
        The scenario that the others vary.
    gpu
        The GPU; its compute capability decides which kernels run. None: the default's.
    traced
        The trace of ``scenario`` if it is known already.
    """

    def __init__(
        self, scenario: Scenario, gpu: Gpu | None = None, traced: Mapping[str, Any] | None = None
    ) -> None:
        self.capability = gpu.capability if gpu else None
        self.sizes = [gpu.usable_bytes] if gpu else []  # that traces are asked about
        self._follows_records = not (
            gpu and gpu.pool_bytes
        )  # loading into a shared memory is in no record
        self.points: list[
            tuple[int, int]
        ] = []  # (analytic estimate's peak, required above it), in order
        self.expandable_points: list[tuple[int, int]] = []  # the same with expandable segments
        self._traced: dict[tuple, Mapping[str, Any]] = {}  # by capability and scenario
        self._peaks: dict[tuple, int] = {}  # of the analytic estimate, by the same
        try:
            self.formula(scenario)
            self.described = True
        except NotDescribed:
            self.described = False
        # Where the scenario's time is known, that of the others is asked for as well.
        self.timed_on = speeds([gpu], scenario) if gpu and traced and traced.get("time") else {}
        if traced is not None:
            self.learn(scenario, traced)

    def __call__(self, scenario: Scenario) -> int:
        """The required bytes, estimated; of layers without a form by a record, and without any estimate the trace's."""
        known = self._traced.get((self.capability, _key(scenario)))
        if known:
            return known["required_bytes"]
        if self._follows_records and layers_alike(scenario) is not scenario:
            exact = if_recorded(scenario, self.capability)
            if exact is not None:
                return exact.required_bytes
        try:
            peak = self.formula(scenario)
        except NotDescribed:
            return self.verify(scenario)["required_bytes"]
        return peak + _above(peak, self._points_of(scenario))

    def on(self, gpu: Gpu) -> CalibratedEstimator:
        """The same knowledge, for a GPU with perhaps other kernels: the differences carry over, traces don't.

        What is traced for it is known to all GPUs of its compute capability.
        """
        other = copy(self)
        other.capability, other.sizes, other._follows_records = (
            gpu.capability,
            [gpu.usable_bytes],
            not gpu.pool_bytes,
        )
        other.points, other.expandable_points = list(self.points), list(self.expandable_points)
        return other

    def verify(self, scenario: Scenario) -> Mapping[str, Any]:
        """Trace the scenario, and correct the estimates that follow."""
        known = self._traced.get((self.capability, _key(scenario)))
        if known is None:
            from dryfit.tracing.trace import trace

            how = {"capability": self.capability, "timed_on": self.timed_on, "sizes": self.sizes}
            known = trace(scenario, timeline=False, **how)
            self.learn(scenario, known)
        return known

    def formula(self, scenario: Scenario) -> int:
        """The analytic estimate's peak, without corrections; of layers that it does not describe a rough one."""
        key = (self.capability, _key(scenario))
        if key not in self._peaks:
            alike = layers_alike(known := _described(scenario))
            form = analytic_estimate(alike, capability=self.capability, blocks=False)
            self._peaks[key] = form["peak_allocated_bytes"] + _more_weights(known, alike, form)
        return self._peaks[key]

    def learn(self, scenario: Scenario, traced: Mapping[str, Any]) -> None:
        """Take what a trace showed of a scenario, or a replay of recorded events, which says the same."""
        self._traced[self.capability, _key(scenario)] = traced
        with suppress(NotDescribed):
            peak = self.formula(scenario)
            insort(self._points_of(scenario), (peak, traced["required_bytes"] - peak))

    def _points_of(self, scenario: Scenario) -> list[tuple[int, int]]:
        return self.expandable_points if scenario.allocator.expandable_segments else self.points


def _above(peak: int, points: Sequence[tuple[int, int]]) -> int:
    """What a GPU must have above a peak, interpolated between points; 0 without points, so that a trace decides."""
    at = bisect(points, (peak, 0))
    if not points:
        return 0
    if at in (0, len(points)):  # outside: in proportion
        known, above = points[min(at, len(points) - 1)]
        return above * peak // known
    (low, first), (high, second) = points[at - 1 : at + 1]
    return first + (second - first) * (peak - low) // max(high - low, 1)


def _described(scenario: Scenario) -> Scenario:
    """The scenario, or one like it that the analytic estimate knows.

    For ZeRO it is FSDP2 with weights as DeepSpeed casts them; for another objective supervised fine-tuning of as many
    rows; with images the language model alone. Traces correct estimates, and are what is shown: this decides only
    which changes are traced.
    """
    if scenario.images:
        scenario = scenario.changed(images=None)
    if scenario.aim.trainer:
        rows = scenario.micro_batch * scenario.aim.texts_in_a_row
        scenario = scenario.changed(
            objective=SUPERVISED, preference={"reference": None}, micro_batch=rows
        )
    parallel = scenario.parallel
    if not parallel.zero_stage:
        return scenario
    like = Parallel(DIVIDED, parallel.gpus, reshard_after_forward=WEIGHTS in parallel.kind.divides)
    if scenario.loss != "full":
        like = Parallel(REPLICATED, parallel.gpus)
    precision = scenario.autocast_precision or scenario.weight_precision
    return scenario.changed(parallel=like, precision=precision, autocast=None)


def layers_alike(scenario: Scenario) -> Scenario:
    """The scenario; where only the weights of its layers are described, one whose layers are all alike.

    Its MLPs are as wide as makes up for all weights that a token goes through.
    """
    try:
        decoder = describe(scenario.model)
    except NotDescribed:
        return scenario
    if not isinstance(decoder, Hybrid):
        return scenario
    counts, layers, hidden = (
        decoder.parameter_counts(),
        len(decoder.layers),
        scenario.size("hidden_size"),
    )
    heads = scenario.size("num_attention_heads") or max(1, hidden // 128)
    groups, head = (
        scenario.size("num_key_value_heads") or heads,
        scenario.size("head_dim") or hidden // heads,
    )
    experts = next((scenario.size(name) for name in EXPERT_COUNTS if scenario.size(name)), 1)
    taken = scenario.size("num_experts_per_tok") or 1
    each = (counts["linear"] + counts.get("experts", 0) * taken // experts) // layers
    width = max((each - 2 * hidden * head * (heads + groups)) // (3 * hidden), hidden // 2)
    model = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "vocab_size": scenario.size("vocab_size"),
        "tie_word_embeddings": "output_head" not in counts,
        "max_position_embeddings": scenario.size("max_position_embeddings")
        or scenario.sequence_length,
    }
    changes: Changes = {
        "model": model,
        "experts": {"quantized": "none"},
        "packages": None,
        "kernels": "transformers",
    }
    if scenario.lora and scenario.lora.target_modules != "all-linear":
        changes["lora"] = {**scenario.to_mapping()["lora"], "target_modules": "all-linear"}
    try:
        return scenario.changed(**changes)
    except UserError:
        return scenario


def _more_weights(scenario: Scenario, alike: Scenario, form: Mapping[str, Any]) -> int:
    """By how much a step's weights take more than those of one with layers alike; trained ones with their states."""
    if alike is scenario:
        return 0
    own, other = (weights_bytes(step, parameter_count(step.model)) for step in (scenario, alike))
    more = own - other
    if scenario.method == "full":
        parts = form["components"]
        states = sum(parts.get(name, 0) for name in (GRADIENTS, OPTIMIZER_STATES))
        more += round(states * (parameter_count(scenario.model) / parameter_count(alike.model) - 1))
    return more // (scenario.parallel.gpus if scenario.parallel.sharded else 1)


def _key(scenario: Scenario) -> str:
    return repr(replace(scenario, gpu=None))


def alone(scenario: Scenario, changes: Changes) -> Scenario:
    """A method's step with a micro-batch of 1, on no GPU in particular."""
    return apply(scenario, {**changes, "micro_batch": 1, "gradient_accumulation": 1, "gpu": None})


def sweep(
    scenario: Scenario,
    *,
    ranks: Sequence[int] = (),
    sequence_lengths: Sequence[int] = (),
    micro_batches: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Memory over all combinations of rank, sequence length and micro-batch, in the order given.

    The analytic estimate, corrected by one trace of the scenario itself; where layers stand in for others by traces of
    the fewest and the most tokens with each rank.
    """
    estimate = CalibratedEstimator(scenario)
    estimate.verify(scenario)
    rows = []
    lora = scenario.to_mapping()["lora"]
    values = [
        (ranks if lora else ()) or ([lora["rank"]] if lora else [0]),
        sequence_lengths or [scenario.sequence_length],
        micro_batches or [scenario.micro_batch],
    ]

    def at(rank: int, length: int, batch: int) -> Scenario:
        changes: Changes = {"sequence_length": length, "micro_batch": batch}
        if lora:
            changes["lora"] = {**lora, "rank": rank}
        return apply(scenario, changes)

    of_rank = dict.fromkeys(values[0], estimate)
    if layers_alike(scenario) is not scenario:
        for rank in values[0]:
            of_rank[rank] = CalibratedEstimator(scenario)
            for end in (min, max):
                of_rank[rank].verify(at(rank, *map(end, values[1:])))
    for rank, length, batch in product(*values):
        required = of_rank[rank](at(rank, length, batch))
        rows.append(
            {
                "rank": rank,
                "sequence_length": length,
                "micro_batch": batch,
                "required_bytes": required,
            }
        )
    return rows
