"""LSTM, GRU and plain RNN as the device runs them: ``meta`` unrolls them as no device does.

On the CPU an LSTM is oneDNN's, a layer and direction at a time, whose workspace oneDNN itself is asked for; every other
one multiplies all inputs first and then goes step by step (ATen ``native/mkldnn/RNN.cpp``, ``native/RNN.cpp``). On CUDA
all of them are one call of cuDNN (``native/cudnn/RNN.cpp``). What cuDNN keeps for the backward pass, its reserve, and
its workspace are sizes that cuDNN alone knows: the reserve is counted as the gates and states that the gradient's
formula needs, which is the least, and the range is open above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from . import costs
from .origins import short

Tensor = torch.Tensor
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# Numbers that the gradient of a step needs for each unit: the gates, an LSTM's cell, and of a GRU what its reset gate
# multiplies.
_KEPT = {"lstm": 5, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}
_LSTM_OF_ONEDNN = 2  # ideep::rnn_kind::LSTM


def places(target: str, noted: Callable[[], None]) -> list[tuple[Any, str, Callable]]:
    """What is exchanged so that recurrent layers run as on ``target``; ``noted`` is called where cuDNN runs."""
    run = _on_cpu if target == "cpu" else partial(_on_cuda, noted)
    return [(torch._VF, kind, _called(run, kind, getattr(torch._VF, kind))) for kind in _GATES]


class _Call(NamedTuple):
    """A call of a recurrent layer; ``batch_sizes``: of a packed sequence, by step."""

    kind: str
    data: Tensor
    batch_sizes: Tensor | None
    hidden: tuple[Tensor, ...]
    weights: list[list[Tensor]]  # by layer and direction
    biased: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def _called(run: Callable[[_Call], tuple], kind: str, original: Callable) -> Callable:
    def layer(*args: Any) -> tuple:
        packed = not isinstance(
            args[3], bool
        )  # data, batch sizes, states, weights; else input, states, weights
        data, batch_sizes = args[0], args[1] if packed else None
        states, weights, biased, layers, dropout, train, bidirectional, *rest = args[
            2 if packed else 1 :
        ]
        hidden = (states,) if isinstance(states, Tensor) else tuple(states)
        if not data.is_meta or hasattr(data, "_local_tensor"):
            return original(*args)
        each = len(weights) // (layers * (2 if bidirectional else 1))
        by_layer = [list(weights[first : first + each]) for first in range(0, len(weights), each)]
        return run(
            _Call(
                kind,
                data,
                batch_sizes,
                hidden,
                by_layer,
                biased,
                layers,
                dropout,
                train,
                bidirectional,
                any(rest),
            )
        )

    return layer


def _on_cpu(call: _Call) -> tuple:
    batched = call.batch_first and call.batch_sizes is None
    data = call.data.transpose(0, 1) if batched else call.data
    own = _oneDNN if _is_oneDNNs(call) else _by_steps
    if own is _oneDNN:
        data = data.contiguous()
    hidden = list(zip(*(state.unbind(0) for state in call.hidden), strict=True))
    last: list[tuple[Tensor, ...]] = []
    for layer in range(call.layers):
        first = layer * call.directions
        outputs = []
        for place in range(first, first + call.directions):
            output, end = own(call, data, hidden[place], call.weights[place], place > first)
            outputs.append(output)
            last.append(end)
        data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        del outputs, output
        if call.dropout and call.train and layer < call.layers - 1:
            data = nn.functional.dropout(data, call.dropout, True)
    ends = [torch.stack(states, 0) for states in zip(*last, strict=True)]
    return (data.transpose(0, 1) if batched else data, *ends)


def _is_oneDNNs(call: _Call) -> bool:
    """Whether oneDNN takes a layer: an LSTM of whole sequences without projections (``use_mkldnn``)."""
    mkldnn = torch.backends.mkldnn
    dtype = call.data.dtype
    taken = dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    projected = len(call.weights[0]) % 2
    whole = call.batch_sizes is None and bool(call.data.numel())
    return (
        call.kind == "lstm"
        and mkldnn.is_available()
        and mkldnn.enabled
        and taken
        and whole
        and not projected
    )


def _oneDNN(
    call: _Call, data: Tensor, hidden: tuple[Tensor, ...], weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    size = hidden[0].shape[-1]
    biases = weights[2:] or [
        torch.zeros(each.shape, dtype=each.dtype, device=each.device) for each in weights
    ]
    own = LstmOfOneDNN.apply(
        data, *weights[:2], *biases, *hidden, reverse, size, call, torch.is_grad_enabled()
    )
    return own[0], own[1:]


class LstmOfOneDNN(torch.autograd.Function):
    """``mkldnn_rnn_layer`` with the workspace that its shape function leaves out."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors, (reverse, size, call, keeps) = args[:7], args[7:]
        flags = (call.layers, call.biased, call.bidirectional, call.batch_first, call.train)
        outputs = torch.ops.aten.mkldnn_rnn_layer(
            *tensors, reverse, [], _LSTM_OF_ONEDNN, size, *flags
        )
        data = tensors[0]
        count = _workspace_bytes(*data.shape, size, data.dtype) if keeps else 0
        workspace = torch.empty(count, dtype=torch.uint8, device=data.device)
        ctx.save_for_backward(*tensors, *outputs[:3], workspace)
        ctx.call, ctx.flags = (reverse, size), flags
        ctx.set_materialize_grads(False)  # the kernel makes zeros itself, and frees them
        return outputs[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        *tensors, output, hidden, cell, workspace = ctx.saved_tensors
        reverse, size = ctx.call
        layers, biased, bidirectional, batch_first, train = ctx.flags
        made = torch.ops.aten.mkldnn_rnn_layer_backward(
            *tensors,
            output,
            hidden,
            cell,
            *grads,
            reverse,
            _LSTM_OF_ONEDNN,
            size,
            layers,
            biased,
            train,
            bidirectional,
            [],
            batch_first,
            workspace,
        )
        bias = torch.empty_like(made[3])  # both biases have gradients of their own
        return *made[:3], made[3], bias, *made[5:], None, None, None, None


@cache
def _workspace_bytes(steps: int, batch: int, inputs: int, size: int, dtype: torch.dtype) -> int:
    """What oneDNN keeps of a layer for the backward pass: it is asked by running one such layer on the CPU."""
    with _disable_current_modes(), torch.enable_grad():  # without gradients it keeps nothing
        make = partial(torch.zeros, dtype=dtype, device="cpu")
        gates = _GATES["lstm"] * size
        tensors = [
            make(steps, batch, inputs),
            make(gates, inputs),
            make(gates, size),
            make(gates),
            make(gates),
        ]
        states = make(batch, size), make(batch, size)
        operator = torch.ops.aten.mkldnn_rnn_layer
        return operator(
            *tensors, *states, False, [], _LSTM_OF_ONEDNN, size, 1, True, False, False, True
        )[3].nbytes


def _by_steps(
    call: _Call, data: Tensor, hidden: tuple[Tensor, ...], weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    given = nn.functional.linear(data, weights[0], weights[2] if call.biased else None)
    step = partial(_CELLS[call.kind], weights=weights, biased=call.biased)
    if call.batch_sizes is not None:
        sizes = [int(size) for size in call.batch_sizes.tolist()]
        return (_packed_backwards if reverse else _packed)(given, sizes, hidden, step)
    outputs = []
    steps = given.unbind(0)
    del given
    for each in reversed(steps) if reverse else steps:
        hidden = step(each, hidden)
        outputs.append(hidden[0])
    return torch.stack(outputs[::-1] if reverse else outputs, 0), hidden


def _packed(given: Tensor, sizes: list[int], hidden: tuple[Tensor, ...], step: Callable) -> tuple:
    outputs, ended, offset = [], [], 0
    for before, size in pairwise([sizes[0], *sizes]):
        if size < before:
            ended.append(tuple(state.narrow(0, size, before - size) for state in hidden))
            hidden = tuple(state.narrow(0, 0, size) for state in hidden)
        hidden = step(given.narrow(0, offset, size), hidden)
        outputs.append(hidden[0])
        offset += size
    ended = [hidden, *reversed(ended)]
    return torch.cat(outputs, 0), tuple(torch.cat(states, 0) for states in zip(*ended, strict=True))


def _packed_backwards(
    given: Tensor, sizes: list[int], begin: tuple[Tensor, ...], step: Callable
) -> tuple:
    outputs, end = [], given.shape[0]
    hidden = tuple(state.narrow(0, 0, sizes[-1]) for state in begin)
    for before, size in pairwise([sizes[-1], *reversed(sizes)]):
        if size > before:
            more = [state.narrow(0, before, size - before) for state in begin]
            hidden = tuple(torch.cat(pair, 0) for pair in zip(hidden, more, strict=True))
        hidden = step(given.narrow(0, end - size, size), hidden)
        outputs.append(hidden[0])
        end -= size
    return torch.cat(outputs[::-1], 0), hidden


def _from_hidden(hidden: Tensor, weights: Sequence[Tensor], biased: bool) -> Tensor:
    return nn.functional.linear(hidden, weights[1], weights[3] if biased else None)


def _plain(
    activation: Callable, given: Tensor, hidden: tuple, weights: Sequence[Tensor], biased: bool
) -> tuple:
    return (activation(_from_hidden(hidden[0], weights, biased).add_(given)),)


def _gru(given: Tensor, hidden: tuple, weights: Sequence[Tensor], biased: bool) -> tuple:
    inputs = given.unsafe_chunk(3, 1)
    own = _from_hidden(hidden[0], weights, biased).unsafe_chunk(3, 1)
    reset = own[0].add_(inputs[0]).sigmoid_()
    update = own[1].add_(inputs[1]).sigmoid_()
    new = inputs[2].add(own[2].mul_(reset)).tanh_()
    return ((hidden[0] - new).mul_(update).add_(new),)


def _lstm(given: Tensor, hidden: tuple, weights: Sequence[Tensor], biased: bool) -> tuple:
    gates = _from_hidden(hidden[0], weights, biased).add_(given).unsafe_chunk(4, 1)
    enters, stays, new, leaves = (
        gates[0].sigmoid_(),
        gates[1].sigmoid_(),
        gates[2].tanh_(),
        gates[3].sigmoid_(),
    )
    cell = (stays * hidden[1]).add_(enters * new)
    output = leaves * cell.tanh()
    return output if len(weights) % 2 == 0 else nn.functional.linear(output, weights[-1]), cell


_CELLS = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_plain, torch.tanh),
    "rnn_relu": partial(_plain, torch.relu),
}


