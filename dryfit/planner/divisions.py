"""How to divide a step among GPUs: the meshes that it can have, the best of them traced, ranked by time and room.

Each mesh takes seconds to trace. So what a GPU has to hold in any case rules out those that can't fit, without a
trace, and a rough estimate orders the others. Where it was too low, another way takes the place of one that does not
fit. Where it may be too high, a way that seems faster than the best is traced, unless it is too large by the smallest
error seen. An answer names those that were not traced. What is shown as fitting has been traced on that very GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.setting import describe
from dryfit.cards.beside import Process
from dryfit.cards.gpus import Gpu
from dryfit.cards.verdict import verdict
from dryfit.common.errors import UserError
from dryfit.hours.step_time import Speed, speed_of
from dryfit.planner.changes import whole_loss
from dryfit.scenario.description import say_way
from dryfit.scenario.model import EXPERT_COUNTS
from dryfit.scenario.nested_fields import Parallel
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import AXES, DIVIDED, NONE, REPLICATED

TRACED = 5  # ways that fit, beside each other
MOST = 10  # ways that are traced, where some of them don't fit
TRACED_TO_SUGGEST = 3
TRACED_OF_COUNT = 2  # ways on each number of GPUs that `fewest` looks at
COUNTS = (
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
)  # of GPUs that `fewest` looks at: whole machines beyond eight
NEAR = 1.05  # a pipeline whose layers were moved is traced where it may need so many times what a GPU has
_STATES = {
    "adamw": 2,
    "adamw_fused": 2,
}  # optimizers whose states are known: of the weights' dtype, by weight
# For the order alone, where the catalogue has no speed: an H100's dense bf16 products and its NVLink, a second.
_FLOPS, _LINK = 989e12, 450e9
_REACHED = 0.5  # of the products' peak
_ALONG_ROWS = {"sequence_parallel": True, "loss_parallel": True}
_LAYER_TENSORS = 30  # of a token's width, that a layer holds while it runs
Watch = Callable[[str, int, Sequence[Any]], None]


@dataclass(frozen=True)
class Division:
    """A way to divide a step, traced."""

    way: str  # in words, ``fsdp2 x tensor 2``
    # What to write in a scenario; as many rows make an update as before, where they can. FSDP takes a whole loss.
    parallel: Mapping[str, Any]
    gradient_accumulation: int
    loss: str
    verdict: str | None
    fits: bool | None
    # Of the GPU that needs most, ``place`` among the others ("": all are alike)
    headroom_bytes: int | None
    peak_allocated_bytes: int
    required_bytes: int
    place: str
    # None where the GPU's speed is not known; tokens of all GPUs together
    seconds_per_step: float | None
    tokens_per_second: float | None
    # What a GPU exchanges in a step, by the group that talks (:func:`dryfit.hours.links.exchanges`)
    exchanges: Sequence[Mapping[str, Any]] = ()

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def ways(scenario: Scenario, gpus: int) -> list[Scenario]:
    """The step on every mesh of so many GPUs that it can have, with as many rows for an update where they can."""
    found: dict[tuple, Scenario] = {}
    for parallel in _meshes(scenario, gpus):
        rows = scenario.gradient_accumulation * scenario.parallel.rows_at_once
        at_once = gpus // (
            parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1)
        )
        other = whole_loss(scenario) if parallel["strategy"] == DIVIDED else {}
        try:
            step = scenario.changed(
                parallel=parallel, gradient_accumulation=max(rows // at_once, 1), **other
            )
        except UserError:  # what divides a step is checked in one place alone
            continue
        found.setdefault(tuple(asdict(step.parallel).items()), step)
    return list(found.values())


def _meshes(scenario: Scenario, gpus: int) -> Iterator[dict[str, Any]]:
    if gpus == 1:
        yield {"strategy": NONE, "gpus": 1}
        return
    kept = asdict(scenario.parallel)
    names = ("reshard_after_forward", "reduce_in_fp32", "offload")
    plain = {name: kept[name] for name in names} if scenario.parallel.sharded else {}
    divisors = [count for count in range(1, gpus + 1) if gpus % count == 0]
    yield {"strategy": REPLICATED, "gpus": gpus}
    for replicate in divisors:
        for axis in ("tensor", "context", "expert"):
            for count in divisors:
                yield {
                    "strategy": DIVIDED,
                    "gpus": gpus,
                    "replicate": replicate,
                    axis: count,
                    **plain,
                }
        for count in divisors:
            yield {
                "strategy": DIVIDED,
                "gpus": gpus,
                "replicate": replicate,
                "tensor": count,
                **_ALONG_ROWS,
                **plain,
            }
    for tensor in divisors:
        for more in ({}, _ALONG_ROWS):
            yield {
                "strategy": NONE,
                "gpus": gpus,
                "tensor": tensor,
                "pipeline": gpus // tensor,
                **more,
            }
        yield {"strategy": DIVIDED, "gpus": gpus, "tensor": tensor, "expert": gpus}


class Order:
    """Rough figures of a step on meshes of one GPU's kind, to say which are worth tracing."""

    def __init__(self, scenario: Scenario, gpu: Gpu) -> None:
        self._gpu, self._speed = gpu, speed_of(gpu.name)
        self._parameters, self._exact = _parameters(scenario)

    def least_bytes(self, step: Scenario) -> int:
        """What some GPU holds in any case: the mean share of weights, gradients and states; 0: it is not known.

        At the end of the backward pass all gradients are there, and from the second step on the states. What is whole
        on each GPU, activations and logits come on top.
        """
        if (
            not self._exact
            or step.method == "qlora"
            or step.parallel.offload != "none"
            or step.parallel.zero_stage
        ):
            return 0
        width, mesh = 4 if step.weight_precision == "fp32" else 2, step.parallel
        each = 2 + _STATES.get(step.optimizer, 0) if step.method == "full" else 1
        copies = mesh.gpus if mesh.kind.replicates else mesh.replicate
        return self._parameters * each * width * copies // mesh.gpus

    def rules_out(self, step: Scenario) -> bool:
        """Whether a step can't fit, however it runs."""
        return self.least_bytes(step) > self._gpu.usable_bytes

    def required_bytes(self, step: Scenario) -> float:
        """Roughly what a GPU holds: its part of the model with gradients and states, a gathered layer, activations."""
        mesh, width = step.parallel, 4 if step.weight_precision == "fp32" else 2
        layers, hidden = step.size("num_hidden_layers") or 1, step.size("hidden_size") or 1
        matrices = mesh.tensor * mesh.pipeline
        among = matrices * (mesh.shard * mesh.context if mesh.kind.divides else 1)
        each = {"full": 4 * width, "lora": width, "qlora": 0.6}[
            step.method
        ]  # weights, gradients and two moments
        total = self._parameters * each / among
        if mesh.kind.divides:
            total += 2 * self._parameters / layers * width / mesh.tensor
        tokens = step.tokens / mesh.context
        in_flight = min(mesh.pipeline, step.gradient_accumulation)
        of_layer = tokens * hidden * width * _LAYER_TENSORS / mesh.tensor
        kept = tokens * hidden * width / (mesh.tensor if mesh.sequence_parallel else 1)
        kept = kept if step.gradient_checkpointing else of_layer
        total += kept * layers / mesh.pipeline * in_flight + of_layer
        total += (
            tokens
            * (step.size("vocab_size") or 0)
            * (width + 8)
            / (mesh.tensor if mesh.loss_parallel else 1)
        )
        if mesh.context > 1:  # the mask that transformers makes where positions jump
            total += step.micro_batch * (step.sequence_length / mesh.context) ** 2
        return total

    def seconds_per_token(self, step: Scenario) -> float:
        """What a token takes, products and exchanges one after the other."""
        mesh, width = step.parallel, 4 if step.weight_precision == "fp32" else 2
        layers, hidden = step.size("num_hidden_layers") or 1, step.size("hidden_size") or 1
        flops, link = _rates(self._speed)
        tokens = step.tokens * mesh.rows_at_once
        products = 6 * self._parameters * tokens / mesh.gpus / (flops * _REACHED)
        sent = 0.0
        if mesh.kind.divides:
            sent += 3 * self._parameters * width / (mesh.tensor * mesh.pipeline)
        if mesh.kind.replicates or mesh.replicate > 1:
            sent += (
                2
                * self._parameters
                * width
                / (mesh.shard if mesh.kind.divides else 1)
                / mesh.tensor
            )
        if mesh.tensor > 1:  # four all-reduces of each layer's tokens, and all logits
            sent += 8 * layers / mesh.pipeline * step.tokens * hidden * width
            sent += (
                0 if mesh.loss_parallel else step.tokens * (step.size("vocab_size") or 0) * width
            )
        if mesh.context > 1:
            sent += 6 * layers * step.tokens / mesh.context * hidden * width
        if mesh.expert > 1:
            sent += 8 * layers * step.tokens * hidden * width
        seconds = products + sent / link
        if mesh.pipeline > 1:
            seconds *= 1 + (mesh.pipeline - 1) / step.gradient_accumulation
        return seconds / tokens

    def sorted(self, steps: Sequence[Scenario]) -> list[Scenario]:
        """Those that seem to fit, the fastest first; then the others, the smallest first."""
        usable = self._gpu.usable_bytes

        def key(step: Scenario) -> tuple[bool, float]:
            needs = self.required_bytes(step)
            return needs > usable, needs if needs > usable else self.seconds_per_token(step)

        return sorted(steps, key=key)


