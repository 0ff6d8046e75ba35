"""Automatic differentiation on sizes: tensors without content, and accounts of what is alive.

An operation allocates its result and puts a node on the tape; the node keeps storages alive, as PyTorch's saved tensors
do, until the backward pass has used them. Storages are counted by Python's own references: a tensor that nobody holds
is gone at once, as in PyTorch.

What is alive is counted by terms. A term is a size written down as a formula: ``2·t·h`` is two bytes for each token and
hidden element. All tensors of one formula, component and purpose are one term.

Source of what an operation keeps: PyTorch 2.13, tools/autograd/derivatives.yaml; of checkpointing:
torch/utils/checkpoint.py (without reentrance: recomputation stops as soon as all that was missing is there; with it:
``CheckpointFunction`` records nothing in the forward pass, and runs forward and backward of the part in its backward).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from sys import getrefcount
from typing import Any, NamedTuple

from dryfit.engine.allocator import EMPTY_CACHE, Event, round_size, typical_block
from dryfit.engine.components import ACTIVATIONS, GRADIENTS, LOGITS_AND_LOSS, ROUNDING, TEMPORARIES
from dryfit.engine.replay import replay

Backward = Callable[
    ["Tensor"], list
]  # the gradient of an operation's result -> one for each input, or None


class Term(NamedTuple):
    """What a number of tensors are: their component, their purpose in words, their formula and the bytes of one."""

    component: str
    what: str
    formula: str
    size: int


class Ledger:
    """What is alive, what was alive at each phase's peak, and, on request, every allocation in order.

    Parameters
    ----------
    symbols
        The numbers that symbols of formulas stand for.
    blocks
        Whether to keep the order of allocations, so that the allocator can make blocks of them. Else each tensor counts
        as much as its block does on average.
    expandable
        Whether segments are expandable: then every block is as large as its tensor, to 512 bytes.
    """

    def __init__(self, symbols: dict[str, int], *, blocks: bool, expandable: bool = False) -> None:
        self.symbols, self.expandable = symbols, expandable
        self.live: Counter[Term] = Counter()
        self.now = 0
        self.phase = "load"
        self.peaks: dict[str, int] = {}
        self.at_peak: dict[str, Counter[Term]] = {}
        self.events: list[Event] | None = [] if blocks else None
        self._terms: dict[tuple, Term] = {}
        self._starts = [("load", 0)]
        self._last_identity = 0
        self._rising = False

    def value(self, symbol: str) -> int:
        """A symbol's number; ``i+i`` is a sum, ``1/64`` a share, ``4096`` itself."""
        if symbol not in self.symbols:
            parts = symbol.split("+")
            self.symbols[symbol] = sum(
                int(part) if part.isdigit() else self.symbols[part] for part in parts
            )
        return self.symbols[symbol]

    def term(self, component: str, what: str, dims: tuple[str, ...], width: int) -> Term:
        """The term of tensors of some dimensions, whose elements take ``width`` bytes."""
        key = (component, what, dims, width)
        term = self._terms.get(key)
        if term is None:
            elements = prod(self.value(symbol) for symbol in dims)
            term = Term(
                component, what, "·".join((str(width), *dims)), self.rounded(elements * width)
            )
            self._terms[key] = term
        return term

    def rounded(self, size: int) -> int:
        """Bytes to account for: requests where the allocator makes the blocks, else blocks as they are on average."""
        return (
            round_size(size) if self.expandable or self.events is not None else typical_block(size)
        )

    def count(self, term: Term, times: int = 1) -> None:
        """Some tensors of a term come."""
        self.live[term] += times
        self.now += term.size * times
        self._rising = True

    def uncount(self, term: Term, times: int = 1) -> None:
        """Some tensors of a term go."""
        if self._rising:
            self.look()
        self.live[term] -= times
        self.now -= term.size * times

    def look(self) -> None:
        """Note the phase's peak if this is one."""
        self._rising = False
        if self.now > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.now
            self.at_peak[self.phase] = self.live.copy()

    def begin(self, phase: str) -> None:
        """A phase begins; what is alive counts for both."""
        self.look()
        self.phase = phase
        self.look()
        if self.events is not None:
            self._starts.append((phase, len(self.events)))

    def hold(
        self, component: str, what: str, width: int, elements: int | str, times: int = 1
    ) -> None:
        """Tensors of some elements (a number or a symbol) come and stay to the end of the step.

        Those of the load phase are allocated by who loads them.
        """
        term = self.term(component, what, (str(elements),), width)
        self.count(term, times)
        if self.events is not None and self.phase != "load":
            for _ in range(times):
                self.allocate(term.size)

    def allocate(self, size: int) -> int:
        """Tell the allocator of a tensor; returns what to retire it by."""
        if self.events is not None:
            self._last_identity += 1
            self.events.append((self._last_identity, size))
        return self._last_identity

    def free(self, identity: int) -> None:
        """Tell the allocator of a tensor's end."""
        if self.events is not None:
            self.events.append((-identity, 0))

    def empty_cache(self) -> None:
        """Tell the allocator to give back what is free."""
        if self.events is not None:
            self.events.append(EMPTY_CACHE)

    def make_blocks(self) -> None:
        """Run the allocations through the allocator: what its blocks take beyond the tensors is a term of its own."""
        if self.events is None:
            return
        run = replay(self.events, self._starts, expandable_segments=self.expandable)
        for phase, peak in run.phases.items():
            self.at_peak[phase][
                Term(ROUNDING, "blocks larger than tensors", "", peak - self.peaks[phase])
            ] = 1
            self.peaks[phase] = peak
        self.events = None


