"""Layers of several kinds on sizes: linear and latent attention, state spaces, short convolutions, experts.

As in :mod:`will_it_fit.analytic.layers`, local variables live as long as in transformers' code. Where a package's
kernel may run in the place of transformers' own loop, there is a function for each.

Sources: transformers 5.24 (models/*/modeling_*.py, integrations/moe.py), flash-linear-attention 0.5, causal-conv1d 1.7,
mamba-ssm 2.3.
"""

from __future__ import annotations

from collections.abc import Callable

from will_it_fit.analytic.delta_rules import delta, kimi_delta
from will_it_fit.analytic.experts import experts
from will_it_fit.analytic.experts import routed as routed_shares
from will_it_fit.analytic.graph import Parameter, Tensor
from will_it_fit.analytic.hybrids import Plan, Weight
from will_it_fit.analytic.layers import (
    Adapter,
    Linear,
    Network,
    activated,
    attended,
    expanded,
    half_turned,
    linear,
    norm,
)
from will_it_fit.analytic.operations import (
    assigned,
    copied,
    joined,
    kept,
    multiplied,
    root_normed,
    viewed,
)
from will_it_fit.analytic.state_spaces import short, state_space


class HybridLayer:
    """The parameters of one layer, by their names, as its plan has them."""

    def __init__(self, net: Network, plan: Plan) -> None:
        self.plan, self._net = plan, net
        lora = net.scenario.lora
        self._targets = set(net.decoder.targets(lora)) if lora else set()
        self.parameters: list[Parameter] = []
        self._adapters: dict[str, Adapter | None] = {}
        self._biases: dict[str, Parameter] = {}
        self.parts = {weight.name: self._part(weight) for weight in plan.weights}
        self.parts |= self._biases
        self.between = {"routed_biased": clamped, "routed_beside_squared": squared_rows}.get(plan.mlp)
        self.up_bias, self.down_bias = self.parts.get("gate_up_proj_bias"), self.parts.get("down_proj_bias")
        self.router, self.router_adapter = self.parts.get("gate"), self._adapters.get("gate")
        self.gated = "gate_up_proj" in self.parts
        up = "gate_up_proj" if self.gated else "experts.up_proj"
        self.up, self.up_adapter = self.parts.get(up), self._adapters.get(up)
        self.down, self.down_adapter = self.parts.get("experts.down_proj"), self._adapters.get("experts.down_proj")

    @property
    def head_norms(self) -> list[Parameter]:
        """Those of queries and keys."""
        return [
            self.parts[w.name] for w in self.plan.weights if w.group == "norms" and w.dims == (self.plan.heads.head,)
        ]

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
        base = net.base_parameter(weight.group, *weight.dims)
        bias = net.base_parameter("biases", weight.dims[0]) if weight.bias else None
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
        return Parameter(("r", inputs), width, True), Parameter((outputs, "r"), width, True)


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
    normed = norm(net, x, layer["norm."])
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
        out = net.add(norm(net, out, weights["post_feedforward_layernorm_1"]), gemma_experts(net, x, layer))
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


