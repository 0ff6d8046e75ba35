"""How long a step takes on this machine's CPU: its operators one after the other, timed by short probes.

A CPU has no datasheet that a program could look up, and others may be using it. So a few small programs are timed
beside the step: a product of matrices, a copy, a copy into new memory, 4-bit weights unpacked, an operator on next to
nothing. The rest follows from what operators do:

- A product computes and packs its operands with the same cores: the times of both add up.
- Elementwise operators are as fast as a copy. Their operands have left the cache since they were made.
- A large tensor is new memory each time: glibc gives what is above 32 MiB back to the system when it is freed
  (``mallopt(3)``, ``M_MMAP_THRESHOLD``), and the system clears each page again when it is first written.
- Python and PyTorch take their time between operators.

Only attention has constants: a share of the product's rate, timed on the kernel alone (64 to 1,024 tokens, heads of 64
and 128, PyTorch 2.13), not on a step.

Probes and steps take one thread and count its own time: what it takes where nothing else wants the CPU. By the
clock it takes longer where others do, and several threads wait for each other then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from mmap import mmap
from time import process_time
from typing import TYPE_CHECKING, Any, ClassVar

from dryfit.evidence.nearest import TimeShares

if TYPE_CHECKING:
    from dryfit.engine.costs import CostRecorder, Operator
    from dryfit.scenario.scenario import Scenario

_MEASURED = TimeShares(0.75, 1.25, 9, "on one CPU")  # docs/time.md has the nine
NEW_FROM_BYTES = 32 * 2**20  # glibc's largest M_MMAP_THRESHOLD on 64-bit systems
ATTENTION = {False: 0.53, True: 0.60}  # forward, backward
_PRODUCT, _COPY_BYTES, _UNPACKED = 1024, 64 * 2**20, (1536, 1024)
_SMALL_PAIRS = 200  # operators forward, and as many backward


@contextmanager
def one_thread() -> Iterator[Callable[[], float]]:
    """Let PyTorch use the calling thread alone; gives a clock of the CPU time that the process takes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield process_time
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Cpu:
    """What the probes found; a speed as :class:`dryfit.hours.step_time.Speed` is one."""

    product_flops: Mapping[str, float]  # operations a second by dtype
    copied_bytes_per_second: float  # read and written, in memory that the process has
    new_bytes_per_second: float  # written, beside that, where the memory is new
    unpacked_bytes_per_second: float | None  # of 4-bit weights, read and written; None: not probed
    launch_seconds: float  # between operators
    basis: str = (
        "found by short probes on this CPU: a product, copies, an unpacking, small operators"
    )
    measured: TimeShares | None = _MEASURED
    board_watts: None = None
    emulated: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, str]] = {"cpu": "Python and PyTorch, between operators"}

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def simulate(self, costs: CostRecorder) -> tuple[float, dict[str, float]]:
        """Seconds of a step, and what of it is products, attention and memory; the rest is between operators."""
        timed = [(operator.kind, self.seconds(operator)) for operator in costs.operators]
        busy = dict.fromkeys(("products", "attention", "memory", "collectives"), 0.0)
        for index in costs.calls:
            kind, seconds = timed[index]
            busy[kind] += seconds
        between = (len(costs.calls) + costs.without_kernel) * self.launch_seconds
        return sum(busy.values()) + between, busy

    def seconds(self, operator: Operator) -> float:
        """Of one operator, without what comes before it."""
        rate = self.copied_bytes_per_second
        if "dequantize_4bit" in operator.name:
            rate = self.unpacked_bytes_per_second or rate
        seconds = operator.moved_bytes / rate
        if operator.made_bytes >= NEW_FROM_BYTES:
            seconds += operator.made_bytes / self.new_bytes_per_second
        if operator.flops:
            share = ATTENTION["backward" in operator.name] if operator.kind == "attention" else 1.0
            peak = self.product_flops.get(operator.dtype) or min(self.product_flops.values())
            seconds += operator.flops / (peak * share)
        return seconds


@dataclass
class Probes:
    """Small programs that are timed again and again, beside what they are to explain."""

    dtypes: Sequence[str] = ("float32",)
    quantization: str | None = None  # nf4 or fp4
    _work: dict[str, tuple[Callable[[], Any], float]] = field(default_factory=dict, init=False)
    _taken: dict[str, list[float]] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, scenario: Scenario) -> Probes:
        """What a scenario's step computes in and unpacks."""
        dtypes = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        used = {
            dtypes.get(name) for name in (scenario.autocast_precision, scenario.weight_precision)
        } - {None}
        packed = scenario.quantization.type if scenario.quantization else None
        return cls(sorted({"float32", *used}), packed if packed != "int8" else None)

    def __post_init__(self) -> None:
        import torch

        for dtype in self.dtypes:
            factor = torch.randn(_PRODUCT, _PRODUCT).to(getattr(torch, dtype))
            self._add(f"product {dtype}", lambda factor=factor: factor @ factor, 2 * _PRODUCT**3)
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8).fill_(1)
        target = torch.ones_like(source)
        self._add("copy", lambda: target.copy_(source), 2 * _COPY_BYTES)
        self._add(
            "new",
            lambda: torch.frombuffer(mmap(-1, _COPY_BYTES), dtype=torch.uint8).copy_(source),
            _COPY_BYTES,
        )
        if self.quantization:
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            packed, state = quantize_4bit(torch.randn(_UNPACKED), quant_type=self.quantization)
            moved = state.shape.numel() // 2 + 4 * state.shape.numel()
            self._add("unpacking", lambda: dequantize_4bit(packed, state), moved)
        layer, small = torch.nn.SiLU(), torch.zeros(8, requires_grad=True)

        def operators() -> None:
            value = small
            for _ in range(_SMALL_PAIRS):
                value = layer(value)
            value.sum().backward()

        self._add("small", operators, 2 * _SMALL_PAIRS)

    def _add(self, name: str, act: Callable[[], Any], work: float) -> None:
        act()  # the first time allocates
        self._work[name], self._taken[name] = (act, work), []

    def run(self, seconds: float = 0.4) -> None:
        """Time them in turn, each for its share of so many seconds, and at least once."""
        for name, (act, _) in self._work.items():
            started, spent = process_time(), 0.0
            while spent < seconds / len(self._work):
                act()
                now = process_time()
                self._taken[name].append(now - started - spent)
                spent = now - started

    def found(self) -> Cpu:
        """The rates in the middle of what was timed."""
        from statistics import median

        each = {name: median(times) for name, times in self._taken.items()}
        rate = {name: work / each[name] for name, (_, work) in self._work.items()}
        return Cpu(
            product_flops={dtype: rate[f"product {dtype}"] for dtype in self.dtypes},
            copied_bytes_per_second=rate["copy"],
            new_bytes_per_second=_COPY_BYTES / max(each["new"] - each["copy"], 1e-9),
            unpacked_bytes_per_second=rate.get("unpacking"),
            launch_seconds=1 / rate["small"],
        )
