"""Operators on ``meta``, each combination of operator and shapes only once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .known_values import ASKED
from .origins import short
from .record import NOTED

# What autograd's formulas write into a tensor of their own. Under a dispatch mode and on `meta` they make another one;
# on a device they write in place (`areAnyTensorSubclassLike` in autograd's FunctionsManual.cpp, native/ReduceOps.cpp
# and native/Loss.cpp). The second names the nodes of autograd whose formula does so; None: each that has the operator.
_ATEN = torch.ops.aten
_SPARSE_MASK = _ATEN.sparse_mask.default
_ADD = _ATEN.add.Tensor
_IN_PLACE: dict[Any, tuple[Any, tuple[str, ...] | None]] = {
    _ATEN.scatter_add.default: (_ATEN.scatter_add_.default, None),
    _ATEN.scatter.src: (_ATEN.scatter_.src, None),
    _ATEN.index_put.default: (_ATEN.index_put_.default, None),
    _ATEN.index_add.default: (_ATEN.index_add_.default, None),
    _ATEN.index_fill.int_Tensor: (_ATEN.index_fill_.int_Tensor, None),
    _ATEN.put.default: (_ATEN.put_.default, None),
    _ATEN.logical_and.default: (_ATEN.logical_and_.default, ("ClampBackward0", "ClampBackward1")),
    _ATEN.mul.Tensor: (_ATEN.mul_.Tensor, ("BinaryCrossEntropyBackward0",)),
    _ATEN.div.Tensor: (_ATEN.div_.Tensor, ("CumprodBackward0",)),
    _ADD: (_ATEN.add_.Tensor, ("AminmaxBackward0",)),
}
_NEVER_IN_PLACE = ("ScatterReduceBackward0", "IndexReduceBackward0")
# Nodes whose formula adds nothing, so that a sum of two gradients that one of them made is the engine's own.
_WITHOUT_SUMS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "Mul",
        "Sub",
        "Div",
        "Mm",
        "Bmm",
        "Addmm",
        "Where",
        "Maximum",
        "Minimum",
        "Cat",
        "Stack",
        "Unbind",
    )
    for number in (0, 1)
)
_RESIZING = frozenset((_ATEN.resize_.default, _ATEN.resize_as_.default))
# Shapes of operators that PyTorch has no function for.
_OWN_SHAPES: dict[Any, Callable[..., Any]] = {
    _ATEN.multi_margin_loss_backward.default: lambda grad, given, *_, **__: torch.empty_like(given),
    _ATEN.multilabel_margin_loss_backward.default: lambda grad, given, *_, **__: torch.empty_like(
        given
    ),
    _ATEN.fractional_max_pool3d_backward.default: lambda grad, given, *_, **__: torch.empty_like(
        given
    ),
    _ATEN.geqrf.default: lambda given: (
        torch.empty_like(given.mT).mT,
        given.new_empty((*given.shape[:-2], min(given.shape[-2:]))),
    ),
    _ATEN._ctc_loss.default: lambda *args, **_: _ctc_loss(*args[:4]),
    _ATEN._ctc_loss.Tensor: lambda *args, **_: _ctc_loss(*args[:4]),
    _ATEN._ctc_loss_backward.default: lambda grad, logits, *_, **__: torch.empty_like(logits),
    _ATEN._ctc_loss_backward.Tensor: lambda grad, logits, *_, **__: torch.empty_like(logits),
}
_BACKWARD = torch.autograd._engine_run_backward.__code__
_DISABLED = "torch._dynamo.eval_frame"  # where torch._dynamo.disable calls what it wraps
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})


class OperatorRules(NamedTuple):
    """An operator, and whose affair it is.

    The kernels', that of known values, of :func:`in_place`, of workspaces, of :func:`resizable`.
    """

    func: Any  # kept, so that nothing else gets its address
    concerned: bool
    of_values: bool
    into_zeros: bool
    of_workspaces: bool
    may_resize: bool

    @classmethod
    def of(cls, func: Any, concerned: bool) -> OperatorRules:
        may_resize = func in _RESIZING or any(
            argument.is_out for argument in func._schema.arguments
        )
        return cls(func, concerned, func in ASKED, func in _IN_PLACE, func in NOTED, may_resize)


def resizable(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[torch.UntypedStorage, int]]:
    """Storages that an operator may make larger, with their sizes: that of ``resize_``, and those given as ``out``."""
    given = [args[0]] if func in _RESIZING else []
    for argument in func._schema.arguments:
        if argument.is_out and (value := kwargs.get(argument.name)) is not None:
            given += value if isinstance(value, (list, tuple)) else [value]
    storages = [item.untyped_storage() for item in given if item.layout is torch.strided]
    return [(storage, storage.nbytes()) for storage in storages]


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
        self._kinds: dict[
            int, tuple[str, Any]
        ] = {}  # by the operator's address: PyTorch hashes them in Python
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
            return (
                None
                if all(item.device.type == "meta" for item in args[0])
                else func(*args, **kwargs)
            )
        try:
            named = ((name, _signature((value,))) for name, value in kwargs.items())
            key = (
                func._name,
                torch.get_default_dtype(),
                _signature(args),
                *named,
            )  # of what is made without a dtype
            known = self._outputs.get(key)
        except (
            TypeError,
            RuntimeError,
        ):  # an argument without a signature, such as a sparse tensor
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
        own = _OWN_SHAPES.get(func)
        output = (
            func(*args, **kwargs)
            if own is None or not args[1 % len(args)].is_meta
            else own(*args, **kwargs)
        )
        return output if self._corrected is None else self._corrected(func, args, output)


def _ctc_loss(
    logits: torch.Tensor, targets: torch.Tensor, _: Any, lengths: Sequence[int] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss for each text, and what its gradient needs: ATen ``native/LossCTC.cpp``, ``ctc_loss_allocate_outputs``."""
    longest = targets.shape[-1] if isinstance(lengths, torch.Tensor) else max(lengths)
    steps, batch = logits.shape[:2]
    return logits.new_empty(batch), logits.new_empty((batch, steps, 2 * longest + 1))


