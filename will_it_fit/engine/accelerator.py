"""What PyTorch's C++ asks about CUDA, answered on a build without it.

Autograd of fake tensors on ``cuda`` asks for the device's guard and for the hooks of the accelerator; a CPU build has
neither. A library of forty lines is compiled once, in about three seconds, and kept where PyTorch keeps what it
compiles. It puts a guard that does nothing in the empty place of CUDA's, and answers two questions of the hooks; both
are put back. A build with CUDA has its own, and is left alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from .errors import TraceError

# The hooks' object is made when PyTorch starts, and nobody can replace it. Its table of virtual functions is that of
# another object of a class below the same base, for a while: both have no members. The compiler knows the places.
_SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>

namespace {
using c10::DeviceType;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }  // no thread of autograd is started for it
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

const Guard guard;
const Hooks hooks;
const c10::impl::DeviceGuardImplInterface* guard_before = nullptr;
void* table_before = nullptr;
}  // namespace

extern "C" void simulate(bool on) {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  auto& place = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  void* object = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  if (on) {
    guard_before = place.exchange(&guard);
    std::memcpy(&table_before, object, sizeof(void*));
    std::memcpy(object, static_cast<const void*>(&hooks), sizeof(void*));
  } else {
    place.store(guard_before);
    std::memcpy(object, &table_before, sizeof(void*));
  }
}
"""
_depth = 0


@contextmanager
def accelerator() -> Iterator[None]:
    """Let PyTorch's C++ believe in a GPU inside; nested, the outermost counts.

    Raises
    ------
    TraceError
        If the library is needed and can't be compiled.
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
        with torch.autograd.set_multithreading_enabled(False):  # there is no thread for the card that isn't
            yield
    finally:
        _depth -= 1
        if not _depth:
            library.simulate(False)


@cache
def _library() -> ctypes.CDLL:
    # Autograd counts devices once, when it first runs: before there is one that has no threads.
    torch.ones(1, requires_grad=True, device="cpu").sum().backward()
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise TraceError(
            "A compiled step is followed for a GPU with the help of a small library, and there is no C++ compiler to"
            " compile it.",
            "Install g++ or name a compiler in CXX; or write compiled='eager' for the figure without torch.compile.",
        )
    key = hashlib.sha256(f"{_SOURCE}{torch.__version__}{compiler}".encode()).hexdigest()[:16]
    path = Path(cache_dir(), f"accelerator-{key}.so")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, path: Path) -> None:
    """Compile the library beside its place and move it there: another process may do the same."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder, "accelerator.cpp"), Path(folder, "accelerator.so")
        source.write_text(_SOURCE, encoding="utf-8")
        strings = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", strings, str(source), "-o", str(made)]
        command += [f"-I{root}/include", f"-L{root}/lib"]
        result = subprocess.run([*command, "-lc10", "-ltorch_cpu"], capture_output=True, text=True, check=False)
        if result.returncode:
            raise TraceError(
                f"The library that compiled steps need can't be compiled: {result.stderr.strip()[-300:]}",
                "Name a compiler that knows C++20 in CXX; or write compiled='eager' for the figure without"
                " torch.compile.",
            )
        made.replace(path)
