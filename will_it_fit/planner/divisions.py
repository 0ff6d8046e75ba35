"""How to divide a step among GPUs: the meshes that it can have, the best of them traced, ranked by time and room.

A rough estimate orders all meshes, since each takes seconds to trace; it decides which are traced, and no verdict. What
is shown as fitting has been traced on that very GPU, all of its kinds of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from will_it_fit.analytic.decoder import NotDescribed
from will_it_fit.analytic.setting import describe
from will_it_fit.cards.gpus import Gpu, verdict
from will_it_fit.common.errors import UserError
from will_it_fit.hours.step_time import Speed, speed_of
from will_it_fit.scenario.description import say_way
from will_it_fit.scenario.model import EXPERT_COUNTS
from will_it_fit.scenario.nested_fields import Parallel
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.scenario.strategies import AXES, DIVIDED, NONE, REPLICATED

TRACED = 5
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of GPUs that `fewest` looks at: whole machines beyond eight
NEAR = 1.3  # estimates that are so many times too large may still fit: they are traced
# For the order alone, where the catalogue has no speed: an H100's dense bf16 products and its NVLink, a second.
_FLOPS, _LINK = 989e12, 450e9
_REACHED = 0.5  # of the products' peak
_LAYER_TENSORS = 30  # of a token's width, that a layer holds while it runs
Watch = Callable[[str, int, Sequence[Any]], None]


@dataclass(frozen=True)
class Division:
    """A way to divide a step, traced.

    Attributes
    ----------
    way
        In words, ``fsdp2 x tensor 2``.
    parallel, gradient_accumulation
        What to write in a scenario; as many rows make an update as before, where they can.
    peak_allocated_bytes, required_bytes, headroom_bytes
        Of the GPU that needs most, ``place`` among the others ("": all are alike).
    seconds_per_step, tokens_per_second
        None where the GPU's speed is not known; tokens of all GPUs together.
    """

    way: str
    parallel: Mapping[str, Any]
    gradient_accumulation: int
    fits: bool | None
    headroom_bytes: int | None
    peak_allocated_bytes: int
    required_bytes: int
    place: str
    seconds_per_step: float | None
    tokens_per_second: float | None

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def ways(scenario: Scenario, gpus: int) -> list[Scenario]:
    """The step on every mesh of so many GPUs that it can have, with as many rows for an update where they can."""
    found: dict[tuple, Scenario] = {}
    for parallel in _meshes(scenario, gpus):
        rows = scenario.gradient_accumulation * scenario.parallel.rows_at_once
        at_once = gpus // (parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1))
        try:
            step = scenario.changed(parallel=parallel, gradient_accumulation=max(rows // at_once, 1))
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
                yield {"strategy": DIVIDED, "gpus": gpus, "replicate": replicate, axis: count, **plain}
    for tensor in divisors:
        yield {"strategy": NONE, "gpus": gpus, "tensor": tensor, "pipeline": gpus // tensor}
        yield {"strategy": DIVIDED, "gpus": gpus, "tensor": tensor, "expert": gpus}


class Order:
    """Rough figures of a step on meshes of one GPU's kind, to say which are worth tracing."""

    def __init__(self, scenario: Scenario, gpu: Gpu) -> None:
        self._gpu, self._speed = gpu, speed_of(gpu.name)
        self._parameters = _parameters(scenario)

    def required_bytes(self, step: Scenario) -> float:
        """What a GPU holds: its part of the model, gradients and states, a gathered layer, activations, logits."""
        mesh, width = step.parallel, 4 if step.weight_precision == "fp32" else 2
        layers, hidden = step.size("num_hidden_layers") or 1, step.size("hidden_size") or 1
        matrices = mesh.tensor * mesh.pipeline
        among = matrices * (mesh.shard * mesh.context if mesh.kind.divides else 1)
        each = {"full": 4 * width, "lora": width, "qlora": 0.6}[step.method]  # weights, gradients and two moments
        total = self._parameters * each / among
        if mesh.kind.divides:
            total += 2 * self._parameters / layers * width / mesh.tensor
        tokens = step.tokens / mesh.context
        in_flight = min(mesh.pipeline, step.gradient_accumulation)
        of_layer = tokens * hidden * width * _LAYER_TENSORS / mesh.tensor
        kept = tokens * hidden * width if step.gradient_checkpointing else of_layer
        total += kept * layers / mesh.pipeline * in_flight + of_layer
        total += tokens * (step.size("vocab_size") or 0) * (width + 8)
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
            sent += 2 * self._parameters * width / (mesh.shard if mesh.kind.divides else 1) / mesh.tensor
        if mesh.tensor > 1:  # four all-reduces of each layer's tokens
            sent += 8 * layers / mesh.pipeline * step.tokens * hidden * width
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


