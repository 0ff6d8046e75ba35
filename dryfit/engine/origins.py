"""Where the tensors that are alive at the peak come from: module, line and operator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .model_tensors import parts

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: what a person needs to find it.

    ``module``: qualified name of the innermost module that was running ("" outside all of them; for what the backward
    pass makes, that of the forward operator); ``line``: the innermost line outside PyTorch, ``file:line in function``;
    ``operator``: what made it, or the parameter's or buffer's own name.
    """

    shape: tuple[int, ...]
    dtype: str
    module: str
    line: str
    operator: str


NOWHERE = Origin(
    (), "", "", "", ""
)  # of what no tensor stands for: workspaces, temporaries inside a kernel


class Origins:
    """Notes the :class:`Origin` of each tensor that a :class:`Tracker` sees.

    A gradient is made by the autograd engine, which runs no line of the model: PyTorch numbers the operators of the
    forward pass, and the node that is running knows its number.

    ``model``: gives the modules, parameters and buffers their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[int, Origin] = {}
        self._modules: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._running: list[str] = []
        self._forward: dict[int, tuple[str, str]] = {}  # module and line by the operator's number
        self._here = f"{Path.cwd()}/"  # asked once, and not at each allocation
        self.learn(model)

    def learn(self, model: nn.Module) -> None:
        """Take the names of a model's modules, parameters and buffers."""
        self._modules.update((id(module), name) for name, module in model.named_modules())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names.update((part.untyped_storage()._cdata, name) for part in parts(tensor))

    def note_existing(self, identity: int, tensor: torch.Tensor) -> None:
        """A parameter, a buffer, or what hangs on one."""
        name = self._names.get(tensor.untyped_storage()._cdata, "")
        module, _, own = name.rpartition(".")
        self.of[identity] = Origin(tuple(tensor.shape), short(tensor.dtype), module, "", own)

    def module(self) -> str:
        """The module whose operator is running; in the backward pass that of the forward operator."""
        running = self._running[-1] if self._running else ""
        node = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():
            return running
        return self._forward.get(node._sequence_nr(), (running, ""))[0]

    def note(self, identity: int, tensor: torch.Tensor, func: Any) -> None:
        """What an operator has just made."""
        module, line = self._running[-1] if self._running else "", calling_line(self._here)
        node = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():
            if (
                torch.is_grad_enabled()
            ):  # its node has been numbered; operators without one come after it
                self._forward.setdefault(torch._C._autograd._get_sequence_nr() - 1, (module, line))
        else:
            module, line = self._forward.get(node._sequence_nr(), (module, line))
        name = func._schema.name + (
            " (backward)" if node is not None and not torch.is_grad_enabled() else ""
        )
        self.of[identity] = Origin(tuple(tensor.shape), short(tensor.dtype), module, line, name)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Know which module is running."""

        def enter(module: nn.Module, *_: Any) -> None:
            self._running.append(self._modules.get(id(module), type(module).__name__))

        def leave(*_: Any) -> None:
            if self._running:
                self._running.pop()

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def short(dtype: torch.dtype) -> str:
    """A dtype's name, ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def calling_frame() -> FrameType | None:
    """The innermost frame outside PyTorch and this folder."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    return frame


def calling_line(here: str) -> str:
    """The line of :func:`calling_frame`, its file as it is called below the installed packages or a folder."""
    frame = calling_frame()
    if frame is None:
        return ""
    return f"{_short(frame.f_code.co_filename, here)}:{frame.f_lineno} in {frame.f_code.co_name}"


@cache
def _short(path: str, here: str) -> str:
    for folder in ("site-packages/", "dist-packages/", here):
        path = path.rpartition(folder)[2]
    return path
