"""What layers of several kinds share: their parameters by name, and operations on sizes."""

from __future__ import annotations

from collections import Counter

from dryfit.analytic.graph import Parameter, Storage, Tensor, Term
from dryfit.analytic.hybrids import Plan, Weight
from dryfit.analytic.layers import Adapter, Linear, Network, through_the_mean, through_the_product

HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


class HybridLayer:
    """The parameters of one layer, by their names, as its plan has them."""

    def __init__(self, net: Network, plan: Plan, targets: set[str]) -> None:
        self.plan, self._net, self._targets = plan, net, targets
        self.parameters: list[Parameter] = []
        self._adapters: dict[str, Adapter | None] = {}
        self._biases: dict[str, Parameter] = {}
        self.parts = {weight.name: self._part(weight) for weight in plan.weights}
        self.parts |= self._biases
        self.up_bias, self.down_bias = self.parts.get("gate_up_proj_bias"), self.parts.get("down_proj_bias")
        self.router, self.router_adapter = self.parts.get("gate"), self._adapters.get("gate")
        self.gated = "gate_up_proj" in self.parts
        up = "gate_up_proj" if self.gated else "experts.up_proj"
        self.up, self.up_adapter = self.parts.get(up), self._adapters.get(up)
        self.down, self.down_adapter = self.parts.get("experts.down_proj"), self._adapters.get("experts.down_proj")

    @property
    def head_norms(self) -> list[Parameter]:
        """Those of queries and keys."""
        return [self.parts[w.name] for w in self.plan.weights if w.name in HEAD_NORMS]

    @property
    def mlp_names(self) -> tuple[str, ...]:
        """Of gate, up and down."""
        return ("w1", "w3", "w2") if "w1" in self.parts else ("gate_proj", "up_proj", "down_proj")

    @property
    def last(self) -> Linear:
        """The matrix that an attention ends with."""
        return self.parts["o_proj"] if "o_proj" in self.parts else self.parts["out_proj"]

    @property
    def norms(self) -> list[Parameter]:
        """Those of the residual stream, in order."""
        return [self.parts[w.name] for w in self.plan.weights if w.group == "norms" and w.dims == ("h",)]

    def __getitem__(self, name: str) -> Linear | Parameter:
        return self.parts[name]

    def _part(self, weight: Weight) -> Linear | Parameter:
        net = self._net
        base = net.base_parameter(weight.group, *weight.dims, reached=weight.reached)
        bias = net.base_parameter("biases", weight.dims[0], reached=weight.reached) if weight.bias else None
        adapter = self._adapters[weight.name] = self._adapter(weight)
        self.parameters += [part for part in (base, bias, *(adapter or ())) if part]
        if weight.group != "linear":
            if bias is not None:
                self._biases[f"{weight.name}.bias"] = bias
            return base
        matrix = next(m for m in net.decoder.matrices if m.name == weight.name and m.inputs == weight.dims[1])
        return Linear(matrix, base, bias, adapter)

    def _adapter(self, weight: Weight) -> Adapter | None:
        if weight.name not in self._targets or not weight.takes_adapter(self._net.decoder.adapts_experts):
            return None
        width = self._net.setting.adapter_width
        if weight.group == "experts":
            experts, outputs, inputs = weight.dims
            rank = "r+r" if weight.name == "gate_up_proj" else "r"
            return Parameter((experts, rank, inputs), width, True), Parameter((outputs, rank, experts), width, True)
        outputs, inputs = weight.dims
        return Parameter(("r", inputs), width, weight.reached), Parameter((outputs, "r"), width, weight.reached)


