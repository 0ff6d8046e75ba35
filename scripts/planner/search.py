"""What fits, and what to change so that it fits.

The analytic estimate answers in milliseconds and is within a few per cent; the trace is exact and takes seconds. So the
analytic estimate searches, corrected by the difference that the trace showed last, and the trace verifies each answer
before it is given.
"""

from __future__ import annotations

from bisect import bisect, bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from scripts.common.errors import UserError
from scripts.common.schema import yaml_text
from scripts.common.sizes import gib
from scripts.memory.analytic.decoder import NotDescribed, describe
from scripts.memory.analytic.estimate import analytic_estimate
from scripts.memory.gpus import EXPANDABLE_LINE, GIB, Gpu, catalogue, verdict
from scripts.memory.step_time import speeds
from scripts.planner.border import Borders, steps
from scripts.settings.scenario import Parallel, Scenario

Changes = dict[str, Any]
SUGGESTIONS = 4  # alternatives to show, beside a bigger GPU
PROBES = 8  # traces that one search may take
ANCHORS = (1, 16)  # micro-batches that are traced to correct the feasibility table
COUNTS = (2, 4, 8)  # of GPUs of a kind
EDGE = 0.03  # share of a GPU within which another GPU's kernels are traced, not estimated


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
        self.timed_on = speeds([gpu]) if gpu and traced and traced.get("time") else {}
        self.times: list[tuple[int, Mapping[str, Any]]] = []  # of traced steps: tokens, and seconds by GPU
        if traced is not None:
            self._learn(scenario, traced)

    def __call__(self, scenario: Scenario) -> int:
        """The required bytes, estimated; the trace itself where there is no analytic estimate."""
        known = self._traced.get((self.capability, _key(scenario)))
        if known:
            return known["required_bytes"]
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
        other.capability = gpu.capability
        other.points, other.expandable_points = list(self.points), list(self.expandable_points)
        return other

    def verify(self, scenario: Scenario) -> Mapping[str, Any]:
        """Trace the scenario, and correct the estimates that follow."""
        known = self._traced.get((self.capability, _key(scenario)))
        if known is None:
            from scripts.memory.trace import trace

            known = trace(scenario, capability=self.capability, timeline=False, timed_on=self.timed_on)
            self._learn(scenario, known)
        return known

    def formula(self, scenario: Scenario) -> int:
        """The analytic estimate's peak, without corrections."""
        key = (self.capability, _key(scenario))
        if key not in self._peaks:
            form = analytic_estimate(_described(scenario), capability=self.capability, blocks=False)
            self._peaks[key] = form["peak_allocated_bytes"]
        return self._peaks[key]

    def _learn(self, scenario: Scenario, traced: Mapping[str, Any]) -> None:
        self._traced[self.capability, _key(scenario)] = traced
        if traced.get("times"):
            seconds = {name: time and time["seconds_per_step"] for name, time in traced["times"].items()}
            self.times.append((scenario.micro_batch * scenario.sequence_length, seconds))
        with suppress(NotDescribed):
            peak = self.formula(scenario)
            insort(self._points_of(scenario), (peak, traced["required_bytes"] - peak))

    def _points_of(self, scenario: Scenario) -> list[tuple[int, int]]:
        return self.expandable_points if scenario.allocator.expandable_segments else self.points


def _above(peak: int, points: Sequence[tuple[int, int]]) -> int:
    """What a GPU must have above a peak, between points; nothing where there are none, so that a trace decides."""
    at = bisect(points, (peak, 0))
    if not points:
        return 0
    if at in (0, len(points)):  # outside: in proportion
        known, above = points[min(at, len(points) - 1)]
        return above * peak // known
    (low, first), (high, second) = points[at - 1 : at + 1]
    return first + (second - first) * (peak - low) // max(high - low, 1)


