"""The parts of a decoder layer as transformers computes them, in operations on sizes.

Each function takes the :class:`Network` and a tensor, and says with ``net.what`` what its tensors are for. Names of
local variables are as long-lived as in the Python code that they describe: a tensor dies when its last name does, and
``del`` stands where transformers' or PEFT's own code drops it.

Sources: transformers 5.24 (models/*/modeling_*.py), peft 0.21 (tuners/lora/layer.py, bnb.py), bitsandbytes 0.50
(autograd/_functions.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from dryfit.analytic.decoder import Decoder, Matrix
from dryfit.analytic.graph import Graph, Parameter, Tensor
from dryfit.analytic.setting import Setting
from dryfit.engine.bitsandbytes_rules import BLOCK
from dryfit.engine.components import TEMPORARIES, WEIGHT_CASTS
from dryfit.engine.cuda_rules import (
    BIAS_ALIGNMENT,
    HALF_TO_FLOAT,
    efficient_workspace_bytes,
    flash_padding,
)
from dryfit.scenario.scenario import Scenario

Adapter = tuple[Parameter, Parameter]  # A and B


class Network(Graph):
    """A graph of operations that knows the setting."""

    def __init__(self, setting: Setting, *, blocks: bool) -> None:
        accumulating = setting.scenario.gradient_accumulation > 1 and not setting.sharded
        expandable = setting.scenario.allocator.expandable_segments
        super().__init__(
            setting.symbols(), blocks=blocks, accumulating=accumulating, expandable=expandable
        )
        self.setting = setting

    @property
    def scenario(self) -> Scenario:
        """The scenario whose step this is."""
        return self.setting.scenario

    @property
    def decoder(self) -> Decoder:
        """The decoder that it trains."""
        return self.setting.decoder

    @contextmanager
    def purpose(self, what: str) -> Iterator[None]:
        """Say what the tensors made inside are for."""
        before, self.what = self.what, what
        try:
            yield
        finally:
            self.what = before

    def base_parameter(self, group: str, *dims: str, tied: bool = False) -> Parameter:
        """A weight of the model that is not packed, of a group of :meth:`Decoder.weight_shapes`."""
        return Parameter(dims, self.setting.weight_width(group), self.setting.full, tied)


@dataclass
class Linear:
    """A linear layer's weight, bias and adapter."""

    matrix: Matrix
    weight: Parameter
    bias: Parameter | None
    adapter: Adapter | None


class Layer:
    """The parameters of one decoder layer."""

    def __init__(self, net: Network) -> None:
        decoder, lora = net.decoder, net.scenario.lora
        targets = set(decoder.targets(lora)) if lora else set()
        width = net.setting.adapter_width

        def adapter(name: str, outputs: tuple[str, ...], inputs: tuple[str, ...]) -> Adapter | None:
            if name not in targets:
                return None
            return Parameter(inputs, width, True), Parameter(outputs, width, True)

        def linear(m: Matrix) -> Linear:
            bias = net.base_parameter("biases", m.outputs) if m.bias else None
            weight = net.base_parameter("linear", m.outputs, m.inputs)
            return Linear(m, weight, bias, adapter(m.name, (m.outputs, "r"), ("r", m.inputs)))

        self.attention = [linear(m) for m in decoder.attention]
        self.mlp = [linear(m) for m in decoder.mlp]
        self.norms = [net.base_parameter("norms", "h") for _ in range(decoder.family.norms)]
        self.qk_norms = [
            net.base_parameter("norms", "d") for _ in range(2 if decoder.qk_norm else 0)
        ]
        self.parameters = [
            p
            for x in self.attention + self.mlp
            for p in (x.weight, x.bias, *(x.adapter or ()))
            if p
        ]
        self.parameters += self.norms + self.qk_norms
        if decoder.experts:
            self.router = net.base_parameter("router", "E", "h")
            self.router_adapter = adapter("gate", ("E", "r"), ("r", "h"))
            self.up = net.base_parameter("experts", "E", "i+i", "h")
            self.up_adapter = adapter("gate_up_proj", ("i+i", "r+r", "E"), ("E", "r+r", "h"))
            self.down = net.base_parameter("experts", "E", "h", "i")
            self.down_adapter = adapter("down_proj", ("h", "r", "E"), ("E", "r", "i"))
            self.parameters += [self.router, self.up, self.down]
            for pair in (self.router_adapter, self.up_adapter, self.down_adapter):
                self.parameters += pair or ()


# --- linear layers ------------------------------------------------------------------------------------------------


