"""What ``torch.cuda`` says about the memory of the simulated card while a program runs: the tracker's own count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from will_it_fit.engine.allocator import round_size
from will_it_fit.engine.card import Card
from will_it_fit.engine.replay import Events, Replay, replay
from will_it_fit.engine.tracker import Tracker

from .places import described, frames_above, is_library

# Sums of rounded sizes, which differ from what PyTorch counts as allocated by blocks that are too small to split. The
# figures of an answer come from the replay.


class Memory:
    """Bytes in use, counted as a tracker's events come, and the line that brought them highest.

    Attributes
    ----------
    peak_line, library_line
        The program's line whose allocation made the highest peak, and the innermost line of a library below it.
    """

    def __init__(self, tracker: Tracker, card: Card, usable_bytes: int) -> None:
        self._tracker, self._card, self._usable_bytes = tracker, card, usable_bytes
        self._position, self._sizes = 0, {}
        self._now = self._since_reset = self._highest = 0
        self.peak_line = self.library_line = ""
        self._replayed: tuple[int, Replay | None] = (-1, None)
        allocate = tracker.allocate

        def allocated(count: int, component: str) -> int:
            identity = allocate(count, component)
            if self._advance() > self._highest:
                self._highest = self._now
                self._note_line()
            return identity

        tracker.allocate = allocated

    def _note_line(self) -> None:
        self.peak_line = self.library_line = ""
        for frame in frames_above(2):
            if not is_library(frame):
                self.peak_line = described(frame)
                return
            self.library_line = self.library_line or described(frame)

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
            self._replayed = len(events), replay(Events.of(list(events)), streams=self._tracker.streams)
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

        def most(*_: Any) -> int:
            return max(self._advance(), self._since_reset)

        def free(*_: Any) -> tuple[int, int]:
            return max(self._usable_bytes - self._replay().reserved_bytes, 0), self._card.memory_bytes

        return {
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