def _described(scenario: Scenario) -> Scenario:
    """The scenario; for ZeRO, which the analytic estimate does not know, FSDP2 with weights as DeepSpeed casts them.

    Traces correct estimates, and are what is shown: this decides only which changes are traced.
    """
    parallel = scenario.parallel
    if not parallel.zero_stage:
        return scenario
    like = Parallel("fsdp2", parallel.gpus, reshard_after_forward=parallel.strategy == "zero3")
    if scenario.loss != "full":
        like = Parallel("ddp", parallel.gpus)
    precision = scenario.autocast_precision or scenario.weight_precision
    return scenario.changed(parallel=like, precision=precision, autocast=None)


def _key(scenario: Scenario) -> str:
    return repr(replace(scenario, gpu=None))


# --- what to change -------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """One way to need less memory: what identifies it, its price in words, and the changes from mild to strong."""

    name: str
    cost: str
    options: Sequence[Changes]


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a step fit.

    Attributes
    ----------
    move
        What identifies it: the name of a :class:`Move`, or several, joined by a plus sign.
    changes, write
        Fields of the scenario, and the same as YAML.
    cost
        The price in words.
    slower_share
        How much longer a row takes on the same card, from two traces; None where its speed is not known.
    """

    move: str
    changes: Changes
    write: str
    cost: str
    peak_allocated_bytes: int
    required_bytes: int
    headroom_bytes: int
    slower_share: float | None = None


def moves(scenario: Scenario) -> Iterator[Move]:
    """What can be changed to need less memory, the cheapest first.

    Changes that contradict the scenario's other fields are left out.
    """
    for move in _moves(scenario):
        possible = [changes for changes in move.options if _possible(scenario, changes)]
        if possible:
            yield move._replace(options=possible)


def _possible(scenario: Scenario, changes: Changes) -> bool:
    try:
        apply(scenario, changes)
    except UserError:
        return False
    return True


def _moves(scenario: Scenario) -> Iterator[Move]:
    yield from _moves_for_free(scenario)
    yield from _moves_among_gpus(scenario)
    yield from _moves_for_time(scenario)
    yield from _moves_for_quality(scenario)


def _moves_for_free(scenario: Scenario) -> Iterator[Move]:
    """The same numbers, or nearly, at the same speed."""
    quantization = scenario.quantization
    if not scenario.allocator.expandable_segments:
        cost = f"free: the same step without gaps in its memory; set {EXPANDABLE_LINE} before Python starts"
        yield Move("expandable_segments", cost, [{"allocator": {"expandable_segments": True}}])
    if scenario.attention == "eager":
        yield Move("fused_attention", "free: the same numbers from a fused kernel", [{"attention": "sdpa"}])
    if scenario.loop == "manual":
        dropped = {"previous_sequence_length": None} if scenario.previous_sequence_length else {}
        yield Move("trainer_loop", "free: the logits may go before backward begins", [{"loop": "trainer", **dropped}])
    if scenario.use_cache:
        cost = "free: training does not read the keys and values that it keeps"
        yield Move("no_cache", cost, [{"use_cache": False}])
    if scenario.optimizer == "adamw":
        cost = "free: the same update without a copy of the second moments"
        yield Move("fused_optimizer", cost, [{"optimizer": "adamw_fused"}])
    unpacked = whole_4bit_bytes(scenario)
    if unpacked:
        cost = f"free: 4-bit weights are divided among GPUs too, {gib(unpacked)} less on each"
        storage = {**asdict(quantization), "storage": scenario.weight_precision}
        yield Move("divide_4bit_weights", cost, [{"quantization": storage}])
    if quantization and quantization.type == "int8" and scenario.gradient_checkpointing is True:
        cost = "free: lets go of the inputs that LLM.int8's layers hold on to otherwise"
        yield Move("reentrant_checkpointing", cost, [{"gradient_checkpointing": "reentrant"}])
    if quantization and quantization.type != "int8" and not quantization.double:
        double = {**asdict(quantization), "double": True}
        yield Move("double_quantization", "next to nothing: the scales are quantized too", [{"quantization": double}])
    if scenario.kbit_preparation != "none":
        cost = "weights that are not quantized stay in 16 bits"
        yield Move("no_kbit_preparation", cost, [{"kbit_preparation": "none"}])


def _moves_among_gpus(scenario: Scenario) -> Iterator[Move]:
    """More communication among the GPUs that are there."""
    parallel = scenario.parallel

    def with_parallel(**changes: Any) -> list[Changes]:
        return [{"parallel": {**asdict(parallel), **changes}, **_divisible(scenario)}]

    if not parallel.reshard_after_forward:
        cost = "half as much again of communication"
        yield Move("reshard_after_forward", cost, with_parallel(reshard_after_forward=True))
    if parallel.strategy == "ddp":
        cost = "more communication: weights, gradients and states are divided, and gathered layer by layer"
        yield Move("fsdp2", cost, with_parallel(strategy="fsdp2"))
    if parallel.strategy == "zero2":
        cost = "more communication: weights are divided too, and gathered layer by layer"
        yield Move("zero3", cost, with_parallel(strategy="zero3"))
    count = scenario.gpu.get("count", 1) if isinstance(scenario.gpu, Mapping) else 1
    if parallel.strategy == "none" and count > 1:
        changes, cost = spread(scenario, count)
        yield Move("spread", cost, [changes])


def _moves_for_time(scenario: Scenario) -> Iterator[Move]:
    """The same numbers more slowly."""
    effective = scenario.micro_batch * scenario.gradient_accumulation
    if scenario.loss == "full":
        cost = "a little time: the output head runs again in backward"
        yield Move("chunked_loss", cost, [{"loss": "chunked"}])
    if not scenario.gradient_checkpointing:
        cost = "time: each layer runs again in backward"
        yield Move("gradient_checkpointing", cost, [{"gradient_checkpointing": True}])
    if scenario.micro_batch > 1:
        smaller = [n for n in range(scenario.micro_batch - 1, 0, -1) if effective % n == 0]
        options = [{"micro_batch": n, "gradient_accumulation": effective // n} for n in smaller]
        yield Move("micro_batch", f"some time: smaller steps, the effective batch stays {effective}", options)


def _moves_for_quality(scenario: Scenario) -> Iterator[Move]:
    """Other numbers: less precise states and weights, smaller adapters, shorter rows, fewer trained weights."""
    if scenario.optimizer in ("adamw", "adamw_fused"):
        yield Move("8bit_optimizer", "optimizer states in 8 bits", [{"optimizer": "adamw_8bit"}])
    if scenario.optimizer != "paged_adamw_8bit":
        cost = "optimizer states in 8 bits that may move to the host, slowly"
        yield Move("paged_optimizer", cost, [{"optimizer": "paged_adamw_8bit"}])
    if scenario.precision == "fp32" and scenario.method != "qlora":
        yield Move("16bit_weights", "weights in 16 bits", [{"precision": "bf16"}])
    if scenario.mixed:
        changes = {"precision": scenario.precision.removesuffix("-mixed")}
        yield Move("no_fp32_copy", "no fp32 copy of the weights", [changes])
    if scenario.lora and scenario.lora.rank > 4:
        lora = scenario.to_mapping()["lora"]
        options = [{"lora": {**lora, "rank": rank}} for rank in _halves(lora["rank"], 4)]
        yield Move("smaller_rank", "adapters with less capacity", options)
    if scenario.sequence_length > 128:
        lengths = [n for n in steps("sequence_length", scenario.sequence_length)[-2::-1] if n >= 128]
        yield Move("sequence_length", "longer examples are dropped", [{"sequence_length": n} for n in lengths])
    if scenario.method == "full":
        yield Move("lora", "only adapters are trained", [as_method(scenario, "lora")])
    if _divisible(scenario):
        yield Move("4bit_weights", "a base of 4 bits instead of 8", [_divisible(scenario)])
    if scenario.method != "qlora":
        yield Move("qlora", "only adapters are trained, on a 4-bit base", [as_method(scenario, "qlora")])


def spread(scenario: Scenario, gpus: int) -> tuple[Changes, str]:
    """What to change to divide a step among GPUs with FSDP2, and its price: the effective batch stays if it can."""
    kept = asdict(scenario.parallel) if scenario.parallel.strategy == "fsdp2" else {}
    changes: Changes = {"parallel": {**kept, "strategy": "fsdp2", "gpus": gpus}, **_divisible(scenario)}
    price = f"the model is divided among {gpus} GPUs, and gathered layer by layer"
    price += "; a base of 4 bits, since one of 8 can't be divided" if "quantization" in changes else ""
    before, rows, steps = scenario.parallel.gpus, scenario.micro_batch, scenario.gradient_accumulation
    if before * steps % gpus == 0:
        changes["gradient_accumulation"] = before * steps // gpus
    elif before * rows % gpus == 0:
        changes["micro_batch"] = before * rows // gpus
    else:
        price += f"; the effective batch becomes {rows * steps * gpus}"
    return changes, price


def _divisible(scenario: Scenario) -> Changes:
    """What to change of a base that can't be divided: LLM.int8's becomes one of 4 bits."""
    quantization = scenario.quantization
    if quantization is None or quantization.type != "int8":
        return {}
    return {"quantization": {**asdict(quantization), "type": "nf4", "double": True}}


def whole_4bit_bytes(scenario: Scenario) -> int:
    """Bytes of 4-bit weights that FSDP2 leaves on each GPU and would divide, were they not stored as integers.

    0 where nothing is to be saved so, or nothing is known of the architecture.
    """
    quantization, parallel = scenario.quantization, scenario.parallel
    if quantization is None or quantization.storage != "uint8" or parallel.strategy != "fsdp2":
        return 0
    try:
        packed = describe(scenario.model).parameter_counts()["linear"] // 2
    except NotDescribed:
        return 0
    return packed - packed // parallel.gpus


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def as_method(scenario: Scenario, method: str) -> Changes:
    """What to change for another method.

    A quantized base has a precision of its own instead of mixed precision, FSDP1 takes its weights in that alone, and
    what TRL prepares is quantized.
    """
    changes: Changes = {"method": method}
    precision = scenario.precision.removesuffix("-mixed")
    if method == "qlora" and scenario.mixed:
        changes["precision"] = precision
    if method == "qlora" and scenario.parallel.strategy == "fsdp1" and not scenario.quantization:
        changes["quantization"] = {"storage": precision}
    if method != "qlora" and scenario.kbit_preparation == "trl":
        changes["kbit_preparation"] = "none"
    return changes


def apply(scenario: Scenario, changes: Changes) -> Scenario:
    """The scenario with changes; a new method drops what it has no place for, and takes defaults of what it needs."""
    values = scenario.to_mapping()
    method = changes.get("method", scenario.method)
    for key, methods in (("lora", ("lora", "qlora")), ("quantization", ("qlora",))):
        if method not in methods:
            values[key] = None
        elif values[key] is None:
            del values[key]
    if method == "full":
        values |= {"kbit_preparation": "none", "adapter": None}
    return Scenario.from_mapping({**values, **changes}, where="a suggestion")


def suggest(scenario: Scenario, gpu: Gpu, traced: Mapping[str, Any] | None = None) -> list[Suggestion]:
    """The smallest changes that make a scenario fit a GPU, in order of what they cost; the trace verifies each.

    What fits with one change, and before that what fits with several that each cost less. More GPUs of the kind and a
    bigger one come last.
    """
    estimate = CalibratedEstimator(scenario, gpu, traced)
    fits = lambda candidate: estimate(candidate) <= gpu.usable_bytes  # noqa: E731
    found: list[Suggestion] = []
    for move in moves(scenario):
        if len(found) == SUGGESTIONS:
            break
        answer = _verified(scenario, move, gpu, estimate, fits)
        if answer is not None:
            found.append(answer)
    combined = _combined(scenario, gpu, estimate, fits, cheaper_than=found[0].move if found else None)
    if combined is not None:
        found.insert(0, combined)
    if estimate.timed_on and scenario.objective == "sft":  # no other has a time
        found = [_timed(item, scenario, gpu, estimate) for item in found]
    return found + [other for other in (_more_gpus(scenario, gpu), _bigger_gpu(scenario, gpu, estimate)) if other]


def _timed(item: Suggestion, scenario: Scenario, gpu: Gpu, estimate: CalibratedEstimator) -> Suggestion:
    """The suggestion with what it saves and what it costs in time, for as many rows."""
    before, changed = estimate.verify(scenario), apply(scenario, item.changes)
    after = estimate.verify(changed)["times"][gpu.name]

    def seconds_per_row(step: Scenario, time: Mapping[str, Any]) -> float:
        return time["seconds_per_step"] / (step.micro_batch * step.gradient_accumulation * step.parallel.gpus)

    slower = seconds_per_row(changed, after) / seconds_per_row(scenario, before["time"]) - 1
    speed = f"{abs(slower):.0%} {'slower' if slower > 0 else 'faster'}" if abs(slower) >= 0.005 else "as fast"
    saved = f"saves {(before['required_bytes'] - item.required_bytes) / GIB:.2f} GiB, {speed}"
    return replace(item, cost=f"{item.cost}; {saved}", slower_share=round(slower, 4))


def _verified(
    scenario: Scenario,
    move: Move,
    gpu: Gpu,
    estimate: CalibratedEstimator,
    fits: Callable[[Scenario], bool],
) -> Suggestion | None:
    """The mildest of a move's changes that fits, by the trace; of lengths the one below which all fit."""
    with suppress(UserError):  # what can't be traced is no suggestion
        options = move.options[_mildest(scenario, move, fits) :]
        if options and "sequence_length" in options[0]:
            expandable = scenario.allocator.expandable_segments
            borders = Borders(scenario, "sequence_length", gpu.capability, [gpu.usable_bytes])
            longest = borders.traced(gpu.usable_bytes, expandable=expandable).value
            options = [changes for changes in move.options if changes["sequence_length"] <= longest][:1]
        for changes in options[:PROBES]:
            candidate = apply(scenario, changes)
            traced = estimate.verify(candidate) if fits(candidate) else None
            if traced and traced["required_bytes"] <= gpu.usable_bytes:
                return _suggestion(move.name, changes, move.cost, traced, gpu)
    return None


