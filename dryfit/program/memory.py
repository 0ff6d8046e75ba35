"""What ``torch.cuda`` says about the memory of the simulated card while a program runs: the tracker's own count.

At the card's border an allocation fails as on a GPU, so that a program which then halves its batch does so here. What
the attempt took is left out of the record afterwards: on a GPU it fails as well, and does not decide what is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from dryfit.engine.allocator import round_size
from dryfit.engine.card import Card
from dryfit.engine.components import TEMPORARIES
from dryfit.engine.replay import Events, Replay, replay
from dryfit.engine.tracker import Tracker

from .places import described, frames_above, is_library

# Sums of rounded sizes, which differ from what PyTorch counts as allocated by blocks that are too small to split. The
# figures of an answer come from the replay.


class Memory:
    """Bytes in use, counted as a tracker's events come, and the line that brought them highest.

    ``usable_bytes``: what the card has. ``raises``: whether an allocation beyond that fails. What the program allows
    itself is a border as well.
    """

    def __init__(self, tracker: Tracker, card: Card, usable_bytes: int, *, raises: bool) -> None:
        self._tracker, self._card, self._usable_bytes, self._raises = (
            tracker,
            card,
            usable_bytes,
            raises,
        )
        self.ran_out: list[str] = []  # lines at which memory ran out
        # What the program allows itself by `set_per_process_memory_fraction`; None: everything.
        self.share_bytes: int | None = None
        self._share = 1.0
        self._failed: list[int] = []  # allocations that failed, by the number of events before
        self._position, self._sizes = 0, {}
        self._now = self._since_reset = self._highest = 0
        # The program's line whose allocation made the highest peak, and the innermost line of a library below it.
        self.peak_line = self.library_line = ""
        self._replayed: tuple[int, Replay | None] = (-1, None)
        allocate = tracker.allocate

        def allocated(count: int, component: str) -> int:
            self._refuse(count)
            identity = allocate(count, component)
            if self._advance() > self._highest:
                self._highest = self._now
                self._note_line()
            return identity

        tracker.allocate = allocated

    def _refuse(self, count: int) -> None:
        """Raise PyTorch's error where an allocation goes beyond the border, in its words, which programs look for."""
        border = min(self._usable_bytes, self.share_bytes or self._usable_bytes)
        if not self._raises or not count or self._advance() + round_size(count) <= border:
            return
        followed, events = self._tracker.ids.values(), self._tracker.events
        for identity in self._sizes.keys() - set(followed):
            if (
                self._tracker.components.get(identity) == TEMPORARIES
            ):  # of the operator that fails now
                self._tracker.free(identity)
        self._failed.append(len(events))
        line = described(next((frame for frame in frames_above(2) if not is_library(frame)), None))
        self.ran_out.append(line)
        raise torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {count / 2**20:.2f} MiB. GPU {torch.cuda.current_device()} has a"
            f" total capacity of {self._card.memory_bytes / 2**30:.2f} GiB of which"
            f" {(border - self._advance()) / 2**20:.2f} MiB is free. (simulated)"
        )

    def forget_attempts(self) -> None:
        """Leave out of the record what attempts took that ran out of memory, and gave back before the next one."""
        events = self._tracker.events
        passes = [at for phase, _, at in self._tracker.marks if phase in ("forward", "evaluation")]
        before = [
            at for phase, _, at in self._tracker.marks if phase in ("load", "between", "optimizer")
        ]
        ends = {-identity: at for at, (identity, _) in enumerate(events) if identity < 0}
        for failed in self._failed:
            begin = max((at for at in before if at <= failed), default=0)
            again = min((at for at in passes if at > failed), default=len(events))
            for at in range(begin, failed):
                identity = events[at][0]
                if identity > 0 and ends.get(identity, len(events)) < again:
                    events[at] = identity, 0

    def _note_line(self) -> None:
        self.peak_line = self.library_line = ""
        for frame in frames_above(2):
            if not is_library(frame):
                self.peak_line = described(frame)
                return
            self.library_line = self.library_line or described(frame)

    def live_bytes(self) -> int:
        """Bytes in use now."""
        return self._advance()

    def _advance(self) -> int:
        events = self._tracker.events
        for identity, count in events[self._position :]:
            if identity > 0:
                size = self._sizes[identity] = round_size(count) if count else 0
                self._now += size
                self._since_reset = max(self._since_reset, self._now)
            else:
                self._now -= self._sizes.pop(-identity, 0)
        self._position = len(events)
        return self._now

    def _replay(self) -> Replay:
        """The allocator's state, which is worked out when somebody asks."""
        events = self._tracker.events
        if self._replayed[0] != len(events):
            self._replayed = (
                len(events),
                replay(Events.of(list(events)), streams=self._tracker.streams),
            )
        return self._replayed[1]

    def _reset(self, *_: Any) -> None:
        self._since_reset = self._advance()

    def _statistics(self, *_: Any) -> dict[str, int]:
        now, run = self._advance(), self._replay()
        found: dict[str, int] = defaultdict(int)
        values = {"allocated": (now, self._since_reset), "active": (now, self._since_reset)}
        values["reserved"] = run.reserved_bytes, run.peak_reserved_bytes
        for name, (current, peak) in values.items():
            found |= {f"{name}_bytes.all.current": current, f"{name}_bytes.all.peak": peak}
        return found

    def answers(self) -> dict[str, Callable[..., Any]]:
        """By the function's name in ``torch.cuda``."""

        def share(fraction: float, device: Any = None) -> None:
            if not 0 <= fraction <= 1:
                raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
            self.share_bytes, self._share = int(fraction * self._card.memory_bytes), fraction

        def most(*_: Any) -> int:
            return max(self._advance(), self._since_reset)

        def free(*_: Any) -> tuple[int, int]:
            return max(
                self._usable_bytes - self._replay().reserved_bytes, 0
            ), self._card.memory_bytes

        return {
            "set_per_process_memory_fraction": share,
            "get_per_process_memory_fraction": lambda *_: self._share,
            "memory_allocated": lambda *_: self._advance(),
            "max_memory_allocated": most,
            "memory_reserved": lambda *_: self._replay().reserved_bytes,
            "max_memory_reserved": lambda *_: self._replay().peak_reserved_bytes,
            "memory_cached": lambda *_: self._replay().reserved_bytes,
            "max_memory_cached": lambda *_: self._replay().peak_reserved_bytes,
            "reset_peak_memory_stats": self._reset,
            "reset_max_memory_allocated": self._reset,
            "reset_max_memory_cached": self._reset,
            "memory_stats": self._statistics,
            "memory_stats_as_nested_dict": self._statistics,
            "memory_summary": lambda *_, **__: "\n".join(
                f"{name}: {size}" for name, size in self._statistics().items()
            ),
            "mem_get_info": free,
            "empty_cache": self._tracker.empty_cache,
        }
