"""One trace of a short model, with the sizes that kernels' rules decide kept as these rules and their arguments."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dryfit.derived.sizes import KINDS, SLOTS
from dryfit.engine import cuda_rules, kernels
from dryfit.engine import trace as core
from dryfit.engine.patching import patched
from dryfit.engine.record import NOTED, Columns, Record, Workspaces
from dryfit.engine.tracker import Tracker
from dryfit.scenario.fields import CHUNK_TOKENS
from dryfit.scenario.scenario import Scenario
from dryfit.step import step as stepping
from dryfit.tracing import loading
from dryfit.tracing import prepare as preparing
from dryfit.tracing import trace as tracing
from dryfit.tracing.loaders import WeightLoader
from dryfit.tracing.prepare import prepare
from dryfit.tracing.ranks import kinds_of_ranks

Rule = tuple[str, tuple[Any, ...], int, tuple[int, ...]]  # name, what is fixed, slot, arguments


class BySize(int):
    """No bytes: a rule decides about them, from numbers that are written down in their place."""

    rule: Rule


def _slots(name: str, fixed: tuple[Any, ...], arguments: Sequence[int]) -> list[int]:
    made = []
    for slot in range(SLOTS[name]):
        one = BySize(0)
        one.rule = name, fixed, slot, tuple(arguments)
        made.append(one)
    return made


_of_reduction = kernels.CudaKernels._of_reduction


def _reduction(
    self: Any, func: Any, kind: Any, name: str, args: Sequence, kwargs: dict
) -> tuple[list, list]:
    given: list[Any] = []

    def noted(*arguments: Any) -> tuple[int, ...]:
        given[:] = arguments
        return ()

    with patched([(cuda_rules, "reduction_bytes", noted)]):
        before, copied = _of_reduction(self, func, kind, name, args, kwargs)
    if not given:
        return before, copied
    sizes, strides, reduced, element, output, kind, *_ = given
    called = next(name for name in KINDS if getattr(cuda_rules, name) is kind)
    fixed = (len(sizes), tuple(sorted(reduced)), element, output, called)
    return before, [*copied, *_slots("reduction", fixed, (*sizes, *strides))]


def _embedding(self: Any, _: str, args: Sequence, __: dict) -> tuple[list, list]:
    grad, indices, words = args[:3]
    return _slots(
        "embedding", (indices.element_size(),), (indices.numel(), words, grad.shape[-1])
    ), []


@contextmanager
def rules_kept() -> Iterator[None]:
    """Write down what rules decide as :class:`BySize`."""
    own = {**kernels._RULES, "aten::embedding_dense_backward": _embedding}
    with patched([(kernels.CudaKernels, "_of_reduction", _reduction), (kernels, "_RULES", own)]):
        yield


class _Sources(Workspaces):
    """Notes for each storage that an optimizer makes from which tensor: so it belongs to that tensor's layer.

    The tracker tells workspaces of every operator, once it has run: a frame around the operator itself would hold its
    arguments, and the engine asks who holds a gradient.
    """

    def __init__(self, tracker: Tracker, of: dict[int, int | None]) -> None:
        super().__init__()
        self._tracker, self._of = tracker, of

    def note(self, func: Any, args: Sequence[Any], output: Any, at: int) -> None:
        if func in NOTED:
            super().note(func, args, output, at)
        if self._tracker._phase not in ("optimizer", "between") or not args:
            return
        given, made = args[0], output
        if (
            isinstance(made, list | tuple)
            and isinstance(given, list | tuple)
            and len(made) == len(given)
        ):
            pairs = list(zip(made, given, strict=True))
        else:
            pairs = [(made, given)]
        for one, source in pairs:
            own = self._identity(one)
            if own is not None and isinstance(source, list | tuple):
                if any(isinstance(each, torch.Tensor) for each in source):
                    self._of[own] = None
            elif own is not None and (other := self._identity(source)) not in (None, own):
                self._of[own] = other

    def _identity(self, tensor: Any) -> int | None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            return None
        return self._tracker._ids.get(tensor.untyped_storage()._cdata)


class _NotingSources(Tracker):
    """A tracker whose workspaces are :class:`_Sources`."""

    of: dict[int, int | None]
    latest: Tracker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.workspaces = _Sources(self, self.of)
        _NotingSources.latest = self

    def _first_met(self, func: Any) -> Any:
        told = super()._first_met(func)._replace(of_workspaces=True)
        self._operators[id(func)] = told
        return told


def _chunk_noted(starts: list[tuple[int, int]]) -> Callable[..., Any]:
    """In the place of ``checkpoint``: notes before which event each chunk of a loss begins, and its number."""

    def noted(
        loss_of: Callable[..., Any], states: torch.Tensor, targets: torch.Tensor, **options: Any
    ) -> Any:
        number = states.storage_offset() // (CHUNK_TOKENS * states.shape[-1])

        def run(*given: torch.Tensor) -> torch.Tensor:
            starts.append((_NotingSources.latest.now(), number))
            return loss_of(*given)

        return checkpoint(run, states, targets, **options)

    return noted


def general(module: str) -> str:
    """A module's name without the number of its layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


