"""Numbers that a program reads of tensors without values: what they are taken for, where, and what they decided.

Most are losses for a log, and any number does. So ``.item()`` gives one that remembers its line. Where the program
compares it, turns it into a whole number or asks whether it is true, the value decides something, and the answer says
so: the line, and what to write for another value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dryfit.engine.known_values import LIMIT, Values, without_masks

from .places import described, frames_above, is_library, short_path

STAND_IN = 1.0
_aten = torch.ops.aten


@dataclass
class Read:
    """A line that reads numbers: how often, what it was given, and whether that decided something."""

    line: str
    value: float
    times: int = 0
    decided: bool = False
    by_library: bool = False

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


class Numbers:
    """What is read of tensors whose values nobody knows.

    ``answers``: values by line, ``train.py:57``.
    """

    def __init__(self, answers: Mapping[str, float]) -> None:
        self._answers = dict(answers)
        self.reads: dict[str, Read] = {}
        self.last: Read | None = None

    def answer(self, kind: torch.dtype) -> float:
        """What a number is, where the program reads one now."""
        frame = next(frames_above(2), None)
        line = described(frame)
        read = self.reads.get(line)
        if read is None:
            value = self._asked_value(frame)
            read = self.reads[line] = Read(line, STAND_IN if value is None else value)
            read.by_library = frame is not None and is_library(frame)
        read.times += 1
        if kind == torch.bool:
            read.decided = True
        self.last = read
        return read.value

    def choice(self, func: Any, args: tuple) -> Any:
        """What an operator that chooses by values gives, by the share that a person named; None: nobody did."""
        frame = next(frames_above(2), None)
        share, line = self._asked_value(frame), described(frame)
        if share is None:
            return None
        read = self.reads.setdefault(line, Read(line, share, decided=True))
        read.times += 1
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
            return func(args[0], without_masks(args[1], share), *args[2:])
        shapes = (each.shape for each in args if isinstance(each, torch.Tensor))
        count = round(share * torch.broadcast_shapes(*shapes).numel())
        if func is _aten.nonzero.default:
            return args[0].new_empty((count, args[0].dim()), dtype=torch.long)
        return args[0].new_empty((count,)) if func is _aten.masked_select.default else None

    def _asked_value(self, frame: Any) -> float | None:
        if frame is None:
            return None
        where = f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno}"
        return next(
            (
                value
                for line, value in self._answers.items()
                if where == line or where.endswith(f"/{line}")
            ),
            None,
        )

    def places(self) -> list[tuple[Any, str, Any]]:
        """Patches: ``Tensor.item`` gives numbers that remember where they were read."""
        item, shown = torch.Tensor.item, torch.Tensor.__format__

        def read_item(tensor: torch.Tensor) -> Any:
            self.last = None
            value = item(tensor)
            return (
                StandIn(value, self.last)
                if self.last is not None and isinstance(value, float)
                else value
            )

        def formatted(tensor: torch.Tensor, form: str) -> str:
            return (
                format(tensor.item(), form)
                if tensor.is_meta and not tensor.dim()
                else shown(tensor, form)
            )

        return [(torch.Tensor, "item", read_item), (torch.Tensor, "__format__", formatted)]


class StandIn(float):
    """A number that nobody knows. It counts like any other, and tells where it came from when it decides something."""

    read: Read

    def __new__(cls, value: float, read: Read) -> StandIn:
        made = super().__new__(cls, value)
        made.read = read
        return made

    def __reduce__(self) -> tuple:
        return float, (float(self),)

    def __hash__(self) -> int:
        return super().__hash__()


def _computes(name: str) -> Callable[..., Any]:
    function = getattr(float, name)

    def computed(self: StandIn, *others: Any) -> Any:
        value = function(self, *others)
        return StandIn(value, self.read) if type(value) is float else value

    return computed


def _decides(name: str) -> Callable[..., Any]:
    function = getattr(float, name)

    def decided(self: StandIn, *others: Any) -> Any:
        self.read.decided = True
        return function(self, *others)

    return decided


# --- what is finite -------------------------------------------------------------------------------------------------

# How PyTorch 2.13 writes the questions: isnan `x != x`, isinf `abs(x) == inf`, isfinite `(x == x) * (abs(x) != inf)`.
_WITH_ITSELF = {_aten.eq.Tensor: True, _aten.ne.Tensor: False}
_WITH_INFINITY = {
    _aten.eq.Scalar: False,
    _aten.ne.Scalar: True,
    _aten.lt.Scalar: True,
    _aten.gt.Scalar: False,
}
_OWN_QUESTIONS = {
    getattr(_aten, name).default: False for name in ("isnan", "isinf", "isposinf", "isneginf")
}
_COMBINED: dict[Any, Callable[..., bool]] = {
    **dict.fromkeys((_aten.logical_not.default, _aten.bitwise_not.default), lambda one: not one),
    **dict.fromkeys(
        (_aten.mul.Tensor, _aten.logical_and.default, _aten.bitwise_and.Tensor),
        lambda one, other: one and other,
    ),
    **dict.fromkeys(
        (_aten.logical_or.default, _aten.bitwise_or.Tensor), lambda one, other: one or other
    ),
}
_REDUCED = frozenset(
    (
        _aten.any.default,
        _aten.any.dim,
        _aten.any.dims,
        _aten.all.default,
        _aten.all.dim,
        _aten.all.dims,
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.clone.default,
        _aten.detach.default,
        _aten.alias.default,
    )
)
_COUNTED = frozenset((_aten.sum.default, _aten.count_nonzero.default))


class Finite:
    """Numbers that nobody knows are finite: ``isnan`` and ``isinf`` are false of each, ``isfinite`` is true.

    A program that stops at the first loss that is none would else stop at once.
    """

    def __init__(self, values: Values) -> None:
        self._values, self._busy = values, False

    def body(self, func: Any, args: tuple) -> Callable[..., Any] | None:
        """What an operator is that asks for it, or goes on with the answer; None: it does neither."""
        if self._busy or not args or not isinstance(args[0], torch.Tensor):
            return None
        answer = self._answer(func, args)
        if answer is None:
            if func._schema.is_mutable and hasattr(args[0], "every_element"):
                del args[0].every_element
            return None
        if func in _COUNTED:
            return lambda *args, **kwargs: self._known(func, args, kwargs, answer * args[0].numel())
        if func is _aten._local_scalar_dense.default or func is _aten.is_nonzero.default:
            return lambda *_, **__: answer

        def compared(*args: Any, **kwargs: Any) -> Any:
            on_host = not any(isinstance(each, torch.Tensor) and each.is_meta for each in args)
            self._busy = True
            try:
                made = func(*args, **kwargs)
                if on_host:  # a stand-in for what was brought there: its shape alone is right
                    made = torch.full(made.shape, answer, dtype=torch.bool)
                elif made.numel() <= LIMIT and func not in _REDUCED | _COMBINED.keys():
                    self._values.remember(made, torch.full(made.shape, answer, dtype=torch.bool))
            finally:
                self._busy = False
            made.every_element = answer
            return made

        return compared

    def _known(self, func: Any, args: tuple, kwargs: dict, value: int) -> torch.Tensor:
        self._busy = True
        try:
            made = func(*args, **kwargs)
            self._values.remember(made, torch.full(made.shape, value, dtype=made.dtype))
        finally:
            self._busy = False
        return made

    def _answer(self, func: Any, args: tuple) -> bool | None:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        told = [getattr(each, "every_element", None) for each in tensors]
        if func in _COMBINED and None not in told and tensors[0].dtype == torch.bool:
            return _COMBINED[func](*told)
        if (
            func in _REDUCED or func in _COUNTED or func is _aten._local_scalar_dense.default
        ) and told[0] is not None:
            return told[0] if tensors[0].is_meta and tensors[0].numel() else None
        if not tensors[0].dtype.is_floating_point or not self._is_unknown(tensors[0]):
            return None
        if func in _WITH_ITSELF and tensors[0] is tensors[-1] and len(tensors) == 2:
            return _WITH_ITSELF[func]
        if func in _WITH_INFINITY and isinstance(args[1], float) and math.isinf(args[1]):
            positive = args[1] > 0 or func in (_aten.eq.Scalar, _aten.ne.Scalar)
            return _WITH_INFINITY[func] == positive
        return _OWN_QUESTIONS.get(func)

    def _is_unknown(self, tensor: torch.Tensor) -> bool:
        if tensor.is_meta:
            return self._values.known(tensor) is None
        return tensor.untyped_storage()._cdata in self._values.stand_ins


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
for _name in (
    *(f"__{side}{each}__" for each in _BINARY for side in ("", "r")),
    "__neg__",
    "__abs__",
):
    setattr(StandIn, _name, _computes(_name))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "trunc", "round"):
    setattr(StandIn, f"__{_name}__", _decides(f"__{_name}__"))
