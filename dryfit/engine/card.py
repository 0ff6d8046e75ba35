"""A card that is simulated: what it is, and what ``torch.cuda`` says of it. :mod:`.simulation` turns it on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .cuda_rules import threads_of_processor
from .errors import TraceError

# Bytes of shared memory that a block may ask for, by compute capability: CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability", the maximum per thread block (KiB).
_SHARED_KIB = {
    (6, 0): 48,
    (6, 1): 48,
    (7, 0): 96,
    (7, 2): 96,
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (11, 0): 227,
    (12, 0): 99,
    (12, 1): 99,
}


@dataclass(frozen=True)
class Card:
    """What is asked about a GPU; the caller takes it from its catalogue.

    Attributes
    ----------
    name
        As the driver says it, ``NVIDIA H100 80GB HBM3``: packages look for words in it.
    capability
        Compute capability, ``(9, 0)``.
    multiprocessors
        How many streaming multiprocessors; sizes of buffers and split reductions follow from it.
    memory_bytes
        ``total_memory``.
    l2_bytes
        Of the second-level cache.
    shared_memory_bytes
        What a block may have as an option; None: what its capability allows.
    platform
        What its PyTorch is built for, ``linux`` or ``windows``: it decides which attention kernels there are.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    shared_memory_bytes: int | None = None
    platform: str = "linux"

    def __post_init__(self) -> None:
        if self.shared_memory_bytes is None:
            if self.capability not in _SHARED_KIB:
                raise TraceError(
                    f"The shared memory of a card of compute capability {self.capability} is not known.",
                    "Write shared_memory_bytes=, what the driver says as shared_memory_per_block_optin.",
                )
            object.__setattr__(self, "shared_memory_bytes", _SHARED_KIB[self.capability] * 1024)

    def properties(self) -> Properties:
        """As ``torch.cuda.get_device_properties`` gives them."""
        major, minor = self.capability
        return Properties(
            name=self.name,
            major=major,
            minor=minor,
            multi_processor_count=self.multiprocessors,
            total_memory=self.memory_bytes,
            L2_cache_size=self.l2_bytes,
            shared_memory_per_block_optin=self.shared_memory_bytes,
            shared_memory_per_multiprocessor=self.shared_memory_bytes
            + 1024,  # a block has 1 KiB less than all of it
            max_threads_per_multi_processor=threads_of_processor(self.capability),
        )


