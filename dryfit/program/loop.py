"""A program's loop as it is heard: loading, training, evaluation, updates, and when it has run long enough."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dryfit.engine.components import GRADIENTS, OPTIMIZER_STATES
from dryfit.engine.model_tensors import component_of, parts, quantization_state, vocabulary
from dryfit.engine.patching import patched
from dryfit.engine.steps import phases
from dryfit.engine.tracker import Tracker

GROWTH_BYTES = 65_536  # by which memory grows with an update before anybody is told
_SURE = 2  # further updates that show whether it goes on growing
_WARM_UPS = (
    11  # updates before a capture: what PyTorch's notes ask for with DDP ("CUDA Graphs", 2.13)
)


class Enough(BaseException):
    """The program has taken its updates. No ``except Exception`` of its own catches it."""


class Loop:
    """Marks the phases of a program in a tracker's record, names what its modules hold, and stops it.

    An update ends with the last of its optimizers: those that stepped before the next forward pass are one update. A
    program without an optimizer updates by hand, and its update ends where it forgets a module's gradients.

    A program that captures its step as a CUDA graph warms it up on a stream of its own. It is not stopped there, but
    where a graph is replayed again, which counts for an update.
    """

    def __init__(
        self, tracker: Tracker, steps: int, live_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self.updates = 0  # how many were finished
        self.launches: list[int] = []  # how many kernels had been launched at the end of each
        self.has_evaluated = False  # whether it has evaluated what it trains
        self.is_beyond = (
            False  # whether it has taken its updates, and goes on until it would train again
        )
        # Called with each update; whether further updates are wanted; whether the program goes on beyond them.
        self.on_update: Callable[[], None] = lambda: None
        self.wants_more: Callable[[], bool] = lambda: False
        self.goes_on: Callable[[], bool] = lambda: False
        self.tell: Callable[[str], None] = lambda text: (
            None
        )  # called with where the program is, in words
        self._live_bytes, self._live, self._live_now = (
            live_bytes,
            [],
            (0, 0),
        )  # bytes in use, and events until then
        self._tracker, self._steps = tracker, steps
        self._stepped: list[int] = []  # optimizers of the update that is running, by id
        self._of_first: set[int] = set()  # of the first update
        self._loading, self._evaluating, self._ended = True, False, False
        self._beside = 0  # streams that the program has entered beside its first
        self._known: dict[int, weakref.ref[nn.Module]] = {}  # a program may let its models go
        self._by_hand, self._went_back = (
            True,
            False,
        )  # by hand until there is an optimizer; since the last update
        tracker.mark("load", 0)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear what runs inside."""
        with ExitStack() as stack:
            hooks = phases(self._enter, self._updated, self._updating, self._phase_of)
            self._begin = stack.enter_context(hooks)
            stack.enter_context(patched(self._places()))
            if self._tracker.graphs is not None:
                self._tracker.graphs.heard = self._replayed
            yield

    def _places(self) -> list[tuple[Any, str, Any]]:
        make, forget = torch.optim.Optimizer.__init__, nn.Module.zero_grad

        def made(optimizer: torch.optim.Optimizer, *args: Any, **options: Any) -> None:
            self._by_hand = False
            make(optimizer, *args, **options)

        def forgotten(module: nn.Module, *args: Any, **options: Any) -> None:
            if self._by_hand and self._went_back:
                self._name_gradients(module.parameters())
                self._note_update()
                self._finish_update()
                self._stop_where_enough()
            forget(module, *args, **options)

        entered = torch.cuda.stream

        @contextmanager
        def beside(stream: Any) -> Iterator[None]:
            elsewhere = stream is not None and stream is not torch.cuda.default_stream()
            self._beside += elsewhere
            try:
                with entered(stream):
                    yield
            finally:
                self._beside -= elsewhere

        return [
            (torch.optim.Optimizer, "__init__", made),
            (nn.Module, "zero_grad", forgotten),
            (torch.cuda, "stream", beside),
        ]

    def end(self) -> None:
        """Close the record: what is freed from now on is the end of the program, not its step."""
        if not self._ended:
            self._ended = True
            self._tracker.mark("end", 1)
            self._tracker.close()

    def _enter(self, phase: str) -> None:
        if self._ended:
            raise Enough  # a bare `except:` of the program caught it
        if phase in ("forward", "backward") and self._stepped:
            self._finish_update()
            self._stop_where_enough()
        elif self.is_beyond and phase in ("forward", "backward") and torch.is_grad_enabled():
            self.end()
            raise Enough
        self.has_evaluated = self.has_evaluated or phase == "evaluation"
        if phase in ("forward", "backward", "optimizer", "evaluation"):
            if self._loading:
                self.tell("the program is loaded and takes its first update")
            self._loading = False
        self._went_back = self._went_back or phase == "backward"
        self._tracker.mark("load" if self._loading else phase, 0)

    def _finish_update(self) -> None:
        self._of_first = self._of_first or set(self._stepped)
        self._stepped, self._went_back = [], False
        self.updates += 1
        self.tell(f"update {self.updates} of {self._steps} is taken")
        self._live.append(self._live_now)
        self.launches.append(len(self._tracker.costs.calls))

    def has_enough(self) -> bool:
        """Whether the updates that were asked for are taken, where the program can't go on after them."""
        if self._stepped:
            self._finish_update()
        return self.updates >= self._steps

    def _replayed(self) -> None:
        if self._stepped:
            self._finish_update()
        self._stop_where_enough()

    def _stop_where_enough(self) -> None:
        warming_up = self._beside and self.updates < self._steps + _WARM_UPS
        if (
            self.is_beyond
            or self.updates < self._steps
            or warming_up
            or self._may_grow()
            or self.wants_more()
        ):
            return
        if self.goes_on():
            self.is_beyond = True
            self.tell("the updates are taken; the program goes on until it would train again")
            return
        self.end()
        raise Enough

    def _may_grow(self) -> bool:
        """Whether memory grew with the last update, and further updates have to show whether it goes on."""
        grew = len(self._live) > 1 and self._live[-1][0] - self._live[-2][0] > GROWTH_BYTES
        return grew and self.updates < self._steps + _SURE

    def growth_bytes(self) -> int:
        """By how much memory grows with each update: what was made in one, and is there after two more; 0: not seen.

        What a program keeps until its next update, such as its last batch, is no growth.
        """
        if len(self._live) < 4:
            return 0
        born, ended, events = {}, {}, self._tracker.events[: self._live[-1][1]]
        for at, (identity, count) in enumerate(events):
            if identity > 0:
                born[identity] = at, count
            elif identity:
                ended[-identity] = at
        grown = []
        for (_, begins), (_, ends) in zip(self._live[-4:-2], self._live[-3:-1], strict=True):
            kept = (
                count
                for identity, (at, count) in born.items()
                if begins <= at < ends and identity not in ended
            )
            grown.append(sum(kept))
        least = min(grown)
        return least if least > GROWTH_BYTES else 0

    @property
    def taken(self) -> int:
        """Updates so far, with one that may go on with another optimizer."""
        return self.updates + bool(self._stepped)

    @property
    def more_than_asked(self) -> int:
        """Updates beyond those that were asked for."""
        return max(self.updates - self._steps, 0)

    def _note_update(self) -> None:
        self._live_now = self._live_bytes(), len(self._tracker.events)
        self.on_update()

    def _phase_of(self, module: nn.Module) -> str | None:
        """Evaluation is a call of what is trained, without gradients, in its evaluation mode."""
        self._learn(module)
        without = not torch.is_grad_enabled() and not module.training
        if without and not self._evaluating:
            without = any(parameter.requires_grad for parameter in module.parameters())
        self._evaluating = without
        return "evaluation" if without else None

    # --- names ---------------------------------------------------------------------------------------------------

    def _learn(self, module: nn.Module) -> None:
        """Say what a module's tensors are for, and how they are called; modules within one that is known are, too."""
        known = self._known.get(id(module))
        if known is not None and known() is module:
            return
        tracker = self._tracker
        self._known.update((id(each), weakref.ref(each)) for each in module.modules())
        tracker.origins.learn(module)
        tracker.vocabulary = (
            tracker.vocabulary or vocabulary(module) or _vocabulary_of_layers(module)
        )
        component, ids = component_of(module), tracker.ids
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tracker.label(tensor, component(name, tensor))
            held = [*parts(tensor)]
            for part in held:
                identity = ids.get(part.untyped_storage()._cdata)
                if identity is not None:
                    tracker.origins.note_existing(identity, part)
            for state in quantization_state(tensor).values():
                tracker.label(state, "quantization_state")

    def _updating(self, optimizer: torch.optim.Optimizer) -> None:
        self._name_gradients(each for group in optimizer.param_groups for each in group["params"])

    def _name_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                self._tracker.label(parameter.grad, GRADIENTS)

    def _updated(self, optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            for value in state.values() if isinstance(state, dict) else ():
                if isinstance(value, torch.Tensor):
                    self._tracker.label(value, OPTIMIZER_STATES)
        self._stepped.append(id(optimizer))
        self._note_update()
        self._begin()
        last = self.updates + 1 >= self._steps
        if last and self._of_first and self._of_first <= set(self._stepped):
            self._finish_update()
            self._stop_where_enough()


def _vocabulary_of_layers(module: nn.Module) -> int:
    """The width of the widest embedding that a linear layer of the same width answers; 0: none."""
    widths = {each.out_features for each in module.modules() if isinstance(each, nn.Linear)}
    embeddings = [
        each.num_embeddings for each in module.modules() if isinstance(each, nn.Embedding)
    ]
    return max((width for width in embeddings if width in widths and width >= 1000), default=0)