def in_place(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_new: Callable[[torch.Tensor], bool],
) -> Any:
    """The operator that a device runs where a dispatch mode is asked about ``func``.

    Another one only in formulas of autograd's own: no Python code runs in between, but for the wrapper that keeps the
    tracker from Dynamo where a compiled step is followed (:mod:`.frames`). And where the engine sums two gradients of
    one tensor: it adds to the first if nobody else holds that (``torch/csrc/autograd/input_buffer.cpp``,
    ``can_accumulate_inplace``). ``is_new``: whether a tensor was made by the node of autograd that runs now.
    """
    written, nodes = _IN_PLACE[func]
    node = torch._C._current_autograd_node()
    name = node.name() if node is not None else None
    if torch.is_grad_enabled() or name in _NEVER_IN_PLACE:
        return func
    if nodes is not None:
        summed = (
            func is _ADD
            and name
            and _sums_into(args, kwargs)
            and (name in _WITHOUT_SUMS or not is_new(args[0]))
        )
        if name not in nodes and not summed:
            return func
    caller = sys._getframe(1).f_back
    while caller is not None and caller.f_globals.get("__name__") == _DISABLED:
        caller = caller.f_back
    return written if caller is None or caller.f_code is _BACKWARD else func


def _sums_into(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the engine may add the second of two gradients to the first, which nobody else holds."""
    if (
        kwargs
        or len(args) != 2
        or not isinstance(args[1], torch.Tensor)
        or _holders(args) != sole_holder()
    ):
        return False
    first, second = args
    alike = (
        first.shape == second.shape
        and first.dtype == second.dtype
        and first.layout == second.layout
    )
    return alike and first.layout is torch.strided and _extent(first) == first.numel()


def _holders(args: Sequence[Any]) -> tuple[int, int, int]:
    """Who holds the first of an operator's arguments: tensors, Python's names, storages."""
    return (
        args[0]._use_count(),
        sys.getrefcount(args[0]),
        torch._C._storage_Use_Count(args[0].untyped_storage()._cdata),
    )


@cache
def sole_holder() -> tuple[int, int, int] | None:
    """What :func:`_holders` says where the engine alone holds a gradient, seen at a sum that surely is such a one.

    To be called first where no dispatch mode runs an operator: there autograd is off.
    """
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
        ) -> Any:
            if func is _ADD and not torch.is_grad_enabled():
                seen.append(_holders(args))
            return func(*args, **kwargs or {})

    if not hasattr(torch.Tensor, "_use_count"):
        return None
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), Watching():
        start = torch.ones(2, requires_grad=True, device="cpu")
        torch.autograd.grad((start.exp() * start.sin()).sum(), start)
    return seen[0] if len(seen) == 1 else None


def _same_dtype(operands: Sequence[torch.Tensor]) -> None:
    """Refuse a product that every device refuses; on ``meta`` only shapes are checked."""
    if len({operand.dtype for operand in operands}) > 1:
        dtypes = ", ".join(short(operand.dtype) for operand in operands)
        raise RuntimeError(
            f"the operands of a matrix product differ in dtype ({dtypes}), and no autocast is on"
        )


def _kind(func: Any) -> str:
    """``view``: outputs share storage with inputs; ``in place``, one tensor or lists; ``new``: outputs are new."""
    returns = func._schema.returns
    if func._schema.name.startswith(
        ("aten::_foreach_", "aten::_fused_")
    ) and func._schema.name.endswith("_"):
        return "in place, lists"
    if any(item.alias_info is not None for item in returns) or not returns:
        first = func._schema.arguments[0] if func._schema.arguments else None
        written = first is not None and first.alias_info is not None and first.alias_info.is_write
        plain = torch.Tag.pointwise in func.tags or func._schema.name in (
            "aten::copy_",
            "aten::zero_",
            "aten::fill_",
        )
        return (
            "in place"
            if written and plain and len(returns) == 1 and str(first.type) == "Tensor"
            else "view"
        )
    return "new"


def _share_storage(output: Any, args: tuple) -> bool:
    if any(isinstance(item, torch.Tensor) and item.layout is not torch.strided for item in args):
        return False
    inputs = {item.untyped_storage()._cdata for item in args if isinstance(item, torch.Tensor)}
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return any(
        isinstance(item, torch.Tensor) and item.untyped_storage()._cdata in inputs
        for item in outputs
    )


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
        plain = (
            output.device.type == "meta"
            and output.storage_offset() == 0
            and _fills_its_storage(output)
        )
        return (output.shape, output.stride(), output.dtype) if plain else ()
    if isinstance(output, tuple):
        items = [None if item is None else _layout(item) for item in output]
        return () if () in items or any(type(item) is list for item in items) else items
    return ()


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    return (
        tensor.untyped_storage().nbytes()
        == (_extent(tensor) if tensor.numel() else 0) * tensor.element_size()
    )


def _extent(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