def viewed(net: Network, x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """A part of a tensor; its gradient becomes one of the whole, with zeros."""
    edge = None
    if x.edge is not None:
        edge = net.node([x.edge], net.like(x))
    return Tensor(x.storage, dims, x.width, edge)


def assigned(net: Network, base: Tensor, value: Tensor) -> Tensor:
    """``base[part] = value``: the whole's gradient is copied, and the part's taken out of it."""
    if value.edge is None and base.edge is None:
        return base
    whole, part = (base.dims, base.width), (value.dims, value.width)

    def backward(grad: Tensor) -> list:
        rest, own = net.tensor(*whole), net.tensor(*part)
        zeros = net.tensor(*part)
        del zeros
        return [rest, own]

    return Tensor(base.storage, base.dims, base.width, net.node([base.edge, value.edge], backward))


def summed(net: Network, x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """A sum over a dimension; its gradient is a view."""
    shape = x.dims
    return net.operation(dims, x.width, [x], lambda grad: [Tensor(grad.storage, shape, grad.width)])


def copied(net: Network, x: Tensor, dims: tuple[str, ...] | None = None) -> Tensor:
    """The same elements in another order; the gradient is a view."""
    shape = x.dims
    return net.operation(dims or x.dims, x.width, [x], lambda grad: [Tensor(grad.storage, shape, grad.width)])


def in_rows(net: Network, x: Tensor) -> Tensor:
    """What a matrix multiplies: of several rows a copy, where channels came before tokens."""
    return copied(net, x) if net.value("b") > 1 else x


def kept(net: Network, x: Tensor) -> Tensor:
    """One tensor to another, which is kept (an exponential, a sigmoid)."""
    return net.operation(x.dims, x.width, [x], net.like(x), saves_output=True)


def joined(net: Network, parts: tuple[Tensor, ...], dims: tuple[str, ...]) -> Tensor:
    """Put together: the gradient of each part is a view of the whole's."""
    shapes = [part.dims for part in parts]
    views = lambda grad: [Tensor(grad.storage, shape, grad.width) for shape in shapes]  # noqa: E731
    return net.operation(dims, max(part.width for part in parts), list(parts), views)


def multiplied(net: Network, x: Tensor, y: Tensor, dims: tuple[str, ...]) -> Tensor:
    """x times y in batches; under autocast in 16 bits."""
    if net.setting.autocast:
        x, y = net.cast(x, 2), net.cast(y, 2)
    return net.batched(x, y, dims)


def outer(net: Network, x: Tensor, y: Tensor, dims: tuple[str, ...]) -> Tensor:
    """Each element of one times many of the other, in fp32: only the two are kept."""
    pair = (x, y)
    shapes, needs = [(each.dims, each.width) for each in pair], [each.edge is not None for each in pair]

    def backward(grad: Tensor) -> list:
        full = [net.tensor(dims, 4) if need else None for need in needs]
        grads = []
        for place, need in enumerate(needs):
            grads.append(net.tensor(*shapes[place]) if need else None)
            full[place] = None
        return grads

    return net.operation(dims, 4, pair, backward, [y if needs[0] else None, x if needs[1] else None])


CHUNKS_RUN = 4


def chunks_run(net: Network) -> int:
    """How many chunks are run of those that follow each other; :func:`as_often` stands for the rest."""
    count = net.value("nc") // net.value("b")
    return count if net.events is not None else min(count, CHUNKS_RUN)


def chunks_left_out(net: Network) -> int:
    """And how many are not."""
    return net.value("nc") // net.value("b") - chunks_run(net)


def as_often(net: Network, state: Tensor, before: Counter[Term], times: int) -> Tensor:
    """The state, with what one chunk or token has left since ``before`` so many times more."""
    if not times:
        return state
    left = {term: net.live[term] - before[term] for term in set(net.live) | set(before)}

    def rest() -> list[Tensor]:
        kept = [
            term._replace(formula=f"{n * times}·{term.formula}", size=n * times * term.size)
            for term, n in left.items()
            if n > 0
        ]
        return [Tensor(Storage(net, term), state_dims, 4) for term in kept]

    state_dims = state.dims
    return net.operation(state.dims, state.width, [state], net.like(state), after=rest)


def by_package(net: Network, name: str) -> bool:
    """Whether a package of the target machine runs in the place of transformers' own code."""
    return name in net.setting.packages


def convolved(net: Network, x: Tensor, layer: HybridLayer, name: str, channels: str, *, silu: bool) -> Tensor:
    """A causal convolution of each channel over a few tokens, and an activation."""
    weight, bias = layer[name], layer.parts.get(f"{name}.bias")
    shape, width = (x.dims, x.width), x.width
    weights = [weight, *([bias] if bias else [])]

    def of_weights() -> list:
        return [net.gradient(p.dims, p.width) if p.trained else None for p in weights]

    if by_package(net, "causal-conv1d"):

        def of_kernel(grad: Tensor) -> list:
            own, wide = net.tensor(*shape), net.tensor(weight.dims, 4)
            narrow = net.tensor(weight.dims, weight.width)
            del wide, narrow
            return [own, *of_weights()]

        return net.operation(("t", channels), width, [x, *weights], of_kernel, [x])
    x = net.cast(x, weight.width)
    x = net.cast(x, 2) if net.setting.autocast else x
    shape = (x.dims, x.width)
    longer = net.operation(
        ("tf", channels), x.width, [x, *weights], lambda grad: [net.tensor(*shape), *of_weights()], [x]
    )
    cut = viewed(net, longer, ("t", channels))
    del longer
    return net.elementwise(cut, saved=[cut]) if silu else cut


def root_normed(net: Network, wide: Tensor, roots: str) -> Tensor:
    """x / root of the mean of squares, in fp32; ``roots``: the symbol of how many a token has."""
    square = net.tensor(wide.dims, 4)
    del square
    root = net.operation(("t", roots), 4, [wide], lambda grad, dims=wide.dims: through_the_mean(net, dims), [wide])
    return net.operation(wide.dims, 4, [wide, root], lambda grad: through_the_product(net, grad), [wide, root])
