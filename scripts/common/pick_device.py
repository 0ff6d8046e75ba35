"""The device that a job computes on, as PyTorch sees it."""

from __future__ import annotations

from will_it_fit.common.device import refuse_missing
from will_it_fit.common.errors import UserError


def pick_device(wanted: str, gpus: int = 1) -> str:
    """``auto`` is CUDA when there is one; asking for CUDA where there is none, or for more GPUs, is an error."""
    import torch

    refuse_missing(wanted, gpus)
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
