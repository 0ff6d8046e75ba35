"""Whether this machine has a CUDA device, asked of the driver: without torch, and before any job starts."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from scripts.common.errors import UserError


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


def refuse_missing(wanted: Iterable[str]) -> None:
    """Refuse ``cuda`` among the wanted devices where there is none."""
    if "cuda" in set(wanted) and not cuda_devices():
        raise UserError(
            "No CUDA device was found, and no job was started.",
            where="training.device in the configuration",
            found="cuda",
            allowed="auto, cpu; or cuda on a machine with a GPU and its driver",
            write="training:\n  device: auto",
        )


def pick_device(wanted: str) -> str:
    """``auto`` is CUDA when there is one; asking for CUDA where there is none is an error."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "No CUDA device was found.",
            where="training.device",
            found=wanted,
            allowed="auto, cpu; or cuda on a machine with a GPU and a CUDA build of torch",
            write="training:\n  device: auto",
        )
    return wanted
