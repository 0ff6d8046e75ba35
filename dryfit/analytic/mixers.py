"""Kinds of attention on sizes: with heads of its own, latent, with sinks.

As in :mod:`dryfit.analytic.layers`, local variables live as long as in transformers' code.

Source: transformers 5.24 (models/*/modeling_*.py).
"""

from __future__ import annotations

from dryfit.analytic.graph import Parameter, Tensor
from dryfit.analytic.layers import Network, attended, dropped, expanded, half_turned, linear, norm
from dryfit.analytic.operations import (
    HybridLayer,
    as_often,
    assigned,
    chunks_left_out,
    chunks_run,
    copied,
    in_rows,
    joined,
    kept,
    multiplied,
    root_normed,
    viewed,
)


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
    if "scaled_queries" in options:  # by their position
        q = net.elementwise(q)
    out = attended(net, q, k, v, heads)
    del q, k, v
    if "g_proj" in layer.parts:
        gate = linear(net, x, layer["g_proj"])
    if gate is not None:
        out = net.multiply(out, kept(net, gate))
        del gate
    out = linear(net, out, layer.last)
    return dropped(net, out) if net.decoder.residual_dropout else out


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
    """Rotary position embedding of a part of each head, or of all of it; in some models in fp32."""
    share, options, source = layer.plan.rotary, layer.plan.options, x.width
    if "complex" in options:
        return as_complex(net, x, unit_heads="unit_heads" in options)
    wide = 4 if "rotated_in_fp32" in options else max(x.width, width)
    if "copied_to_fp32" in options:
        turned_half = net.elementwise(net.cast(half_turned(net, x), 4))
        return net.cast(net.add(net.elementwise(net.cast(x, 4)), turned_half), source)
    if wide > max(x.width, width):
        return net.cast(net.add(net.elementwise(x, wide), net.elementwise(half_turned(net, x), wide)), source)
    if share == 1:
        return net.add(net.elementwise(x, wide), net.elementwise(half_turned(net, x), wide))
    part = f"{size}·{share:g}"
    net.symbols.setdefault(part, round(net.value(size) * share))
    rotated, rest = viewed(net, x, ("t", part)), viewed(net, x, x.dims)
    out = net.add(net.elementwise(rotated, wide), net.elementwise(half_turned(net, rotated), wide))
    del rotated
    return joined(net, (out, rest), x.dims)


def as_complex(net: Network, x: Tensor, *, unit_heads: bool) -> Tensor:
    """Rotation by complex numbers, and then each head at a root mean square of one (Llama 4)."""
    source = x.width
    wide = net.cast(x, 4)
    out = net.cast(net.elementwise(wide), source)
    del wide
    if not unit_heads:
        return out
    with net.purpose("norms"):
        return net.cast(root_normed(net, net.cast(out, 4), "H"), source)


# --- latent attention -------------------------------------------------------------------------------------------------


