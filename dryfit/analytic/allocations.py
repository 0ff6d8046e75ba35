"""A step's allocations as the closed form knows them, from loading to the end of the second step, for the allocator.

The peak of a step says what is alive, and not what a GPU must have: that is more by what lies free in fragments, up to
a quarter for full fine-tuning. Fragments come about in the first step, where optimizer states come last and settle
between what activations left. So the form's operations on sizes (:mod:`dryfit.analytic.step`) are run twice
here, and each tensor's coming and going is kept; the allocator's model replays that as it replays a trace.
"""

from collections.abc import Iterator, Sequence
from random import Random

from dryfit.analytic import state
from dryfit.analytic.graph import Parameter
from dryfit.analytic.setting import Setting, check_described, described
from dryfit.analytic.step import TrainingStep
from dryfit.engine.allocator import SMALL, Event
from dryfit.engine.cuda_rules import (
    CUBLASLT_WORKSPACE_BYTES,
    DEFAULT_CAPABILITY,
    Capability,
    cublas_workspace_bytes,
)
from dryfit.scenario.fields import CHUNK_TOKENS
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario

VARIATIONS = 8
VARIED = 0.03  # of the tensors over 1 MiB, in each of two ways
BRIEF = 8  # events


def form_events(
    scenario: Scenario, where: object = "scenario", *, capability: Capability | None = None
) -> list[Event]:
    """Allocations and frees of loading and two steps.

    NotDescribed: for an architecture or a setting that the analytic estimate knows nothing of.
    """
    decoder = described(scenario, where)
    check_described(scenario)
    return _TwoSteps(Setting(decoder, scenario, capability or DEFAULT_CAPABILITY)).events_of_two()


def variations(events: Sequence[Event], count: int = VARIATIONS) -> Iterator[list[Event]]:
    """The events as they are, then with small differences such as the form has from the trace.

    Where a step's largest tensors find a hole or not hangs on such differences, and what a GPU must have changes by
    their size. Then the form can't tell, and its variations say so by disagreeing. In each some tensors that live for a
    few events are left out, and some stay for a few events longer.
    """
    sizes = {identity: size for identity, size in events if identity > 0}
    born = {identity: index for index, (identity, _) in enumerate(events) if identity > 0}
    freed = [(index, -identity) for index, (identity, _) in enumerate(events) if identity < 0]
    freed = [(index, identity) for index, identity in freed if sizes.get(identity, 0) > SMALL]
    yield list(events)
    for seed in range(1, count):
        draw = Random(seed)
        changed: list[Event | None] = list(events)
        late: dict[int, list[Event]] = {}
        for index, identity in freed:
            chance = draw.random()
            if chance < VARIED and index - born[identity] <= BRIEF:
                changed[born[identity]] = changed[index] = None
            elif chance < 2 * VARIED:
                changed[index] = None
                late.setdefault(min(index + draw.randrange(1, 6), len(events) - 1), []).append(
                    (-identity, 0)
                )
        yield [
            event
            for index, one in enumerate(changed)
            for event in (one, *late.get(index, ()))
            if event is not None
        ]


class _TwoSteps(TrainingStep):
    """The step of a setting, taken twice after loading."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, blocks=True)
        parts = [
            self.embedding,
            *(p for layer in self.layers for p in layer.parameters),
            self._final_norm,
        ]
        parts += [] if self.decoder.tied else [self.head]
        self._workspaces: set[tuple[str, str]] = set()
        self.trained: list[Parameter] = [one for one in parts if one.trained]

    def multiplies(self, *, bias: bool = False) -> None:
        """The first product on a thread takes cuBLAS's workspace, the first with a bias cublasLt's.

        The backward pass runs in a thread of its own.
        """
        for kind, size in (
            ("cublas", cublas_workspace_bytes(self.setting.capability)),
            ("cublaslt", CUBLASLT_WORKSPACE_BYTES),
        )[: 1 + bias]:
            if (self.phase, kind) not in self._workspaces:
                self._workspaces.add((self.phase, kind))
                self.allocate(size)

    def _chunks(self) -> list[str]:
        """All of them, the last with what is left."""
        whole, rest = divmod(self.value("n"), CHUNK_TOKENS)
        if rest:
            self.symbols["rest"] = rest
        return ["c"] * whole + ["rest"] * bool(rest)

    def events_of_two(self) -> list[Event]:
        """The events."""
        state.load(self, self.setting)
        self.begin("forward")
        for number in range(2):
            self._take(first=number == 0)
        return self.events

    def _take(self, *, first: bool) -> None:
        """One step: its micro-batches, the optimizer, and gradients that go."""
        earlier = []  # gradients of the micro-batches before
        for number in range(min(self.scenario.gradient_accumulation, 2)):
            self.accumulating = number > 0
            batch = self.batch()
            self.micro_batch()
            self.begin("backward")
            self.backward_pass()
            batch.clear()
            earlier += [one.grad for one in self.trained if one.grad is not None]
            for one in self.trained:
                one.grad = None
        shapes = self._shapes()
        if first:
            state.hold_optimizer_states(self, self.setting, shapes)
        if self.scenario.has_wider_states:
            for _, elements, _ in shapes:
                for _ in ("gradient", "denominator"):  # each in fp32, and gone before the next
                    self.free(self.allocate(4 * elements))
        elif OPTIMIZERS[self.scenario.optimizer].copies_moments:
            for identity in [self.allocate(width * elements) for width, elements, _ in shapes]:
                self.free(identity)
        earlier.clear()
        self.begin("forward")

    def _shapes(self) -> list[tuple[int, int, int]]:
        """Trained tensors in the order of the model's, as :meth:`Setting.trained_shapes` has them."""
        if self.sharding:
            return [
                (width, elements, 1)
                for width, elements, times in self.setting.trained_shapes()
                for _ in range(times)
            ]
        return [(one.width, self._elements(one), 1) for one in self.trained]

    def _elements(self, parameter: Parameter) -> int:
        count = 1
        for symbol in parameter.dims:
            count *= self.value(symbol)
        return count
