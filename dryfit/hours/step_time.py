"""How long a step takes on a GPU that is not there: the operators of the traced step, timed on two timelines.

The engine says what each kernel costs (:mod:`dryfit.engine.costs`); a GPU's datasheet and a few shares of it say
how long that takes. A kernel takes the longer of computing and moving bytes. The CPU launches kernels one after the
other and runs ahead of the GPU; each stream of the GPU runs its own in order, and streams wait for each other where the
program makes them. What the loop around the step takes, such as loading data, is left out; a trainer's own overhead of
a step is one constant.

A product of matrices is computed in tiles: the last wave of tiles leaves multiprocessors idle, and each tile begins
with a prologue, so small and narrow products reach less than large ones. Sizes of tiles are those of CUTLASS's default
kernels (``docs/cutlass_3x`` there, "efficient GEMM").

What constants were fitted to, and how far off the model is on other rows: ``python -m validation.times``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

from dryfit.cards.gpus import CATALOGUE, Gpu, find
from dryfit.common.files import read_yaml
from dryfit.evidence.nearest import TimeShares, time_shares
from dryfit.hours.cpu import Cpu
from dryfit.hours.links import Links, collective_seconds, exchanges
from dryfit.scenario.scenario import Scenario

if TYPE_CHECKING:
    from dryfit.engine.costs import CostRecorder, Operator

NO_SPEED = (
    "not known: config/gpus.yaml has no speed of this GPU. Name a GPU that it knows, or add under `speeds`: NAME:"
    " {bf16_tflops: , fp16_tflops: , fp32_tflops: , memory_gb_s: , cache_mb: , link_gb_s: , multiprocessors: , watts: }"
)
# Rows and columns of a tile, and the share of the best rate that it reaches.
_TILES = (
    (256, 128, 1.0),
    (128, 128, 0.95),
    (128, 64, 0.75),
    (64, 64, 0.55),
    (128, 32, 0.95),
    (128, 16, 0.95),
)
_SPLIT_INNER = 256  # the inner dimension is split among idle multiprocessors down to this
_MANY_WAVES = 8  # from here on the last wave's idle part is spread by the scheduler
# What a step is limited by, in words.
LIMITS = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "memory bandwidth",
    "collectives": "the link between GPUs",
    "cpu": "the CPU, which launches kernels too slowly for the GPU",
}


@dataclass(frozen=True)
class Speed:
    """What a GPU can do, and what of it kernels reach."""

    # Dense floating-point operations a second by dtype, tensor cores where they are used; fp32 without TF32, which is
    # PyTorch's default.
    peak_flops: Mapping[str, float]
    # Of the GPU's memory; of its link to other GPUs of its node, one way.
    memory_bytes_per_second: float
    link_bytes_per_second: float
    cache_bytes: float  # of the last level that all multiprocessors share
    multiprocessors: int  # how many tiles of a product are computed at once
    board_watts: float  # the most that the board takes
    emulated: frozenset[str]  # dtypes that the GPU has no products of: they run at the rate of fp32
    # Shares of those figures; `efficient_attention` multiplies those of attention for the memory-efficient kernel.
    product: float
    memory: float
    attention_forward: float
    attention_backward: float
    efficient_attention: float
    link: float
    cached: float  # how many times faster memory is for a kernel whose operands fit into the cache
    contention: float  # share of a collective's time that it costs the kernels beside it
    prologue: (
        float  # what a tile takes before and after its inner loop, in steps of the inner dimension
    )
    # The CPU's time to launch a kernel, or a collective.
    launch_seconds: float
    collective_seconds: float
    shortest_kernel_seconds: float  # what any kernel takes on the GPU
    basis: str  # `measured`: on rows of this GPU; `measured: ...` of its architecture; `assumed`
    # What steps of this kind took on this GPU, as shares of the prediction; None where too few were measured.
    measured: TimeShares | None = None
    gpus_per_node: int = 8  # how many GPUs share a node
    link_to_each: bool = False
    network_bytes_per_second: float = 12.5e9  # what each of them sends to other nodes, one way

    @property
    def links(self) -> Links:
        """What is reached of the links to other GPUs: one share inside a node and between nodes."""
        reached = self.link_bytes_per_second * self.link, self.network_bytes_per_second * self.link
        return Links(*reached, self.gpus_per_node, self.link_to_each)


def speed_of(name: str, scenario: Scenario | None = None) -> Speed | None:
    """The speed of a GPU of config/gpus.yaml; None where the file has no peaks for it.

    ``scenario``: the step that is timed, for what was measured of its kind; None: a step of any kind on one GPU.
    """
    speed = _speed(name)
    return speed and replace(speed, measured=time_shares(name, scenario))


def node_of(name: str | None) -> Mapping[str, Any]:
    """How a card's node is built, or is assumed to be: ``gpus`` in it, ``network_gb_s`` of each to other nodes."""
    nodes = read_yaml(CATALOGUE)["nodes"]
    return nodes.get(name) or nodes["assumed"]