def linear(net: Network, x: Tensor, layer: Linear) -> Tensor:
    """A linear layer, 4-bit or not, and B·A·x added in the adapter's precision if it has one."""
    setting, source = net.setting, x.width
    if setting.quantized:
        inner = net.cast(x, setting.dense_width)
        out = net.cast(product_4bit(net, inner, layer.matrix), source)
        del inner
    else:
        out = product(net, x, layer.weight, layer.matrix.outputs, layer.bias)
    if layer.adapter is None:
        return out
    (a, b), width = layer.adapter, out.width
    with net.purpose("adapters"):
        if setting.quantized:
            out = net.elementwise(out)  # a defensive clone
        held = x if setting.autocast and setting.quantized else net.cast(x, a.width)
        inner = dropped(net, held) if net.scenario.lora.dropout else held
        low = product(net, inner, a, "r")
        del inner
        update = net.elementwise(product(net, low, b, layer.matrix.outputs))  # times alpha / rank
        del low
        if setting.quantized and not setting.autocast:  # PEFT's `requires_conversion`
            update = net.cast(update, width)
    out = net.add(out, update)
    del update, held  # PEFT's forward holds its cast input to the end
    return net.cast(out, width)


def product(
    net: Network, x: Tensor, weight: Parameter, outputs: str, bias: Parameter | None = None
) -> Tensor:
    """x times a dense weight; under autocast both in 16 bits."""
    copy = None
    if net.setting.autocast:
        x = net.cast(x, 2)
        if weight.width == 4:
            copy = net.tensor(weight.dims, 2, WEIGHT_CASTS, "16-bit copies of weights")
            if weight.trained:
                net.casts.append(copy)
    return net.matmul(x, weight, outputs, bias, copy)


def product_4bit(net: Network, x: Tensor, matrix: Matrix) -> Tensor:
    """x times a 4-bit weight: keeps nothing; forward and backward unpack the weight, and nested scales twice before."""
    shape, dims, width = (x.dims, x.width), (matrix.outputs, matrix.inputs), net.setting.dense_width
    scales = [(f"{matrix.outputs}·{matrix.inputs}/{BLOCK}",)] * (2 if net.setting.nested else 0)

    def unpacked() -> list[Tensor]:
        sizes = [*((dims, 4) for dims in scales), (dims, width)]
        return [net.tensor(*size, TEMPORARIES, "4-bit weight, unpacked") for size in sizes]

    def backward(grad: Tensor) -> list:
        buffers = unpacked()
        net.multiplies()
        result = net.tensor(*shape)
        buffers.clear()
        return [result]

    buffers = unpacked()
    net.multiplies()
    out = net.operation((*x.dims[:-1], matrix.outputs), x.width, [x], backward)
    buffers.clear()
    return out


def dropped(net: Network, x: Tensor) -> Tensor:
    """Dropout with a probability: keeps a mask of one byte an element."""
    return net.operation(x.dims, x.width, [x], net.like(x), after=lambda: [net.tensor(x.dims, 1)])


# --- norms --------------------------------------------------------------------------------------------------------


def norm(net: Network, x: Tensor, weight: Parameter) -> Tensor:
    """LayerNorm in one kernel, or RMSNorm step by step in fp32 (Gemma's until after the weight)."""
    kind, source = net.decoder.family.norm, x.width
    with net.purpose("norms"):
        if kind == "layer":
            return _layer_norm(net, net.cast(x, 4) if net.setting.autocast else x, weight)
        wide = net.cast(x, 4)
        square = net.tensor(wide.dims, 4)
        del square
        root = net.operation(
            ("t",), 4, [wide], lambda grad, dims=wide.dims: through_the_mean(net, dims), [wide]
        )
        out = net.operation(
            wide.dims, 4, [wide, root], lambda grad: through_the_product(net, grad), [wide, root]
        )
        del wide, root
        if kind == "rms":
            return net.multiply(net.cast(out, source), weight)
        return net.cast(net.multiply(out, Parameter(weight.dims, 4, weight.trained)), source)


def _layer_norm(net: Network, x: Tensor, weight: Parameter) -> Tensor:
    shape = (x.dims, x.width)

    def backward(grad: Tensor) -> list:
        return [
            net.tensor(*shape),
            net.gradient(weight.dims, weight.width) if weight.trained else None,
        ]

    return net.operation(x.dims, max(x.width, weight.width), [x, weight], backward, [x])


def through_the_product(net: Network, grad: Tensor) -> list:
    """The backward of x * rsqrt(mean(x * x)), of its outer product: for x, and for the root by one of x's size."""
    direct = net.tensor(grad.dims, 4)
    other = net.tensor(grad.dims, 4)
    del other
    return [direct, net.tensor(("t",), 4)]