class Storage:
    """Bytes that are alive as long as this object is; so a backward function must hold none but what is saved."""

    __slots__ = ("_identity", "_ledger", "term")

    def __init__(self, ledger: Ledger, term: Term) -> None:
        self._ledger, self.term = ledger, term
        ledger.count(term)
        self._identity = ledger.allocate(term.size)

    def __del__(self) -> None:
        self._ledger.free(self._identity)
        self._ledger.uncount(self.term)


class Tensor:
    """Dimensions on a storage, which views share; ``edge`` is where its gradient goes (None: it needs none)."""

    __slots__ = ("dims", "edge", "storage", "width")

    def __init__(
        self, storage: Storage, dims: tuple[str, ...], width: int, edge: Any = None
    ) -> None:
        self.storage, self.dims, self.width, self.edge = storage, dims, width, edge


class Parameter:
    """A weight: accounted for from the start, with a gradient if it is trained."""

    __slots__ = ("dims", "grad", "tied", "trained", "width")

    def __init__(
        self, dims: tuple[str, ...], width: int, trained: bool, tied: bool = False
    ) -> None:
        self.dims, self.width, self.trained, self.tied = dims, width, trained, tied
        self.grad: Tensor | None = None

    @property
    def edge(self) -> Parameter | None:
        """Where its gradient goes."""
        return self if self.trained else None


