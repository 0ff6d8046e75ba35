"""Layers of several kinds on sizes: linear and latent attention, state spaces, short convolutions, experts.

As in :mod:`will_it_fit.analytic.layers`, local variables live as long as in transformers' code. Where a package's
kernel may run in the place of transformers' own loop, there is a function for each.

Sources: transformers 5.24 (models/*/modeling_*.py, integrations/moe.py), flash-linear-attention 0.5, causal-conv1d 1.7,
mamba-ssm 2.3.
"""

from __future__ import annotations

from collections.abc import Callable

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
    by_package,
    convolved,
    copied,
    joined,
    kept,
    multiplied,
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
        return [self.parts[w.name] for w in self.plan.weights if w.group == "norms" and w.dims == ("d",)]

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


# --- attention --------------------------------------------------------------------------------------------------------


def grouped(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Attention with heads of its own; a gate for its output, and norms of queries and keys, where it has them."""
    net.what = "attention"
    heads, options = layer.plan.heads, layer.plan.options
    q_norm, k_norm = [p for p in layer.head_norms] if "normed" in options else (None, None)
    gate = None
    if "gated" in options:
        both = linear(net, x, layer["q_proj"])
        q, gate = net.split(both, (heads.queries, heads.queries))
        del both
        gate = copied(net, gate)
    else:
        q = linear(net, x, layer["q_proj"])
    q = norm(net, q, q_norm) if q_norm else q
    k = linear(net, x, layer["k_proj"])
    k = norm(net, k, k_norm) if k_norm else k
    v = linear(net, x, layer["v_proj"])
    if layer.plan.rotary:
        q, k = turned(net, q, width, heads.queries, layer), turned(net, k, width, heads.keys, layer)
    out = attended(net, q, k, v, heads)
    del q, k, v
    if gate is not None:
        out = net.multiply(out, kept(net, gate))
        del gate
    return linear(net, out, layer.last)


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
    system = net.multiply(multiplied(net, k_beta, k, pairs.dims), pairs)
    within = net.multiply(multiplied(net, q, k, pairs.dims), pairs)
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
            piece(values, "bc", "y"), net.elementwise(multiplied(net, piece(keys, "bc", "X"), state, ("bc", "y")))
        )
        before = multiplied(net, piece(q, "bc", "X"), state, ("bc", "y"))
        own = multiplied(net, piece(within, "bc", "N", "C"), fresh, ("bc", "y"))
        out = assigned(net, out, net.add(before, own))
        del before, own
        update = multiplied(net, piece(k, "bc", "X"), fresh, state.dims)
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
    del q
    narrow = linear(net, x, layer["kv_a_proj_with_mqa"])
    keys, shared = net.split(narrow, ("l", "z"))
    del narrow
    keys = norm(net, keys, layer["kv_a_layernorm"])
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


_LAYERS: dict[str, Callable] = {"plain": plain, "scaled": plain, "single": single}
_MIXERS: dict[str, Callable] = {
    "delta": delta,
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
