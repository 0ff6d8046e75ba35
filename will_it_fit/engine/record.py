"""What a step did to memory, written down: allocations and frees in order, what each was for, where phases begin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .allocator import Event
from .components import WORKSPACES
from .costs import CostRecorder
from .cuda_rules import CUBLASLT_WORKSPACE_BYTES, cufft_worst_bytes
from .origins import Origins
from .replay import Events
from .stashes import Stashes

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
_TRANSFORMS = (torch.ops.aten._fft_c2c.default, torch.ops.aten._fft_r2c.default, torch.ops.aten._fft_c2r.default)
# aten/src/ATen/native/cudnn/Conv_v8.cpp: `run_conv_plan` takes the plan's workspace from the allocator for the call;
# `try_configs` goes on to the next plan where it is out of memory, and `generate_and_filter_plans` (benchmark mode)
# leaves out what the largest free block can't hold.
_CUDNN = (
    "the step runs convolutions, and cuDNN's workspaces for them are not counted: the peak is the least it can be, see"
    " `peak_allocated_range_bytes`. PyTorch takes a smaller plan where a workspace doesn't fit, so the least that a GPU"
    " must have stays. CUDNN_CONV_WSCAP_DBG, in MiB, bounds a workspace; `cudnn_workspace_bytes` says it to the trace"
)
_CUFFT = (
    "the step runs Fourier transforms, and cuFFT's work areas for them are not counted: the peak is the least it can"
    " be, see `peak_allocated_range_bytes`. A transform whose work area doesn't fit fails: a GPU must have as much more"
)


class Record:
    """A step's record, empty at first. :class:`~will_it_fit.engine.tracker.Tracker` writes one.

    Attributes
    ----------
    events
        ``(id, bytes)`` for an allocation, ``(-id, 0)`` for its end.
    marks
        ``(phase, step, index of its first event)`` in order.
    components
        What each id is for.
    warnings
        What a person should know about the answer, in the order in which it was seen.
    origins, costs
        Where each tensor comes from, and what each operator costs; None unless somebody sets them.
    streams
        The stream that an id was allocated on, where it is not the one that models compute on.
    reusable
        For an id that another stream uses as well, and that is freed: the index of the event before which the GPU has
        certainly got there.
    workspaces
        Where cuDNN and cuFFT take some of their own.
    stashes
        The collectives that it starts; None without any.
    kernels_run
        How often each of Triton's kernels was launched.
    compiled
        What the compiler took, where a compiled step is followed.
    replayed
        Steps in which CUDA graphs were replayed, which allocates nothing.
    columns_so_far
        What :class:`~will_it_fit.engine.columns.Columns` made of so many events.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.marks: list[tuple[str, int, int]] = []
        self.components: dict[int, str] = {}
        self.warnings: dict[str, None] = {}
        self.origins: Origins | None = None
        self.costs: CostRecorder | None = None
        self.streams: dict[int, int] = {}
        self.reusable: dict[int, int] = {}
        self.workspaces = Workspaces()
        self.stashes: Stashes | None = None
        self.kernels_run: Counter[str] = Counter()
        self.compiled: Any = None
        self.replayed: set[int] = set()
        self.columns_so_far: tuple[int, Any] | None = None

    def warn(self, text: str) -> None:
        """Note what a person should know about the answer."""
        self.warnings.setdefault(text)

    def sequence(self) -> Events:
        """The events in one array."""
        return Events.of(self.events)

    def cublas_workspaces(self) -> frozenset[int]:
        """Ids of cuBLAS's workspaces, whose bytes the GPU decides."""
        ids = (one for one, component in self.components.items() if component == WORKSPACES)
        sizes = dict(self.events)
        return frozenset(one for one in ids if sizes[one] != CUBLASLT_WORKSPACE_BYTES)

    def start(self, step: int) -> int:
        """Index of a step's first event."""
        return next(index for _, number, index in self.marks if number == step)

    def spans(self, step: int) -> list[tuple[str, int, int]]:
        """Return the phases of a step in order: name, index of its first event, index after its last."""
        ends = [index for _, _, index in self.marks[1:]]
        return [
            (phase, first, last)
            for (phase, number, first), last in zip(self.marks, ends, strict=False)
            if number == step
        ]


class Workspaces:
    """Where a step takes workspaces whose size cuDNN and cuFFT alone know, and the range that its peak then has.

    Attributes
    ----------
    cudnn_bytes
        What cuDNN may take; None: what the GPU has left.
    """

    def __init__(self) -> None:
        self.cudnn_bytes: int | None = None
        self._convolutions: list[int] = []  # indices of the events after which cuDNN runs
        self._transforms: list[tuple[int, int]] = []  # likewise cuFFT, with the most that its work area may take

    @property
    def taken(self) -> list[tuple[int, int | None]]:
        """In order: the event after which one is taken, and the most that cuFFT's may be; None: it is cuDNN's."""
        return sorted([*((at, None) for at in self._convolutions), *self._transforms], key=lambda one: one[0])

    @taken.setter
    def taken(self, taken: Iterable[tuple[int, int | None]]) -> None:
        taken = list(taken)
        self._convolutions = [at for at, most in taken if most is None]
        self._transforms = [(at, most) for at, most in taken if most is not None]

    def note(self, func: Any, args: Sequence[Any], output: Any, at: int) -> None:
        """Hear of an operator that has run; ``at``: the number of events before it."""
        if func in _CONVOLUTIONS:
            self._convolutions.append(at)
        elif func in _TRANSFORMS:
            number = args[0] if args[0].is_complex() else output
            elements = max(args[0].numel(), output.numel())
            self._transforms.append((at, cufft_worst_bytes(elements, number.element_size())))

    def range_of(
        self,
        lowest: int,
        allocated: Callable[[int], int],
        since: int,
        capacity: int | None,
        warn: Callable[[str], None],
    ) -> dict[str, tuple[int, int | None]]:
        """The range of a peak that is ``lowest`` without them; nothing where none is taken from the event ``since`` on.

        cuDNN's end at what it may take, or at the GPU's ``capacity``; cuFFT's at the most that its reference names.
        ``allocated``: bytes before an event.
        """
        convolving = [allocated(at) for at in self._convolutions if at >= since]
        transforming = [allocated(at) + most for at, most in self._transforms if at >= since]
        if not convolving and not transforming:
            return {}
        most: list[int | None] = [lowest, *transforming]
        if transforming:
            warn(_CUFFT)
        if convolving:
            warn(_CUDNN)
            most.append(capacity if self.cudnn_bytes is None else max(convolving) + self.cudnn_bytes)
        return {"peak_allocated_range_bytes": (lowest, None if None in most else max(most))}
