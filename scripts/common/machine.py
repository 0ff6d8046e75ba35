"""What a job may use of this machine: the device that it computes on, host memory, packages that somebody asks for."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dryfit.common.device import cuda_devices, driver_cuda_version, install_line, refuse_missing
from dryfit.common.errors import UserError

CGROUP = Path("/sys/fs/cgroup")


def pick_device(wanted: str, gpus: int = 1) -> str:
    """``auto`` is CUDA where there is a GPU. A GPU that PyTorch can't use is an error; ``cpu`` says it is not meant.

    UserError: if CUDA is asked for where there is none, or for more GPUs than there are; or if the driver shows a GPU
    and PyTorch can't use it, so that a large model would silently be trained on the CPU.
    """
    import torch

    refuse_missing(wanted, gpus)
    if wanted == "cpu" or torch.cuda.is_available():
        return "cuda" if wanted == "auto" else wanted
    if not cuda_devices():
        return "cpu"
    built, driver = torch.version.cuda, driver_cuda_version()
    raise UserError(
        "This machine has a GPU that PyTorch can't use.",
        where="training.device",
        found=f"a driver for CUDA {driver}, and torch {torch.__version__}"
        + (f" built for CUDA {built}" if built else " built without CUDA"),
        allowed="a build of PyTorch for this driver; or device: cpu, which leaves the GPU alone",
        write=install_line(driver),
    )


def host_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this machine's processes may still take; in a container or a cluster's job what its limit leaves.

    The limit of cgroup v2 (``memory.max``) of this process's own group and of those above it counts.
    """
    import psutil

    free = [psutil.virtual_memory().available]
    try:
        own = next(
            line[3:]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
    except (OSError, StopIteration):
        own = "/"
    place = cgroup / own.lstrip("/")
    for folder in (place, *place.parents):
        if not folder.is_relative_to(cgroup):
            break
        try:
            free.append(
                int((folder / "memory.max").read_text())
                - int((folder / "memory.current").read_text())
            )
        except (OSError, ValueError):  # no limit: "max"
            continue
    return max(0, min(free))


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise where the package of a tracker is not installed, before anything is computed.

    UserError: naming all that are missing, with the line that installs them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The training is to report to what is not installed: {', '.join(missing)}.",
            where="training.report_to in the configuration",
            found=list(names),
            allowed="trackers whose packages are installed; or none: report_to: []",
            write=f"pip install {' '.join(missing)}",
        )
