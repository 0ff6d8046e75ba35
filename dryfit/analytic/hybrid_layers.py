"""Layers of several kinds on sizes: their parameters, and how a mixer of tokens and an MLP go together.

As in :mod:`dryfit.analytic.layers`, local variables live as long as in transformers' code. Mixers:
:mod:`~dryfit.analytic.mixers` (attention), :mod:`~dryfit.analytic.delta_rules` and
:mod:`~dryfit.analytic.state_spaces`; MLPs: :mod:`~dryfit.analytic.feed_forward`.

Source: transformers 5.24 (models/*/modeling_*.py).
"""

from __future__ import annotations

from collections.abc import Callable

from dryfit.analytic import feed_forward, mixers, state_spaces
from dryfit.analytic.delta_rules import delta, kimi_delta, separate_delta
from dryfit.analytic.graph import Tensor
from dryfit.analytic.layers import Network, activated, linear, norm
from dryfit.analytic.operations import HybridLayer, viewed
from dryfit.analytic.streams import alternating, put_together, spread_out

__all__ = ["HybridLayer", "inputs_of_layers", "put_together", "run_layer", "spread_out"]

# --- layers -----------------------------------------------------------------------------------------------------------


def run_layer(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """One layer, as its plan has it."""
    return _LAYERS[layer.plan.layer](net, x, layer)


def plain(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Norm, mixer, norm, MLP, each added to the residual stream; in some models times a number."""
    plan, width, (first, second) = layer.plan, x.width, layer.norms
    scaled = plan.layer == "scaled"
    out = _MIXERS[plan.mixer](net, norm(net, x, first), layer, width)
    net.what = "residual stream"
    x = net.add(x, net.elementwise(out) if scaled else out)
    del out
    out = _MLPS[plan.mlp](net, norm(net, x, second), layer)
    net.what = "residual stream"
    return net.add(x, net.elementwise(out) if scaled else out)


def single(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """A norm and one part, added to the residual stream (Nemotron)."""
    plan, width = layer.plan, x.width
    normed = norm(net, net.cast(x, layer["norm."].width), layer["norm."])
    x = net.cast(x, 4) if "residual_in_fp32" in plan.options else x
    out = _MIXERS[plan.mixer](net, normed, layer, width) if plan.mixer else _MLPS[plan.mlp](net, normed, layer)
    del normed
    net.what = "residual stream"
    return net.add(x, out)


def sandwich(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """What mixer and MLP give is normalized too, before it is added; Gemma 4 adds inputs of each layer besides."""
    width, weights = x.width, layer.parts
    out = _MIXERS[layer.plan.mixer](net, norm(net, x, weights["input_layernorm"]), layer, width)
    out = norm(net, out, weights["post_attention_layernorm"])
    net.what = "residual stream"
    x = net.add(x, out)
    out = _MLPS[layer.plan.mlp](net, norm(net, x, weights["pre_feedforward_layernorm"]), layer)
    if "router.proj" in weights:
        out = net.add(
            norm(net, out, weights["post_feedforward_layernorm_1"]), feed_forward.gemma_experts(net, x, layer)
        )
    out = norm(net, out, weights["post_feedforward_layernorm"])
    net.what = "residual stream"
    x = net.add(x, out)
    del out
    if "per_layer_input_gate" in weights:
        gate = activated(net, linear(net, x, weights["per_layer_input_gate"]))
        gate = net.multiply(gate, viewed(net, net.inputs_of_layers, ("t", "p4")))
        out = norm(net, linear(net, gate, weights["per_layer_projection"]), weights["post_per_layer_input_norm"])
        net.what = "residual stream"
        x = net.add(x, out)
        del gate, out
    if x.edge is None or layer.plan.layer != "sandwich":
        return x
    return Tensor(x.storage, x.dims, x.width, net.node([x.edge], net.like(x)))  # times a number, in place


def after(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """What mixer and MLP give is normalized, and not what they get (OLMo, EXAONE)."""
    plan, width, (first, second) = layer.plan, x.width, layer.norms
    out = norm(net, _MIXERS[plan.mixer](net, x, layer, width), first)
    net.what = "residual stream"
    x = net.add(x, out)
    del out
    out = norm(net, _MLPS[plan.mlp](net, x, layer), second)
    net.what = "residual stream"
    return net.add(x, out)


def scaled_after_norm(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """What a norm gives is the residual stream too; both parts of each sum are times a number (MiniMax M1)."""
    plan, width, (first, second) = layer.plan, x.width, layer.norms
    x = norm(net, x, first)
    out = _MIXERS[plan.mixer](net, x, layer, width)
    net.what = "residual stream"
    x = net.add(net.elementwise(x), net.elementwise(out))
    del out
    x = norm(net, x, second)
    out = _MLPS[plan.mlp](net, x, layer)
    net.what = "residual stream"
    return net.add(net.elementwise(x), net.elementwise(out))


def between_norms(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Norms before and after (LFM 3)."""
    plan, width, weights = layer.plan, x.width, layer.parts
    out = _MIXERS[plan.mixer](net, norm(net, x, weights["operator_norm"]), layer, width)
    out = norm(net, out, weights["post_operator_norm"])
    net.what = "residual stream"
    x = net.add(x, out)
    del out
    out = norm(net, _MLPS[plan.mlp](net, norm(net, x, weights["ffn_norm"]), layer), weights["post_ffn_norm"])
    net.what = "residual stream"
    return net.add(x, out)


def side_by_side(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """A state space and attention on the same norm's output, each times numbers (Falcon-H1)."""
    width, weights = x.width, layer.parts
    normed = norm(net, x, weights["input_layernorm"])
    space = net.elementwise(state_spaces.state_space(net, net.elementwise(normed), layer, width))
    attention = net.elementwise(mixers.grouped(net, net.elementwise(normed), layer, width))
    net.what = "residual stream"
    out = net.add(space, attention)
    del space, attention
    x = net.add(x, out)
    del out, normed
    out = feed_forward.gated(net, norm(net, x, weights["pre_ff_layernorm"]), layer)
    net.what = "residual stream"
    return net.add(x, out)


def inputs_of_layers(net: Network, x: Tensor, outside: HybridLayer) -> Tensor:
    """What each token brings to each layer besides (Gemma 4): rows of an embedding, and a projection of the others."""
    net.what = "inputs of each layer"
    rows = net.elementwise(net.rows(outside["embed_tokens_per_layer"], "t"))
    own = net.elementwise(linear(net, x, outside["per_layer_model_projection"]))
    own = norm(net, own, outside["per_layer_projection_norm"])
    return net.elementwise(net.add(own, rows))


_LAYERS: dict[str, Callable] = {
    "after": after,
    "alternating": alternating,
    "between_norms": between_norms,
    "plain": plain,
    "sandwich": sandwich,
    "scaled": plain,
    "scaled_after_norm": scaled_after_norm,
    "side_by_side": side_by_side,
    "single": single,
}
_MIXERS: dict[str, Callable] = {
    "delta": delta,
    "kimi_delta": kimi_delta,
    "first_state_space": state_spaces.first_state_space,
    "grouped": mixers.grouped,
    "latent": mixers.latent,
    "lightning": mixers.lightning,
    "separate_delta": separate_delta,
    "short": state_spaces.short,
    "state_space": state_spaces.state_space,
    "with_sinks": mixers.with_sinks,
}
_MLPS: dict[str, Callable] = {
    "every_expert": feed_forward.every_expert,
    "fused": feed_forward.fused,
    "gated": feed_forward.gated,
    "routed": feed_forward.routed,
    "routed_after": feed_forward.routed_after,
    "routed_beside": feed_forward.routed_beside,
    "routed_beside_fused": feed_forward.routed_beside_fused,
    "routed_beside_gated": feed_forward.routed_beside_gated,
    "routed_beside_squared": feed_forward.routed_beside_squared,
    "routed_biased": feed_forward.routed_biased,
    "squared": feed_forward.squared,
}
