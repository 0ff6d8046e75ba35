"""The adapter as it starts, where its factors are taken out of the base's weights (PiSSA, OLoRA).

Such an adapter belongs to a base without these factors, which nobody else has. PEFT turns it into a plain adapter of
the base as it was (``save_pretrained`` with ``path_initial_model_for_weight_conversion``): its factors are ``[A, A0]``
and ``[B, -B0]``, with ``A0`` and ``B0`` as they started, and its rank is twice the trained one. So the start is kept
until the adapter is saved.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dryfit.common.files import atomic_folder
from dryfit.common.terminal import log
from dryfit.scenario.scenario import Scenario

NAME = "start"  # of the folder, and PEFT's of the adapter while it is converted
WEIGHTS = "adapter_model.safetensors"


def start_folder(checkpoint: Path) -> Path:
    """Where a training keeps its adapter's start: beside its checkpoint, which each save replaces whole."""
    return checkpoint.with_name(f"{checkpoint.name}-{NAME}") / NAME


def keep_start(model: Any, scenario: Scenario, checkpoint: Path) -> Path | None:
    """Keep the adapter of a model that was just built; None where it is taken out of nothing.

    A checkpoint belongs to the start that it began with. Where another processor or library computes other factors, the
    base is another one too, and the checkpoint is dropped.
    """
    if scenario.lora is None or not scenario.lora.takes_from_base:
        return None
    folder = start_folder(checkpoint)
    before = folder / WEIGHTS
    if before.is_file() and not _same(model, before):
        log.warning(
            "This machine takes other factors out of the base than the checkpoint in %s began with, so training starts"
            " from the beginning.",
            checkpoint,
        )
        shutil.rmtree(checkpoint, ignore_errors=True)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
    return folder


def remove_start(checkpoint: Path) -> None:
    """Remove what :func:`keep_start` has kept, when the adapter is saved."""
    shutil.rmtree(start_folder(checkpoint).parent, ignore_errors=True)


def _same(model: Any, kept: Path) -> bool:
    """Whether a model's adapter is the kept one, to the last bit."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    before, now = load_file(kept), get_peft_model_state_dict(model)
    if before.keys() != now.keys():
        return False
    return all(torch.equal(now[name].cpu(), tensor) for name, tensor in before.items())
