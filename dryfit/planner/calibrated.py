"""Required bytes of a step and of those like it: the analytic estimate, corrected by traces.

The analytic estimate answers in milliseconds and is within a few per cent; the trace is exact and takes seconds.
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
from dryfit.analytic.estimate import analytic_estimate
from dryfit.cards.gpus import Gpu
from dryfit.derived.step import if_recorded
from dryfit.hours.step_time import speeds
from dryfit.planner.changes import Changes, apply
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

    def __init__(self, scenario: Scenario, gpu: Gpu | None = None, traced: Mapping[str, Any] | None = None) -> None:
        self.capability = gpu.capability if gpu else None
        self.sizes = [gpu.usable_bytes] if gpu else []  # that traces are asked about
        self._follows_records = not (gpu and gpu.pool_bytes)  # loading into a shared memory is in no record
        self.points: list[tuple[int, int]] = []  # (analytic estimate's peak, required above it), in order
        self.expandable_points: list[tuple[int, int]] = []  # the same with expandable segments
        self._traced: dict[tuple, Mapping[str, Any]] = {}  # by capability and scenario
        self._peaks: dict[tuple, int] = {}  # of the analytic estimate, by the same
        try:
            analytic_estimate(_described(scenario), capability=self.capability, blocks=False)
            self.described = True
        except NotDescribed:
            self.described = False
        # Where the scenario's time is known, that of the others is asked for as well.
        self.timed_on = speeds([gpu], scenario) if gpu and traced and traced.get("time") else {}
        if traced is not None:
            self.learn(scenario, traced)

    def __call__(self, scenario: Scenario) -> int:
        """The required bytes, estimated; where there is no analytic estimate, a record's or the trace's own."""
        known = self._traced.get((self.capability, _key(scenario)))
        if known:
            return known["required_bytes"]
        try:
            peak = self.formula(scenario)
        except NotDescribed:
            exact = if_recorded(scenario, self.capability) if self._follows_records else None
            return exact.required_bytes if exact else self.verify(scenario)["required_bytes"]
        return peak + _above(peak, self._points_of(scenario))

    def on(self, gpu: Gpu) -> CalibratedEstimator:
        """The same knowledge, for a GPU with perhaps other kernels: the differences carry over, traces don't.

        What is traced for it is known to all GPUs of its compute capability.
        """
        other = copy(self)
        other.capability, other.sizes, other._follows_records = gpu.capability, [gpu.usable_bytes], not gpu.pool_bytes
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
        """The analytic estimate's peak, without corrections."""
        key = (self.capability, _key(scenario))
        if key not in self._peaks:
            form = analytic_estimate(_described(scenario), capability=self.capability, blocks=False)
            self._peaks[key] = form["peak_allocated_bytes"]
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
        scenario = scenario.changed(objective=SUPERVISED, preference={"reference": None}, micro_batch=rows)
    parallel = scenario.parallel
    if not parallel.zero_stage:
        return scenario
    like = Parallel(DIVIDED, parallel.gpus, reshard_after_forward=WEIGHTS in parallel.kind.divides)
    if scenario.loss != "full":
        like = Parallel(REPLICATED, parallel.gpus)
    precision = scenario.autocast_precision or scenario.weight_precision
    return scenario.changed(parallel=like, precision=precision, autocast=None)


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

    The analytic estimate, corrected by one trace of the scenario itself.
    """
    estimate = CalibratedEstimator(scenario)
    estimate.verify(scenario)
    rows = []
    lora = scenario.to_mapping()["lora"]
    own_rank = [lora["rank"]] if lora else [0]
    for rank, length, batch in product(
        (ranks if lora else ()) or own_rank,
        sequence_lengths or [scenario.sequence_length],
        micro_batches or [scenario.micro_batch],
    ):
        changes: Changes = {"sequence_length": length, "micro_batch": batch}
        if lora:
            changes["lora"] = {**lora, "rank": rank}
        required = estimate(apply(scenario, changes))
        rows.append({"rank": rank, "sequence_length": length, "micro_batch": batch, "required_bytes": required})
    return rows