class Properties(NamedTuple):
    """What the driver says of a card. Dynamo takes a named tuple for a constant, as it takes PyTorch's own class."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    max_threads_per_multi_processor: int
    shared_memory_per_block: int = 48 * 1024
    regs_per_multiprocessor: int = 65_536
    warp_size: int = 32
    max_threads_per_block: int = 1024
    gcnArchName: str = ""
    is_integrated: bool = False
    is_multi_gpu_board: bool = False
    uuid: str = "simulated"


H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 85_017_755_648, 50 * 2**20)
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_097_971_712, 40 * 2**20)


@dataclass
class Simulation:
    """A card that is simulated at the moment, and what happened meanwhile."""

    card: Card
    # Which of an autotuner's configurations wins, by the kernel's name and the configurations.
    choose: Callable[[str, list], int]
    pads: bool = False  # whether Inductor pads products of odd sizes, which it decides by a benchmark on the GPU
    templates: bool = False  # whether Inductor's own products win against cuBLAS in the benchmarks of `max-autotune`
    # How many keys a query of FlexAttention sees in the mean, which its time depends on; None: half of them.
    attended_keys: float | None = None
    # By kernel, from how many configurations which one was taken.
    chosen: dict[str, tuple[int, str]] = field(default_factory=dict)
    programs: list[str] = field(
        default_factory=list
    )  # programs that were to be run (`ldconfig`), and were not
    # C extensions that were to be imported, and have no entry in the table of `.extensions`.
    missing: list[str] = field(default_factory=list)
    # Autotuners of Triton that have chosen here, with what they knew before.
    tuners: list[tuple[Any, dict]] = field(default_factory=list)
    index: int = 0  # which of the machine's cards this process has

    def forget_choices(self) -> None:
        """Let autotuners compare anew, as in a process that starts: a step then never depends on those before it."""
        for tuner, _ in self.tuners:
            tuner.cache = {}

    @property
    def device(self) -> torch.device:
        """What a tensor on the card says of its device."""
        return torch.device("cuda", self.index)


active: list[Simulation] = []  # :mod:`.simulation` puts it in


def active_simulation() -> Simulation | None:
    """The card that is simulated at the moment; None: none is."""
    return active[-1] if active else None


class FakeStream:
    """A stream or an event that has always been waited for."""

    cuda_stream = device_index = stream_id = idx = prev_idx = cuda_event = 0
    device = torch.device("meta")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("record_event", "record"):
            return lambda *args, **kwargs: FakeStream()
        return lambda *args, **kwargs: 1.0 if name == "elapsed_time" else True


NCCL = (2, 28, 9)  # a version of today; nothing here depends on it


def answers_of(card: Card, index: int = 0) -> list[tuple[Any, str, Any]]:
    """What ``torch.cuda`` says of the card, which is the machine's card ``index``."""
    properties, stream = card.properties(), FakeStream()
    state = torch.zeros(16, dtype=torch.uint8, device="cpu")
    fixed = {
        **dict.fromkeys(("is_available", "is_initialized"), True),
        **dict.fromkeys(("_is_in_bad_fork", "is_current_stream_capturing"), False),
        **dict.fromkeys(("device_count", "_device_count_nvml"), 1),
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), index),
        "initial_seed": 0,
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
            0,
        ),
        **dict.fromkeys(("utilization", "temperature", "power_draw", "clock_rate"), 0),
        **dict.fromkeys(
            (
                "synchronize",
                "set_device",
                "set_stream",
                "_lazy_init",
                "_lazy_call",
                "init",
                "empty_cache",
            )
        ),
        **dict.fromkeys(
            (
                "manual_seed",
                "manual_seed_all",
                "seed",
                "seed_all",
                "set_rng_state",
                "set_rng_state_all",
            )
        ),
        **dict.fromkeys(
            ("reset_peak_memory_stats", "reset_accumulated_memory_stats", "ipc_collect")
        ),
        "get_device_properties": properties,
        "get_device_capability": card.capability,
        "get_device_name": card.name,
        "get_arch_list": [f"sm_{card.capability[0]}{card.capability[1]}"],
        "mem_get_info": (card.memory_bytes, card.memory_bytes),
        "memory_stats": OrderedDict(),
        "get_rng_state": state,
        "get_rng_state_all": [state],
        "current_stream": stream,
        "default_stream": stream,
    }
    answers: dict[str, Any] = {name: _saying(answer) for name, answer in fixed.items()}
    modern = card.capability >= (8, 0)
    answers |= {
        "is_bf16_supported": lambda including_emulation=True: modern or including_emulation,
        "is_tf32_supported": lambda: modern,
        "stream": lambda stream: nullcontext(),
        **dict.fromkeys(("Stream", "Event", "device", "device_of", "_DeviceGuard"), FakeStream),
    }
    owners = (torch.cuda, torch.cuda.random, torch.cuda.memory)
    places = [
        (owner, name, answer)
        for owner in owners
        for name, answer in answers.items()
        if name in vars(owner)
    ]
    places.append((torch.version, "cuda", torch.version.cuda or "13.0"))
    # A wrapper of Inductor imports it, and packages hand it to their launches; a build without CUDA lacks it.
    places.append((torch._C, "_cuda_getCurrentRawStream", lambda device: 0))
    places.append((torch.cuda.nccl, "version", lambda: NCCL))  # its profiler and log of errors ask
    return places


def _saying(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer
