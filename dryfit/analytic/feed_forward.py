"""What follows attention in layers of several kinds, on sizes: MLPs, experts, and both side by side.

Sources: transformers 5.24 (models/*/modeling_*.py, integrations/moe.py).
"""

from __future__ import annotations

from dryfit.analytic.experts import experts
from dryfit.analytic.experts import routed as routed_shares
from dryfit.analytic.graph import Parameter, Tensor
from dryfit.analytic.layers import Network, activated, dropped, linear, norm, product
from dryfit.analytic.operations import HybridLayer, kept, root_normed, summed


def gated(net: Network, x: Tensor, layer: HybridLayer, names: tuple[str, ...] = ()) -> Tensor:
    """Gate, up, down."""
    net.what = "MLP"
    gate_proj, up_proj, down_proj = (layer[name] for name in names or layer.mlp_names)
    if layer.plan.layer == "side_by_side":  # Falcon-H1: each times a number, up before gate
        up = linear(net, x, up_proj)
        out = net.multiply(up, activated(net, net.elementwise(linear(net, x, gate_proj))))
        del up
        return net.elementwise(linear(net, out, down_proj))
    gate = linear(net, x, gate_proj)
    gate = activated(net, cut_off(net, gate) if "cut_off" in layer.plan.options else gate)
    out = net.multiply(gate, linear(net, x, up_proj))
    del gate
    out = linear(net, out, down_proj)
    return dropped(net, out) if net.decoder.residual_dropout else out


def cut_off(net: Network, x: Tensor) -> Tensor:
    """What lies a number of deviations above each token's mean, and nought for the rest (Gemma 3n)."""
    shape = (x.dims, x.width)

    def of_deviation(grad: Tensor) -> list:
        distance = net.tensor(*shape)
        result = net.tensor(*shape)
        del distance
        return [result]

    mean = net.operation(("t",), x.width, [x], net.like(x))
    deviation = net.operation(("t",), x.width, [x], of_deviation, [x], saves_output=True)
    above = net.add(x, net.add(mean, deviation))
    return kept(net, above)


def shared_names(prefix: str) -> tuple[str, ...]:
    """Of an MLP that every token goes through."""
    return tuple(f"{prefix}.{name}_proj" for name in ("gate", "up", "down"))


def fused(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Gate and up in one matrix, down."""
    net.what = "MLP"
    both = linear(net, x, layer["input_linear"])
    gate, up = net.split(both, ("S", "S"))
    out = net.multiply(activated(net, gate), up)
    del both, gate, up
    return linear(net, out, layer["output_linear"])


def squared(net: Network, x: Tensor, layer: HybridLayer, prefix: str = "") -> Tensor:
    """Up, the square of what is positive, down."""
    net.what = "MLP"
    out = squares(net, linear(net, x, layer[f"{prefix}up_proj"]))
    return linear(net, out, layer[f"{prefix}down_proj"])


def squares(net: Network, x: Tensor) -> Tensor:
    """What is positive, squared: the first is kept."""
    positive = kept(net, x)
    return net.elementwise(positive, saved=[positive])


def routed(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Experts alone."""
    return experts(net, x, layer, "m")


def routed_biased(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Experts with biases and a gate of their own (gpt-oss)."""
    return experts(net, x, layer, "m", between=clamped)


def squared_rows(net: Network, made: Tensor, size: str) -> Tensor:
    """What experts without a gate do between their matrices."""
    return squares(net, made)


def clamped(net: Network, made: Tensor, size: str) -> Tensor:
    """gpt-oss' gate: both halves clamped, the sigmoid of one, and one more than the other."""
    gate, up = net.split(made, (size, size))
    gate = net.elementwise(gate, saved=[gate])
    up = net.elementwise(up, saved=[up])
    opened = net.multiply(gate, kept(net, net.elementwise(gate)))
    return net.multiply(net.elementwise(up), opened)


def routed_beside_gated(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Experts, and beside them an MLP that every token goes through, by a gate of its own (Qwen)."""
    shared = gated(net, x, layer, shared_names("shared_expert"))
    out = experts(net, x, layer, "m")
    net.what = "experts"
    gate = kept(net, linear(net, x, layer["shared_expert_gate"]))
    return net.add(out, net.multiply(shared, gate))


def routed_beside(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Experts, and an MLP that every token goes through (DeepSeek, GLM, Kimi)."""
    out = experts(net, x, layer, "m")
    return net.add(out, gated(net, x, layer, shared_names("shared_experts")))


def routed_after(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """The same, the experts last (ERNIE)."""
    shared = gated(net, x, layer, shared_names("shared_experts"))
    return net.add(experts(net, x, layer, "m"), shared)


def every_expert(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Every expert gets every token, times its share, most of which are nought (Llama 4)."""
    net.what, rows, source = "experts", ("E", "t"), x.width
    scores = product(net, x, layer["gate"], "E")
    scores = net.cast(kept(net, net.cast(net.elementwise(scores), 4)), source)
    inputs = net.multiply(net.elementwise(x, dims=(*rows, "h")), net.elementwise(scores))
    both = product(net, inputs, layer["gate_up_proj"], "m+m")
    gate, up = net.split(both, ("m", "m"))
    del both
    hidden = net.multiply(up, activated(net, gate))
    del gate, up
    out = product(net, hidden, layer["experts.down_proj"], "h")
    del hidden
    shared = gated(net, x, layer, shared_names("shared_expert"))
    net.what = "experts"
    total = net.add(shared, summed(net, out, x.dims))
    del inputs, out  # the model's code holds them to the end
    return total


def routed_beside_fused(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """The same with gate and up in one matrix (Granite)."""
    out = experts(net, x, layer, "m")
    return net.add(out, fused(net, x, layer))


def routed_beside_squared(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Experts without a gate, on narrower vectors in some models, and an MLP that every token goes through."""
    if "fc1_latent_proj" in layer.parts:
        shares = routed_shares(net, x, layer)
        out = experts(net, linear(net, x, layer["fc1_latent_proj"]), layer, "m", shares, squared_rows)
        out = linear(net, out, layer["fc2_latent_proj"])
    else:
        out = experts(net, x, layer, "m", between=squared_rows)
    return net.add(out, squared(net, x, layer, "shared_experts."))


def gemma_experts(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Gemma 4's experts beside its MLP: a router with a norm of its own, norms before and after."""
    with net.purpose("norms"):
        routing = net.cast(root_normed(net, net.cast(x, 4), "1"), x.width)
    routing = net.elementwise(net.multiply(routing, layer["router.scale"]))
    scores = net.softmax(net.cast(linear(net, routing, layer["router.proj"]), 4), 4)
    del routing
    indices = net.tensor(("e", "t"), 8)
    shares = net.elementwise(scores, dims=("e", "t"), saved=[indices])
    shares = net.multiply(shares, Parameter(("1",), 4, layer["router.per_expert_scale"].trained))
    out = experts(net, norm(net, x, layer["pre_feedforward_layernorm_2"]), layer, "m", (shares, indices))
    return norm(net, out, layer["post_feedforward_layernorm_2"])
