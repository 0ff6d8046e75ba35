"""Layers of several kinds on sizes: linear and latent attention, state spaces, short convolutions, experts.

As in :mod:`will_it_fit.analytic.layers`, local variables live as long as in transformers' code. Where a package's
kernel may run in the place of transformers' own loop, there is a function for each.

Sources: transformers 5.24 (models/*/modeling_*.py, integrations/moe.py), flash-linear-attention 0.5, causal-conv1d 1.7,
mamba-ssm 2.3.
"""

from __future__ import annotations

from collections.abc import Callable

from will_it_fit.analytic.experts import experts
from will_it_fit.analytic.graph import Parameter, Tensor
from will_it_fit.analytic.hybrids import Plan, Weight
from will_it_fit.analytic.layers import Adapter, Linear, Network, activated, attended, half_turned, linear, norm
from will_it_fit.analytic.operations import (
    assigned,
    by_package,
    convolved,
    copied,
    joined,
    kept,
    root_normed,
    summed,
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
        self.router, self.router_adapter = self.parts.get("gate"), self._adapters.get("gate")
        self.up, self.up_adapter = self.parts.get("gate_up_proj"), self._adapters.get("gate_up_proj")
        self.down, self.down_adapter = self.parts.get("experts.down_proj"), self._adapters.get("experts.down_proj")

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
        if weight.name not in self._targets or not weight.takes_adapter(self._net.decoder.family):
            return None
        width = self._net.setting.adapter_width
        if weight.group == "experts":
            experts, outputs, inputs = weight.dims
            rank = "r+r" if weight.name == "gate_up_proj" else "r"
            return Parameter((experts, rank, inputs), width, True), Parameter((outputs, rank, experts), width, True)
        outputs, inputs = weight.dims
        return Parameter(("r", inputs), width, True), Parameter((outputs, "r"), width, True)


def run_layer(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Norm, mixer, norm, MLP, each added to the residual stream."""
    mixer, mlp, width = _MIXERS[layer.plan.mixer], _MLPS[layer.plan.mlp], x.width
    out = mixer(net, norm(net, x, layer["input_layernorm"]), layer, width)
    net.what = "residual stream"
    x = net.add(x, out)
    del out
    out = mlp(net, norm(net, x, layer["post_attention_layernorm"]), layer)
    net.what = "residual stream"
    return net.add(x, out)


# --- attention --------------------------------------------------------------------------------------------------------


def grouped(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Attention with heads of its own; the output through a gate, and queries and keys through norms, where it has them."""
    net.what = "attention"
    heads, options = layer.plan.heads, layer.plan.options
    gate = None
    if "gated" in options:
        joined = linear(net, x, layer["q_proj"])
        q, gate = net.split(joined, (heads.queries, heads.queries))
        del joined
        gate = net.elementwise(gate)
    else:
        q = linear(net, x, layer["q_proj"])
    if "normed" in options:
        q = norm(net, q, layer["q_norm"])
        k = norm(net, linear(net, x, layer["k_proj"]), layer["k_norm"])
    else:
        k = linear(net, x, layer["k_proj"])
    v = linear(net, x, layer["v_proj"])
    if net.decoder.rotary:
        q, k = turned(net, q, width, heads.queries), turned(net, k, width, heads.keys)
    out = attended(net, q, k, v, heads)
    del q, k, v
    if gate is not None:
        out = net.multiply(out, kept(net, gate))
        del gate
    return linear(net, out, layer[layer.plan.weights[3].name] if "o_proj" not in layer.parts else layer["o_proj"])


def turned(net: Network, x: Tensor, width: int, size: str) -> Tensor:
    """Rotary position embedding of a part of each head, or of all of it."""
    share = net.decoder.rotary
    wide = max(x.width, width)
    if share == 1:
        return net.add(net.elementwise(x, wide), net.elementwise(half_turned(net, x), wide))
    part = f"{size}·{share:g}"
    net.symbols.setdefault(part, round(net.value(size) * share))
    rotated, rest = viewed(net, x, ("t", part)), viewed(net, x, x.dims)
    out = net.add(net.elementwise(rotated, wide), net.elementwise(half_turned(net, rotated), wide))
    del rotated
    return joined(net, (out, rest), x.dims)


# --- linear attention by the gated delta rule -------------------------------------------------------------------------


def delta(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Project, convolve, run the rule, normalize by a gate, project."""
    net.what = "linear attention"
    if "in_proj_qkvz" in layer.parts:
        both = linear(net, x, layer["in_proj_qkvz"])
        scores = linear(net, x, layer["in_proj_ba"])
        q, k, v, z = net.split(both, ("x", "x", "y", "y"))
        b, a = net.split(scores, ("N", "N"))
        b, a = net.elementwise(b), net.elementwise(a)
        q, k, v, z = (net.elementwise(part) for part in (q, k, v, z))
        mixed = joined(net, (q, k, v), ("t", "x+x+y"))
        del both, scores, q, k, v
    else:
        mixed = linear(net, x, layer["in_proj_qkv"])
        z = linear(net, x, layer["in_proj_z"])
        b, a = linear(net, x, layer["in_proj_b"]), linear(net, x, layer["in_proj_a"])
    mixed = convolved(net, mixed, layer, "conv1d", "x+x+y", silu=True)
    q, k, v = net.split(mixed, ("x", "x", "y"))
    beta = kept(net, b)
    wide = net.add(net.cast(a, 4), layer_constant(net, ("N",)))
    decay = net.elementwise(net.elementwise(wide, saved=[wide]))
    del wide
    rule = delta_rule_of_package if by_package(net, "fla") else delta_rule
    out = rule(net, q, k, v, decay, beta)
    del mixed, q, k, v, decay, beta, b, a
    source = out.width
    with net.purpose("norms"):
        out = net.multiply(net.cast(root_normed(net, net.cast(out, 4), "N"), source), layer["norm"])
        wide = net.cast(z, 4)
        out = net.cast(net.multiply(out, net.elementwise(wide, saved=[wide])), source)
        del wide
    return linear(net, out, layer["out_proj"])


def layer_constant(net: Network, dims: tuple[str, ...]) -> Tensor:
    """A small tensor without a gradient."""
    return net.tensor(dims, 4)


def unit(net: Network, x: Tensor) -> Tensor:
    """Each head's vector at length one."""
    squares = net.multiply(x, x)
    root = kept(net, net.elementwise(summed(net, squares, (x.dims[0], "N"))))
    del squares
    return net.multiply(x, root)


def delta_rule(net: Network, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The rule in chunks, as transformers' own code has it: in fp32, every chunk's state and values kept."""
    source = q.width
    if net.value("x") != net.value("X"):
        q, k = net.elementwise(q, dims=("t", "X")), net.elementwise(k, dims=("t", "X"))
    q, k, v = net.elementwise(q, 4), net.elementwise(k, 4), net.elementwise(v, 4)
    beta = net.cast(beta, 4)
    q, k = unit(net, q), unit(net, k)
    q = net.elementwise(q)
    q, k, v = (net.elementwise(part, dims=("tc", size)) for part, size in ((q, "X"), (k, "X"), (v, "y")))
    beta, decay = (net.elementwise(part, dims=("tc", "N")) for part in (beta, decay))
    v_beta, k_beta = net.multiply(v, beta), net.multiply(k, beta)
    del v
    total = net.elementwise(decay)
    del decay
    pairs = net.elementwise(total, dims=("tc", "N", "C"))
    mask = net.tensor(("C", "C"), 1)
    pairs = net.elementwise(pairs, saved=[mask])
    pairs = kept(net, pairs)
    system = net.multiply(net.batched(k_beta, k, pairs.dims), pairs)
    within = net.multiply(net.batched(q, k, pairs.dims), pairs)
    del pairs
    decayed = net.multiply(k_beta, kept(net, total))
    values, keys = solved(net, system, v_beta), solved(net, system, decayed)
    del system, decayed, v_beta, k_beta
    state = net.tensor(("b", "N", "u", "w"), 4)
    out = net.tensor(("tc", "y"), 4)
    q = net.multiply(q, kept(net, total))
    k = net.multiply(k, kept(net, net.elementwise(total)))
    last = viewed(net, total, ("nc", "N"))
    last = kept(net, last)
    del total
    for _ in range(net.value("nc") // net.value("b")):
        piece = lambda whole, *dims: viewed(net, whole, dims)  # noqa: E731
        fresh = net.add(
            piece(values, "bc", "y"), net.elementwise(net.batched(piece(keys, "bc", "X"), state, ("bc", "y")))
        )
        before = net.batched(piece(q, "bc", "X"), state, ("bc", "y"))
        own = net.batched(piece(within, "bc", "N", "C"), fresh, ("bc", "y"))
        out = assigned(net, out, net.add(before, own))
        del before, own
        update = net.batched(piece(k, "bc", "X"), fresh, state.dims)
        state = net.add(net.multiply(state, piece(last, "b", "N")), update)
        del update
    del values, keys, q, k, within, state, fresh, last
    return net.elementwise(net.elementwise(out), source, dims=("t", "y"))


def solved(net: Network, system: Tensor, right: Tensor) -> Tensor:
    """The solution of a triangular system."""
    pairs, shape = (system.dims, 4), (right.dims, 4)

    def backward(grad: Tensor) -> list:
        of_right = net.tensor(*shape)
        outer = net.tensor(*pairs)
        negated = net.tensor(*pairs)
        del outer
        lower = net.tensor(*pairs)
        del negated
        return [lower, of_right]

    return net.operation(right.dims, 4, [system, right], backward, [system], saves_output=True)


def delta_rule_of_package(net: Network, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The same by flash-linear-attention: inputs, norms and one matrix a chunk kept, states made again.

    Source: fla 0.5, ops/gated_delta_rule/chunk.py (ChunkGatedDeltaRuleFunction).
    """
    width = q.width
    q, k, v = net.elementwise(q), net.elementwise(k), net.elementwise(v)
    sizes = {"x": ("t", "x"), "X": ("t", "X"), "y": ("t", "y"), "N": ("t", "N"), "A": ("t", "N", "C")}
    states = (("nc", "N", "u", "w"), width)
    shapes = [(part.dims, part.width) for part in (q, k, v, decay, beta)]

    def prepared() -> list[Tensor]:
        return [net.tensor(sizes["X"], width), net.tensor(sizes["y"], width)]

    def backward(grad: Tensor) -> list:
        made = prepared()
        hidden, fresh = net.tensor(*states), net.tensor(sizes["y"], width)
        own = net.tensor(sizes["y"], width)
        of_states, of_values = net.tensor(*states), net.tensor(sizes["y"], width)
        del own
        repeated = [net.tensor(sizes["X"], width) for _ in range(3)]
        repeated += [net.tensor(sizes["N"], 4)]
        del hidden, fresh, of_states
        narrow = [net.tensor(sizes["x"], width) for _ in range(2)]
        dv = net.tensor(sizes["y"], width)
        repeated += [net.tensor(sizes["X"], width)]
        del made, of_values, repeated, narrow
        return [net.tensor(*shapes[0]), net.tensor(*shapes[1]), dv, net.tensor(*shapes[3]), net.tensor(*shapes[4])]

    def saved() -> list[Tensor]:
        return [net.tensor(sizes["N"], 4), net.tensor(sizes["A"], width)]

    unit_q, unit_k = net.tensor(sizes["x"], width), net.tensor(sizes["x"], width)
    roots = [net.tensor(sizes["N"], 4) for _ in range(2)]
    inner = saved()
    made = prepared()
    hidden, fresh = net.tensor(*states), net.tensor(sizes["y"], width)
    out = net.operation(("t", "y"), width, [q, k, v, decay, beta], backward, [unit_q, unit_k, v, beta, *roots, *inner])
    del made, hidden, fresh
    return out


# --- MLPs -------------------------------------------------------------------------------------------------------------


def gated(net: Network, x: Tensor, layer: HybridLayer, prefix: str = "") -> Tensor:
    """Gate, up, down."""
    net.what = "MLP"
    gate = activated(net, linear(net, x, layer[f"{prefix}gate_proj"]))
    out = net.multiply(gate, linear(net, x, layer[f"{prefix}up_proj"]))
    del gate
    return linear(net, out, layer[f"{prefix}down_proj"])


def routed(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """Experts, and beside them one that every token goes through, by a gate of its own (Qwen)."""
    shared = gated(net, x, layer, "shared_expert.")
    out = experts(net, x, layer, "m")
    net.what = "experts"
    gate = kept(net, linear(net, x, layer["shared_expert_gate"]))
    shared = net.multiply(shared, gate)
    return net.add(out, shared)


_MIXERS: dict[str, Callable] = {"delta": delta, "grouped": grouped}
_MLPS: dict[str, Callable] = {"gated": gated, "routed": routed}
