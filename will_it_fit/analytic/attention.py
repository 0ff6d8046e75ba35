"""Attention on sizes: projections, rotary embedding, and the kernel that takes queries, keys and values.

Sources: transformers 5.24 (models/*/modeling_*.py, integrations/sdpa_attention.py); the kernels'
:mod:`will_it_fit.engine.cuda_rules`.
"""

from __future__ import annotations

from functools import partial

from will_it_fit.analytic.graph import Tensor
from will_it_fit.analytic.layers import Layer, Network, dropped, linear, norm
from will_it_fit.engine import cuda_rules


def attention(net: Network, x: Tensor, layer: Layer, hidden_width: int) -> Tensor:
    """Project, normalize and rotate, attend, project; ``hidden_width``: bytes of an element of the residual stream."""
    net.what = "attention"
    *projections, output = layer.attention
    if net.decoder.family.fused_qkv:
        joined = linear(net, x, projections[0])
        q, k, v = net.split(joined, ("a", "k", "k"))
        del joined
    else:
        q = normed(net, linear(net, x, projections[0]), layer, 0)
        k = normed(net, linear(net, x, projections[1]), layer, 1)
        v = linear(net, x, projections[2])
    q, k = rotated(net, q, hidden_width), rotated(net, k, hidden_width)
    kernel = net.setting.attention_kernel(q.width)
    run = {"eager": eager, "math": formula}.get(kernel, fused)
    out = linear(net, run(net, q, k, v), output)
    return dropped(net, out) if net.decoder.residual_dropout else out


def normed(net: Network, x: Tensor, layer: Layer, index: int) -> Tensor:
    """Queries (0) or keys (1) through their norm, where the model has one."""
    return norm(net, x, layer.qk_norms[index]) if layer.qk_norms else x


def rotated(net: Network, x: Tensor, width: int) -> Tensor:
    """Rotary position embedding: x * cos + rotate_half(x) * sin; keeps cos and sin alone."""
    if not net.decoder.rotary:
        return x
    wide = max(x.width, width)
    out = net.add(net.elementwise(x, wide), net.elementwise(half_turned(net, x), wide))
    return net.elementwise(out) if net.decoder.rotary < 1 else out  # put together with the part not rotated


def half_turned(net: Network, x: Tensor) -> Tensor:
    """rotate_half: one half of each head negated, and put before the other."""
    shape = (x.dims, x.width)
    negated = net.tensor(x.dims, x.width // 2)

    def backward(grad: Tensor) -> list:
        negated = net.tensor(shape[0], shape[1] // 2)
        result = net.tensor(*shape)  # each half's gradient as one of the whole
        del negated
        other = net.tensor(*shape)
        del other
        return [result]

    out = net.operation(*shape, [x], backward)
    del negated
    return out


def expanded(net: Network, x: Tensor) -> Tensor:
    """Keys or values repeated for every query head that shares them."""
    return net.elementwise(x, dims=("t", "a")) if net.setting.grouped else x


def fused(net: Network, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in one kernel: keeps its inputs, its output and the log-sum-exp of each row."""
    setting, length = net.setting, net.scenario.sequence_length
    flash = setting.attention_kernel(q.width) == "flash"
    if setting.autocast:
        q, k, v = net.cast(q, 2), net.cast(k, 2), net.cast(v, 2)
    if not flash:
        k, v = expanded(net, k), expanded(net, v)
    shapes, width = [(x.dims, x.width) for x in (q, k, v)], q.width
    workspace = partial(
        cuda_rules.efficient_workspace_bytes,
        head=net.value("d"),
        dtype=setting.attention_dtype(width),
        capability=setting.capability,
    )
    net.symbols |= {"W": workspace(length, length), "W64": workspace(64, 64), "W128": workspace(128, 128)}
    bias = []
    if setting.packed:  # pad_bias
        if length % cuda_rules.BIAS_ALIGNMENT:
            bias = [net.tensor(("t", "s8"), width)]
    elif setting.windowed:  # convert_boolean_attn_mask
        bias = [net.tensor(("t", "s8"), width)]
        opposite = net.tensor(("t", "s"), 1)
        del opposite
    sums = net.tensor(("H", "t") if flash else ("H", "b", "s32"), 4)

    def backward(grad: Tensor) -> list:
        grads = [net.tensor(*shape) for shape in shapes]
        if flash:
            scratch = [net.tensor(("H", "b", "s128"), 4), net.tensor(("H", "b", "s128", "d32"), 4)]
            scratch += [net.tensor(("t", "a"), width) for _ in range(2 if setting.grouped else 0)]
        else:
            scratch = [net.tensor(("H", "t"), 4), net.tensor(("H", "b", "W"), 1)]
        while scratch:
            del scratch[0]
        return grads

    return net.operation(("t", "a"), width, [q, k, v], backward, [q, k, v, sums, *bias], saves_output=True)


def formula(net: Network, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention without a kernel that takes its inputs: in fp32, scores in memory.

    Source: aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
    """
    if net.setting.autocast:
        q, k, v = net.cast(q, 2), net.cast(k, 2), net.cast(v, 2)
    width = q.width
    q, k, v = net.cast(q, 4), net.cast(expanded(net, k), 4), net.cast(expanded(net, v), 4)
    with net.purpose("attention scores"):
        mask = net.tensor(("s", "s"), 4)
        q, k = net.elementwise(q), net.elementwise(k)  # each times the square root of the scale
        scores = net.batched(q, k, ("H", "t", "s"))
        del q, k
        soft = net.softmax(scores, 4)
        del scores, mask
    out = net.batched(soft, v, ("t", "a"))
    del soft, v
    return net.elementwise(net.cast(out, width))  # made contiguous


def eager(net: Network, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in single steps, the scores of every head in memory."""
    decoder, autocast = net.decoder, net.setting.autocast
    compute = 2 if autocast else q.width
    k, v = expanded(net, k), expanded(net, v)
    if decoder.family.fused_qkv and decoder.rotary and net.scenario.micro_batch > 1:
        v = net.elementwise(v)  # bmm copies a part of the one matrix's output, and queries and keys left it before
    ql, kl = net.cast(q, compute), net.cast(k, compute)
    with net.purpose("attention scores"):
        weights = net.batched(ql, kl, ("H", "t", "s"))
        del ql, kl
        weights = net.elementwise(weights)  # scaled
        if decoder.softcap:
            weights = net.elementwise(weights)
            weights = net.tanh(weights)
            weights = net.elementwise(weights)
        weights = net.elementwise(weights)  # plus the mask
        direct = net.setting.attention_dtype(q.width) in cuda_rules.HALF_TO_FLOAT or not decoder.family.softmax_fp32
        width = 4 if decoder.family.softmax_fp32 or autocast else weights.width
        soft = net.cast(net.softmax(weights if direct else net.cast(weights, 4), width), q.width)
        del weights
        if decoder.attention_dropout:
            soft = dropped(net, soft)
        soft, v = net.cast(soft, compute), net.cast(v, compute)
    out = net.batched(soft, v, ("t", "a"))
    del soft
    return net.elementwise(out)  # made contiguous