def _rates(speed: Speed | None) -> tuple[float, float]:
    return (speed.peak_flops["bfloat16"], speed.link_bytes_per_second) if speed else (_FLOPS, _LINK)


def _parameters(scenario: Scenario) -> tuple[int, bool]:
    """Parameters of the model, and whether they are exact; roughly from its width and layers where no rule knows it."""
    try:
        return describe(scenario.model).parameter_counts()["total"], True
    except NotDescribed:
        hidden, layers = scenario.size("hidden_size") or 1, scenario.size("num_hidden_layers") or 1
        experts = next((scenario.size(name) for name in EXPERT_COUNTS if scenario.size(name)), 1)
        inner = (
            scenario.size("moe_intermediate_size")
            or scenario.size("intermediate_size")
            or 4 * hidden
        )
        words = scenario.size("vocab_size") or 0
        return layers * (4 * hidden**2 + 3 * hidden * inner * experts) + 2 * hidden * words, False


def divide(
    scenario: Scenario,
    gpu: Gpu,
    watch: Watch | None = None,
    shown: Callable[[Division], None] | None = None,
) -> dict[str, Any]:
    """The best ways to divide a step among the GPUs that it has.

    The asked way is traced first, and ``shown`` is called with it; then the best of the others by the rough order,
    until :data:`TRACED` fit or :data:`MOST` were traced. A pipeline's stages are tried with other numbers of layers.

    Returns ``asked``, a :class:`Division` as a mapping; ``divisions``, all that were traced, those that fit first, the
    fastest of them before the others; ``considered``, how many meshes the step can have; ``ruled_out``, with ``way``
    and ``at_least_bytes`` that a GPU holds in any case; ``not_traced``, with ``way`` and ``rough_bytes``; ``refused``,
    ways that the installed libraries can't run; ``gpus``.
    """
    order = Order(scenario, gpu)
    steps = order.sorted(ways(scenario, scenario.parallel.gpus))
    others = [step for step in steps if step.parallel != scenario.parallel]
    possible = [step for step in others if not order.rules_out(step)]
    search = _DivisionSearch(gpu, watch, order)
    asked = search.trace(scenario, left=min(len(possible), TRACED - 1))
    if asked and shown:
        shown(asked)
    left = search.best(possible)
    return {
        "asked": asked and asked.to_mapping(),
        "divisions": [one.to_mapping() for one in sorted(search.found, key=_rank)],
        "considered": len(steps),
        "ruled_out": [
            {"way": _named(step), "at_least_bytes": order.least_bytes(step)}
            for step in others
            if order.rules_out(step)
        ],
        "not_traced": [
            {"way": _named(step), "rough_bytes": round(order.required_bytes(step))} for step in left
        ],
        "refused": search.refused,
        "gpus": scenario.parallel.gpus,
    }