class Node:
    """An operation of the forward pass, waiting for its backward.

    ``saved`` is what it keeps; None: not known before the checkpointed part it lies in runs again.
    """

    __slots__ = ("backward", "checkpoint", "edges", "grad", "saved")

    def __init__(
        self,
        edges: list,
        saved: list[Storage] | None,
        backward: Backward | None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.edges, self.saved, self.backward, self.checkpoint = edges, saved, backward, checkpoint
        self.grad: Tensor | None = None


class Checkpoint:
    """A part of the forward pass that keeps its input alone, and runs again when something else is asked for."""

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.run, self.storage, self.shape, self.needs = (
            run,
            x.storage,
            (x.dims, x.width),
            x.edge is not None,
        )
        self.nodes: list[Node] = []


class _Complete(Exception):
    """All that a checkpointed part did not keep is there again; what is left of it need not run."""


class Graph(Ledger):
    """Operations on sizes, and their backward pass.

    ``what`` says what new tensors are for; the passes that build layers set it as they go.
    """

    def __init__(
        self, symbols: dict[str, int], *, blocks: bool, accumulating: bool, expandable: bool = False
    ) -> None:
        super().__init__(symbols, blocks=blocks, expandable=expandable)
        self.accumulating = (
            accumulating  # gradients of micro-batches before this one are there already
        )
        self.what = "weights"
        self.nodes: list[Node] = []
        self.casts: list[Tensor] = []  # autocast's copies of weights, kept until its context ends
        self._checkpoint: Checkpoint | None = None  # the part that runs
        self._again: Checkpoint | None = None  # the part that runs again, in the backward pass
        self._taping = (
            True  # whether operations put nodes on the tape (``torch.no_grad`` switches that off)
        )
        self._recomputing = False  # whether a part runs again, in the backward pass
        self._left = self._missing = (
            0  # its nodes to come, and those of them that miss what they keep
        )

    # --- tensors ---

    def tensor(
        self,
        dims: tuple[str, ...],
        width: int,
        component: str | None = None,
        what: str | None = None,
    ) -> Tensor:
        """A new tensor. Like the trace, whatever is as wide as the vocabulary counts to the logits."""
        backward = self.phase == "backward" and not self._recomputing
        if component is None and dims[-1] == "V":
            component = LOGITS_AND_LOSS
        component = component or (TEMPORARIES if backward else ACTIVATIONS)
        return Tensor(
            Storage(self, self.term(component, what or self.what, dims, width)), dims, width
        )

    def like(self, *tensors: Tensor) -> Backward:
        """The backward of an operation that gives each input a gradient of its own dimensions and nothing more."""
        shapes = [(x.dims, x.width) for x in tensors]
        return lambda grad: [self.tensor(*shape) for shape in shapes]

    # --- operations ---

    def operation(
        self,
        dims: tuple[str, ...],
        width: int,
        inputs: Sequence[Tensor | Parameter],
        backward: Backward,
        saved: Sequence[Tensor | Parameter | None] = (),
        saves_output: bool = False,
        after: Callable[[], Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """A new tensor; its node keeps ``saved`` and turns its gradient into one for each input.

        ``after`` makes what comes after the result and is kept too.
        """
        edges = [x.edge for x in inputs]
        node = None
        if self._taping and any(edge is not None for edge in edges):
            kept = [x.storage for x in saved if isinstance(x, Tensor)]
            if self._checkpoint is not None:
                kept = None if kept or saves_output or after else []
            node = Node(edges, kept, backward, self._checkpoint)
            self._record(node)
        out = self.tensor(dims, width)
        later = [x.storage for x in after()] if after else []
        if node is not None:
            out.edge = node
            if self._checkpoint is None:
                node.saved += [out.storage, *later] if saves_output else later
        return out

    def multiplies(self, *, bias: bool = False) -> None:
        """Called before each product of matrices: the first one on a thread takes a workspace."""

    def elementwise(
        self,
        x: Tensor,
        width: int | None = None,
        saved: Sequence[Tensor] = (),
        dims: tuple[str, ...] | None = None,
    ) -> Tensor:
        """One tensor to another, of its dimensions or others (an activation, a scaling, a dtype, a choice of rows)."""
        return self.operation(dims or x.dims, width or x.width, [x], self.like(x), saved)

    def cast(self, x: Tensor, width: int) -> Tensor:
        """The tensor with elements of ``width`` bytes; itself if they are."""
        return x if x.width == width else self.elementwise(x, width)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y: keeps nothing, and hands its gradient on to both."""
        widths = (x.width, y.width)

        def backward(grad):
            return [grad if grad.width == w else self.tensor(grad.dims, w) for w in widths]

        return self.operation(x.dims, max(widths), [x, y], backward)

    def multiply(self, x: Tensor, y: Tensor | Parameter) -> Tensor:
        """x * y, y perhaps smaller and spread over x; each is kept for the gradient of the other."""
        pair = (x, y)
        shapes, needs = [(z.dims, z.width) for z in pair], [z.edge is not None for z in pair]
        saved = [y if needs[0] else None, x if needs[1] else None]

        def backward(grad: Tensor) -> list:
            full = [
                self.tensor(grad.dims, max(grad.width, width)) if need else None
                for need, (_, width) in zip(needs, shapes, strict=True)
            ]
            return [
                wide if wide is None or (wide.dims, wide.width) == shape else self.tensor(*shape)
                for wide, shape in zip(full, shapes, strict=True)
            ]

        return self.operation(x.dims, max(x.width, y.width), pair, backward, saved)

    def matmul(
        self,
        x: Tensor,
        weight: Parameter | Tensor,
        outputs: str,
        bias: Parameter | None = None,
        cast: Tensor | None = None,
    ) -> Tensor:
        """x times a weight; ``cast``: the copy that is multiplied, where autocast has made one."""
        dims, shape, width, of_weight = (
            (*x.dims[:-1], outputs),
            (x.dims, x.width),
            x.width,
            weight.dims,
        )
        trained, needs = weight.edge is not None, x.edge is not None
        computed = isinstance(weight, Tensor)
        kept = weight if computed else cast

        def backward(grad: Tensor) -> list:
            self.multiplies()
            grads = [self.tensor(*shape) if needs else None]
            grads.append(self.gradient(of_weight, width, computed=computed) if trained else None)
            if bias:
                grads.append(self.gradient(bias.dims, width) if bias.trained else None)
            return grads

        self.multiplies(bias=bias is not None)
        inputs = [x, weight] + ([bias] if bias else [])
        return self.operation(
            dims, width, inputs, backward, [x if trained else None, kept if needs else None]
        )

    def batched(self, x: Tensor, y: Tensor, dims: tuple[str, ...]) -> Tensor:
        """x times y, both kept."""
        self.multiplies()
        return self.operation(dims, x.width, [x, y], self.like(x, y), [x, y])

    def softmax(self, x: Tensor, width: int) -> Tensor:
        """Keeps its output; its backward makes a product of gradient and output too."""
        shape = (x.dims, x.width)

        def backward(grad: Tensor) -> list:
            result = self.tensor(*shape)
            product = self.tensor(shape[0], width)
            del product
            return [result]

        return self.operation(x.dims, width, [x], backward, saves_output=True)

    def tanh(self, x: Tensor) -> Tensor:
        """Keeps its output."""
        return self.operation(x.dims, x.width, [x], self.like(x), saves_output=True)

    def split(self, x: Tensor, parts: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Views of one tensor; their gradients are put together again into one of its size."""
        edge = self.node([x.edge], self.like(x)) if x.edge else None
        return tuple(Tensor(x.storage, (*x.dims[:-1], name), x.width, edge) for name in parts)

    def checkpointed(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a part without keeping anything but its input; it runs again in the backward pass."""
        self._checkpoint = Checkpoint(run, x)
        out = run(x)
        self._checkpoint = None
        return out

    def checkpointed_reentrantly(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The same in the older way: one node for the part, whose backward has a forward and backward pass of its own.

        So everything that the part keeps, and its result, is there at once.
        """
        source, shape = x.storage, (x.dims, x.width)
        self._taping = False
        out = run(Tensor(source, *shape))
        self._taping = True
        if x.edge is None:
            return out

        def backward(grad: Tensor) -> list:
            input_ = Node([], [], None)
            tape, self.nodes = self.nodes, []
            with self._running_again():
                result = run(Tensor(source, *shape, input_))
            nodes, self.nodes = self.nodes, tape
            result.edge.grad = grad
            self.backward(nodes)
            return [input_.grad]

        self._record(node := Node([x.edge], [], backward))
        out.edge = node
        return out

    @contextmanager
    def _running_again(self) -> Iterator[None]:
        """What is made inside is a part's own again, and no temporary of the backward pass."""
        what, self._recomputing = self.what, True
        yield
        self._recomputing, self.what = False, what
        self.casts.clear()

    def node(self, edges: list, backward: Backward) -> Node:
        """A node of the tape that keeps nothing."""
        self._record(node := Node(edges, [], backward, self._checkpoint))
        return node

    def _record(self, node: Node) -> None:
        """Put a node on the tape; while a part runs again, only what it keeps is of interest."""
        if self._again is None:
            self.nodes.append(node)
            if self._checkpoint is not None:
                self._checkpoint.nodes.append(node)
            return
        original = self._again.nodes[len(self._again.nodes) - self._left]
        self._left -= 1
        if original.saved is None:
            original.saved = node.saved
            self._missing -= 1
            if not self._missing:
                raise _Complete

    # --- backward ---

    def gradient(self, dims: tuple[str, ...], width: int, *, computed: bool = False) -> Tensor:
        """The gradient of a weight; of one that was ``computed`` it is a temporary."""
        return self.tensor(dims, width, None if computed else GRADIENTS, "gradients of weights")

    def backward(self, nodes: list[Node]) -> None:
        """Run nodes in reverse order, as the autograd engine does."""
        self.what = "gradients of activations"
        while nodes:
            node = nodes.pop()
            grad, node.grad = node.grad, None
            if grad is None:
                node.checkpoint = node.saved = None
                continue
            if node.saved is None:
                self._run_again(node.checkpoint)
            grads = node.backward(grad)
            del (
                grad
            )  # before what was saved, as `call_function` has it (torch/csrc/autograd/engine.cpp)
            node.checkpoint = node.saved = node.backward = None
            for index, edge in enumerate(node.edges):
                new, grads[index] = (
                    grads[index],
                    None,
                )  # moved: from here on the edge alone holds it
                self._accumulate(edge, new)
                del new
            del grads

    def _run_again(self, part: Checkpoint) -> None:
        """Recompute a part until everything that its nodes keep is there."""
        self._again, self._left = part, len(part.nodes)
        self._missing = sum(node.saved is None for node in part.nodes)
        x = Tensor(part.storage, *part.shape, Node([], [], None) if part.needs else None)
        with self._running_again(), suppress(_Complete):
            part.run(x)
        self._again = None
        part.nodes.clear()

    def _accumulate(self, edge: Node | Parameter | None, grad: Tensor | None) -> None:
        """Hand a gradient to the node or parameter it belongs to; a second one is added to it.

        In place if nobody else holds the first one, else into a new tensor beside both
        (``torch/csrc/autograd/input_buffer.cpp``, ``can_accumulate_inplace``).
        """
        if edge is None or grad is None:
            return
        parameter = isinstance(edge, Parameter)
        if parameter and (grad.width != edge.width or grad.storage.term.component != GRADIENTS):
            grad = self.gradient(edge.dims, edge.width)
        if edge.grad is not None:
            if parameter:  # a tied weight's gradients wait for each other, and make a new one
                edge.grad = self.gradient(edge.dims, edge.width)
            elif _holders(edge) != _HELD_ONCE or (edge.grad.dims, edge.grad.width) != (
                grad.dims,
                grad.width,
            ):
                edge.grad = self.tensor(grad.dims, max(grad.width, edge.grad.width))
        elif not (parameter and self.accumulating and not edge.tied):
            edge.grad = grad  # else it is added to what earlier micro-batches left


def _holders(node: Node) -> tuple[int, int]:
    """References to a node's gradient and to its storage, as Python counts them here."""
    return getrefcount(node.grad), getrefcount(node.grad.storage)


def _held_once() -> tuple[int, int]:
    """What :func:`_holders` says where a node is the only holder: how many that is depends on Python's version."""
    node = Node([], [], None)
    node.grad = Tensor(Storage(Ledger({}, blocks=False), Term(TEMPORARIES, "", "", 0)), (), 0)
    return _holders(node)


_HELD_ONCE = _held_once()
