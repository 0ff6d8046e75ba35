"""What this machine computes with, found without torch and before any job starts: CUDA devices, and bf16."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

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
    """Refuse ``cuda`` where there is none, and more GPUs than there are; ``auto`` is the CPU where there is none."""
    if wanted == "cpu" or (found := cuda_devices()) >= gpus or (wanted == "auto" and not found):
        return
    if not found:
        raise UserError(
            "No CUDA device was found, and no job was started.",
            where="training.device in the configuration",
            found="cuda",
            allowed="auto, cpu; or cuda on a machine with a GPU and its driver",
            write="training:\n  device: auto",
        )
    raise UserError(
        f"The training is for {gpus} GPUs, and this machine has {found}.",
        where="training.parallel.gpus in the configuration",
        found=gpus,
        allowed=f"1 to {found} (CUDA_VISIBLE_DEVICES may hide others); or device: cpu, on which processes can share",
        write=f"parallel: {{strategy: fsdp2, gpus: {found}}}" if found > 1 else "parallel: {strategy: none, gpus: 1}",
    )