@cache
def _speed(name: str) -> Speed | None:
    content = read_yaml(CATALOGUE)
    peaks, shares = content["speeds"].get(name), content["speed_shares"]
    node = node_of(name)
    if peaks is None:
        return None
    half = peaks.get("bf16_tflops")
    flops = {
        "float16": peaks["fp16_tflops"],
        "bfloat16": half or peaks["fp32_tflops"],
        "float32": peaks["fp32_tflops"],
    }
    flops["int8"] = flops["float16"]  # at least: no GPU multiplies bytes more slowly
    if (find(name).capability or (0, 0)) >= (
        8,
        9,
    ):  # NVIDIA's datasheets of Ada, Hopper and Blackwell: twice as fast
        flops |= dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), 2 * flops["float16"])
    return Speed(
        peak_flops={dtype: value * 1e12 for dtype, value in flops.items()},
        memory_bytes_per_second=peaks["memory_gb_s"] * 1e9,
        link_bytes_per_second=peaks["link_gb_s"] * 1e9,
        cache_bytes=peaks["cache_mb"] * 1e6,
        multiprocessors=peaks["multiprocessors"],
        board_watts=peaks["watts"],
        emulated=frozenset() if half else frozenset({"bfloat16"}),
        gpus_per_node=node["gpus"],
        link_to_each=peaks.get("link_to_each", False),
        network_bytes_per_second=node["network_gb_s"] * 1e9,
        **{**shares["assumed"], **shares.get(name, {})},
    )


def speeds(gpus: Iterable[Gpu], scenario: Scenario | None = None) -> dict[str, Speed | None]:
    """The speed of each GPU by its name."""
    return {gpu.name: speed_of(gpu.name, scenario) for gpu in gpus}


