"""Operations on sizes that layers of several kinds share: parts, copies, sums, convolutions, norms of heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from will_it_fit.analytic.graph import Tensor
from will_it_fit.analytic.layers import Network, through_the_mean, through_the_product

if TYPE_CHECKING:
    from will_it_fit.analytic.hybrid_layers import HybridLayer


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
