"""Operators on ``meta``, each combination of operator and shapes only once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .known_values import ASKED
from .origins import short
from .record import NOTED

# Gradients that autograd writes into zeros. Under a dispatch mode and on `meta` it makes a second tensor of each; on a
# device it writes in place (`areAnyTensorSubclassLike` in autograd's FunctionsManual.cpp and native/ReduceOps.cpp).
_ATEN = torch.ops.aten
_SPARSE_MASK = _ATEN.sparse_mask.default
_INTO_ZEROS = {
    _ATEN.scatter_add.default: _ATEN.scatter_add_.default,
    _ATEN.scatter.src: _ATEN.scatter_.src,
    _ATEN.index_put.default: _ATEN.index_put_.default,
    _ATEN.index_add.default: _ATEN.index_add_.default,
    _ATEN.index_fill.int_Tensor: _ATEN.index_fill_.int_Tensor,
}
_BACKWARD = torch.autograd._engine_run_backward.__code__
_DISABLED = "torch._dynamo.eval_frame"  # where torch._dynamo.disable calls what it wraps
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})


class Operator(NamedTuple):
    """An operator, and whose affair it is: the kernels', that of known values, of :func:`in_place`, of workspaces."""

    func: Any  # kept, so that nothing else gets its address
    concerned: bool
    of_values: bool
    into_zeros: bool
    of_workspaces: bool

    @classmethod
    def of(cls, func: Any, concerned: bool) -> Operator:
        return cls(func, concerned, func in ASKED, func in _INTO_ZEROS, func in NOTED)


class Shapes:
    """Runs operators on ``meta``, and each combination of operator and shapes only once.

    A shape function of PyTorch takes some 100 microseconds, and a model's layers are alike: afterwards the outputs are
    made directly. Operators that return views run as ever; pointwise ones that write into their first argument have
    nothing to do.
    """

    def __init__(
        self,
        outputs: Callable[[Any, tuple, Any], Any] | None = None,
        known: dict[tuple, list[tuple] | tuple | None] | None = None,
    ) -> None:
        self._corrected = outputs
        self._kinds: dict[int, tuple[str, Any]] = {}  # by the operator's address: PyTorch hashes them in Python
        self._outputs = {} if known is None else known  # by operator and shapes

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is _SPARSE_MASK and args[1].device.type == "meta":  # has no shape function
            values = torch.empty_like(args[1]._values(), dtype=args[0].dtype)
            return torch.sparse_coo_tensor(args[1]._indices(), values, args[0].shape, device="meta")
        kind, _ = self._kinds.get(id(func)) or self._kinds.setdefault(id(func), (_kind(func), func))
        if kind == "view":
            return func(*args, **kwargs)
        if kind == "in place":
            return args[0] if args[0].device.type == "meta" else func(*args, **kwargs)
        if kind == "in place, lists":
            return None if all(item.device.type == "meta" for item in args[0]) else func(*args, **kwargs)
        try:
            named = ((name, _signature((value,))) for name, value in kwargs.items())
            key = (func._name, torch.get_default_dtype(), _signature(args), *named)  # of what is made without a dtype
            known = self._outputs.get(key)
        except (TypeError, RuntimeError):  # an argument without a signature, such as a sparse tensor
            return func(*args, **kwargs)
        if known is None:
            if func._schema.name in _PRODUCTS:
                _same_dtype([item for item in args if isinstance(item, torch.Tensor)])
            output = self._run(func, args, kwargs)
            if isinstance(output, torch.Tensor) and output.layout is not torch.strided:
                self._kinds[id(func)] = "view", func
                return output
            if _share_storage(output, args):  # _unsafe_view's schema doesn't say so
                self._kinds[id(func)] = "view", func
            else:
                self._outputs[key] = _layout(output)
            return output
        if type(known) is list:
            return tuple([None if item is None else _empty(*item) for item in known])
        return _empty(*known) if known else self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        output = func(*args, **kwargs)
        return output if self._corrected is None else self._corrected(func, args, output)


def in_place(func: Any) -> Any:
    """The operator that a device runs where a dispatch mode is asked about ``func``.

    Another one only for gradients written into zeros, by a formula of autograd's own: no Python code runs in between,
    but for the wrapper that keeps the tracker from Dynamo where a compiled step is followed (:mod:`.frames`).
    """
    written = _INTO_ZEROS.get(func)
    if written is None or torch.is_grad_enabled():
        return func
    caller = sys._getframe(1).f_back
    while caller is not None and caller.f_globals.get("__name__") == _DISABLED:
        caller = caller.f_back
    return written if caller is None or caller.f_code is _BACKWARD else func


def _same_dtype(operands: Sequence[torch.Tensor]) -> None:
    """Refuse a product that every device refuses; on ``meta`` only shapes are checked."""
    if len({operand.dtype for operand in operands}) > 1:
        dtypes = ", ".join(short(operand.dtype) for operand in operands)
        raise RuntimeError(f"the operands of a matrix product differ in dtype ({dtypes}), and no autocast is on")


def _kind(func: Any) -> str:
    """``view``: outputs share storage with inputs; ``in place``, one tensor or lists; ``new``: outputs are new."""
    returns = func._schema.returns
    if func._schema.name.startswith(("aten::_foreach_", "aten::_fused_")) and func._schema.name.endswith("_"):
        return "in place, lists"
    if any(item.alias_info is not None for item in returns) or not returns:
        first = func._schema.arguments[0] if func._schema.arguments else None
        written = first is not None and first.alias_info is not None and first.alias_info.is_write
        plain = torch.Tag.pointwise in func.tags or func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_")
        return "in place" if written and plain and len(returns) == 1 and str(first.type) == "Tensor" else "view"
    return "new"


def _share_storage(output: Any, args: tuple) -> bool:
    inputs = {item.untyped_storage()._cdata for item in args if isinstance(item, torch.Tensor)}
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return any(isinstance(item, torch.Tensor) and item.untyped_storage()._cdata in inputs for item in outputs)


def _empty(size: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _signature(values: Iterable[Any]) -> tuple:
    """What of some arguments decides the layout of an operator's outputs."""
    signature = []
    for value in values:
        if isinstance(value, torch.Tensor):
            signature.append((value.shape, value.stride(), value.dtype, value.is_meta))
        elif isinstance(value, (list, tuple)):
            signature.append(_signature(value))
        else:
            signature.append((type(value), value))
    return tuple(signature)


def _layout(output: Any) -> list[tuple] | tuple:
    """Sizes, strides and dtypes of an operator's outputs; () where they aren't plain new tensors on ``meta``."""
    if isinstance(output, torch.Tensor):
        plain = output.device.type == "meta" and output.storage_offset() == 0 and _fills_its_storage(output)
        return (output.shape, output.stride(), output.dtype) if plain else ()
    if isinstance(output, tuple):
        items = [None if item is None else _layout(item) for item in output]
        return () if () in items or any(type(item) is list for item in items) else items
    return ()


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() == (extent if tensor.numel() else 0) * tensor.element_size()
