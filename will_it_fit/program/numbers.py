"""Numbers that a program reads of tensors without values: what they are taken for, where, and what they decided.

Most are losses for a log, and any number does. So ``.item()`` gives one that remembers its line. Where the program
compares it, turns it into a whole number or asks whether it is true, the value decides something, and the answer says
so: the line, and what to write for another value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from will_it_fit.engine.known_values import without_masks

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

    Parameters
    ----------
    answers
        Values by line, ``train.py:57``.
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
            (value for line, value in self._answers.items() if where == line or where.endswith(f"/{line}")), None
        )

    def places(self) -> list[tuple[Any, str, Any]]:
        """Patches: ``Tensor.item`` gives numbers that remember where they were read."""
        item, shown = torch.Tensor.item, torch.Tensor.__format__

        def read_item(tensor: torch.Tensor) -> Any:
            self.last = None
            value = item(tensor)
            return StandIn(value, self.last) if self.last is not None and isinstance(value, float) else value

        def formatted(tensor: torch.Tensor, form: str) -> str:
            return format(tensor.item(), form) if tensor.is_meta and not tensor.dim() else shown(tensor, form)

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


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
for _name in (*(f"__{side}{each}__" for each in _BINARY for side in ("", "r")), "__neg__", "__abs__"):
    setattr(StandIn, _name, _computes(_name))
for _name in (
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__eq__",
    "__ne__",
    "__bool__",
    "__int__",
    "__trunc__",
    "__round__",
):
    setattr(StandIn, _name, _decides(_name))
