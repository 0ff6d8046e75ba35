"""Lines of a program: what a person who wrote it looks for, and not those of libraries below."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_OWN = (
    "engine",
    "program",
)  # packages of this library that follow a program; a program may use the others
_LIBRARY = Path(__file__).parents[1]
_ENGINE = tuple(str(_LIBRARY / name) for name in _OWN)
_TORCH = str(Path(torch.__file__).parent)
_STANDARD = sysconfig.get_path("stdlib")
_PACKAGES = ("site-packages", "dist-packages")


def frames_above(depth: int = 1) -> Iterator[FrameType]:
    """The frames that led here, the innermost first, without those of this library and of PyTorch."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(("<", *_ENGINE, _TORCH)) and "torchinductor" not in name:
            yield frame
        frame = frame.f_back


def is_library(frame: FrameType) -> bool:
    """Whether a frame belongs to an installed package or to Python."""
    name = frame.f_code.co_filename
    return any(part in name for part in _PACKAGES) or name.startswith((_STANDARD, str(_LIBRARY)))


def described(frame: FrameType | None) -> str:
    """``file:line in function``, the file as it is called below the working folder or the installed packages."""
    if frame is None:
        return ""
    return f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def short_path(path: str) -> str:
    """A path as a person would write it: below the installed packages, the working folder, or beside that one."""
    for folder in ("site-packages/", "dist-packages/", f"{Path.cwd()}/"):
        path = path.rpartition(folder)[2]
    beside = f"{Path.cwd().parent}/"
    return f"../{path.removeprefix(beside)}" if path.startswith(beside) and beside != "/" else path


def asking_package(depth: int) -> str:
    """The package whose code asks, by the frame so far above."""
    names: dict[str, Any] = sys._getframe(depth).f_globals
    first, *rest = names.get("__name__", "").split(".")
    return "program" if first == "dryfit" and rest[:1] not in ([name] for name in _OWN) else first