def fewest(scenario: Scenario, gpu: Gpu, watch: Watch | None = None) -> dict[str, Any]:
    """The least number of GPUs, of :data:`COUNTS`, that hold a step in some way, and that way.

    Returns ``gpus`` and ``division`` as a mapping, both None where none was found; ``tried``, the divisions that were
    traced and don't fit; ``counts``, the numbers that were looked at; ``not_traced``, on fewer GPUs, as :func:`divide`
    gives them; ``not_sharded``, why FSDP2 alone can't take the step ("": it can).
    """
    order, search, counts, skipped = Order(scenario, gpu), _DivisionSearch(gpu, watch), [], []
    found = None
    for count in COUNTS:
        counts.append(count)
        steps = [step for step in ways(scenario, count) if not order.rules_out(step)]
        left = search.several(
            sorted(steps, key=order.required_bytes), TRACED_OF_COUNT, until_one_fits=True
        )
        found = next((one for one in search.found if one.fits), None)
        if found:
            break
        skipped += [
            {
                "way": f"{count} GPUs, {_named(step)}",
                "rough_bytes": round(order.required_bytes(step)),
            }
            for step in left
        ]
    return {
        "gpus": found and found.parallel["gpus"],
        "division": found and found.to_mapping(),
        "tried": [one.to_mapping() for one in search.found if one is not found],
        "counts": counts,
        "not_traced": skipped,
        "not_sharded": _not_sharded(scenario),
    }


