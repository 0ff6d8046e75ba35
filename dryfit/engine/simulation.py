"""A simulated card: what PyTorch, Triton, Inductor and packages ask about a GPU, answered on a machine without one.

Packages with kernels of their own ask for the card while they are imported and while they run. Inside
:func:`simulated` they hear of the card that is given; nothing is computed, and a GPU that is really there isn't
touched::

    with simulated(H100):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2
        with on_meta():
            model = ...
        report = trace_step(model, optimizer, step, batch)

What is made on ``cuda`` is made on ``meta``, by a dispatch mode: so it holds in the backward pass and in the compiler
too. ``tensor.device`` says ``cuda:0`` to packages with kernels of their own, which choose by it what they allocate, and
the truth to PyTorch and all others. Launches of Triton are in :mod:`.launches`, C extensions in :mod:`.extensions`,
compiled steps in :mod:`.inductor`.

A package keeps what it heard while it was imported: trace for one card in one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .card import Card, Simulation, active, answers_of
from .cuda_graphs import TREES
from .custom import on_card
from .errors import TraceError
from .importing import Execute, running
from .launches import compiled_kernels, no_launches
from .patching import patched

# Packages that choose by `tensor.device` what they allocate. A module that imports Triton counts as one too.
PACKAGES = frozenset(
    "causal_conv1d cut_cross_entropy fla flash_attn liger_kernel mamba_ssm unsloth unsloth_zoo".split()
)
# They look for CUDA while they are imported, and load libraries by what they find: they have to learn the truth.
_BEFORE = ("bitsandbytes", "peft")
_OWN = __name__.partition(".")[0]
_DEVICE, _DATA = torch._C.TensorBase.device, torch._C.TensorBase.data
_STANDARD = frozenset(("subprocess", "os", "posix"))


@contextmanager
def simulated(
    card: Card,
    choose: Callable[[str, list], int] | None = None,
    pads: bool = False,
    templates: bool = False,
    *,
    attended_keys: float | None = None,
    whole_program: bool = False,
    index: int = 0,
) -> Iterator[Simulation]:
    """Let all that runs inside believe in a card, and whatever it launches do nothing.

    Parameters
    ----------
    card
        What is answered.
    choose
        Which of an autotuner's configurations wins, as an index: called with the kernel's name and the configurations.
        None: the first.
    pads
        Whether Inductor pads products of odd sizes.
    templates
        Whether Inductor's own products win against cuBLAS where ``max-autotune`` compares them: more is fused into
        them, and less is kept between kernels. A step may be traced both ways, for a range.
    attended_keys
        How many keys a query of FlexAttention sees in the mean, for the time of a step. None: half of them, as with a
        causal mask.
    whole_program
        Whether a program runs inside that imports what it needs: then :data:`_BEFORE` are imported when it asks.
    index
        Which of the machine's cards this process has: ``cuda:index``.

    Raises
    ------
    TraceError
        If a card is simulated already.
    """
    if active:
        raise TraceError(
            f"A card is simulated already ({active[-1].card.name}), and packages that were imported keep its answers.",
            "Trace for another card in a process of its own.",
        )
    for name in _BEFORE:
        if not whole_program and find_spec(name) is not None:
            import_module(name)
    from .extensions import extensions  # its tables are made while it is imported

    answers = answers_of(card, index)
    torch.utils._device._device_constructors()  # `with torch.device(...)` keeps PyTorch's own functions, once
    first: Callable[[str, list], int] = lambda name, configurations: 0  # noqa: E731
    simulation = Simulation(card, choose or first, pads, templates, attended_keys, index=index)
    lifts = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.enter_context(_forgotten_answers())
        if whole_program:
            truth = _as_it_is([(at, name, vars(at).get(name)) for at, name, _ in answers])
            stack.enter_context(running(dict.fromkeys(_BEFORE, truth)))
        stack.enter_context(patched(answers))
        stack.enter_context(patched(_tensors(simulation), hidden=True))
        stack.enter_context(patched(_programs(simulation) + compiled_kernels()))
        if find_spec("triton") is not None:
            stack.enter_context(no_launches(simulation))
        stack.enter_context(extensions(simulation))
        active.append(simulation)
        stack.callback(active.pop)
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device="cuda") comes to the dispatcher
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.enter_context(_OnCard())
        yield simulation


# --- tensors ------------------------------------------------------------------------------------------------------


class _OnCard(TorchDispatchMode):
    """Makes on ``meta`` what is made on ``cuda`` outside a trace: while a package is imported, or a model is built."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles although this mode is on."""
        return True

    @torch._disable_dynamo
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = on_card(func, args, kwargs)
        if own is None:
            return func(*args, **kwargs)
        with self:
            return own(*args, **kwargs)