class Taken:
    """One trace as columns.

    Attributes
    ----------
    kinds, targets, sizes, ids
        Of each event: whether it allocates (1) or frees (2), the place of what it frees, bytes, the id.
    about
        What each is for: component and stream.
    marks
        ``(phase, step, index of its first event)``.
    origins
        By id where a tensor comes from; only if it was asked for.
    sources
        By id the tensor that an optimizer made it from; None: from several.
    chunks
        Before which events a chunk of the loss begins, with its number; only where origins are asked for.
    arrivals
        By id of the base model's tensors of how many sources' experts it is made; 0: it comes whole. Empty where all
        do.
    """

    def __init__(
        self,
        record: Record,
        sources: Mapping[int, int | None],
        arrivals: Mapping[int, int],
        chunks: Sequence[tuple[int, int]],
    ) -> None:
        columns = Columns.of(record)
        self.kinds: list[int] = columns.kinds.tolist()
        self.targets: list[int] = columns.targets.tolist()
        self.about = [columns.told[code] for code in columns.about.tolist()]
        self.sizes = [size for _, size in record.events]
        self.ids = [identity for identity, _ in record.events]
        self.marks = list(record.marks)
        self.origins = record.origins.of if record.origins else {}
        self.sources, self.chunks = sources, chunks
        self.arrivals = arrivals if any(arrivals.values()) else {}
        own = record.cublas_workspaces()
        self.cublas = {place for place, identity in enumerate(self.ids) if identity in own}

    @property
    def structure(self) -> tuple[Any, ...]:
        """What has to be the same at all numbers."""
        rules = tuple(
            (*size.rule[:3],) if isinstance(size, BySize) else None for size in self.sizes
        )
        return self.kinds, self.targets, self.about, rules, self.marks, self.cublas


@contextmanager
def experts_whole(arrivals: dict[int, int]) -> Iterator[None]:
    """Load experts as the one tensor that the model has: how they arrive is :mod:`dryfit.derived.arrivals`'s."""
    parts_of, load = loading._checkpoint_bytes, loading._load_on_device

    def noted(
        device: Any,
        model: Any,
        base: dict[str, torch.Tensor],
        scenario: Scenario,
        loader: WeightLoader,
    ) -> None:
        load(device, model, base, scenario, loader)
        for name, tensor in base.items():
            count = len(parts_of(name, tensor, scenario))
            arrivals[device.ids[tensor.untyped_storage()._cdata]] = (
                count // tensor.shape[0] if count > 1 else 0
            )

    with patched(
        [
            (loading, "_checkpoint_bytes", lambda *given: [sum(parts_of(*given))]),
            (loading, "_load_on_device", noted),
            (WeightLoader, "order_is_random", lambda *_: False),
        ]
    ):
        yield


def take(
    scenario: Scenario,
    capability: tuple[int, int],
    *,
    origins: bool = False,
    in_chunks: bool = False,
) -> Taken:
    """Trace a step of one GPU for recording. ``in_chunks``: note where chunks of the loss begin.

    UnknownOrder: if chance decides about the loading.
    """
    sources: dict[int, int | None] = {}
    _NotingSources.of = sources
    chunks: list[tuple[int, int]] = []
    places: list[tuple[Any, str, Any]] = [(core, "Tracker", _NotingSources)] if origins else []
    if origins and in_chunks:
        places.append((stepping, "checkpoint", _chunk_noted(chunks)))
    arrivals: dict[int, int] = {}
    with tracing.one_thread(), rules_kept(), patched(places), experts_whole(arrivals):
        record, _ = tracing._stepped(
            scenario,
            "cuda",
            prepare,
            kinds_of_ranks(scenario)[0],
            capability=capability,
            costs=False,
            report=tracing._as_record,
            origins=origins,
        )
    return Taken(record, sources, arrivals, chunks)


def events(
    scenario: Scenario, capability: tuple[int, int]
) -> tuple[list[tuple[int, int]], list[tuple[str, int, int]]]:
    """A step's events and marks as :class:`dryfit.derived.layers.Composition` has them: what a record has to equal.

    Where chance decides about the loading, they are those of the first order.
    """
    with tracing.one_thread(), patched([(preparing, "ORDERS", 1)]):
        record, _ = tracing._stepped(
            scenario,
            "cuda",
            prepare,
            kinds_of_ranks(scenario)[0],
            capability=capability,
            costs=False,
            report=tracing._as_record,
        )
    numbers: dict[int, int] = {}
    listed = []
    for identity, size in record.events:
        if identity > 0:
            numbers[identity] = len(numbers) + 1
            listed.append((numbers[identity], int(size)))
        else:
            listed.append((-numbers[-identity] if identity else 0, 0))
    return listed, [tuple(mark) for mark in record.marks]