@dataclass(frozen=True)
class StepTime:
    """How long a step takes."""

    seconds_per_step: float  # from one step's beginning to the next one's
    # Lowest and highest, as measured steps of the kind lay beside their predictions on the GPU (`time_shares`); None
    # where too few were measured on it.
    range: tuple[float, float] | None
    limited_by: str  # what most of the time goes into, in words
    # Of the GPU's time by what limits each kernel, and `cpu`, when the GPU waits for launches; they add up to 1.
    shares: Mapping[str, float]
    tokens_per_second: float | None  # on all GPUs together
    basis: str  # where the GPU's constants come from, in words
    warnings: Sequence[str]  # what makes this step slow on this GPU, and what to write instead
    # Of the step's first micro-batch, without the update; of a step with one micro-batch the whole step.
    seconds_per_micro_batch: float
    # What this GPU exchanges in the step, by the group that talks (`exchanges`).
    exchanges: Sequence[Mapping[str, Any]] = ()

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def in_pipeline(self, gpus: int, stages: int, micro_batches: int) -> StepTime:
        """The step of a GPU of a pipeline, which waits for the others while the pipeline fills and empties.

        By (gpus - 1) / (micro-batches x stages of a GPU) of its own time: Narayanan et al. 2021, arXiv:2104.04473,
        section 2.2. The zero-bubble schedule waits less.
        """
        longer = 1 + (gpus - 1) / (micro_batches * (stages // gpus))
        return replace(
            self,
            seconds_per_step=self.seconds_per_step * longer,
            range=self.range and (self.range[0] * longer, self.range[1] * longer),
            tokens_per_second=self.tokens_per_second and self.tokens_per_second / longer,
            basis=f"{self.basis}; with a pipeline's wait",
            seconds_per_micro_batch=self.seconds_per_micro_batch * longer,
        )


def step_time(
    costs: CostRecorder,
    speed: Speed | Cpu | None,
    *,
    tokens: int | None = None,
    micro_batches_left_out: int = 0,
) -> StepTime | None:
    """How long a traced step takes on a GPU; None without its speed.

    Parameters
    ----------
    costs
        Of the step's trace, with as many GPUs as it has.
    speed
        Of the GPU (:func:`speed_of`), or of this machine's CPU.
    tokens
        That the step learns from on all GPUs together.
    micro_batches_left_out
        A trace takes only the first few micro-batches of a step, since memory repeats; so many more are alike.
    """
    if speed is None:
        return None
    words = LIMITS | Cpu.limits if isinstance(speed, Cpu) else LIMITS
    seconds, busy = simulate(costs, speed)
    one, micro_batch = costs.first_micro_batch(), seconds
    if one is not None:
        micro_batch, busy_more = simulate(one, speed)
        seconds += micro_batches_left_out * micro_batch
        busy = {
            kind: value + micro_batches_left_out * busy_more[kind] for kind, value in busy.items()
        }
    total = sum(busy.values())
    shares = {kind: value / max(seconds, total) for kind, value in busy.items()}
    shares["cpu"] = max(0.0, 1 - sum(shares.values()))
    exchanged = not isinstance(speed, Cpu) and any(operator.group for operator in costs.operators)
    return StepTime(
        seconds_per_step=seconds,
        range=speed.measured and (seconds * speed.measured.low, seconds * speed.measured.high),
        limited_by=words[max(shares, key=lambda kind: shares[kind])],
        shares={kind: round(value, 4) for kind, value in sorted(shares.items())},
        tokens_per_second=tokens / seconds if tokens else None,
        basis=speed.basis,
        warnings=list(_slow_dtypes(costs, speed)),
        seconds_per_micro_batch=micro_batch,
        exchanges=exchanges(costs, speed.links, one, micro_batches_left_out) if exchanged else [],
    )


def _slow_dtypes(costs: CostRecorder, speed: Speed) -> Iterator[str]:
    computed = {
        operator.dtype for operator in costs.operators if operator.kind in ("products", "attention")
    }
    for dtype in sorted(computed & speed.emulated):
        slow, fast = (speed.peak_flops[name] / 1e12 for name in (dtype, "float16"))
        yield (
            f"this GPU has no {dtype} products: they run at the rate of fp32, {slow:g} TFLOPS instead of the"
            f" {fast:g} of fp16. Write fp16 for bf16 in precision and autocast"
        )


def simulate(costs: CostRecorder, speed: Speed | Cpu) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and the GPU's seconds on the computing stream by what limits each kernel, or is waited for."""
    if isinstance(speed, Cpu):
        return speed.simulate(costs)
    timed = [kernel_time(operator, speed) for operator in costs.operators]
    launch = [
        speed.collective_seconds if operator.kind == "collectives" else speed.launch_seconds
        for operator in costs.operators
    ]
    busy = dict.fromkeys(("products", "attention", "memory", "collectives"), 0.0)
    cpu, free = 0.0, {0: 0.0}
    ended: dict[int, list[tuple[int, float]]] = {}  # by stream: launch and the time of its end
    waits = list(costs.waits)  # in order already
    for number, (index, stream) in enumerate(zip(costs.calls, costs.streams, strict=True)):
        while waits and waits[0][0] <= number:
            _, waiter, other, launches = waits.pop(0)
            end = next(
                (end for launched, end in reversed(ended.get(other, ())) if launched < launches),
                0.0,
            )
            if waiter is None:
                cpu = max(cpu, end)
            else:
                if waiter == 0:  # what others send is not there yet
                    busy["collectives"] += max(end - max(cpu, free[0]), 0.0)
                free[waiter] = max(free.get(waiter, 0.0), end)
        seconds, limit = timed[index]
        cpu += launch[index]
        free[stream] = max(cpu, free.get(stream, 0.0)) + seconds
        ended.setdefault(stream, []).append((number, free[stream]))
        if (
            limit == "collectives" and stream != 0
        ):  # its kernel takes multiprocessors and bandwidth from the others
            free[0] += seconds * speed.contention
        if stream == 0:
            busy[limit] += seconds
    return max(cpu, *free.values()), busy


def kernel_time(operator: Operator, speed: Speed) -> tuple[float, str]:
    """Seconds of a kernel on the GPU, and what limits it, a key of :data:`LIMITS`."""
    if operator.kind == "collectives":
        return collective_seconds(operator, speed.links), "collectives"
    bandwidth = speed.memory_bytes_per_second * speed.memory
    if operator.bytes < speed.cache_bytes:
        bandwidth *= speed.cached
    moving = max(operator.bytes / bandwidth, speed.shortest_kernel_seconds)
    if operator.kind == "memory":
        return moving, "memory"
    peak = speed.peak_flops.get(operator.dtype, 0.0)
    if not peak:  # products of integers
        return moving, "memory"
    if operator.kind == "attention":
        share = speed.attention_backward if "backward" in operator.name else speed.attention_forward
        if (
            "efficient" in operator.name and operator.dtype != "float32"
        ):  # which uses no tensor cores
            share *= speed.efficient_attention
        computing = operator.flops / (peak * share)
    else:
        computing = _product_seconds(operator, peak * speed.product, speed)
    return (computing, operator.kind) if computing > moving else (moving, "memory")


def _product_seconds(operator: Operator, flops_per_second: float, speed: Speed) -> float:
    """The best of the tiles, for a product or its transpose."""
    if not operator.shape:
        return operator.flops / flops_per_second
    matrices, rows, columns, inner = operator.shape
    parallel = speed.multiprocessors
    best = float("inf")
    for height, width, share in _TILES:
        for down, across in ((rows, columns), (columns, rows)):
            tiles = matrices * ceil(down / height) * ceil(across / width)
            split = max(1, min(parallel // tiles, inner // _SPLIT_INNER)) if tiles < parallel else 1
            waves = tiles * split / parallel
            if waves < _MANY_WAVES:
                waves = ceil(waves)
            tile_flops = 2 * height * width * (inner / split + speed.prologue)
            best = min(best, waves * tile_flops * parallel / (flops_per_second * share))
    return best
