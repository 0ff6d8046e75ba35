"""Where a program's tensors lie: on the card, on the host, or on its own ``meta``.

What lies on the card is on ``meta`` really. A program hears ``cuda:0``, or what its card is, and PyTorch the truth. Two
kinds of tensors of the host need care:

* A program's own ``meta`` tensors, which a model is built of before its weights come, take no memory of the card.
* Large tensors in floating point that a model is built of on the host stand for themselves with one element, so that a
  model may be larger than this machine.

An operator on tensors of both is an error, as it is for CUDA's kernels: on ``meta`` alone PyTorch would not notice.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils import _device

from dryfit.engine.cuda_graphs import TREES
from dryfit.engine.custom import on_card
from dryfit.engine.tracker import Tracker

from .numbers import Finite
from .places import asking_package

HOST_ELEMENTS = 262_144  # a tensor of the host with more stands for itself with one element
_aten = torch.ops.aten
_BARRIER = torch.ops.c10d.barrier.default
_DEVICE = torch._C.TensorBase.device
_EMPTY = frozenset(
    (_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default)
)
_TRUTH = frozenset(("torch", "dryfit"))  # packages that hear where a tensor really is
# PyTorch's modules make what they were told to make; its optimizers, groups and utilities follow other tensors.
_BUILDS = ("torch.nn.modules", "torch.nn.parameter", "torch.nn.init", "torch.ao.nn")


def placed(tracker: Tracker) -> Callable[..., Any]:
    """What an operator of a program is where a card is simulated, as :func:`dryfit.engine.custom.on_card`."""

    finite = Finite(tracker.values)

    def body(func: Any, args: tuple, kwargs: dict, host: Any = None) -> Any:
        if func in _EMPTY and _stands_for_itself(func, args, kwargs):
            shape = args[1] if func is _aten.new_empty.default else args[0]
            dtype = kwargs.get("dtype") or (
                args[0].dtype if func is _aten.new_empty.default else None
            )
            return lambda *_, **__: tracker.values.stand_in(
                torch.Size(shape), dtype or torch.get_default_dtype()
            )
        refuse_mixture(func, args, kwargs, tracker)
        refuse_targets(func, args)
        return finite.body(func, args) or on_card(func, args, kwargs, host)

    return body


# They read from one device and write to another, or take a tensor as a number.
_BETWEEN_DEVICES = frozenset(
    (
        _aten.copy_.default,
        _aten._to_copy.default,
        _aten._local_scalar_dense.default,
        _aten.set_.source_Tensor,
        _aten.set_.source_Storage,
        _aten.set_.source_Storage_storage_offset,
        _aten._copy_from.default,
    )
)
_INDEXES = frozenset(
    (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
)  # also by the host's


def refuse_mixture(func: Any, args: tuple, kwargs: dict, tracker: Tracker) -> None:
    """Raise what CUDA's kernels raise of tensors on two devices, and NCCL of the host's.

    A tensor without dimensions may lie on the host, and indices into a tensor on the card may, too.

    Raises :class:`RuntimeError` in PyTorch's own words, which programs look for.
    """
    if func in _BETWEEN_DEVICES:
        return
    card, host = [], []
    for place, item in enumerate((*args, *kwargs.values())):
        for each in item if isinstance(item, (tuple, list)) else (item,):
            if not isinstance(each, torch.Tensor):
                continue
            if each.is_meta and not tracker.lies_on_host(each):
                card.append(place)
            elif not each.is_meta and each.dim():
                host.append(place)
    if not host:
        return
    if (
        func.namespace == "c10d"
        and getattr(tracker, "backend", "") == "nccl"
        and func is not _BARRIER
    ):
        raise RuntimeError("No backend type associated with device type cpu")
    if card and func.namespace != "c10d" and not (func in _INDEXES and 0 in card):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices,"
            f" cuda:{torch.cuda.current_device()} and cpu! (when checking arguments of {func})"
        )


_OF_TARGETS = {
    _aten.nll_loss_forward.default: "nll_loss_forward_reduce_cuda_kernel_2d_index",
    _aten.nll_loss2d_forward.default: "nll_loss2d_forward_kernel",
}


def refuse_targets(func: Any, args: tuple) -> None:
    """Raise what CUDA's kernels of a loss raise of classes in another dtype than 64 or 8 bits: ``meta`` takes any.

    Raises :class:`RuntimeError` in PyTorch's own words.
    """
    if func in _OF_TARGETS and args[0].is_meta and args[1].dtype not in (torch.int64, torch.uint8):
        kind = {torch.int32: "Int", torch.int16: "Short", torch.int8: "Char"}.get(
            args[1].dtype, str(args[1].dtype)
        )
        raise RuntimeError(f"\"{_OF_TARGETS[func]}\" not implemented for '{kind}'")


def _stands_for_itself(func: Any, args: tuple, kwargs: dict) -> bool:
    device, dtype = kwargs.get("device"), kwargs.get("dtype") or torch.get_default_dtype()
    shape = args[0]
    if func is _aten.new_empty.default:
        shape, device, dtype = (
            args[1],
            device or _DEVICE.__get__(args[0]),
            kwargs.get("dtype") or args[0].dtype,
        )
    on_host = device is None or torch.device(device).type == "cpu"
    return on_host and dtype.is_floating_point and prod(shape) > HOST_ELEMENTS


def tensor_places(tracker: Tracker) -> list[tuple[Any, str, Any]]:
    """Patches: what tensors say of their device, and what a program makes on its own ``meta``."""

    def where(tensor: torch.Tensor, depth: int = 1) -> torch.device:
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # a subclass, as bitsandbytes' weights, would ask here again
            device = _DEVICE.__get__(tensor)
        trees = (
            sys._getframe(depth).f_globals.get("__name__") == TREES
        )  # check that a graph's outputs are CUDA's
        if (
            device.type != "meta"
            or tracker.lies_on_host(tensor)
            or (asking_package(depth + 1) in _TRUTH and not trees)
        ):
            return device
        return here if _is_followed(tracker) else device

    here = torch.device("cuda", torch.cuda.current_device())
    move, of_context = torch.Tensor.to, _device.DeviceContext.__torch_function__
    bring, set_device, enter_device = (
        torch.Tensor.cuda,
        torch.cuda.set_device,
        torch.cuda.device.__enter__,
    )
    own = (
        threading.local()
    )  # not by the thread's id: a new thread may get the id of one that has ended
    own.has_chosen = "," not in os.environ.get(
        "CUDA_VISIBLE_DEVICES", ","
    )  # a process that sees its own card alone

    def choose(device: Any) -> None:
        own.has_chosen = True
        set_device(device)

    def enter(context: Any) -> None:
        own.has_chosen = True
        enter_device(context)

    def refuse_other_card(device: Any) -> None:
        """CUDA's current device is a thread's own, and 0 in a new one, whatever the main thread has chosen."""
        if not here.index or str(device) != "cuda" or getattr(own, "has_chosen", False):
            return
        is_main = threading.current_thread() is threading.main_thread()
        who, what = (
            ("The process", "in it") if is_main else ("A thread of its own", "in the thread")
        )
        raise RuntimeError(
            f"{who} asks for `cuda`, which is cuda:0 there, and its card is {here}. Write the index, or call"
            f" torch.cuda.set_device {what}."
        )

    def cuda(tensor: torch.Tensor, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        refuse_other_card(device or "cuda")
        return bring(tensor, device, *args, **kwargs)

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for each in (*args, kwargs.get("device")):
            if isinstance(each, (str, torch.device)):
                refuse_other_card(each)
        args = tuple(map(_named, args))
        kwargs = {name: _named(value) for name, value in kwargs.items()}
        target = next(
            (
                each
                for each in (*args, kwargs.get("device"))
                if isinstance(each, (str, torch.device))
            ),
            None,
        )
        made = move(tensor, *args, **kwargs)
        if _is_own_meta(target) and not tensor.is_meta:
            tracker.left(made)
        return made

    def in_context(
        context: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        own = (
            context.device.type == "meta"
            and (kwargs or {}).get("device") is None
            and _is_followed(tracker)
        )
        made = of_context(context, func, types, args, kwargs)
        if (
            own
            and func in _device._device_constructors()
            and isinstance(made, torch.Tensor)
            and made.is_meta
        ):
            tracker.left(made)
        return made

    to_module = torch.nn.Module.to

    def moved(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return to_module(
            module, *map(_named, args), **{name: _named(value) for name, value in kwargs.items()}
        )

    def makes(constructor: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            if type(kwargs.get("device")) is int:
                kwargs["device"] = _named(kwargs["device"])
            refuse_other_card(kwargs.get("device"))
            made = constructor(*args, **kwargs)
            own = _is_own_meta(kwargs.get("device")) and isinstance(made, torch.Tensor)
            if own and _is_followed(tracker) and _told(2):
                tracker.left(made)
            return made

        return make

    names = (
        "empty",
        "zeros",
        "ones",
        "full",
        "rand",
        "randn",
        "randint",
        "arange",
        "empty_strided",
        "tensor",
        "as_tensor",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
    )
    indexes = "set_device_index", "set_device_idx"
    methods = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
    return [
        (torch.Tensor, "device", property(where)),
        (torch.Tensor, "is_cuda", property(lambda tensor: where(tensor, 2).type == "cuda")),
        (torch.cuda, "set_device", choose),
        (torch.cuda.device, "__enter__", enter),
        *(
            (torch.accelerator, name, choose)
            for name in indexes
            if hasattr(torch.accelerator, name)
        ),
        (torch.Tensor, "to", to),
        (torch.Tensor, "cuda", cuda),
        (torch.nn.Module, "to", moved),
        (_device.DeviceContext, "__torch_function__", in_context),
        *((torch, name, makes(getattr(torch, name))) for name in names),
        *((torch.Tensor, name, makes(getattr(torch.Tensor, name))) for name in methods),
    ]


def array_places(tracker: Tracker) -> list[tuple[Any, str, Any]]:
    """Patches: what is on the card is no array. To be made when others have taken the place of ``Tensor.numpy``."""
    as_array = torch.Tensor.numpy

    def numpy(tensor: torch.Tensor, **options: Any) -> Any:
        if tensor.is_meta and not tracker.lies_on_host(tensor):
            raise TypeError(
                f"can't convert cuda:{torch.cuda.current_device()} device type tensor to numpy. Use Tensor.cpu() to"
                " copy the tensor to host memory first."
            )
        return as_array(tensor, **options)

    return [(torch.Tensor, "numpy", numpy)]


def _is_followed(tracker: Tracker) -> bool:
    """Whether the tracker hears what is made now: not in the shape functions of operators, which run below it."""
    stack = torch._C._len_torch_dispatch_stack()
    return any(torch._C._get_dispatch_stack_at(place) is tracker for place in range(stack))


def _named(value: Any) -> Any:
    """A card by its name, where a program gives its number."""
    return torch.device("cuda", value) if type(value) is int else value


def _is_own_meta(device: Any) -> bool:
    """Whether a program names ``meta`` itself: of the card it hears ``cuda``, and with an index the card is meant."""
    return isinstance(device, (str, torch.device)) and str(device) == "meta"


def _told(depth: int) -> bool:
    """Whether the module that makes a tensor was told where, and did not take another tensor's place."""
    name = sys._getframe(depth).f_globals.get("__name__", "")
    return not name.startswith(("torch.", "dryfit.")) or name.startswith(_BUILDS)


def device_kind() -> Any:
    """In the place of ``torch.device``: a number names a card, for which PyTorch would ask a GPU."""
    real = torch.device

    class Kind(type):
        def __instancecheck__(cls, item: Any) -> bool:
            return isinstance(item, real)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if args and type(args[0]) is int:
                return real("cuda", args[0])
            return real(*args, **kwargs)

    return Kind("device", (), {"__module__": "torch"})
