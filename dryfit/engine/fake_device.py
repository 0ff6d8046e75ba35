"""The GPU that is not there: for ``meta`` what ``torch.cuda`` is for CUDA, with streams and events.

A tracker notes on which stream a block is allocated (:class:`FakeDevice` knows it), and which blocks another stream
uses as well: such a block is free for others only when the GPU has got there, which is later than in the program. How
much later depends on the CPU's lead over the GPU; at the latest it is when the program waits for the GPU.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeviceStream:
    """A stream: work that runs in order. The first is the one that models compute on."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.id = device, device.count()

    def record_event(self, event: Any = None) -> FakeEvent:
        event = event or FakeEvent(self.device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.device.wait()

    def wait_event(self, event: FakeEvent) -> None:
        """Streams that wait for each other cost no memory, but time."""
        event.wait(self)

    def wait_stream(self, stream: DeviceStream) -> None:
        stream.record_event().wait(self)


class FakeEvent:
    """A point in a stream; the program can wait until the GPU has got there."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.moment = device, None
        self.stream, self.launches = 0, 0

    def record(self, stream: DeviceStream | None = None) -> None:
        self.moment = self.device.now()
        self.stream, self.launches = (stream or self.device.stream_now).id, self.device.launched()

    def synchronize(self) -> None:
        if self.moment is not None:
            self.device.wait(self.moment)
            self.device.stream_waits(None, self.stream, self.launches)

    def query(self) -> bool:
        """Whether the GPU has got there: it is as far behind as the program lets it be."""
        return self.moment is None

    def wait(self, stream: DeviceStream | None = None) -> None:
        """As a stream that waits: the current one by default."""
        if self.moment is not None:
            self.device.stream_waits(
                (stream or self.device.stream_now).id, self.stream, self.launches
            )


class FakeDevice(types.ModuleType):
    """For ``meta`` what ``torch.cuda`` is for CUDA, as far as FSDP asks."""

    def __init__(self, gpus: int) -> None:
        super().__init__("torch.meta")
        self.gpus, self._streams = gpus, 0
        # What an allocation is for, where the library that allocates says so; None: its tracker finds out.
        self.component: str | None = None
        self.listener: Any = None  # the `Tracker` of the running trace, whose module imports this one; None: none runs
        self.Stream: Callable[..., DeviceStream] = lambda *_, **__: DeviceStream(self)
        self.Event: Callable[..., FakeEvent] = lambda *_, **__: FakeEvent(self)
        # The stream that models compute on, and the one that is current.
        self.first_stream = self.stream_now = DeviceStream(self)

    def count(self) -> int:
        self._streams += 1
        return self._streams - 1

    def now(self) -> int:
        return self.listener.now() if self.listener else 0

    def launched(self) -> int:
        return self.listener.launched() if self.listener else 0

    def stream_waits(self, waiter: int | None, stream: int, launches: int) -> None:
        """A stream, or the program (None), waits for those of another's kernels that are among so many launches."""
        if self.listener:
            self.listener.stream_waits(waiter, stream, launches)

    def wait(self, since: int | None = None) -> None:
        """The program waits for the GPU: for all of its work, or for that before a moment."""
        if self.listener:
            self.listener.waited(since)

    def arrived(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors are brought to the GPU from the host: those on ``meta`` are there as soon as somebody says so."""
        for tensor in tensors:
            if not tensor.is_meta:  # of a whole program, where a card is simulated
                tensor.data = tensor.to(torch.device("meta", 0))
            elif self.listener:
                self.listener.arrived(tensor)

    def left(self, tensor: torch.Tensor) -> None:
        """A tensor is brought from the GPU to the host."""
        if self.listener:
            self.listener.left(tensor)

    def used_on(self, tensor: torch.Tensor, stream: DeviceStream | None = None) -> None:
        """``Tensor.record_stream``: a stream uses a tensor as well; None: one that is not its own."""
        if self.listener:
            self.listener.used_by_another_stream(tensor, None if stream is None else stream.id)

    def named(self, tensor: torch.Tensor, component: str) -> None:
        """Say what a tensor is for."""
        if self.listener:
            self.listener.name(tensor, component)

    def current_stream(self, *_: Any) -> DeviceStream:
        return self.stream_now

    @contextmanager
    def stream(self, stream: DeviceStream) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    @contextmanager
    def allocating(self, component: str) -> Iterator[None]:
        """Say what is allocated meanwhile is for."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    def synchronize(self, *_: Any) -> None:
        self.wait()

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return self.gpus

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        """A generator's state, as ``torch.random.fork_rng`` keeps it."""
        return torch.empty(16, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, *_: Any) -> None:
        """Nothing is drawn."""

    def set_device(self, *_: Any) -> None:
        """There is one."""


def active() -> FakeDevice | None:
    """The device of the group that is there; None outside :func:`fake_group`."""
    device = vars(torch).get("meta")
    return device if isinstance(device, FakeDevice) else None
