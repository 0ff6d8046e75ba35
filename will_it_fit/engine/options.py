"""What a trace is asked, beside the step itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .cuda_rules import PLATFORMS
from .errors import TraceError
from .label_model import Label
from .report import History, make_report
from .steps import STEPS, Step

TARGETS = ("cuda", "cpu")
COMPILED = ("refuse", "eager", "fused", "follow")


@dataclass(frozen=True)
class Options:
    """What a trace is asked; a measurement heeds what is not about a device.

    Attributes
    ----------
    target
        ``cuda``: as PyTorch's CUDA allocator counts. ``cpu``: bytes of live tensors, as
        :func:`~will_it_fit.engine.trace.measure_step`.
    capability
        Compute capability of the GPU, such as ``(8, 0)``; decides kernels and the size of workspaces.
    torch_version
        Whose CUDA kernels are meant, such as ``2.4.1``; the installed PyTorch's by default. One that is older than the
        rules (:data:`~will_it_fit.engine.cuda_rules.READ_IN`) is a warning.
    platform
        ``linux`` or ``windows``, whose PyTorch is built without FlashAttention.
    bitsandbytes_version
        Whose 4-bit layers are meant, such as ``0.42.0``; None: the installed one's.
    capacity_bytes
        The GPU's memory without the CUDA context: reserved memory is then that of a GPU which gives cached segments
        back when it is full. None: memory is plentiful.
    cudnn_workspace_bytes
        What ``CUDNN_CONV_WSCAP_DBG`` allows a workspace of cuDNN to take; None: nothing is set.
    expandable_segments
        Whether the allocator runs with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.
    steps
        How many to take; the last is reported. One is enough where there is no optimizer.
    previous_batch
        The first step's batch where it differs: outputs that a loop keeps until the next step have its length.
    histories
        What happened before the first step, see :class:`~will_it_fit.engine.report.History`; several where chance
        decides, and reserved memory is a range. None: the model's tensors are allocated one after the other.
    begin
        Called before the first step, with the model on its device, where memory is followed already: for what wraps it
        there, such as DDP. Returns the step to take instead of ``step``.
    beside
        Models that lie on the device too and are not trained, such as a reference.
    label
        Called with the name of each parameter or buffer and the tensor: what it is for, or None for the default,
        ``adapters`` for what is trained in a model that is frozen in part, and ``weights_<dtype>``. ``host``: it is in
        the host's memory, as what FSDP offloads.
    scalars
        What ``.item()``, ``.tolist()`` and ``if tensor`` give where a value is not known, for steps that read numbers
        to log them or to give them back. None: such a step is refused.
    answers
        What ``if tensor`` gives in a function of a library, by ``module:function`` or ``module``, where the value
        decides about what is allocated: beside :data:`~will_it_fit.engine.known_values.ANSWERS`.
    compiled
        How functions that ``torch.compile`` has compiled are taken: refused; followed through the compiler, ``follow``,
        for a GPU where its card is simulated (:func:`~will_it_fit.engine.simulation.simulated`); or with a warning,
        as they would run without the compiler, ``eager``, or without the tensors that it makes and drops, ``fused``.
    timeline
        Whether the report has a timeline.
    origins
        Whether the report has the tensors that are alive at the peak, with the module and line that made them.
    costs
        Whether the report has what each operator of the step costs.
    report
        What makes the answer of the record; :func:`~will_it_fit.engine.report.recording` gives the events alone.
    """

    target: str = "cuda"
    capability: tuple[int, int] | None = None
    torch_version: str = torch.__version__
    platform: str = "linux"
    bitsandbytes_version: str | None = None
    capacity_bytes: int | None = None
    cudnn_workspace_bytes: int | None = None
    expandable_segments: bool = False
    steps: int = STEPS
    previous_batch: Any = None
    histories: Sequence[History] = ()
    begin: Callable[[], Step] | None = None
    beside: Sequence[nn.Module] = ()
    label: Label | None = None
    scalars: float | None = None
    answers: Mapping[str, bool] = field(default_factory=dict)
    compiled: str = "refuse"
    timeline: bool = False
    origins: bool = False
    costs: bool = False
    report: Callable[..., Any] = make_report

    def __post_init__(self) -> None:
        choices = (("target", self.target, TARGETS), ("compiled", self.compiled, COMPILED))
        for name, value, allowed in (*choices, ("platform", self.platform, tuple(PLATFORMS))):
            if value not in allowed:
                words = " or ".join(f"{name}={word!r}" for word in allowed)
                raise TraceError(f"Unknown {name} of the trace: {value!r}.", f"Write {words}.")
        if self.steps < 1:
            raise TraceError(f"A trace takes at least one step, not {self.steps}.", f"Write steps={STEPS}.")