def _not_sharded(scenario: Scenario) -> str:
    try:
        scenario.changed(parallel={"strategy": DIVIDED, "gpus": 2}, **whole_loss(scenario))
    except UserError as error:
        return error.problem
    return ""


def fitting(
    scenario: Scenario, gpu: Gpu, count: int, allowed: Callable[[Scenario], bool]
) -> Division | None:
    """The first way to divide a step among so many GPUs that fits, of the best few by the rough order.

    ``allowed`` says of a way whether it may be traced.
    """
    order, search = Order(scenario, gpu), _DivisionSearch(gpu)
    steps = [
        step
        for step in ways(scenario, count)
        if step.parallel != scenario.parallel and not order.rules_out(step)
    ]
    search.several(
        list(filter(allowed, order.sorted(steps))), TRACED_TO_SUGGEST, until_one_fits=True
    )
    return next((one for one in search.found if one.fits), None)


class _DivisionSearch:
    """Ways that are traced one after the other.

    Attributes
    ----------
    found
        The divisions so far.
    refused
        Ways that the installed libraries can't run.
    """

    def __init__(self, gpu: Gpu, watch: Watch | None = None, order: Order | None = None) -> None:
        self._gpu, self._watch, self._order = gpu, watch, order
        self._stages: dict[Any, Any] = {}  # of pipelines, which differ in some of them alone
        self._errors: list[float] = []  # traced by roughly estimated bytes
        self._fastest = float("inf")  # roughly, of those that fit: seconds a token
        self._traced = 0
        self.found: list[Division] = []
        self.refused: list[str] = []

    def trace(self, step: Scenario, left: int = 0) -> Division | None:
        """A step's division; None where the installed libraries can't run it. ``left``: as many come behind it."""
        if self._watch:
            self._watch(f"{step.parallel.gpus} GPUs, {_named(step)}", left, self.found)
        traced = _traced(step, self._gpu, self._stages)
        if traced is None:
            self.refused.append(_named(step))
            return None
        division, ranks = traced
        self.found.append(division)
        self._traced += 1
        if self._order:
            self._errors.append(division.required_bytes / self._order.required_bytes(step))
            if division.fits:
                self._fastest = min(self._fastest, self._order.seconds_per_token(step))
        even = None
        if step.parallel.pipeline > 1 and step.parallel.stage_layers is None:
            even = evened(
                step, ranks, most_bytes=None if division.fits else NEAR * self._gpu.usable_bytes
            )
        if (
            even
            and (better := _traced(even, self._gpu, self._stages))
            and better[0].required_bytes < division.required_bytes
        ):
            self.found.append(better[0])
        return division

    def best(self, steps: Sequence[Scenario]) -> list[Scenario]:
        """Trace the most promising steps; returns those that were not."""
        left = list(steps)
        while left and self._traced < MOST and (step := self._next(left)):
            left.remove(step)
            more = max(TRACED - sum(bool(one.fits) for one in self.found), 1)
            self.trace(step, min(len(left), more - 1, MOST - self._traced - 1))
        return left

    def _next(self, left: Sequence[Scenario]) -> Scenario | None:
        """The step that is worth tracing next; ``left`` are sorted by the rough order."""
        order, fit = self._order, sum(bool(one.fits) for one in self.found)
        most = self._gpu.usable_bytes / min(self._errors, default=1.0)
        small = [step for step in left if order.required_bytes(step) <= most]
        if fit >= TRACED:
            first = min(small, key=order.seconds_per_token, default=None)
            return (
                first
                if first is not None and order.seconds_per_token(first) < self._fastest
                else None
            )
        if small and (fit or self._traced < TRACED):
            return small[0]
        return min(left, key=order.required_bytes)

    def several(
        self, steps: Sequence[Scenario], most: int, *, until_one_fits: bool = False
    ) -> list[Scenario]:
        """Trace the first steps; returns those that were not."""
        for number, step in enumerate(steps[:most]):
            self.trace(step, min(len(steps), most) - number - 1)
            if until_one_fits and any(one.fits for one in self.found):
                return list(steps[number + 1 :])
        return list(steps[most:])