def _mildest(scenario: Scenario, move: Move, fits: Callable[[Scenario], bool]) -> int:
    """Place of the first of a move's options, each of which needs less memory than the one before, that fits."""
    return bisect_left(move.options, True, key=lambda changes: fits(apply(scenario, changes)))


def _combined(
    scenario: Scenario,
    gpu: Gpu,
    estimate: CalibratedEstimator,
    fits: Callable[[Scenario], bool],
    cheaper_than: str | None,
) -> Suggestion | None:
    """Several changes together, verified; each trace corrects the estimate, until the search finds the same again."""
    best: Suggestion | None = None
    before: list[tuple[Move, Changes]] | None = None
    for _ in range(PROBES):
        taken = _cheapest(scenario, estimate, fits, cheaper_than)
        if taken is None or taken == before:
            break
        before = taken
        traced = estimate.verify(_all(scenario, taken))
        if traced["required_bytes"] <= gpu.usable_bytes:
            changes = {key: value for _, step in taken for key, value in step.items()}
            name, cost = "+".join(move.name for move, _ in taken), "; ".join(move.cost for move, _ in taken)
            best = _suggestion(name, changes, cost, traced, gpu)
    return best


def _cheapest(
    scenario: Scenario, estimate: CalibratedEstimator, fits: Callable[[Scenario], bool], cheaper_than: str | None
) -> list[tuple[Move, Changes]] | None:
    """The cheapest changes first until it fits, then without those that turn out not to be needed."""
    taken: list[tuple[Move, Changes]] = []
    seen: set[str] = set()
    current = scenario
    while not fits(current):
        move = next((move for move in moves(current) if move.name not in seen), None)
        if move is None or move.name == cheaper_than:
            return None
        seen.add(move.name)
        chosen = move.options[min(_mildest(current, move, fits), len(move.options) - 1)]
        candidate = apply(current, chosen)
        if estimate(candidate) < estimate(current):
            taken.append((move, chosen))
            current = candidate
    for item in list(taken):  # where a later change alone is enough, the cheap ones before it are not needed
        rest = [other for other in taken if other is not item]
        if fits(_all(scenario, rest)):
            taken = rest
    return taken


