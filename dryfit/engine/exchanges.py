"""What a tracker does with operators that exchange tensors between GPUs, or with the host.

A fake group's collectives move nothing. What they allocate, what they hold and for how long, and which values arrive
is noted here; every rank is taken to hold what this one holds.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch._guards import active_fake_mode
from torch.distributed.distributed_c10d import _resolve_process_group

from .components import COLLECTIVES
from .known_values import Values
from .model_tensors import those_on_meta
from .stashes import Stashes

_functional, _aten = torch.ops._c10d_functional, torch.ops.aten
_COPY, _TO_COPY, _SCALAR = (
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten._local_scalar_dense.default,
)
_TO_HOST = frozenset((_COPY, _TO_COPY, _SCALAR))  # operators that may bring a tensor to the host
_NAMESPACES = frozenset(("c10d", "_c10d_functional"))  # of what exchanges
# Functional collectives whose work holds what it sends until somebody waits for it (PyTorch 2.8's
# ``ProcessGroupNCCL.cpp``, ``TensorShelf``; gloo's work holds it as well).
_SENDING = frozenset(
    getattr(_functional, name).default
    for name in (
        "all_gather_into_tensor",
        "all_gather_into_tensor_coalesced",
        "all_to_all_single",
        "reduce_scatter_tensor",
        "reduce_scatter_tensor_coalesced",
    )
)


class Exchanges:
    """The exchanges of one GPU of a group, as its tracker meets them."""

    def __init__(self, tracker: Any) -> None:  # a `Tracker`, whose module imports this one
        self._tracker = tracker
        # What functional collectives have sent, by the storage that arrives, until it is waited for or gone.
        self._sent: dict[int, Any] = {}

    def answer(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operator gives that isn't for the kernels of this GPU; None: it is for them."""
        if (
            torch._C._len_torch_dispatch_stack() and active_fake_mode() is not None
        ):  # DTensor works out shapes
            return func(*args, **kwargs)
        if (
            func not in _TO_HOST
            and func.namespace not in _NAMESPACES
            and not self._tracker.holds_on_host
        ):
            return None
        if (
            func is _functional.wait_tensor.default
        ):  # what it waits for is there; on `meta` it copies
            self._sent.pop(args[0].untyped_storage()._cdata, None)
            return args[0]
        if (
            func is _functional._wrap_tensor_autograd.default
        ):  # on `meta` it copies too, and the wrapper is lost
            from torch.distributed._functional_collectives import AsyncCollectiveTensor

            return AsyncCollectiveTensor(args[0])
        if func is _COPY and args[1].is_meta and not args[0].is_meta:  # DDP's sizes of buckets
            return args[0]
        return self._to_host(func, args, kwargs)

    def _to_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operator gives that brings a tensor to the host, or works on what lies there; None: neither."""
        tracker, values = self._tracker, self._tracker.values
        copied = _leaves_the_device(func, args, kwargs)
        if copied and values is not None:
            if (known := values.known(args[0])) is not None:
                return known.to(kwargs.get("dtype") or known.dtype, copy=True)
            if values.reading:
                return None
        if func is _SCALAR:
            return None
        tensors = list(those_on_meta(args)) if copied or tracker.holds_on_host else []
        if copied and tensors:
            output = torch.empty_like(tensors[0], dtype=kwargs.get("dtype"))
        elif tensors and all(tracker.lies_on_host(tensor) for tensor in tensors):
            output = tracker.run(func, args, kwargs)
        else:
            return None
        for item in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(item, torch.Tensor):
                tracker.leave_on_host(item)
        return output

    def made(self, func: Any, args: tuple, output: Any) -> list[int]:
        """Note what an operator that has run exchanges; returns ids that are held until it returns."""
        if func.namespace not in _NAMESPACES:
            return []
        if func in _SENDING:
            for item in output if isinstance(output, (tuple, list)) else (output,):
                key = item.untyped_storage()._cdata
                end = weakref.finalize(item.untyped_storage(), self._sent.pop, key, None)
                end.atexit = False
                self._sent[key] = args[0]
        if self._tracker.values is not None:
            if func is torch.ops.c10d.alltoall_base_.default:
                _exchanged(self._tracker.values, args[0], args[1], dist.ProcessGroup.unbox(args[2]))
            elif func is _functional.all_to_all_single.default:
                _exchanged(self._tracker.values, output, args[0], _resolve_process_group(args[3]))
        if func.namespace != "c10d":
            return []
        return self._started(func, args)

    def _started(self, func: Any, args: tuple) -> list[int]:
        """Note a collective: NCCL gathers or scatters a list of tensors by way of one that is as large as all."""
        tracker = self._tracker
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
        lists = [given.get("output_tensors", ()), given.get("input_tensors", ())]
        flat = [
            item for given_list in lists if isinstance(given_list, list) for item in given_list[:1]
        ]
        flat = [
            each
            for each in flat
            if isinstance(each, list) and len({tensor.shape for tensor in each}) == 1
        ]
        whole = [
            tracker.allocate(sum(tensor.nbytes for tensor in each), COLLECTIVES) for each in flat
        ]
        kept = [
            identity for tensor in those_on_meta(args) for identity in tracker.identities(tensor)
        ]
        held = (
            given.get("async_op", True) and _asked_by_a_program()
        )  # DDP's own, in C++, hold what DDP holds anyway
        tracker.stashes = tracker.stashes or Stashes()
        tracker.stashes.start(
            tracker.now(), tracker.kernels_launched, [*kept, *whole] if held else ()
        )
        return whole

    def close(self) -> None:
        """Hold nothing any more."""
        self._sent.clear()


def _exchanged(values: Values, output: torch.Tensor, sent: torch.Tensor, group: Any) -> None:
    """Carry the values of an all-to-all in even parts, where they are known.

    All ranks are taken to send the same. So from each of them comes the part that is meant for this one.
    """
    known = values.known(sent)
    if known is not None and output.shape == sent.shape:
        values.remember(output, torch.cat([known.chunk(group.size())[group.rank()]] * group.size()))


def _asked_by_a_program() -> bool:
    """Whether a function of ``torch.distributed`` called the operator that is running."""
    frame = sys._getframe(1)
    while (
        frame is not None
        and frame.f_globals.get("__name__") != "torch.distributed.distributed_c10d"
    ):
        frame = frame.f_back
    return frame is not None


def _leaves_the_device(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operator copies a tensor from ``meta`` to the CPU."""
    if func is not _TO_COPY or kwargs.get("device") is None:
        return False
    return args[0].device.type == "meta" and torch.device(kwargs["device"]).type == "cpu"