def _parameters(scenario: Scenario) -> int:
    """Parameters of the model; of an architecture without a description roughly, from its width and layers."""
    try:
        return describe(scenario.model).parameter_counts()["total"]
    except NotDescribed:
        hidden, layers = scenario.size("hidden_size") or 1, scenario.size("num_hidden_layers") or 1
        experts = next((scenario.size(name) for name in EXPERT_COUNTS if scenario.size(name)), 1)
        inner = scenario.size("moe_intermediate_size") or scenario.size("intermediate_size") or 4 * hidden
        return layers * (4 * hidden**2 + 3 * hidden * inner * experts) + 2 * hidden * (scenario.size("vocab_size") or 0)


def divide(
    scenario: Scenario, gpu: Gpu, watch: Watch | None = None, shown: Callable[[Division], None] | None = None
) -> dict[str, Any]:
    """The best ways to divide a step among the GPUs that it has.

    The asked way is traced first, and ``shown`` is called with it; then the best of the others by the rough order.

    Returns
    -------
    dict
        ``asked``, a :class:`Division` as a mapping; ``divisions``, all that were traced, those that fit first, the
        fastest of them before the others; ``considered``, how many meshes the step can have; ``gpus``.
    """
    gpus = scenario.parallel.gpus
    steps = Order(scenario, gpu).sorted(ways(scenario, gpus))
    others = [step for step in steps if step.parallel != scenario.parallel][: TRACED - 1]
    found: list[Division] = []
    for left, step in zip(range(len(others), -1, -1), [scenario, *others], strict=True):
        if watch:
            watch(say_way(asdict(step.parallel)), left, found)
        found += _traced(step, gpu)
        if step is scenario and found and shown:
            shown(found[0])
    return {
        "asked": next((one.to_mapping() for one in found if one.parallel == asdict(scenario.parallel)), None),
        "divisions": [one.to_mapping() for one in sorted(found, key=_rank)],
        "considered": len(steps),
        "gpus": gpus,
    }


def fewest(scenario: Scenario, gpu: Gpu, watch: Watch | None = None) -> dict[str, Any]:
    """The least number of GPUs, of :data:`COUNTS`, that hold a step in some way, and that way.

    Returns
    -------
    dict
        ``gpus`` and ``division`` as a mapping, both None where none was found; ``tried``, the divisions that were
        traced and don't fit; ``counts``, the numbers that were looked at.
    """
    order, tried, counts = Order(scenario, gpu), [], []
    for count in COUNTS:
        counts.append(count)
        steps = sorted(ways(scenario, count), key=order.required_bytes)
        near = [step for step in steps if order.required_bytes(step) <= NEAR * gpu.usable_bytes][:2]
        for step in near:
            if watch:
                watch(f"{count} GPUs, {say_way(asdict(step.parallel)) or 'whole'}", 0, tried)
            for one in _traced(step, gpu):
                if one.fits:
                    return {"gpus": count, "division": one.to_mapping(), "tried": tried, "counts": counts}
                tried.append(one.to_mapping())
    return {"gpus": None, "division": None, "tried": tried, "counts": counts}


def _rank(one: Division) -> tuple[bool, float, int]:
    """Fitting ones first, by time; the others by what they need."""
    if not one.fits:
        return True, float(one.required_bytes), 0
    return False, -(one.tokens_per_second or 0.0), -(one.headroom_bytes or 0)


def _traced(step: Scenario, gpu: Gpu) -> list[Division]:
    """A step's division on a GPU; none where the installed libraries can't run it."""
    from will_it_fit.tracing.imports import import_quietly

    import_quietly(step)  # before the trace's module, which imports transformers whole
    from will_it_fit.tracing.trace import trace

    try:
        answer = trace(
            step,
            capability=gpu.capability,
            timeline=False,
            timed_on={gpu.name: speed_of(gpu.name)},
            sizes=[gpu.usable_bytes],
        )
    except UserError:
        return []
    fits, headroom = verdict(answer, gpu)[:2]
    rows = answer.get("ranks") or [{"place": "", "required_bytes": 0}]
    time = (answer.get("times") or {}).get(gpu.name) or {}
    return [
        Division(
            way=say_way(asdict(step.parallel)) or "one GPU",
            parallel=asdict(step.parallel),
            gradient_accumulation=step.gradient_accumulation,
            fits=fits,
            headroom_bytes=headroom,
            peak_allocated_bytes=answer["peak_allocated_bytes"],
            required_bytes=answer["required_bytes"],
            place=max(rows, key=lambda row: row["required_bytes"] or 0)["place"],
            seconds_per_step=time.get("seconds_per_step"),
            tokens_per_second=time.get("tokens_per_second"),
        )
    ]


def written(division: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a division's ``parallel`` that have to be written."""
    own = Parallel(**division["parallel"]).written
    return {name: own[name] for name in ("strategy", "gpus", *AXES, *own) if name in own}
