"""What this machine computes with, found without torch and before any job starts: CUDA devices, bf16, the allocator."""

import ctypes
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.terminal import log

ALLOCATOR_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)  # the first one from PyTorch 2.9 on
# Versions of CUDA that PyTorch has builds for, by the names of its package index.
_BUILDS = ((11, 8), (12, 6), (12, 8), (13, 0))
EXPANDABLE = "expandable_segments"


def cuda_devices() -> int:
    """How many devices the driver shows (CUDA_VISIBLE_DEVICES applies); 0 without a driver.

    ``cuInit`` and ``cuDeviceGetCount`` of the CUDA driver API; both return 0 for success.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if ready else 0


def driver_cuda_version() -> str | None:
    """The newest CUDA that the driver runs, ``12.4``; None without a driver (``cuDriverGetVersion``)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def install_line(driver: str | None) -> str:
    """The command that installs a PyTorch which a driver's CUDA can run."""
    newest = tuple(map(int, driver.split("."))) if driver else _BUILDS[-1]
    fitting = [build for build in _BUILDS if build <= newest]
    if not fitting:
        return "update the driver: no current PyTorch is built for its CUDA"
    major, minor = fitting[-1]
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu{major}{minor}"


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies matrices faster in bf16 than in fp32, by what the kernel lists of it.

    AMX does, and AMD's AVX512-BF16. Intel's AVX512-BF16 alone does not: one thread of a Xeon without AMX reached 84
    GFLOPS in bf16 and 162 in fp32 (2048 x 576 x 1536), though PyTorch says of it that bf16 is supported.
    """
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:  # not Linux
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return "amx_bf16" in known or ("avx512_bf16" in known and "AuthenticAMD" in text)


def refuse_missing(wanted: str, gpus: int = 1) -> None:
    """Refuse ``cuda`` on a machine without a GPU, and more GPUs than it has; ``auto`` then means the CPU."""
    if wanted == "cpu" or (count := cuda_devices()) >= gpus or (wanted == "auto" and not count):
        return
    if not count:
        raise UserError(
            "No CUDA device was found, and no job was started.",
            where="training.device in the configuration",
            found="cuda",
            allowed="auto, cpu; or cuda on a machine with a GPU and its driver",
            write="training:\n  device: auto",
        )
    raise UserError(
        f"The training is for {gpus} GPUs, and this machine has {count}.",
        where="training.parallel.gpus in the configuration",
        found=gpus,
        allowed=f"1 to {count} (CUDA_VISIBLE_DEVICES may hide others); or device: cpu, on which processes can share",
        write=f"parallel: {{strategy: fsdp2, gpus: {count}}}"
        if count > 1
        else "parallel: {strategy: none, gpus: 1}",
    )


def expandable_segments_here(device: str) -> bool:
    """Whether our own training has the allocator's segments grow: on CUDA, unless the environment says otherwise.

    PyTorch has them on Linux alone. Where ``auto`` finds no GPU the answer is the same, so that a machine that plans
    and one that trains agree; on the CPU nothing follows from it.
    """
    said = " ".join(os.environ.get(name, "") for name in ALLOCATOR_VARIABLES)
    return device != "cpu" and sys.platform != "win32" and f"{EXPANDABLE}:False" not in said


def _torch_version() -> tuple[int, int]:
    """Major and minor version of the installed PyTorch, which is not imported; (2, 9) where none is installed."""
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return 2, 9
    return int(major), int(minor)


def set_allocator(expandable: bool) -> None:
    """Let PyTorch's caching allocator work as the trace assumed; before torch is imported.

    What the environment says of expandable segments stays, and is named where it contradicts; its other settings stay
    beside ours.
    """
    wanted = f"{EXPANDABLE}:{expandable}"
    ours = ALLOCATOR_VARIABLES[_torch_version() < (2, 9)]  # 2.7 and 2.8 pass over the new name
    name = next((name for name in ALLOCATOR_VARIABLES if os.environ.get(name)), ours)
    given = os.environ.get(name, "")
    if EXPANDABLE not in given:
        os.environ[name] = ",".join(filter(None, (given, wanted)))
    elif wanted not in given:
        log.warning(
            "%s=%s in the environment; the memory was predicted with %s", name, given, wanted
        )