def _tensors(simulation: Simulation) -> list[tuple[Any, str, Any]]:
    of_generator = torch.Generator

    class GeneratorClass(type):
        def __instancecheck__(cls, item: Any) -> bool:
            return isinstance(item, of_generator)

        def __call__(cls, device: Any = "cpu") -> Any:
            return of_generator("cpu" if torch.device(device).type == "cuda" else device)

    def with_index(device: Any) -> Any:
        """PyTorch asks CUDA, which a build may lack, which card `cuda` is."""
        found = isinstance(device, (str, torch.device)) and str(device) == "cuda"
        return simulation.device if found else device

    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = (
            [with_index(each) for each in args],
            {name: with_index(each) for name, each in kwargs.items()},
        )
        return move(tensor, *args, **kwargs)

    def cuda(
        tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        return move(tensor, simulation.device, non_blocking=non_blocking, **kwargs)

    def made(
        data: Any, *, device: Any = None, pin_memory: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """It asks for CUDA before the dispatcher hears of it."""
        if device is not None and torch.device(device).type == "cuda":
            device = torch.device("meta")
        return make(data, device=device, **kwargs)

    compatible = torch._has_compatible_shallow_copy_type

    def keeps_parameter(tensor: torch.Tensor, other: torch.Tensor) -> bool:
        """A module that moves keeps its parameters, what is hung on them and those that are tied, as on a GPU."""
        return compatible(tensor, other) or tensor.is_meta != other.is_meta

    make = torch.tensor
    return [
        (torch, "_has_compatible_shallow_copy_type", keeps_parameter),
        (torch.Tensor, "data", property(_DATA.__get__, _set_data, _DATA.__delete__)),
        (torch, "tensor", made),
        (torch.Tensor, "to", to),
        (torch.Tensor, "cuda", cuda),
        (torch.Tensor, "device", property(partial(_device, simulation))),
        (
            torch.Tensor,
            "is_cuda",
            property(lambda tensor: _device(simulation, tensor, 2).type == "cuda"),
        ),
        (torch.Tensor, "get_device", lambda tensor: simulation.index if tensor.is_meta else -1),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (torch, "Generator", GeneratorClass("Generator", (), {})),
    ]


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """``tensor.data = data``: from the host to a GPU PyTorch allows it, from the host to ``meta`` it does not."""
    if tensor.is_meta == data.is_meta:
        _DATA.__set__(tensor, data)
        return
    other, gradient = data.detach(), tensor.grad if tensor.is_leaf else None
    if other.is_floating_point():
        other.requires_grad_(tensor.requires_grad)
    torch._C._swap_tensor_impl(tensor, other)
    if (
        gradient is not None and not tensor.is_meta
    ):  # `module.cpu()` moves it next, and wants it to be there
        tensor.grad = gradient.to("cpu")


def _device(simulation: Simulation, tensor: torch.Tensor, depth: int = 1) -> torch.device:
    """Where a tensor lies, as the module that asks would hear it on a machine with the card."""
    device = _DEVICE.__get__(tensor)
    return (
        simulation.device if device.type == "meta" and _by_package(sys._getframe(depth)) else device
    )


def _by_package(frame: FrameType) -> bool:
    """Whether a frame's module has kernels of its own: it belongs to a known package, or imports Triton."""
    asking = frame.f_globals
    name = asking.get("__name__", "")
    owner = name.partition(".")[0]
    with_kernels = ("triton" in asking or "tl" in asking) and owner not in ("torch", _OWN)
    return owner in PACKAGES or name == TREES or with_kernels


@contextmanager
def _forgotten_answers() -> Iterator[None]:
    """Let nobody keep an answer about CUDA that was given before, or inside."""

    def forget() -> None:
        for name in ("transformers.utils.import_utils", "torch.utils._triton"):
            for function in list(vars(sys.modules.get(name, SimpleNamespace())).values()):
                if hasattr(function, "cache_clear"):
                    function.cache_clear()

    forget()
    try:
        yield
    finally:
        forget()


def _as_it_is(truth: list[tuple[Any, str, Any]]) -> Callable[[Any, Execute], None]:
    """Let a module learn the truth while it runs: ``truth`` is what the answers stand in for."""

    def run(module: Any, execute: Execute) -> None:
        with patched(truth):
            execute(module)

    return run


# --- programs -----------------------------------------------------------------------------------------------------


def _programs(simulation: Simulation) -> list[tuple[Any, str, Any]]:
    """Programs that nothing starts here: those that know GPUs or change the system, and all that packages start."""
    start, system = subprocess.Popen.__init__, os.system

    def refused(command: Any) -> bool:
        words = (
            command.split() if isinstance(command, str) else [os.fsdecode(word) for word in command]
        )
        name = os.path.basename(words[0]) if words else ""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "") in _STANDARD:
            frame = frame.f_back
        owner = frame.f_globals.get("__name__", "").partition(".")[0] if frame is not None else ""
        if name not in ("ldconfig", "nvidia-smi", "nvcc") and owner not in PACKAGES:
            return False
        simulation.programs.append(" ".join(words))
        return True

    def popen(process: Any, args: Any, *more: Any, **options: Any) -> None:
        if refused([args] if isinstance(args, os.PathLike) else args):
            process.returncode, process._child_created = 127, False
            raise FileNotFoundError(2, "not started where a card is simulated", str(args))
        start(process, args, *more, **options)

    def run(command: str) -> int:
        return 127 * 256 if refused(command) else system(command)

    return [(subprocess.Popen, "__init__", popen), (os, "system", run)]