def _all(scenario: Scenario, taken: Iterable[tuple[Move, Changes]]) -> Scenario:
    for _, changes in taken:
        scenario = apply(scenario, changes)
    return scenario


def _bigger_gpu(scenario: Scenario, gpu: Gpu, estimate: CalibratedEstimator) -> Suggestion | None:
    """The smallest GPU of the catalogue that the scenario fits as it is."""
    own = estimate.verify(scenario)
    known = {estimate.capability: own["required_bytes"]}  # by compute capability, from traces
    for other in sorted(catalogue().values(), key=lambda other: other.usable_bytes):
        if other.total_bytes <= gpu.total_bytes:
            continue
        required = known.get(other.capability)
        if required is None:
            # Another GPU may run other kernels. The analytic estimate knows how the peak differs, but not how well the
            # blocks fit together: where the peak fits and the estimate doesn't clearly, the trace decides.
            required = own["required_bytes"]
            if estimate.described:
                peak = estimate.on(other).formula(scenario)
                required += peak - estimate.formula(scenario)
                doubtful = peak <= other.usable_bytes < required * (1 + EDGE)
            else:
                doubtful = required <= other.usable_bytes
            if doubtful:
                required = known[other.capability] = CalibratedEstimator(scenario, other).verify(scenario)[
                    "required_bytes"
                ]
        if required <= other.usable_bytes:
            answer = {"peak_allocated_bytes": own["peak_allocated_bytes"], "required_bytes": required}
            return _suggestion("bigger_gpu", {"gpu": other.name}, f"another GPU: {other.title}", answer, other)
    return None


