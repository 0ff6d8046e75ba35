"""A mixture of experts on sizes: a router, and experts that are one tensor for all of them.

Rows are gathered by expert (each token comes ``e`` times), multiplied in groups, weighted, put back and summed. How
many tokens an expert gets does not matter, since all rows lie in one tensor. bitsandbytes leaves the experts in their
dtype, since they are no linear layers. PEFT's adapter of such a parameter is added to the whole of it: a copy of all
experts' weights that lives until the layer is done, and in the backward pass a gradient of that size.

Sources: transformers 5.24 (integrations/moe.py, grouped_mm_experts_forward; models/*/modeling_*.py), peft 0.21
(tuners/lora/layer.py, ParamWrapper).
"""

from __future__ import annotations

from will_it_fit.analytic.graph import Parameter, Tensor
from will_it_fit.analytic.layers import Adapter, Layer, Network, activated, product
from will_it_fit.engine.components import WEIGHT_CASTS

ROWS = ("e", "t")  # each token as often as it has experts


def experts(net: Network, x: Tensor, layer: Layer, size: str = "i") -> Tensor:
    """Route the tokens, run the experts, sum what each token gets; ``size``: the width of one."""
    net.what = "experts"
    shares, indices = routed(net, x, layer)
    rows = net.elementwise(x, dims=(*ROWS, "h"), saved=[indices])
    up = merged(net, layer.up, layer.up_adapter) if layer.up_adapter else layer.up  # cached until the layer is done
    joined = grouped(net, rows, up, f"{size}+{size}")
    del rows
    gate, second = net.split(joined, (size, size))
    del joined
    hidden = net.multiply(activated(net, gate), second)
    del gate, second
    down = merged(net, layer.down, layer.down_adapter) if layer.down_adapter else layer.down
    out = grouped(net, hidden, down, "h")
    del hidden
    weighted = net.multiply(out, shares)
    ordered = net.elementwise(weighted, saved=[indices])
    del weighted, out
    return net.elementwise(ordered, dims=("t", "h"))


def routed(net: Network, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """The share of each of a token's experts, and which these are."""
    router = merged(net, layer.router, layer.router_adapter) if layer.router_adapter else layer.router
    logits = product(net, x, router, "E") if isinstance(router, Parameter) else net.matmul(x, router, "E")
    shares = net.softmax(net.cast(logits, 4), 4)
    indices = net.tensor(ROWS, 8)
    return net.cast(net.elementwise(shares, dims=ROWS, saved=[indices]), logits.width), indices


def grouped(net: Network, x: Tensor, weight: Parameter | Tensor, outputs: str) -> Tensor:
    """Rows times the weight of the expert they belong to: grouped_mm, which is not under autocast."""
    return net.matmul(net.cast(x, weight.width), weight, outputs)


def merged(net: Network, weight: Parameter, adapter: Adapter) -> Tensor:
    """A weight with its adapter's product added, as a tensor of its own; the factors are cast to the weight's dtype."""
    a, b = adapter
    width = weight.width
    factors = [net.tensor(f.dims, width, WEIGHT_CASTS, "adapters of parameters") for f in (a, b) if f.width != width]

    def backward(grad: Tensor) -> list:
        tensors = []
        for factor in (b, a):
            unscaled = net.tensor(factor.dims, width)
            tensors.append(net.tensor(factor.dims, width))
            del unscaled
        return tensors

    return net.operation(weight.dims, width, [b, a], backward, factors)
