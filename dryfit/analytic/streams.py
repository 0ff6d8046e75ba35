"""Several residual streams side by side on sizes: Gemma 3n's alternating updates.

A layer predicts all streams from the one that it works on, and corrects all of them by what came out. As in
:mod:`dryfit.analytic.layers`, local variables live as long as in transformers' code.

Source: transformers 5.24 (models/gemma3n/modeling_gemma3n.py).
"""

from __future__ import annotations

from dryfit.analytic import feed_forward, mixers
from dryfit.analytic.graph import Tensor
from dryfit.analytic.layers import Network, activated, linear, norm
from dryfit.analytic.operations import HybridLayer, copied, joined, kept, viewed

ALL, ONE = ("al", "t", "h"), ("t", "h")


def alternating(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Predict, work on one stream beside a narrow residual path, correct, add the layer's own inputs to the others."""
    weights = layer.parts
    predictions = predicted(net, x, layer)
    active = viewed(net, predictions, ONE)
    normed = norm(net, active, weights["input_layernorm"])
    net.what = "narrow residual path"
    low = linear(net, linear(net, normed, weights["laurel.linear_left"]), weights["laurel.linear_right"])
    low = net.add(normed, norm(net, low, weights["laurel.post_laurel_norm"]))
    out = norm(net, mixers.grouped(net, normed, layer, x.width), weights["post_attention_layernorm"])
    net.what = "residual stream"
    gated = net.add(active, out)
    both = net.elementwise(net.add(gated, low))
    inner = norm(net, both, weights["pre_feedforward_layernorm"])
    made = feed_forward.gated(net, inner, layer)
    made_normed = norm(net, made, weights["post_feedforward_layernorm"])
    net.what = "residual stream"
    done = net.add(both, made_normed)
    corrected = correction(net, predictions, done, layer)
    first = copied(net, viewed(net, corrected, ONE))
    if "scaled_correction" in layer.plan.options:
        first = net.multiply(first, weights["altup.correct_output_scale"])
    first = activated(net, linear(net, first, weights["per_layer_input_gate"]))
    first = net.multiply(first, viewed(net, net.inputs_of_layers, ("t", "p4")))
    first = norm(net, linear(net, first, weights["per_layer_projection"]), weights["post_per_layer_input_norm"])
    corrected = added_to_others(net, corrected, first)
    del active, normed, low, out, gated, both, inner, made, made_normed, done  # the code holds them to its end
    return corrected


def routed(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """A number for each stream."""
    with net.purpose("routing of streams"):
        scores = net.elementwise(norm(net, x, layer["altup.router_norm"]))
        return net.cast(kept(net, net.cast(linear(net, scores, layer["altup.modality_router"]), 4)), x.width)


def predicted(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """All streams from products of all of them, in another order first."""
    shares = linear(net, routed(net, viewed(net, x, ONE), layer), layer["altup.prediction_coefs"])
    net.what = "streams"
    narrow = net.cast(x, 2) if net.setting.autocast else x
    mixed = net.batched(narrow, net.cast(shares, narrow.width), ALL)
    del narrow
    return net.cast(copied(net, plus(net, mixed, x)), x.width)


def plus(net: Network, x: Tensor, y: Tensor) -> Tensor:
    """``x += y``: the gradient goes to both."""
    width = y.width
    both = lambda grad: [grad, grad if grad.width == width else net.tensor(grad.dims, width)]  # noqa: E731
    return Tensor(x.storage, x.dims, x.width, net.node([x.edge, y.edge], both))


def correction(net: Network, predictions: Tensor, done: Tensor, layer: HybridLayer) -> Tensor:
    """Each stream's share of what was not predicted, beside the prediction."""
    shares = routed(net, done, layer)
    net.what = "streams"
    new = net.add(done, viewed(net, predictions, ONE))
    new = net.operation(ALL, new.width, [new], lambda grad: [net.tensor(ONE, grad.width)])
    shares = net.elementwise(net.matmul(shares, layer["altup.correction_coefs"].weight, "al"))
    return plus(net, net.multiply(new, shares), predictions)


def added_to_others(net: Network, streams: Tensor, one: Tensor) -> Tensor:
    """``streams[1:] += one``: the gradient is copied whole, and its part once more."""
    width = one.width

    def backward(grad: Tensor) -> list:
        whole, others = net.tensor(ALL, grad.width), net.tensor(("al-1", *ONE), grad.width)
        result = net.tensor(ONE, width)
        del others
        return [whole, result]

    return Tensor(streams.storage, streams.dims, streams.width, net.node([streams.edge, one.edge], backward))


def spread_out(net: Network, x: Tensor, outside: HybridLayer) -> Tensor:
    """One stream to all, each but the first through a matrix and at the first one's magnitude."""
    net.what = "streams"
    magnitude = measured(net, x)
    parts = [x]
    for index in range(net.value("al") - 1):
        parts.append(at_magnitude(net, linear(net, x, outside[f"altup_projections.{index}"]), magnitude))
    net.held += parts
    return joined(net, tuple(parts), ALL)


def put_together(net: Network, x: Tensor, outside: HybridLayer) -> Tensor:
    """All streams to one, the mean of them."""
    net.what = "streams"
    magnitude = measured(net, viewed(net, x, ONE))
    parts = [viewed(net, x, ONE)]
    for index in range(net.value("al") - 1):
        made = linear(net, viewed(net, x, ONE), outside[f"altup_unembed_projections.{index}"])
        parts.append(at_magnitude(net, made, magnitude))
    together = joined(net, tuple(parts), ALL)
    return net.operation(ONE, together.width, [together], net.like(together))


def measured(net: Network, x: Tensor) -> Tensor:
    """The root of the mean of squares of each token."""
    squares = net.elementwise(x, saved=[x])
    return kept(net, net.operation(("t",), x.width, [squares], net.like(squares)))


def at_magnitude(net: Network, x: Tensor, magnitude: Tensor) -> Tensor:
    """Times one magnitude, divided by its own."""
    own = measured(net, x)
    return net.multiply(net.multiply(x, magnitude), own)