def _more_gpus(scenario: Scenario, gpu: Gpu) -> Suggestion | None:
    """The fewest GPUs of the kind that hold the scenario as it is, divided with FSDP2."""
    if scenario.parallel.strategy not in ("none", "fsdp2"):
        return None
    kind: dict[str, Any] = {"name": gpu.name} if gpu.name in catalogue() else {"vram_gib": gpu.total_bytes / GIB}
    estimate: CalibratedEstimator | None = None
    for count in COUNTS:
        if count <= max(gpu.count, scenario.parallel.gpus):
            continue
        changes, price = spread(scenario, count)
        changes["gpu"] = {**kind, "count": count}
        try:
            candidate = apply(scenario, changes)
        except UserError:  # such as a loss that FSDP has no place for
            return None
        estimate = estimate or CalibratedEstimator(candidate, gpu)
        with suppress(UserError):  # what can't be traced is no suggestion
            if estimate(candidate) <= gpu.usable_bytes * (1 + EDGE):
                traced = estimate.verify(candidate)
                if traced["required_bytes"] <= gpu.usable_bytes:
                    return _suggestion("more_gpus", changes, f"{count} such GPUs: {price}", traced, gpu)
    return None


def _suggestion(move: str, changes: Changes, cost: str, traced: Mapping[str, Any], gpu: Gpu) -> Suggestion:
    peak, required = traced["peak_allocated_bytes"], traced["required_bytes"]
    write = ", ".join(f"{key}: {yaml_text(value)}" for key, value in changes.items())
    return Suggestion(move, changes, write, cost, peak, required, verdict(required, gpu).headroom_bytes)