def through_the_mean(net: Network, dims: tuple[str, ...]) -> list:
    """And of the root of the mean of squares."""
    spread = net.tensor(dims, 4)
    power = net.tensor(dims, 4)
    doubled = net.tensor(dims, 4)
    result = net.tensor(dims, 4)
    del doubled, power, spread
    return [result]


# --- MLP ----------------------------------------------------------------------------------------------------------


def activated(net: Network, x: Tensor) -> Tensor:
    """The MLP's nonlinearity."""
    if net.decoder.activation not in ("gelu_new", "gelu_fast"):
        return net.elementwise(x, saved=[x])
    # Written out in Python: each step's operands are kept.
    wide = net.cast(x, 4) if net.setting.autocast else x  # powers are in fp32 under autocast
    cube = net.elementwise(wide, saved=[wide])
    del wide
    inner = net.elementwise(net.elementwise(net.add(x, net.elementwise(cube))))
    del cube
    one_plus = net.elementwise(net.tanh(inner))
    del inner
    return net.multiply(net.elementwise(x), one_plus)


def mlp(net: Network, x: Tensor, layer: Layer) -> Tensor:
    """The feed-forward part: gated or not, gate and up in one matrix or two."""
    family = net.decoder.family
    net.what = "MLP"
    first, *_, last = layer.mlp
    if family.fused_gate_up:
        joined = linear(net, x, first)
        gate, up = net.split(joined, ("i", "i"))
        del joined
        out = net.multiply(up, activated(net, gate))
        del gate, up
    elif family.gated:
        gate = activated(net, linear(net, x, first))
        out = net.multiply(gate, linear(net, x, layer.mlp[1]))
        del gate
    else:
        out = activated(net, linear(net, x, first))
    out = linear(net, out, last)
    return dropped(net, out) if net.decoder.residual_dropout else out


# --- attention ----------------------------------------------------------------------------------------


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
    out = linear(net, attended(net, q, k, v), output)
    return dropped(net, out) if net.decoder.residual_dropout else out


def attended(net: Network, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What queries get of keys and values, by the kernel that takes them."""
    run = {"eager": eager, "math": formula}.get(net.setting.attention_kernel(q.width), fused)
    return run(net, q, k, v)


def normed(net: Network, x: Tensor, layer: Layer, index: int) -> Tensor:
    """Queries (0) or keys (1) through their norm, where the model has one."""
    return norm(net, x, layer.qk_norms[index]) if layer.qk_norms else x


def rotated(net: Network, x: Tensor, width: int) -> Tensor:
    """Rotary position embedding: x * cos + rotate_half(x) * sin; keeps cos and sin alone."""
    if not net.decoder.rotary:
        return x
    wide = max(x.width, width)
    out = net.add(net.elementwise(x, wide), net.elementwise(half_turned(net, x), wide))
    return (
        net.elementwise(out) if net.decoder.rotary < 1 else out
    )  # put together with the part not rotated


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
    shapes, width, head = [(x.dims, x.width) for x in (q, k, v)], q.width, net.value("d")
    workspace = partial(
        efficient_workspace_bytes,
        head=head,
        dtype=setting.attention_dtype(width),
        capability=setting.capability,
    )
    net.symbols |= {"W": workspace(length, length), "d32": flash_padding(length, head)[1]}
    bias = []
    if setting.packed:  # pad_bias
        if length % BIAS_ALIGNMENT:
            bias = [net.tensor(("t", "s8"), width)]
    elif setting.masked:  # convert_boolean_attn_mask
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

    return net.operation(
        ("t", "a"), width, [q, k, v], backward, [q, k, v, sums, *bias], saves_output=True
    )


def formula(net: Network, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention without a kernel that takes its inputs: in fp32, scores in memory.

    Source: aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
    """
    if net.setting.autocast:
        q, k, v = net.cast(q, 2), net.cast(k, 2), net.cast(v, 2)
    width = q.width
    q, k = net.cast(q, 4), net.cast(expanded(net, k), 4)
    v = net.cast(expanded(net, v), 4)
    with net.purpose("attention scores"):
        mask = net.tensor(("t" if net.setting.padded else "s", "s"), 4)
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
        v = net.elementwise(
            v
        )  # bmm copies a part of the one matrix's output, and queries and keys left it before
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
        direct = (
            net.setting.attention_dtype(q.width) in HALF_TO_FLOAT or not decoder.family.softmax_fp32
        )
        width = 4 if decoder.family.softmax_fp32 or autocast else weights.width
        soft = net.cast(net.softmax(weights if direct else net.cast(weights, 4), width), q.width)
        del weights
        if decoder.attention_dropout:
            soft = dropped(net, soft)
        soft, v = net.cast(soft, compute), net.cast(v, compute)
    out = net.batched(soft, v, ("t", "a"))
    del soft
    return net.elementwise(out)  # made contiguous
