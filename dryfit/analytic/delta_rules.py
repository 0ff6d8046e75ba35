"""Linear attention by the delta rule on sizes: Qwen's gated rule and Kimi's, by loops and by flash-linear-attention.

As in :mod:`dryfit.analytic.layers`, local variables live as long as in transformers' code.

Sources: transformers 5.24 (models/qwen3_5/modeling_qwen3_5.py and its relatives), fla 0.5
(ops/gated_delta_rule/chunk.py, ops/kda/chunk.py).
"""

from __future__ import annotations

from dryfit.analytic.graph import Parameter, Tensor
from dryfit.analytic.layers import Network, linear
from dryfit.analytic.operations import (
    HybridLayer,
    as_often,
    assigned,
    by_package,
    chunks_left_out,
    chunks_run,
    convolved,
    copied,
    joined,
    kept,
    multiplied,
    outer,
    root_normed,
    summed,
    viewed,
)

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
    beta, decay = kept(net, b), decayed(net, a)
    rule = delta_rule_of_package if by_package(net, "fla") else delta_rule
    out = rule(net, q, k, v, decay, beta)
    del mixed, q, k, v, decay, beta, b, a
    return linear(net, gated_norm(net, out, z, layer["norm"]), layer["out_proj"])


def separate_delta(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """The same with a matrix for each of queries, keys, values and gates, the gate last (OLMo Hybrid)."""
    net.what = "linear attention"
    parts = tuple(linear(net, x, layer[name]) for name in ("delta.q_proj", "delta.k_proj", "delta.v_proj"))
    mixed = joined(net, parts, ("t", "x+x+y"))
    del parts
    mixed = convolved(net, mixed, layer, "conv1d", "x+x+y", silu=True)
    q, k, v = net.split(mixed, ("x", "x", "y"))
    beta = kept(net, linear(net, x, layer["b_proj"]))
    beta = net.elementwise(beta) if "negative" in layer.plan.options else beta
    decay = decayed(net, linear(net, x, layer["a_proj"]))
    rule = delta_rule_of_package if by_package(net, "fla") else delta_rule
    out = rule(net, q, k, v, decay, beta)
    gate = linear(net, x, layer["g_proj"])
    out = gated_norm(net, out, gate, layer["o_norm"])
    del mixed, q, k, v, decay, beta  # the code holds them to its end
    return linear(net, out, layer["delta.o_proj"])


def decayed(net: Network, a: Tensor) -> Tensor:
    """The logarithm of each head's decay, in fp32."""
    wide = net.add(net.cast(a, 4), layer_constant(net, ("N",)))
    return net.elementwise(net.elementwise(wide, saved=[wide]))


def gated_norm(net: Network, out: Tensor, gate: Tensor, weight: Parameter) -> Tensor:
    """A norm of each head, and the activated gate in fp32."""
    source = out.width
    with net.purpose("norms"):
        out = net.multiply(net.cast(root_normed(net, net.cast(out, 4), "N"), source), weight)
        wide = net.cast(gate, 4)
        return net.cast(net.multiply(out, net.elementwise(wide, saved=[wide])), source)


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
    for number in range(chunks_run(net)):
        before_it = net.live.copy() if number == 1 else None
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
        state = as_often(net, state, before_it, chunks_left_out(net)) if before_it is not None else state
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


# --- Kimi's -----------------------------------------------------------------------------------------------------------


def kimi_delta(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """The rule with a decay for each channel; its gates come through narrow projections."""
    net.what = "linear attention"
    parts = tuple(linear(net, x, layer[name]) for name in ("delta.q_proj", "delta.k_proj", "delta.v_proj"))
    mixed = joined(net, parts, ("t", "y+y+y"))
    del parts
    mixed = convolved(net, mixed, layer, "conv1d", "y+y+y", silu=True)
    q, k, v = net.split(mixed, ("y", "y", "y"))
    decay = forgotten(net, linear(net, linear(net, x, layer["f_a_proj"]), layer["f_b_proj"]), layer)
    beta = kept(net, linear(net, x, layer["b_proj"]))
    rule = kimi_rule_of_package if by_package(net, "fla") else kimi_rule
    out = rule(net, q, k, v, decay, beta)
    del mixed, q, k, v, decay, beta
    gate = linear(net, linear(net, x, layer["g_a_proj"]), layer["g_b_proj"])
    source = out.width
    with net.purpose("norms"):
        out = root_normed(net, net.cast(out, 4), "N")
        out = net.multiply(out, Parameter(("u",), 4, layer["o_norm"].trained))
        out = net.cast(net.multiply(out, kept(net, net.cast(gate, 4))), source)
        del gate
    return linear(net, out, layer["delta.o_proj"])


def forgotten(net: Network, x: Tensor, layer: HybridLayer) -> Tensor:
    """The decay of each channel, in fp32: a softplus step by step."""
    wide = net.add(net.cast(x, 4), net.tensor(("y",), 4))
    large = net.tensor(wide.dims, 1)
    power = kept(net, wide)
    more = net.elementwise(power)
    del power
    soft = net.elementwise(more, saved=[more])
    del more
    chosen = net.operation(wide.dims, 4, [wide, soft], net.like(wide, soft), [large])
    del soft, large, wide
    return net.multiply(chosen, Parameter(("N",), 4, layer["A_log"].trained))


def kimi_rule(net: Network, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The rule in chunks, as transformers' own code has it: decays between tokens of a chunk for each channel."""
    source, rows, pairs = q.width, ("tc", "y"), ("tc", "N", "C")
    q, k, v = (net.cast(net.elementwise(part), 4) for part in (q, k, v))
    beta, decay = net.cast(net.elementwise(beta), 4), net.elementwise(decay)
    q, k = unit(net, q), unit(net, k)
    q = net.elementwise(net.elementwise(q, dims=rows))
    k, v, decay = (net.elementwise(part, dims=rows) for part in (k, v, decay))
    beta = net.elementwise(beta, dims=("tc", "N"))
    v_beta, k_beta = net.multiply(v, beta), net.multiply(k, beta)
    decay = net.elementwise(decay)
    masks = [net.tensor(("C", "C"), 1) for _ in range(2)]
    wide = ("tc", "y", "C")
    falls = pairwise(net, decay, wide)
    falls = net.elementwise(falls, saved=masks)
    falls = kept(net, falls)
    scores = net.multiply(outer(net, k_beta, k, wide), falls)
    scores = net.elementwise(net.elementwise(summed(net, scores, pairs)), saved=masks)
    scores = substituted(net, scores)
    scores = net.elementwise(scores)
    values = multiplied(net, scores, v_beta, rows)
    keys = multiplied(net, scores, net.multiply(k_beta, kept(net, decay)), rows)
    state = net.tensor(("b", "N", "u", "u"), 4)
    out = net.tensor(rows, 4)
    piece = lambda whole, *dims: viewed(net, whole, dims)  # noqa: E731
    for number in range(chunks_run(net)):
        before_it = net.live.copy() if number == 1 else None
        q_i, k_i, g_i = piece(q, "bc", "y"), piece(k, "bc", "y"), piece(decay, "bc", "y")
        before = multiplied(net, net.multiply(q_i, kept(net, g_i)), state, ("bc", "y"))
        within = net.multiply(outer(net, q_i, k_i, ("bc", "y", "C")), piece(falls, "bc", "y", "C"))
        within = net.elementwise(summed(net, within, ("bc", "N", "C")), saved=masks)
        fresh = net.add(piece(values, "bc", "y"), multiplied(net, piece(keys, "bc", "y"), state, ("bc", "y")))
        out = assigned(net, out, net.add(before, multiplied(net, within, fresh, ("bc", "y"))))
        late = kept(net, net.elementwise(g_i))
        update = multiplied(net, net.multiply(k_i, late), fresh, state.dims)
        state = net.add(net.multiply(state, kept(net, viewed(net, g_i, ("b", "y")))), update)
        del before, late, update
        state = as_often(net, state, before_it, chunks_left_out(net)) if before_it is not None else state
    del falls, scores, values, keys, q, k, v, v_beta, k_beta, state, fresh, within, decay, beta, q_i, k_i, g_i
    return net.elementwise(net.cast(copied(net, out), source), dims=("t", "y"))


def pairwise(net: Network, x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """The difference of each token's and each other's vector."""
    shape = (x.dims, x.width)

    def backward(grad: Tensor) -> list:
        first = net.tensor(*shape)
        negated = net.tensor(dims, 4)
        second = net.tensor(*shape)
        del negated
        result = net.tensor(*shape)
        del first, second
        return [result]

    return net.operation(dims, 4, [x], backward)


def substituted(net: Network, scores: Tensor) -> Tensor:
    """The inverse of a triangular matrix, row by row in place."""
    for row in range(1, net.value("C")):
        part, above = ("nc", "N", str(row)), ("nc", "N", str(row), str(row))
        own = copied(net, viewed(net, scores, part))
        sub = copied(net, viewed(net, scores, above))
        scores = assigned(net, scores, net.add(own, summed(net, net.multiply(sub, own), part)))
        del own, sub
    return scores


def kimi_rule_of_package(net: Network, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The same by flash-linear-attention: what transformers' code gives it is kept, and a few matrices a chunk."""
    width = q.width
    q, k, v = copied(net, q), copied(net, k), copied(net, v)
    shapes = [(part.dims, part.width) for part in (q, k, v, decay, beta)]
    rows, pairs, states = (("t", "y"), width), (("t", "N", "C"), width), (("nc", "N", "u", "u"), width)

    def backward(grad: Tensor) -> list:
        made = [net.tensor(*rows) for _ in range(4)]
        hidden, fresh = net.tensor(*states), net.tensor(*rows)
        of_states, of_values = net.tensor(*states), net.tensor(*rows)
        wide = [net.tensor(("t", "y"), 4) for _ in range(4)]
        del hidden, fresh, of_states
        del made, of_values, wide
        return [net.tensor(*shape) for shape in shapes]

    units = [net.tensor(*rows) for _ in range(2)]
    roots = [net.tensor(("t", "N"), 4) for _ in range(2)]
    total = net.tensor(("t", "y"), 4)
    inner = [net.tensor(*pairs) for _ in range(2)]
    made = [net.tensor(*rows) for _ in range(3)]
    hidden, fresh = net.tensor(*states), net.tensor(*rows)
    saved = [*units, v, beta, *roots, total, *inner]
    out = net.operation(("t", "y"), width, [q, k, v, decay, beta], backward, saved)
    del made, hidden, fresh
    return out