def latent(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Queries, keys and values through narrow vectors; a part of each head is rotated, its keys the same for all."""
    net.what = "attention"
    heads, narrow_q = layer.plan.heads, None
    net.symbols |= {"Hz": net.value("H") * net.value("z"), "Hp": net.value("H") * (net.value("d") - net.value("z"))}
    if "q_proj" in layer.parts:
        q = linear(net, x, layer["q_proj"])
    else:
        narrow_q = norm(net, linear(net, x, layer["q_a_proj"]), layer["q_a_layernorm"])
        q = linear(net, narrow_q, layer["q_b_proj"])
        narrow_q = narrow_q if heads.selects else None
    passed, rotated = net.split(q, ("Hp", "Hz"))
    if layer.plan.rotary:
        del q
    narrow = linear(net, x, layer["kv_a_proj_with_mqa"])
    keys, shared = net.split(narrow, ("l", "z"))
    keys = norm(net, keys, layer["kv_a_layernorm"])
    if layer.plan.rotary:
        rotated, shared = interleaved(net, rotated, width), interleaved(net, shared, width)
        q = joined(net, (passed, rotated), ("t", heads.queries))
    q = net.elementwise(q) if "scaled_queries" in layer.plan.options else q
    both = linear(net, keys, layer["kv_b_proj"])
    part, v = net.split(both, ("Hp", "P"))
    k = net.tensor(("t", heads.keys), both.width)
    k = assigned(net, k, part)
    k = assigned(net, k, spread(net, shared, ("t", "Hz")))
    del part, both
    masks = chosen_keys(net, x, narrow_q, layer, width) if narrow_q else []
    del narrow_q
    out = attended(net, q, k, v, heads)
    out = linear(net, out, layer["o_proj"])
    del q, k, v, passed, rotated, narrow, keys, shared, masks  # the code holds all of them to its end
    return out


def chosen_keys(net: Network, x: Tensor, narrow_q: Tensor, layer: HybridLayer, width: int) -> list[Tensor]:
    """Which keys each token attends to: the best by an indexer's scores, as a mask (DeepSeek-V3.2, GLM-5).

    No gradient goes through it. The scores of all its heads are in fp32 at once. In GLM-5 some layers take what an
    earlier one has chosen. Returned is what the attention's code holds to its end.
    """
    net.symbols["chosen"] = min(net.value("top"), net.value("s"))
    with net.purpose("indexer"):
        if "indexer.wk" in layer.parts:
            found = indices_of_keys(net, without_gradient(x), without_gradient(narrow_q), layer, width)
            if "hands_on" in layer.plan.options:
                net.hand_on(found)
        else:
            found = net.chosen
        wide = net.tensor(("t", "chosen"), 8)
        blank = net.tensor(("t", "s"), 1)
        left_out = net.tensor(("t", "s"), 1)
        del wide, blank
        if net.setting.attention_kernel(x.width, layer.plan.heads) == "eager":
            return [found, left_out, net.tensor(("t", "s"), width)]
        opposite = net.tensor(("t", "s"), 1)
        mask = net.tensor(("t", "s"), 1)
        del opposite
        return [found, left_out, mask]


def without_gradient(x: Tensor) -> Tensor:
    """The same elements, under ``torch.no_grad``."""
    return Tensor(x.storage, x.dims, x.width)


def indices_of_keys(net: Network, x: Tensor, narrow_q: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """The indexer: queries and one key for all of its heads, in part rotated; ReLU of their products, summed by heads.

    Where a batch has several rows, the product of matrices copies the keys of a row for each of its tokens.
    """
    net.symbols |= {"iz": net.value("in") * net.value("z")}
    q = linear(net, narrow_q, layer["indexer.wq_b"])
    k = linear(net, x, layer["indexer.wk"])
    k = net.tensor(k.dims, 4 if net.setting.autocast else k.width)
    q_turned = net.add(*(net.tensor(("t", "iz"), max(q.width, width)) for _ in range(2)))
    k_turned = net.add(*(net.tensor(("t", "z"), max(k.width, width)) for _ in range(2)))
    passed = q, k  # the code holds parts of both to its end
    q = joined(net, (q, q_turned), q.dims)
    k = joined(net, (k, k_turned), k.dims)
    wide_q, wide_k = net.cast(q, 4), net.cast(k, 4)
    rows = net.tensor(("t", "id", "s"), 4) if net.value("b") > 1 else None
    scores = net.tensor(("in", "t", "s"), 4)
    del wide_q, wide_k, rows
    scores = net.elementwise(scores)
    scores = net.elementwise(scores)
    weights = net.elementwise(net.cast(linear(net, x, layer["indexer.weights_proj"]), 4))
    total = net.tensor(("t", "s"), 4)
    opposite = net.tensor(("s", "s"), 1)
    total = net.elementwise(total)
    del opposite, weights
    best, found = net.tensor(("t", "chosen"), 4), net.tensor(("t", "chosen"), 8)
    del best
    found = net.tensor(("t", "chosen"), 4)
    del scores, total, q, k, passed, q_turned, k_turned
    return found


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
        scores = net.cast(scores, 4) if net.setting.autocast else scores
        shares = net.softmax(scores, scores.width)
        del scores
        shares = viewed(net, shares, ("H", "t", "s"))
    out = multiplied(net, shares, v, ("t", "a"))
    del shares, q, k, v
    return linear(net, copied(net, out), layer["o_proj"])


# --- attention in blocks, without a softmax ---


def lightning(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Scores within a block of tokens, and a state of all blocks before, both times fixed decays (MiniMax M1)."""
    net.what = "linear attention"
    wide = net.setting.dense_width  # of the decays, which come with the model
    made = linear(net, x, layer["qkv_proj"])
    made = net.elementwise(made, saved=[made])
    q, k, v = net.split(made, ("a", "a", "a"))
    del made
    net.symbols["bk"] = net.value("b") * min(net.value("C"), net.value("s"))
    net.symbols["ck"] = min(net.value("C"), net.value("s"))
    block, pairs, state_dims = ("bk", "a"), ("bk", "H", "ck"), ("b", "a", "d")
    state, outputs = net.tensor(state_dims, v.width), []
    for number in range(chunks_run(net)):
        before_it = net.live.copy() if number == 1 else None
        own_q, own_k, own_v = (in_rows(net, viewed(net, part, block)) for part in (q, k, v))
        scores = multiplied(net, own_q, own_k, pairs)
        within = multiplied(net, net.elementwise(scores, wide), own_v, block)
        before = multiplied(net, net.elementwise(own_q, wide), state, block)
        outputs.append(net.add(before, within))
        fresh = multiplied(net, net.elementwise(own_k, wide), own_v, state_dims)
        state = net.add(net.elementwise(state, wide), fresh)
        if before_it is not None:
            state = as_often(net, state, before_it, chunks_left_out(net))
    del scores, within, before, fresh, own_q, own_k, own_v
    out = joined(net, tuple(outputs), ("t", "a"))
    outputs.clear()
    out = norm(net, copied(net, out), layer["lightning.norm"])
    out = net.multiply(out, kept(net, linear(net, x, layer["output_gate"])))
    return linear(net, out, layer["lightning.out_proj"])
