"""How weights come to the device by name and size alone: by which thread when, and experts one by one. No torch.

Sources: transformers ``core_model_loading``, ``convert_and_load_state_dict_in_model``, and ``MergeModulelist`` and
``Concatenate`` of :class:`WeightConverter` for experts that a file has one by one and the model as one tensor.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

WORKERS = 4  # transformers core_model_loading.GLOBAL_WORKERS
# How fast the parts of a threaded load are on the machine that feeds the card. Round figures, none fitted: a cast from
# bf16 to fp16 out of a mapped file ran at 2 GB/s in all, whether one thread or four did it (torch 2.13, two cores);
# memory that isn't pinned crosses PCIe 3.0 x16 (15.8 GB/s) at less than half its rate.
_CAST_BYTES_PER_SECOND = 2e9 / WORKERS  # of each thread
_COPY_BYTES_PER_SECOND = 6e9  # one copy at a time
_OVERHEAD_SECONDS = 2e-4  # of a thread for each tensor
_TURN_SECONDS = 2e-3  # of the main thread for each tensor: quantizing it, setting it in the model, the progress bar
_VARIATION = 0.3  # standard deviation of the logarithm of each of these times
ORDERS = 5  # that are tried, of a loading that chance orders
Event = tuple[int, int]


class Loading:
    """What is allocated and freed while a model loads."""

    def __init__(self, first_id: int) -> None:
        self.events: list[Event] = []  # `(id, bytes)` for an allocation, `(-id, 0)` for its end
        self.next = first_id

    def allocate(self, count: int) -> int:
        """Allocate so many bytes, and return the id."""
        identity, self.next = self.next, self.next + 1
        self.events.append((identity, count))
        return identity

    def free(self, identity: int) -> None:
        """Free what was allocated."""
        self.events.append((-identity, 0))

    def merged(self, parts: Sequence[int], experts: int, total: int) -> int:
        """Stack the experts of each source, put gate and up side by side, and return the id of the whole.

        ``parts``: ids of the experts of the first source, then of the second, if there is one. ``total``: bytes.
        """
        sources = [parts[start : start + experts] for start in range(0, len(parts), experts)]
        stacked = []
        for source in sources:
            stacked.append(self.allocate(total // len(sources)))
            for part in source:
                self.free(part)
        if len(stacked) == 1:
            return stacked[0]
        whole = self.allocate(total)
        for part in stacked:
            self.free(part)
        return whole


def turns(sizes: list[int], workers: int, seed: int) -> list[tuple[int, bool]]:
    """Return in which order tensors arrive on the device (True) and are quantized or set in the model (False).

    Several threads take the tensors in order. A thread allocates the tensor on the device (ATen ``_to_copy`` does so
    before it copies), casts it on the CPU, waits until the way to the device is free, and copies. The main thread sets
    each tensor in the model once it and those before it are there.
    """
    if workers == 1:
        return [(position, arrives) for position in range(len(sizes)) for arrives in (True, False)]
    draw = random.Random(seed)

    def vary(seconds: float) -> float:
        return seconds * draw.lognormvariate(0.0, _VARIATION)

    moments: list[tuple[float, int, bool]] = []
    cast: list[tuple[float, int]] = []  # when each thread has cast its tensor, and which
    loaded = [0.0] * len(sizes)
    waiting = iter(enumerate(sizes))

    def take(now: float) -> None:
        for position, size in waiting:
            moments.append((now, position, True))
            heapq.heappush(
                cast, (now + vary(_OVERHEAD_SECONDS + size / _CAST_BYTES_PER_SECOND), position)
            )
            return

    for _ in range(workers):
        take(0.0)
    free = 0.0  # when the last copy ends
    while cast:
        now, position = heapq.heappop(cast)
        free = loaded[position] = max(now, free) + sizes[position] / _COPY_BYTES_PER_SECOND
        take(free)
    now = 0.0
    for position, moment in enumerate(loaded):
        now = max(now, moment) + vary(_TURN_SECONDS)
        moments.append((now, position, False))
    return [(position, arrives) for _, position, arrives in sorted(moments)]