# --- what fits ------------------------------------------------------------------------------------------------------


def alone(scenario: Scenario, changes: Changes) -> Scenario:
    """A method's step with a micro-batch of 1, on no GPU in particular."""
    return apply(scenario, {**changes, "micro_batch": 1, "gradient_accumulation": 1, "gpu": None})


def anchored(scenario: Scenario, changes: Changes) -> tuple[Scenario, CalibratedEstimator]:
    """A method's step with a micro-batch of 1, and its estimate, corrected by traces of :data:`ANCHORS`.

    They are timed as well, on the GPUs of the catalogue that run the traced kernels.
    """
    base = alone(scenario, changes)
    estimate = CalibratedEstimator(base)
    estimate.timed_on = speeds(gpu for gpu in catalogue().values() if (gpu.capability or (8, 0)) >= (8, 0))
    for batch in ANCHORS:
        estimate.verify(replace(base, micro_batch=batch))
    return base, estimate


def divided(scenario: Scenario, changes: Changes) -> dict[int, tuple[Scenario, CalibratedEstimator]]:
    """A method's step on several GPUs with FSDP2, by their number, with estimates that share two traces.

    The traces are the ends: the most GPUs with a micro-batch of the first of :data:`ANCHORS`, the fewest with the last.
    Empty where FSDP2 has no place for a setting.
    """
    base = alone(scenario, changes)
    try:
        bases = {count: apply(base, spread(base, count)[0]) for count in COUNTS}
    except UserError:
        return {}
    estimate = CalibratedEstimator(bases[COUNTS[0]])
    for count, batch in zip((COUNTS[-1], COUNTS[0]), ANCHORS, strict=True):
        estimate.verify(replace(bases[count], micro_batch=batch))
    return {count: (base, estimate) for count, base in bases.items()}


