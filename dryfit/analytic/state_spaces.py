"""State spaces and short convolutions on sizes, by transformers' own code and by packages' kernels.

As in :mod:`dryfit.analytic.layers`, local variables live as long as in transformers' code.

Sources: transformers 5.24 (models/bamba/modeling_bamba.py and its relatives, models/lfm2/modeling_lfm2.py,
models/jamba/modeling_jamba.py), mamba-ssm
2.3 (ops/triton/ssd_combined.py), causal-conv1d 1.7 (cpp_functions.py).
"""

from __future__ import annotations

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.graph import Parameter, Tensor
from dryfit.analytic.layers import Network, linear, norm, product
from dryfit.analytic.operations import (
    CHUNKS_RUN,
    HybridLayer,
    as_often,
    by_package,
    convolved,
    copied,
    in_rows,
    joined,
    kept,
    multiplied,
    outer,
    root_normed,
    viewed,
)
from dryfit.engine.components import WEIGHT_CASTS

MULTIPROCESSORS = 132  # of an H100: mamba-ssm splits sums of gradients among them


# --- state spaces -----------------------------------------------------------------------------------------------------


def state_space(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Mamba 2: project, convolve, scan in chunks, gate, normalize, project."""
    net.what = "state space"
    projected = linear(net, x, layer["in_proj"])
    if layer.plan.layer == "side_by_side":  # Falcon-H1: times a number for each part
        projected = net.elementwise(projected)
    if by_package(net, "mamba-ssm"):
        return scan_of_package(net, projected, layer)
    gate, mixed, dt = net.split(projected, ("y", "y+G+G", "N"))
    del projected
    mixed = convolved(net, mixed, layer, "conv1d", "y+G+G", silu=True)
    inner, before, after = net.split(mixed, ("y", "G", "G"))
    out = scan(net, inner, dt, before, after, layer)
    del mixed, inner, before, after, dt
    out = gated_after(net, out, gate, layer)
    return linear(net, net.cast(out, width), layer["out_proj"])


def gated_after(net: Network, out: Tensor, gate: Tensor, layer: HybridLayer) -> Tensor:
    """Times the activated gate, in fp32, and normalized where the model does it."""
    if "norm" not in layer.parts:
        return net.multiply(out, net.elementwise(gate, saved=[gate]))
    wide = net.cast(gate, 4)
    with net.purpose("norms"):
        wide = net.multiply(out, net.elementwise(wide, saved=[wide]))
        return net.multiply(root_normed(net, wide, "1"), layer["norm"])


def scan(net: Network, x: Tensor, dt: Tensor, before: Tensor, after: Tensor, layer: HybridLayer) -> Tensor:
    """The scan as transformers' own code has it: scores of each head within chunks, states between them, in fp32.

    ``before`` and ``after`` are B and C of the paper.
    """
    rows, pairs = ("tc", "y"), ("tc", "N", "C")
    dt = net.elementwise(dt)
    dt = net.elementwise(dt, saved=[dt])
    dt = net.elementwise(dt, saved=[dt])
    x = net.elementwise(x, 4)
    before = repeated(net, before)
    after = repeated(net, after)
    rest = net.multiply(net.elementwise(x, dims=rows), Parameter(("N",), 4, layer["D"].trained))
    step = net.cast(dt, 4)
    x = net.multiply(x, step)
    decay = net.elementwise(step)
    x, decay = net.elementwise(x, dims=rows), net.elementwise(decay, dims=("tc", "N"))
    before, after = padded(net, before), padded(net, after)
    total = net.elementwise(decay)
    weights = segments(net, decay, pairs)
    scores = multiplied(net, copied(net, after), copied(net, before), pairs)
    scores = net.multiply(scores, weights)
    within = multiplied(net, scores, copied(net, x), rows)
    falling = kept(net, net.elementwise(total))
    scaled = net.multiply(before, falling)
    states = multiplied(net, copied(net, x), copied(net, scaled), ("nc", "N", "w", "g"))
    first = net.tensor(("b", "N", "w", "g"), 4)
    states = joined(net, (first, states), ("nc+b", "N", "w", "g"))
    states = net.elementwise(states, saved=[states])
    between = multiplied(net, copied(net, after), copied(net, viewed(net, states, ("nc", "N", "w", "g"))), rows)
    between = net.multiply(between, kept(net, total))
    out = net.add(copied(net, net.add(within, between)), rest)
    whole = net.value("tc") == net.value("t")
    return Tensor(out.storage, ("t", "y"), out.width, out.edge) if whole else viewed(net, out, ("t", "y"))


def repeated(net: Network, x: Tensor) -> Tensor:
    """One of each group's states for every head, in fp32; the gradient is summed to the groups."""
    wide = net.cast(x, 4)
    narrow = wide.dims
    return net.operation(("t", "N", "g"), 4, [wide], lambda grad: [net.tensor(narrow, 4)])


def padded(net: Network, x: Tensor) -> Tensor:
    """With zeros up to whole chunks; on the way back in another order first."""
    shape = (x.dims, x.width)

    def backward(grad: Tensor) -> list:
        ordered = net.tensor(*shape)
        result = net.tensor(*shape)
        del ordered
        return [result]

    return net.operation(("tc", *x.dims[1:]), x.width, [x], backward)


def segments(net: Network, decay: Tensor, pairs: tuple[str, ...]) -> Tensor:
    """The decay between each two tokens of a chunk."""
    shape = (pairs, 4)

    def of_sums(grad: Tensor) -> list:
        turned = net.tensor(*shape)
        total = net.tensor(*shape)
        del turned
        result = net.tensor(*shape)
        del total
        return [result]

    narrow = decay.dims
    spread = net.operation(pairs, 4, [decay], lambda grad: [net.tensor(narrow, 4)])
    spread = net.elementwise(spread)
    total = net.operation(pairs, 4, [spread], of_sums)
    masked = net.elementwise(total)
    del spread, total
    return kept(net, masked)


def scan_of_package(net: Network, projected: Tensor, layer: HybridLayer) -> Tensor:
    """Convolution, scan, gate and the way back in one function of mamba-ssm, which makes most of it again."""
    last, width = layer["out_proj"], projected.width
    if net.setting.quantized:
        raise NotDescribed("mamba-ssm's kernel can't read a quantized out_proj")
    shape, states = (projected.dims, width), ("nc", "N", "w", "g")
    norm = layer.parts.get("norm")
    parts = [layer[name] for name in ("conv1d", "conv1d.bias", "dt_bias", "A_log", "D") if name in layer.parts]
    parts += [norm] if norm is not None else []
    splits = min(net.value("N"), max(1, MULTIPROCESSORS // net.value("nc")))
    net.symbols["o"] = splits

    def forward_states() -> list[Tensor]:
        small = [net.tensor(("tc", "N"), 4) for _ in range(2)]
        own = net.tensor(states, 4)
        passed, final = net.tensor(states, width), net.tensor(("b", "N", "w", "g"), 4)
        del own
        scores = net.tensor(("tc", "C"), 4)
        del scores
        return [*small, passed, final]

    def backward(grad: Tensor) -> list:
        again = [net.tensor(("t", "y"), width), net.tensor(("t", "y+G+G"), width), net.tensor(*shape)]
        again += [net.tensor(("t", "y+G+G"), width), net.tensor(("t", "y"), width)]
        small = [net.tensor(("tc", "N"), 4) for _ in range(2)]
        own = net.tensor(states, 4)
        passed, final = net.tensor(states, 4), net.tensor(("b", "N", "w", "g"), 4)
        del own
        of_states = net.tensor(states, 4)
        narrow = [net.tensor(states, width), net.tensor(states, width)]
        del of_states, passed
        for dims in (("t", "o", "g"), ("t", "o", "g"), ("tc", "o", "C")):
            split = net.tensor(dims, 4)
            del split
        del narrow, small, final
        of_last = net.tensor(last.weight.dims, width) if not last.weight.trained else None
        weights = [net.gradient(p.dims, p.width) if p.trained else None for p in parts]
        own = net.gradient(last.weight.dims, width) if last.weight.trained else None
        result = again[2]
        del of_last, again
        return [result, own, *weights]

    copy = net.tensor(last.weight.dims, width, WEIGHT_CASTS, "16-bit copies of weights")
    copy = copy if last.weight.width != width else None
    mixed = net.tensor(("t", "y+G+G"), width)
    held = forward_states()
    inner = net.tensor(("t", "y"), width)
    out = net.operation(("t", "h"), width, [projected, last.weight, *parts], backward, [projected, inner, copy])
    del mixed, held
    return out


# --- the first Mamba --------------------------------------------------------------------------------------------------


def first_state_space(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """Mamba 1 with norms of step, B and C (Jamba): project, convolve, scan token by token, gate, project."""
    net.what = "state space"
    if by_package(net, "mamba-ssm"):
        raise NotDescribed("the analytic estimate does not describe mamba-ssm's kernel of the first Mamba")
    projected = linear(net, x, layer["in_proj"])
    wide = exponential(net, layer["A_log"])
    mixed, gate = net.split(projected, ("y", "y"))
    mixed = convolved(net, mixed, layer, "conv1d", "y", silu=True)
    parts = linear(net, in_rows(net, mixed), layer["x_proj"])
    step, before, after = net.split(parts, ("R", "g", "g"))
    step, before, after = (
        norm(net, part, layer[f"{name}_layernorm"]) for part, name in ((step, "dt"), (before, "b"), (after, "c"))
    )
    if net.setting.quantized:
        step = net.elementwise(linear(net, step, layer["dt_proj"]))
    else:
        step = product(net, step, layer["dt_proj"].weight, "y")
    out = token_by_token(net, mixed, step, wide, before, after, layer)
    out = net.multiply(out, net.elementwise(gate, saved=[gate]))
    out = in_rows(net, net.cast(out, width))
    return linear(net, out, layer["out_proj"])


def exponential(net: Network, weight: Parameter) -> Tensor:
    """The decays of a state, in fp32, from their logarithms."""
    wide = net.operation(weight.dims, 4, [weight], lambda grad: [net.gradient(weight.dims, weight.width)])
    return net.elementwise(kept(net, wide))


def token_by_token(
    net: Network, x: Tensor, step: Tensor, wide: Tensor, before: Tensor, after: Tensor, layer: HybridLayer
) -> Tensor:
    """The scan as transformers' own code has it: every token's decay, input and state, in fp32, are kept."""
    full, state_dims = ("t", "y", "g"), ("b", "y", "g")
    step = net.elementwise(step)  # plus the bias
    step = net.cast(step, 4) if net.setting.autocast else step
    step = net.elementwise(step, saved=[step])
    decays = kept(net, outer(net, step, wide, full))
    inputs = outer(net, step, net.cast(before, 4), full)
    inputs = net.multiply(inputs, net.cast(x, 4))
    state = net.tensor(state_dims, x.width)
    outputs, count = [], net.value("s")
    for number in range(min(count, CHUNKS_RUN)):
        before_it = net.live.copy() if number == 1 else None
        state = net.add(net.multiply(viewed(net, decays, state_dims), state), viewed(net, inputs, state_dims))
        outputs.append(multiplied(net, net.cast(state, x.width), viewed(net, after, ("b", "g")), ("b", "y")))
        if before_it is not None:
            state = as_often(net, state, before_it, max(0, count - CHUNKS_RUN))
    out = joined(net, tuple(outputs), ("t", "y"))
    return net.add(out, net.multiply(x, Parameter(("y",), 4, layer["D"].trained)))


# --- short convolutions -----------------------------------------------------------------------------------------------


def short(net: Network, x: Tensor, layer: HybridLayer, width: int) -> Tensor:
    """A short convolution between two gates, all three from one matrix (LFM2)."""
    net.what = "short convolution"
    together = linear(net, x, layer["conv.in_proj"])
    first, second, x = net.split(together, ("h", "h", "h"))
    mixed = convolved(net, net.multiply(first, x), layer, "conv.conv", "h", silu=False)
    out = copied(net, net.multiply(second, mixed))
    del together, first, second, x, mixed
    return linear(net, out, layer["conv.out_proj"])
