"""A mixture of experts on sizes: a router, and experts that are one tensor for all of them.

Rows are gathered by expert (each token comes ``e`` times), multiplied in groups, weighted, put back and summed. How
many tokens an expert gets does not matter, since all rows lie in one tensor. bitsandbytes leaves the experts in their
dtype, since they are no linear layers. PEFT's adapter of such a parameter is added to the whole of it: a copy of all
experts' weights that lives until the layer is done, and in the backward pass a gradient of that size.

Sources: transformers 5.24 (integrations/moe.py, grouped_mm_experts_forward; models/*/modeling_*.py), peft 0.21
(tuners/lora/layer.py, ParamWrapper).
"""

from dryfit.analytic.graph import Parameter, Tensor
from dryfit.analytic.layers import Adapter, Layer, Network, activated, product
from dryfit.engine.components import WEIGHT_CASTS

ROWS = ("e", "t")  # each token as often as it has experts


def experts(net: Network, x: Tensor, layer: Layer) -> Tensor:
    """Route the tokens, run the experts, sum what each token gets."""
    net.what = "experts"
    width, tokens = x.width, x.dims
    shares, indices = routed(net, x, layer)
    rows = net.elementwise(x, dims=(*ROWS, x.dims[-1]), saved=[indices])
    up = (
        merged(net, layer.up, layer.up_adapter) if layer.up_adapter else layer.up
    )  # cached until the layer is done
    made = grouped(net, rows, up, "i+i")
    del rows
    gate, second = net.split(made, ("i", "i"))
    del made
    hidden = net.multiply(activated(net, gate), second)
    del gate, second
    down = merged(net, layer.down, layer.down_adapter) if layer.down_adapter else layer.down
    out = grouped(net, hidden, down, tokens[-1])
    del hidden
    weighted = net.multiply(as_wide(net, out, shares.width), shares)
    ordered = net.elementwise(weighted, saved=[indices])
    del weighted, out
    return net.cast(net.elementwise(ordered, dims=tokens), width)


def as_wide(net: Network, x: Tensor, width: int) -> Tensor:
    """The same elements, whose gradient comes wider: it is narrowed when that of the product is gone.

    Source: PyTorch 2.13, torch/csrc/autograd/engine.cpp (validate_outputs, after the product's own backward).
    """
    if x.width == width or x.edge is None:
        return x
    return Tensor(x.storage, x.dims, width, net.node([x.edge], net.like(x)))


def routed(net: Network, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """The share of each of a token's experts, and which these are."""
    router = (
        merged(net, layer.router, layer.router_adapter) if layer.router_adapter else layer.router
    )
    logits = (
        product(net, x, router, "E")
        if isinstance(router, Parameter)
        else net.matmul(x, router, "E")
    )
    indices = net.tensor(ROWS, 8)
    scores = net.softmax(net.cast(logits, 4), 4)
    shares = net.elementwise(scores, dims=ROWS, saved=[indices])
    return net.cast(shares, x.width), indices


def grouped(net: Network, x: Tensor, weight: Parameter | Tensor, outputs: str) -> Tensor:
    """Rows times the weight of the expert they belong to: grouped_mm, which is not under autocast."""
    return net.matmul(net.cast(x, weight.width), weight, outputs)


def merged(net: Network, weight: Parameter, adapter: Adapter) -> Tensor:
    """A weight with its adapter's product added, as a tensor of its own; the factors are cast to the weight's dtype."""
    a, b = adapter
    width = weight.width
    factors = [
        net.tensor(f.dims, width, WEIGHT_CASTS, "adapters of parameters")
        for f in (a, b)
        if f.width != width
    ]

    def backward(grad: Tensor) -> list:
        tensors = []
        for factor in (b, a):
            unscaled = net.tensor(factor.dims, width)
            tensors.append(net.tensor(factor.dims, width))
            del unscaled
        return tensors

    return net.operation(weight.dims, width, [b, a], backward, factors)
