"""Records what a program's own training steps take on the GPU, from within the program.

``dryfit measure ... -- python train.py`` lets Python import this file before the program, which is not changed.
It needs the standard library alone. PyTorch calls :meth:`Recorder.after_update` after each optimizer's step. After
:data:`UPDATES` of them the record is written and the program ends.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

UPDATES = 3  # the first makes the optimizer's states; the others are like all that follow
TARGET = "DRYFIT_RECORD"  # the environment's name of the file to write
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
_OPTIMIZER = "torch.optim.optimizer"


class RunRecorder:
    """Counts updates, and notes for each its time and the allocator's peaks.

    Attributes
    ----------
    updates
        Of each: ``seconds`` since the one before it (None of the first), ``allocated_bytes`` and ``reserved_bytes``,
        the peaks since then; None without a GPU.
    """

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self._last: float | None = None

    def after_update(self) -> None:
        """Note an update that has just been made."""
        import torch

        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.updates.append(
            {
                "seconds": None if self._last is None else now - self._last,
                "allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
                "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
            }
        )
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._last = time.perf_counter()

    def to_mapping(self) -> dict[str, Any]:
        """The record: the updates, the device, and the versions of what ran."""
        return {
            "form": 1,
            "updates": self.updates,
            "device": _device(),
            "platform": sys.platform,
            "versions": {name: found for name in VERSIONS if (found := _version(name))},
        }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _device() -> dict[str, Any] | None:
    """The GPU: its name, its memory, what the CUDA context holds beside the allocator; None without one."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return {
        "name": about.name,
        "total_bytes": total,
        "capability": [about.major, about.minor],
        "beside_allocator_bytes": total - free - torch.cuda.memory_reserved(),
        "gpus": int(os.environ.get("WORLD_SIZE", "1")),
    }


def install() -> None:
    """Record the program that is about to start, if the environment names a file."""
    if TARGET in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        sys.meta_path.insert(0, _AfterOptimizers())


class _AfterOptimizers(importlib.abc.MetaPathFinder):
    """Lets PyTorch call after each update, as soon as the program imports its optimizers."""

    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _OPTIMIZER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def executed(module: Any) -> None:
                run(module)
                _follow(module)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def _follow(optimizers: Any) -> None:
    recorder, target = RunRecorder(), Path(os.environ[TARGET])

    def after(*_: Any) -> None:
        recorder.after_update()
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(recorder.to_mapping()), encoding="utf-8")
        os.replace(partial, target)
        if len(recorder.updates) == UPDATES:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # nothing is saved: the program was run to be measured

    optimizers.register_optimizer_step_post_hook(after)