def side_by_side(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """A state space and attention on the same norm's output, each times numbers (Falcon-H1)."""
    width, weights = x.width, layer.parts
    normed = norm(net, x, weights["input_layernorm"])
    space = net.elementwise(state_space(net, net.elementwise(normed), layer, width))
    attention = net.elementwise(grouped(net, net.elementwise(normed), layer, width))
    net.what = "residual stream"
    out = net.add(space, attention)
    del space, attention
    x = net.add(x, out)
    del out, normed
    out = gated(net, norm(net, x, weights["pre_ff_layernorm"]), layer)
    net.what = "residual stream"
    return net.add(x, out)


def inputs_of_layers(net: Network, x: Tensor, outside: HybridLayer) -> Tensor:
    """What each token brings to each layer besides (Gemma 4): rows of an embedding, and a projection of the others."""
    net.what = "inputs of each layer"
    rows = net.elementwise(net.rows(outside["embed_tokens_per_layer"], "t"))
    own = net.elementwise(linear(net, x, outside["per_layer_model_projection"]))
    own = norm(net, own, outside["per_layer_projection_norm"])
    return net.elementwise(net.add(own, rows))


# --- attention --------------------------------------------------------------------------------------------------------


def grouped(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Attention with heads of its own; a gate for its output, and norms of queries and keys, where it has them."""
    net.what = "attention"
    heads, options = layer.plan.heads, layer.plan.options
    norms, gate = layer.head_norms, None
    if "gated" in options:
        both = linear(net, x, layer["q_proj"])
        q, gate = net.split(both, (heads.queries, heads.queries))
        del both
        gate = copied(net, gate)
    else:
        q = linear(net, x, layer["q_proj"])
    q = norm(net, q, norms[0]) if norms else q
    k, v = keys_and_values(net, x, layer, norms[1] if len(norms) > 1 else None)
    if layer.plan.rotary:
        q = turned(net, q, width, heads.queries, layer)
        k = k if "reuses" in options else turned(net, k, width, heads.keys, layer)
    if "stores" in options:
        net.shared_keys[heads.head] = k, v
    out = attended(net, q, k, v, heads)
    del q, k, v
    if gate is not None:
        out = net.multiply(out, kept(net, gate))
        del gate
    return linear(net, out, layer.last)


def keys_and_values(net: Network, x: Tensor, layer: HybridLayer, k_norm: Parameter | None) -> tuple[Tensor, Tensor]:
    """A layer's own, or those of an earlier one; in some layers of Gemma 4 values are keys before their norm."""
    options = layer.plan.options
    if "reuses" in options:
        return net.shared_keys[layer.plan.heads.head]
    k = linear(net, x, layer["k_proj"])
    k = net.elementwise(k) if "scaled_keys" in options else k
    if "normed_values" not in options:
        k = norm(net, k, k_norm) if k_norm else k
        return k, linear(net, x, layer["v_proj"])
    v = linear(net, x, layer["v_proj"]) if "v_proj" in layer.parts else k
    k = norm(net, k, k_norm)
    with net.purpose("norms"):
        return k, net.cast(root_normed(net, net.cast(v, 4), layer.plan.heads.groups), v.width)


def turned(net: Network, x: Tensor, width: int, size: str, layer: HybridLayer) -> Tensor:
    """Rotary position embedding of a part of each head, or of all of it."""
    share = layer.plan.rotary
    wide = max(x.width, width)
    if share == 1:
        return net.add(net.elementwise(x, wide), net.elementwise(half_turned(net, x), wide))
    part = f"{size}·{share:g}"
    net.symbols.setdefault(part, round(net.value(size) * share))
    rotated, rest = viewed(net, x, ("t", part)), viewed(net, x, x.dims)
    out = net.add(net.elementwise(rotated, wide), net.elementwise(half_turned(net, rotated), wide))
    del rotated
    return joined(net, (out, rest), x.dims)


# --- latent attention -------------------------------------------------------------------------------------------------


def latent(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Queries, keys and values through narrow vectors; a part of each head is rotated, its keys the same for all."""
    net.what = "attention"
    heads = layer.plan.heads
    net.symbols |= {"Hz": net.value("H") * net.value("z"), "Hp": net.value("H") * (net.value("d") - net.value("z"))}
    if "q_proj" in layer.parts:
        q = linear(net, x, layer["q_proj"])
    else:
        q = norm(net, linear(net, x, layer["q_a_proj"]), layer["q_a_layernorm"])
        q = linear(net, q, layer["q_b_proj"])
    passed, rotated = net.split(q, ("Hp", "Hz"))
    if layer.plan.rotary:
        del q
    narrow = linear(net, x, layer["kv_a_proj_with_mqa"])
    keys, shared = net.split(narrow, ("l", "z"))
    del narrow
    keys = norm(net, keys, layer["kv_a_layernorm"])
    if layer.plan.rotary:
        rotated, shared = interleaved(net, rotated, width), interleaved(net, shared, width)
        q = joined(net, (passed, rotated), ("t", heads.queries))
    del passed, rotated
    both = linear(net, keys, layer["kv_b_proj"])
    part, v = net.split(both, ("Hp", "P"))
    k = net.tensor(("t", heads.keys), both.width)
    k = assigned(net, k, part)
    k = assigned(net, k, spread(net, shared, ("t", "Hz")))
    del part, both, shared, keys
    out = attended(net, q, k, v, heads)
    del q, k, v
    return linear(net, out, layer["o_proj"])


def spread(net: Network, x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """A view of the same elements for all heads; the gradient is summed."""
    return Tensor(x.storage, dims, x.width, net.node([x.edge], net.like(x)) if x.edge is not None else None)


def interleaved(net: Network, x: Tensor, width: int) -> Tensor:
    """Rotary position embedding of pairs that lie side by side, or of halves that are put together again."""
    wide = max(x.width, width)
    size = x.dims[-1]
    half = f"{size}/2"
    net.symbols.setdefault(half, net.value(size) // 2)
    first, second = viewed(net, x, ("t", half)), viewed(net, x, ("t", half))
    one = net.add(net.elementwise(first, wide), net.elementwise(second, wide))
    two = net.add(net.elementwise(second, wide), net.elementwise(first, wide))
    return joined(net, (one, two), x.dims)


# --- attention with sinks ---------------------------------------------------------------------------------------------


def with_sinks(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Attention whose scores have one more column, in memory (gpt-oss)."""
    net.what = "attention"
    heads = layer.plan.heads
    q, k, v = (linear(net, x, layer[name]) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = interleaved(net, q, width), interleaved(net, k, width)
    k, v = expanded(net, k, heads), expanded(net, v, heads)
    net.symbols.setdefault("s+1", net.value("s") + 1)
    with net.purpose("attention scores"):
        scores = multiplied(net, q, k, ("H", "t", "s"))
        scores = net.elementwise(scores)
        scores = net.elementwise(scores)
        scores = joined(net, (scores,), ("H", "t", "s+1"))
        scores = net.elementwise(scores)
        shares = net.softmax(scores, scores.width)
        del scores
        shares = viewed(net, shares, ("H", "t", "s"))
    out = multiplied(net, shares, v, ("t", "a"))
    del shares, q, k, v
    return linear(net, copied(net, out), layer["o_proj"])


# --- MLPs -------------------------------------------------------------------------------------------------------------


def gated(net: Network, x: Tensor, layer: HybridLayer, names: tuple[str, ...] = ()) -> Tensor:
    """Gate, up, down."""
    net.what = "MLP"
    gate_proj, up_proj, down_proj = (layer[name] for name in names or layer.mlp_names)
    if layer.plan.layer == "side_by_side":  # Falcon-H1: each times a number, up before gate
        up = linear(net, x, up_proj)
        out = net.multiply(up, activated(net, net.elementwise(linear(net, x, gate_proj))))
        del up
        return net.elementwise(linear(net, out, down_proj))
    gate = activated(net, linear(net, x, gate_proj))
    out = net.multiply(gate, linear(net, x, up_proj))
    del gate
    return linear(net, out, down_proj)


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


def routed_beside_fused(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """The same with gate and up in one matrix (Granite)."""
    out = experts(net, x, layer, "m")
    return net.add(out, fused(net, x, layer))


def routed_beside_squared(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Experts without a gate, on narrower vectors in some models, and an MLP that every token goes through."""
    if "fc1_latent_proj" in layer.parts:
        shares = routed_shares(net, x, layer)
        out = experts(net, linear(net, x, layer["fc1_latent_proj"]), layer, "m", shares)
        out = linear(net, out, layer["fc2_latent_proj"])
    else:
        out = experts(net, x, layer, "m")
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


_LAYERS: dict[str, Callable] = {
    "plain": plain,
    "sandwich": sandwich,
    "scaled": plain,
    "side_by_side": side_by_side,
    "single": single,
}
_MIXERS: dict[str, Callable] = {
    "delta": delta,
    "kimi_delta": kimi_delta,
    "grouped": grouped,
    "latent": latent,
    "short": short,
    "state_space": state_space,
    "with_sinks": with_sinks,
}
_MLPS: dict[str, Callable] = {
    "fused": fused,
    "gated": gated,
    "routed": routed,
    "routed_beside": routed_beside,
    "routed_beside_fused": routed_beside_fused,
    "routed_beside_gated": routed_beside_gated,
    "routed_beside_squared": routed_beside_squared,
    "routed_biased": routed,
    "squared": squared,
}
