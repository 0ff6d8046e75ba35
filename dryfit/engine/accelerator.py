"""What PyTorch's C++ asks about CUDA, answered on a build without it.

Autograd of fake tensors on ``cuda`` asks for the device's guard and for the hooks of the accelerator; a CPU build has
neither. ``native/accelerator.cpp`` is compiled once, in about three seconds. It puts a guard that does nothing in the
empty place of CUDA's, and answers two questions of the hooks. Both are put back. A build with CUDA has its own, and is
left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .errors import TraceError
from .native_library import SOURCES, NotCompiled, Sources

_depth = 0


@contextmanager
def accelerator() -> Iterator[None]:
    """Let PyTorch's C++ believe in a GPU inside; nested, the outermost counts.

    Raises :class:`TraceError` if the library is needed and can't be compiled.
    """
    global _depth
    if torch.backends.cuda.is_built():
        yield
        return
    library = _library()
    if not _depth:
        library.simulate(True)
    _depth += 1
    try:
        with torch.autograd.set_multithreading_enabled(
            False
        ):  # there is no thread for the card that isn't
            yield
    finally:
        _depth -= 1
        if not _depth:
            library.simulate(False)


@cache
def _library() -> Any:
    # Autograd counts devices once, when it first runs: before there is one that has no threads.
    torch.ones(1, requires_grad=True, device="cpu").sum().backward()
    root = Path(torch.__file__).parent
    sources = Sources(
        [SOURCES / "accelerator.cpp"],
        compilers=("g++", "clang++"),
        variable="CXX",
        flags=[
            "-O1",
            "-std=c++20",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-I{root}/include",
        ],
        links=[f"-L{root}/lib", "-lc10", "-ltorch_cpu"],
        also=torch.__version__,
    )
    try:
        return sources.load()
    except NotCompiled as reason:
        raise TraceError(
            "A compiled step is followed for a GPU with the help of a small library, which can't be compiled:"
            f" {reason}.",
            "Install g++, or name a compiler that knows C++20 in CXX; or write compiled='eager' for the figure without"
            " torch.compile.",
        ) from None