def _on_cuda(noted: Callable[[], None], call: _Call) -> tuple:
    noted()
    flat = [weight for weights in call.weights for weight in weights]
    output, *states = CudnnRnn.apply(call, noted, call.data, *call.hidden, *flat)
    return (output, *states)


class CudnnRnn(torch.autograd.Function):
    """Allocates what ``_cudnn_rnn`` does: outputs, the reserve at its least, one buffer of the weights' gradients."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, noted: Callable[[], None], data: Tensor, *tensors: Tensor
    ) -> tuple:
        batched = call.batch_first and call.batch_sizes is None
        given = (data.transpose(0, 1) if batched else data).contiguous()
        hidden, weights = tensors[: len(call.hidden)], tensors[len(call.hidden) :]
        width = hidden[0].shape[-1] * call.directions
        output = given.new_empty((*given.shape[:-1], width))
        ends = [torch.empty_like(state) for state in hidden]
        units = call.weights[0][1].shape[0] // _GATES[call.kind]
        rows = given.shape[:-1].numel()
        kept = _KEPT[call.kind] * units * call.directions * call.layers + width * (call.layers - 1)
        reserve = given.new_empty(rows * kept if call.train else 0)
        del given
        ctx.save_for_backward(data, *tensors, output, reserve)
        ctx.call, ctx.noted = call, noted
        _costs(call, rows, output.dtype, weights, times=1)
        return output.transpose(0, 1) if batched else output, *ends

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
        call = ctx.call
        ctx.noted()
        data, *tensors, output, _ = ctx.saved_tensors
        hidden, weights = tensors[: len(call.hidden)], tensors[len(call.hidden) :]
        batched = call.batch_first and call.batch_sizes is None
        given, grad = (each.transpose(0, 1) if batched else each for each in (data, grad))
        given, grad = given.contiguous(), grad.contiguous()
        of_data = torch.empty_like(given)
        of_hidden = [torch.empty_like(state) for state in hidden]
        buffer = weights[0].new_empty(sum(weight.numel() for weight in weights))
        parts = buffer.split([weight.numel() for weight in weights])
        of_weights = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
        _costs(call, output.shape[:-1].numel(), output.dtype, weights, times=2)
        return None, None, of_data.transpose(0, 1) if batched else of_data, *of_hidden, *of_weights


def _costs(
    call: _Call, rows: int, dtype: torch.dtype, weights: Sequence[Tensor], times: int
) -> None:
    """The products of all steps, each layer's as one: how long the steps wait for each other is not in it."""
    each = len(call.weights[0])
    for first in range(0, len(weights), each):
        for weight in weights[first : first + 2]:
            outputs, inner = weight.shape
            moved = (rows * (inner + outputs) + weight.numel()) * dtype.itemsize
            shape, flops = (1, rows, outputs, inner), 2 * rows * outputs * inner
            name = f"cudnn_{call.kind}"
            costs.launch(
                costs.Operator(name, costs.PRODUCT, short(dtype), times * flops, moved, shape)
            )