def evened(
    step: Scenario, ranks: Sequence[Mapping[str, Any]], most_bytes: float | None = None
) -> Scenario | None:
    """A pipeline's step with layers moved from the stage that needs most; None: no layer moves.

    ``ranks``: of the even step's trace, a row for each stage. ``most_bytes``: None too where a stage would need more.
    What a layer takes is roughly its share of the parameters, with gradients and states, and its inputs of the
    micro-batches in flight. So the answer is for tracing.
    """
    mesh, width = step.parallel, 4 if step.weight_precision == "fp32" else 2
    layers = step.size("num_hidden_layers")
    if mesh.stages != mesh.pipeline or len(ranks) != mesh.stages:
        return None
    ends = 2 * (step.size("vocab_size") or 0) * (step.size("hidden_size") or 1)
    kept = {"full": 4 * width, "lora": width, "qlora": 0.6}[step.method]
    of_weights = (_parameters(step)[0] - ends) / layers * kept / mesh.tensor
    of_inputs = step.tokens * (step.size("hidden_size") or 1) * width
    needs = [float(row["required_bytes"]) for row in ranks]
    each = [
        of_weights + of_inputs * min(mesh.stages - stage, step.gradient_accumulation)
        for stage in range(len(needs))
    ]
    given = list(mesh.layers_of_stages(layers))
    while True:
        most, least = needs.index(max(needs)), needs.index(min(needs))
        if given[most] == 1 or needs[least] + each[least] >= needs[most]:
            break
        for stage, by in ((most, -1), (least, 1)):
            given[stage] += by
            needs[stage] += by * each[stage]
    if tuple(given) == mesh.layers_of_stages(layers) or (most_bytes and max(needs) > most_bytes):
        return None
    return step.changed(parallel={**asdict(mesh), "stage_layers": given})


def _named(step: Scenario) -> str:
    return say_way(asdict(step.parallel)) or "one GPU"


def _rank(one: Division) -> tuple[bool, float, int]:
    """Fitting ones first, by time; the others by what they need."""
    if not one.fits:
        return True, float(one.required_bytes), 0
    return False, -(one.tokens_per_second or 0.0), -(one.headroom_bytes or 0)


def _traced(
    step: Scenario, gpu: Gpu, stages: dict[Any, Any] | None = None
) -> tuple[Division, list[dict[str, Any]]] | None:
    """A step's division on a GPU, and a row for each kind of rank; None where the installed libraries can't run it.

    ``stages``: where traces of pipelines' stages are kept.
    """
    from dryfit.tracing.imports import import_quietly

    import_quietly(step)  # before the trace's module, which imports transformers whole
    from dryfit.tracing.trace import trace

    try:
        answer = trace(
            step,
            capability=gpu.capability,
            timeline=False,
            timed_on={gpu.name: speed_of(gpu.name)},
            sizes=[gpu.usable_bytes],
            stages=stages,
        )
    except UserError:
        return None
    judged = verdict(answer, gpu, Process.of(step))
    rows = answer.get("ranks") or [{"place": "", "required_bytes": 0}]
    time = (answer.get("times") or {}).get(gpu.name) or {}
    division = Division(
        way=_named(step),
        parallel=asdict(step.parallel),
        gradient_accumulation=step.gradient_accumulation,
        loss=step.loss,
        **judged.fields(),
        peak_allocated_bytes=answer["peak_allocated_bytes"],
        required_bytes=answer["required_bytes"],
        place=max(rows, key=lambda row: row["required_bytes"] or 0)["place"],
        seconds_per_step=time.get("seconds_per_step"),
        tokens_per_second=time.get("tokens_per_second"),
        exchanges=time.get("exchanges", ()),
    )
    return division, rows


def written(division: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a division's ``parallel`` that have to be written."""
    own = Parallel(**division["parallel"]).written
    return {name: own[name] for name in ("strategy", "gpus", *AXES, *own) if name in own}
