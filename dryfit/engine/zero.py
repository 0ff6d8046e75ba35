"""DeepSpeed's ZeRO by rules, where DeepSpeed is not installed: what its engine allocates, when, and on which stream.

The rules are facts of DeepSpeed 0.19.8 (github.com/deepspeedai/DeepSpeed, ``deepspeed/runtime/zero``), each with the
function that it is of; nothing here computes. :class:`ZeroEngine` stands where ``DeepSpeedEngine`` would, on ``meta``:
its tensors are as large as DeepSpeed's and live as long. Stages 1 and 2 are
:class:`~dryfit.engine.zero_flat.FlatPartitions`, stage 3 is
:class:`~dryfit.engine.zero_gathered.GatheredWeights`. ``make test-deepspeed`` compares both with DeepSpeed's own
engine, byte by byte and phase by phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from .fake_device import FakeDevice

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # engine.py, CASTABLE_DTYPES
NORM_DTYPE = torch.double  # zero/utils.py, get_norm_dtype
Component = Callable[[str, torch.Tensor], str]


class ZeroSettings(Protocol):
    """What an engine is told of a configuration's ``zero_optimization``, by DeepSpeed's names (``zero/config.py``).

    Sizes are in elements; ``offload_*`` are ``none`` or ``cpu``.
    """

    overlap_comm: bool | None
    contiguous_gradients: bool
    reduce_scatter: bool
    round_robin_gradients: bool
    reduce_bucket_size: int
    stage3_prefetch_bucket_size: int
    stage3_param_persistence_threshold: int
    stage3_max_live_parameters: int
    stage3_max_reuse_distance: int
    sub_group_size: int
    offload_optimizer: str
    offload_param: str


class ZeroEngine(nn.Module):
    """What stands for ``DeepSpeedEngine``.

    ``module``: the model, on the host (stages 1, 2) or with its weights divided (stage 3). ``optimizer``: DeepSpeed's
    own around the user's.
    """

    def __init__(self, module: nn.Module, optimizer: Zero) -> None:
        super().__init__()
        self.module, self.optimizer = module, optimizer
        self.last_norm: torch.Tensor | None = (
            None  # of the step before, until this one's update is done
        )

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.optimizer.forward_begins()
        return self.module(*arguments, **options)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.optimizer.is_last = is_boundary

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = False) -> None:
        """``engine.py``, ``backward``: the loss is scaled, which makes a tensor of it; what is left is exchanged."""
        loss = loss * self.optimizer.loss_scale
        loss.backward()
        self.optimizer.backward_ends()

    def step(self) -> None:
        self.optimizer.step()
        self.last_norm = self.optimizer.last_norm


class Zero:
    """What all stages have in common."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        settings: ZeroSettings,
        device: FakeDevice,
        *,
        overlaps: bool,
    ) -> None:
        self.settings, self.device, self.own = settings, device, optimizer
        self.overlaps = overlaps if settings.overlap_comm is None else settings.overlap_comm
        self.offloads = settings.offload_optimizer == "cpu"
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.clip_grad = 0.0  # largest norm of all gradients; 0: they are not clipped
        self.is_last = True  # whether the micro-batch that runs is the step's last
        self.last_norm: torch.Tensor | None = (
            None  # of all gradients, which DeepSpeed keeps for those who ask
        )
        self.dtype = next(
            parameter.dtype for group in optimizer.param_groups for parameter in group["params"]
        )
        self.loss_scale = 65536.0 if self.dtype == torch.float16 else 1.0
        self.exchanging = device.Stream() if self.overlaps else device.first_stream

    def name(self, component: Component) -> None:
        """Say what the model's tensors are for: ``component`` knows it by a parameter's name and the parameter."""
        raise NotImplementedError

    def forward_begins(self) -> None:
        """Nothing is kept between forward passes."""

    def backward_ends(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def update(self, group: dict[str, Any]) -> None:
        """Let the user's optimizer step one of its groups."""
        groups, self.own.param_groups = self.own.param_groups, [group]
        self.own.step()
        self.own.param_groups = groups

    def scale(self, gradient: torch.Tensor, norm: torch.Tensor) -> None:
        """``unscale_and_clip_grads``."""
        combined: Any = self.loss_scale
        if self.clip_grad > 0:
            clip = torch.clamp((norm / self.loss_scale + 1e-6) / self.clip_grad, min=1.0)
            combined = clip * self.loss_scale  # both live until the gradient is multiplied
        gradient.mul_(1.0 / combined)


def cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    """``engine.py``, ``_cast_module_mixed_precision``: weights get the step's dtype, buffers keep theirs."""
    for parameter in parameters if dtype is not None else ():
        if parameter.dtype in FLOATS and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