def becomes_possible(scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """On how many GPUs of each kind scenarios fit, divided with FSDP2: one GPU and :data:`COUNTS`.

    Each step is traced on the kernels of a GPU that nobody names; for other compute capabilities the difference of the
    analytic estimates is added.

    Returns
    -------
    dict
        ``counts``; ``scenarios``: by name a row for each count, with ``gpus``, ``peak_allocated_bytes`` and
        ``required_bytes`` of each GPU; ``gpus``: for each GPU of the catalogue ``gpu``, ``title``, ``total_gib`` and
        ``first``, by name the smallest count that fits (None: none does); ``first``: by name the ``gpu`` and ``gpus``
        of the least memory in all that fit.
    """
    needs: dict[str, list[dict[str, Any]]] = {}
    kinds = [
        {"gpu": gpu.name, "title": gpu.title, "total_gib": round(gpu.total_bytes / GIB, 2), "first": {}}
        for gpu in catalogue().values()
    ]
    for name, scenario in scenarios.items():
        whole = replace(scenario, gpu=None)
        steps = {1: whole, **{count: apply(whole, spread(whole, count)[0]) for count in COUNTS}}
        estimates = {count: CalibratedEstimator(step) for count, step in steps.items()}
        traced = {count: estimates[count].verify(step) for count, step in steps.items()}
        needs[name] = [
            {"gpus": count, **{key: traced[count][key] for key in ("peak_allocated_bytes", "required_bytes")}}
            for count in steps
        ]
        for kind, gpu in zip(kinds, catalogue().values(), strict=True):
            fitting = (
                count
                for count, step in steps.items()
                if _on_another(step, estimates[count], traced[count], gpu) <= gpu.usable_bytes
            )
            kind["first"][name] = next(fitting, None)
    first = {}
    for name in scenarios:
        possible = [
            (kind["first"][name] * gpu.usable_bytes, kind["first"][name], gpu.name)
            for kind, gpu in zip(kinds, catalogue().values(), strict=True)
            if kind["first"][name]
        ]
        first[name] = {"gpus": min(possible)[1], "gpu": min(possible)[2]} if possible else None
    return {"counts": [1, *COUNTS], "scenarios": needs, "gpus": kinds, "first": first}


def _on_another(scenario: Scenario, estimate: CalibratedEstimator, traced: Mapping[str, Any], gpu: Gpu) -> int:
    """Required bytes of a traced step on a GPU with perhaps other kernels."""
    try:
        return traced["required_bytes"] + estimate.on(gpu).formula(scenario) - estimate.formula(scenario)
    except NotDescribed:
        return CalibratedEstimator(scenario, gpu).verify(scenario)["required_bytes"]


def sweep(
    scenario: Scenario,
    *,
    ranks: Sequence[int] = (),
    sequence_lengths: Sequence[int] = (),
    micro_batches: Sequence[int] = (),
    estimate: CalibratedEstimator | None = None,
) -> list[dict[str, Any]]:
    """Memory over all combinations of rank, sequence length and micro-batch, in the order given.

    The analytic estimate, corrected by one trace of the scenario itself unless an ``estimate`` is given.
    """
    if estimate is None:
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
