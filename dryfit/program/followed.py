"""What of a program is followed beside its updates: an evaluation, a save, the largest batch; and what is not.

After its last update a program goes on until it would train again. Loaders of its training data end then, as they do
at the end of an epoch, and a Trainer of transformers evaluates and saves at once. Its validation gets two batches.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import dataloader

from .batches import Batches
from .checkpoints import write_tensors
from .loop import Enough, Loop
from .places import short_path

VALIDATION_BATCHES = 2
FETCHED_AHEAD = 2  # updates whose batches a loader may have by then
MOST_EMPTY = 20  # loaders that end at once; a program that asks on would ask for ever
LEAST_SECONDS = 15.0  # what a program gets for its validation and its save; or half of the time that it took until then
# Words of a program's own text that say what it will do.
_SIGNS = {
    "validation": r"\.eval\(\)|\bevaluate\(|\bvalidat\w*\(|\bestimate_loss\(|\btrainer\.test\(",
    "saving": r"torch\.save\(|\bsave_(?:pretrained|model|checkpoint|state|file)\w*\(|\bdcp\.(?:async_)?save\(",
}
_LIGHTNING = frozenset(
    ("lightning.pytorch", "pytorch_lightning")
)  # saves at the end of an epoch, unless it is told
# What changes a step later on.
_CHANGES = {
    "unfreezing": r"requires_grad_?\s*(?:=\s*True|\(\s*(?:True)?\s*\))|\bunfreeze\w*\(",
    "averaging of weights": r"\bAveragedModel\(|\bEMA\w*\(|\bExponentialMovingAverage\(|\bModelEma\w*\(",
    "a search for the learning rate": r"\blr_find\(|\bLRFinder\(|\brange_test\(",
}


class Followed:
    """Lets a program go on after its updates, and knows what it did not come to."""

    def __init__(self, loop: Loop, program: str) -> None:
        self.batches, self._program = Batches(), program
        self._loop, self._began = loop, time.monotonic()
        self._saved = self._saves = self._evaluates = False
        self._empty, self._given = 0, {}
        self._timer: threading.Timer | None = None
        loop.on_update, loop.wants_more, loop.goes_on = (
            self.batches.updated,
            self._wants_more,
            self._goes_on,
        )

    # --- how long it goes on -----------------------------------------------------------------------------------------

    def _wants_more(self) -> bool:
        """Whether a further update shows more: one with the largest batch, which a loader may have fetched ahead."""
        given = self.batches.largest_at
        if given is None:
            return self.batches.are_missing and self._loop.more_than_asked < FETCHED_AHEAD
        return self._loop.updates < given + FETCHED_AHEAD

    def _unseen(self) -> list[str]:
        signs = self._signs()
        unseen = []
        if not self._loop.has_evaluated and (self._evaluates or "validation" in signs):
            unseen.append("validation")
        saves = self._saves or "saving" in signs or not _LIGHTNING.isdisjoint(sys.modules)
        if not self._saved and saves:
            unseen.append("saving")
        return unseen

    def _goes_on(self) -> bool:
        """Whether the program goes on after its last update, until it would train again."""
        if not self._unseen() and "transformers.trainer" not in sys.modules:
            return False
        seconds = max(LEAST_SECONDS, (time.monotonic() - self._began) / 2)
        main = ctypes.c_ulong(threading.main_thread().ident)
        stop = lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Enough))  # noqa: E731
        self._timer = threading.Timer(seconds, stop)
        self._timer.daemon = True
        self._timer.start()
        return True

    def end(self) -> None:
        """The program has ended: it is not stopped any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _stop_if_seen(self) -> None:
        if not self._unseen() or self._empty > MOST_EMPTY:
            self._loop.end()
            raise Enough

    # --- patches -----------------------------------------------------------------------------------------------------

    def places(self) -> list[tuple[Any, str, Any]]:
        """Patches of loaders, and of what writes files of weights."""
        iterator, save = dataloader._BaseDataLoaderIter, torch.save
        following, index = iterator.__next__, iterator._next_index

        def next_batch(batches: Any) -> Any:
            if not self._loop.is_beyond:
                self.batches.given(batches)
                return following(batches)
            if self.batches.is_training(batches):
                self._empty += 1
                self._stop_if_seen()
                raise StopIteration
            self._given[id(batches)] = self._given.get(id(batches), 0) + 1
            if self._given[id(batches)] > VALIDATION_BATCHES:
                raise StopIteration
            return following(batches)

        def next_index(batches: Any) -> Any:
            return self.batches.index(
                batches, index(batches), self._loop.taken, validates=self._loop.is_beyond
            )

        def saved(*args: Any, **options: Any) -> None:
            self._saved = True
            save(*args, **options)

        places = [
            (iterator, "__next__", next_batch),
            (iterator, "_next_index", next_index),
            (torch, "save", saved),
        ]
        return [*places, *self._files()]

    def _files(self) -> list[tuple[Any, str, Any]]:
        """Weights are written as files with headers alone: their content is nobody's, and may be larger than a disk."""
        try:
            import safetensors.torch as files
        except ImportError:
            return []

        def save_file(
            tensors: dict[str, torch.Tensor], filename: Any, metadata: dict[str, str] | None = None
        ) -> None:
            self._saved = True
            write_tensors(
                Path(filename),
                {name: tensor.detach().cpu() for name, tensor in tensors.items()},
                metadata,
            )

        return [(files, "save_file", save_file)]

    def of_models(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``transformers.modeling_utils``: no address of a tensor on ``meta`` says which ones are tied."""
        identify = module.id_tensor_storage

        def identified(tensor: torch.Tensor) -> tuple[Any, int, int]:
            if not tensor.is_meta:
                return identify(tensor)
            storage = tensor.untyped_storage()
            return tensor.device, storage._cdata, storage.nbytes()

        return [(module, "id_tensor_storage", identified)]

    def of_trainer(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``transformers.trainer``: after the last update it evaluates and saves, if it ever would."""
        kind = module.Trainer
        after_step = kind._maybe_log_save_evaluate

        def maybe(trainer: Any, *args: Any, **options: Any) -> None:
            control, settings = trainer.control, trainer.args
            self._evaluates = (
                str(getattr(settings.eval_strategy, "value", settings.eval_strategy)) != "no"
            )
            self._saves = (
                str(getattr(settings.save_strategy, "value", settings.save_strategy)) != "no"
            )
            if self._loop.is_beyond:
                control.should_evaluate |= self._evaluates and not self._loop.has_evaluated
                control.should_save |= self._saves and not self._saved
            after_step(trainer, *args, **options)
            if self._loop.is_beyond:
                control.should_training_stop = True

        return [(kind, "_maybe_log_save_evaluate", maybe)]

    # --- what is not followed ----------------------------------------------------------------------------------------

    def _signs(self) -> dict[str, str]:
        """By what the program's own text announces, the line that does."""
        found: dict[str, str] = {}
        for path, lines in _own_text(self._program):
            for number, line in enumerate(lines, 1):
                code = line.partition("#")[0]
                for name, words in (_SIGNS | _CHANGES).items():
                    if name not in found and re.search(words, code):
                        found[name] = f"{short_path(path)}:{number}"
        return found

    def not_followed(self, ended: bool) -> list[str]:
        """What the peak does not cover, in words; nothing for a program that came to its own end."""
        if ended:
            return []
        signs = self._signs()
        later = [f"{name} ({signs[name]})" for name in _CHANGES if name in signs]
        told = [self.batches.not_seen(), *self._unseen(), *later]
        return [each for each in told if each]


def _own_text(program: str) -> Iterator[tuple[str, list[str]]]:
    """The text of the program and of its modules: those in its folder."""
    folder = str(Path.cwd())
    files = [
        program,
        *(getattr(module, "__file__", None) or "" for module in list(sys.modules.values())),
    ]
    for path in dict.fromkeys(str(Path(file).absolute()) for file in files if file.endswith(".py")):
        if (
            path.startswith(folder) or path == str(Path(program).absolute())
        ) and "site-packages" not in path:
            with suppress(OSError):
                yield path, Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
