"""What each operator of a step costs: floating-point operations, bytes moved, what collectives exchange.

A :class:`CostRecorder` sits beside the tracker and notes one :class:`Operator` for each kernel that a GPU would launch.
Views and allocations launch none. Model layers are alike, so a cost is computed once for each operator and shapes.
Nothing here is a time: what a card makes of the costs is for the caller to say.

FLOPs come from PyTorch's own registry (``torch.utils.flop_counter``): a multiplication and an addition are two.
Attention is halved where it is causal, and its backward pass computes five products for the forward pass's two
(FlashAttention-2, arXiv:2307.08691, section 3.1: 2.5 times).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from .collectives import EXCHANGES, GpuGroup, everybody, group_of, sent_share, whole_bytes
from .origins import short

PRODUCT, ATTENTION, MEMORY, COLLECTIVE = "products", "attention", "memory", "collectives"
KINDS = (PRODUCT, ATTENTION, MEMORY, COLLECTIVE)
BACKWARD_ATTENTION = 2.5
_CPU_KEYS = 512  # in a block of the CPU's attention kernel
_NO_KERNEL = (
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::lift_fresh",
    "aten::_local_scalar_dense",
    "aten::promote_types",
    "aten::_has_compatible_shallow_copy_type",
    "profiler::",
)
_OVERWRITTEN = (
    "aten::copy_",
    "aten::fill_",
    "aten::zero_",
)  # the first argument is written and not read
_MADE = (
    "aten::zeros",
    "aten::new_zeros",
    "aten::ones_like",
    "aten::zeros_like",
    "aten::full",
    "aten::arange",
)
# Only what is picked is read, however large the table.
_PICKED = (
    "aten::embedding",
    "aten::index_select",
    "aten::gather",
    "aten::nll_loss_forward",
    "aten::index",
    "aten::nll_loss_backward",
    "aten::embedding_dense_backward",
)


class Operator(NamedTuple):
    """A kernel and what it costs."""

    name: str  # the operator's, `aten::mm`; of a stand-in for a kernel, that kernel's
    kind: str  # one of `KINDS`
    dtype: str  # what products are computed in, such as `bfloat16`
    flops: int  # multiplications and additions
    # Read and written; of a collective, of the whole tensor that it gathers, sums or exchanges; of a send or receipt,
    # of what is moved.
    bytes: int
    shape: tuple[int, ...] = ()  # of a product `(matrices, rows, columns, inner)`; else `()`
    made_bytes: int = 0  # of the largest tensor that it makes anew
    group: GpuGroup | None = None  # of a collective: the GPUs that it connects

    @property
    def moved_bytes(self) -> float:
        """Read and written; of a collective, what this GPU sends."""
        return (
            float(self.bytes * sent_share(self.name, self.group.size)) if self.group else self.bytes
        )


class CostRecorder:
    """The kernels of a step in the order in which the program launches them.

    ``last_step``: the number of the step that is recorded. ``gpus``: how many GPUs a collective connects whose group
    isn't known.
    """

    def __init__(self, last_step: int, gpus: int = 1) -> None:
        self.on = False  # whether that step is running
        self._last, self._gpus = last_step, gpus
        self._known: dict[tuple, tuple[int, ...]] = {}
        self._quiet: set[Any] = set()
        self.operators: list[Operator] = []  # each operator and shapes once
        self.calls: list[int] = []  # for each launch, in order, the index of its operator
        self.streams: list[
            int
        ] = []  # for each launch the stream; 0 is the one that models compute on
        self.phases: list[tuple[str, int]] = []  # `(phase, index of its first launch)` in order
        # `(index of the next launch, waiting stream, stream, launches)`: it waits for those of the other stream's
        # kernels that are among the first so many launches. Waiting stream None: the program.
        self.waits: list[tuple[int, int | None, int, int]] = []
        self.without_kernel = 0  # how many operators launched none, such as views
        # Asked at each launch, and what it said: the module's name. None: not asked.
        self.module_now: Callable[[], str] | None = None
        self.modules: list[str] = []

    def mark(self, phase: str, step: int) -> None:
        """Say that a phase begins. Only the last step is recorded."""
        self.on = step == self._last
        if self.on:
            self.phases.append((phase, len(self.calls)))

    def note(self, func: Any, args: Sequence, kwargs: dict, output: Any, stream: int = 0) -> None:
        """Record an operator that has run."""
        if func in self._quiet:
            self.without_kernel += 1
            return
        group = (
            group_of(func, args) or everybody(self._gpus) if func.namespace in EXCHANGES else None
        )
        key = (func, _shapes(args), _shapes(kwargs.values()) if kwargs else (), group)
        indices = self._known.get(key)
        if indices is None:
            if _launches_nothing(func):
                self._quiet.add(func)
                self.without_kernel += 1
                return
            made = _made_bytes(func, output)
            costs = [
                operator._replace(made_bytes=made, group=group)
                for operator in self._cost(func, args, kwargs, output)
            ]
            indices = self._known[key] = tuple(
                range(len(self.operators), len(self.operators) + len(costs))
            )
            self.operators += costs
        self._launched(indices, stream)

    def launch(self, operator: Operator, stream: int = 0) -> None:
        """Record a kernel that no operator stands for."""
        if not self.on:
            return
        indices = self._known.get((operator,))
        if indices is None:
            indices = self._known[(operator,)] = (len(self.operators),)
            self.operators.append(operator)
        self._launched(indices, stream)

    def wait(self, waiter: int | None, stream: int, launches: int) -> None:
        """Record that a stream, or the program (None), waits for another stream's kernels among so many launches."""
        if self.on:
            self.waits.append((len(self.calls), waiter, stream, launches))

    def first_micro_batch(self) -> CostRecorder | None:
        """The launches of the step's first micro-batch alone; None where the step has only one."""
        forwards = [first for phase, first in self.phases if phase == "forward"]
        if len(forwards) < 2:
            return None
        return self.between(*forwards[:2])

    def between(self, first: int, end: int) -> CostRecorder:
        """The launches from one index of :attr:`calls` to another alone, without their phases."""
        part = CostRecorder(0)
        part.operators, part.calls, part.streams = (
            self.operators,
            self.calls[first:end],
            self.streams[first:end],
        )
        part.without_kernel = self.without_kernel * len(part.calls) // len(self.calls)
        part.waits = [
            (now - first, waiter, stream, max(launches - first, 0))
            for now, waiter, stream, launches in self.waits
            if first <= now < end
        ]
        return part

    def in_phases(self) -> Iterator[tuple[str, CostRecorder]]:
        """Each phase in order with its launches, those without any left out."""
        ends = [*(first for _, first in self.phases[1:]), len(self.calls)]
        for (phase, first), end in zip(self.phases, ends, strict=True):
            if end > first:
                yield phase, self.between(first, end)

    def by_phase(self) -> dict[str, dict[str, dict[str, int]]]:
        """Sums of the step: by phase and kind ``launches``, ``flops`` and ``bytes``."""
        ends = [*(first for _, first in self.phases[1:]), len(self.calls)]
        return self._sums(
            phase
            for (phase, first), end in zip(self.phases, ends, strict=True)
            for _ in range(first, end)
        )

    def by_module(self) -> dict[str, dict[str, dict[str, int]]]:
        """The same by module, where :attr:`module_now` says which runs; of the backward pass, that of the forward."""
        return self._sums(self.modules)

    def _sums(self, labels: Iterable[str]) -> dict[str, dict[str, dict[str, int]]]:
        sums_of: dict[str, dict[str, dict[str, int]]] = {}
        for index, label in zip(self.calls, labels, strict=True):
            operator = self.operators[index]
            kinds = sums_of.setdefault(label, {})
            sums = kinds.setdefault(operator.kind, {"bytes": 0, "flops": 0, "launches": 0})
            sums["bytes"] += round(operator.moved_bytes)
            sums["flops"] += operator.flops
            sums["launches"] += 1
        return sums_of

    def _launched(self, indices: tuple[int, ...], stream: int) -> None:
        self.calls += indices
        self.streams += [stream] * len(indices)
        if self.module_now is not None:
            self.modules += [self.module_now()] * len(indices)

    def _cost(self, func: Any, args: Sequence, kwargs: dict, output: Any) -> Iterator[Operator]:
        name, schema = func._schema.name, func._schema
        written = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        inputs, outputs = (
            list(_tensors([*args, *kwargs.values()])),
            list(_tensors(written)) or list(_tensors([output])),
        )
        if not inputs and not outputs:
            return
        if func.namespace in EXCHANGES:
            sizes = ([touched_bytes([item]) for item in tensors] for tensors in (inputs, outputs))
            if whole := whole_bytes(name, *sizes):
                yield Operator(name, COLLECTIVE, "", 0, whole)
        elif (
            name == "bitsandbytes::gemm_4bit"
        ):  # with many rows: decoded to 16 bits, then multiplied
            inner, weights = args[0], prod(args[2])
            width, dtype = inner.element_size(), short(inner.dtype)
            yield Operator("dequantize_4bit", MEMORY, "", 0, weights // 2 + weights * width)
            rows, columns = inner.numel() // inner.shape[-1], weights // inner.shape[-1]
            moved = touched_bytes([inner, *outputs]) + weights * width
            yield Operator(
                name, PRODUCT, dtype, 2 * rows * weights, moved, (1, rows, columns, inner.shape[-1])
            )
        elif func._overloadpacket in _CPU_ATTENTION:
            flops = _CPU_ATTENTION[func._overloadpacket](args, kwargs)
            yield Operator(
                name, ATTENTION, short(inputs[0].dtype), flops, touched_bytes(inputs + outputs)
            )
        elif func._overloadpacket in flop_registry:
            counted = [
                value
                for argument, value in zip(schema.arguments, args, strict=False)
                if argument.name != "out_dtype"
            ]
            flops = int(flop_registry[func._overloadpacket](*counted, **kwargs, out_val=output))
            flops //= 2 if _is_causal(schema, args, kwargs) else 1
            inputs = [
                item
                for item in inputs
                if all(item is not other for other in _tensors(kwargs.values()))
            ]
            factors = [item for item in args if isinstance(item, torch.Tensor) and item.dim() > 1]
            kind = ATTENTION if "attention" in name or "flash" in name else PRODUCT
            shape = _product_shape(name, factors, output) if kind == PRODUCT else ()
            one = (factors or inputs)[
                -1 if kind == PRODUCT else 0
            ]  # attention's last are its sums, in fp32
            yield Operator(
                name, kind, short(one.dtype), flops, touched_bytes(inputs + outputs), shape
            )
        elif name.startswith((*_PICKED, *_MADE)):
            yield Operator(
                name, MEMORY, "", 0, touched_bytes(outputs) * (1 if name.startswith(_MADE) else 2)
            )
        else:
            read = [
                item
                for item in inputs
                if name not in _OVERWRITTEN or all(item is not other for other in outputs)
            ]
            yield Operator(name, MEMORY, "", 0, touched_bytes(read) + touched_bytes(outputs))


_RECORDER: CostRecorder | None = None


@contextmanager
def recording(recorder: CostRecorder | None) -> Iterator[None]:
    """Let stand-ins for kernels tell a recorder what they compute."""
    global _RECORDER
    before, _RECORDER = _RECORDER, recorder
    try:
        yield
    finally:
        _RECORDER = before


def launch(operator: Operator, stream: int = 0) -> None:
    """Record a kernel that a stand-in takes the place of, where somebody records."""
    if _RECORDER is not None:
        _RECORDER.launch(operator, stream)


def begin(phase: str) -> None:
    """Say that a part of a phase begins, where somebody records."""
    if _RECORDER is not None and _RECORDER.on:
        _RECORDER.phases.append((phase, len(_RECORDER.calls)))


def memory_kernel(name: str, *tensors: torch.Tensor) -> None:
    """Record a kernel that reads and writes these tensors once."""
    launch(Operator(name, MEMORY, "", 0, touched_bytes(tensors)))


def product(name: str, rows: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
    """Record a product of rows with a weight (outputs x inputs)."""
    outputs, inner = weight.shape
    count = rows.numel() // inner
    moved = touched_bytes((rows, weight, output))
    launch(
        Operator(
            name,
            PRODUCT,
            short(rows.dtype),
            2 * count * outputs * inner,
            moved,
            (1, count, outputs, inner),
        )
    )


def attention(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    tokens_dim: int,
    causal: bool,
    backward: bool,
) -> None:
    """Record a fused attention kernel.

    Parameters
    ----------
    kernel
        Its name, ``flash`` or ``mem_efficient``.
    query, key
        Batch, tokens, heads, head size; or batch, heads, tokens, head size.
    tokens_dim
        Which dimension of both are tokens.
    causal
        Whether the kernel leaves out what lies above the diagonal.
    backward
        Whether this is the backward pass.
    """
    flops = 4 * query.numel() * key.shape[tokens_dim]
    if causal:
        flops //= 2
    # Queries and outputs, keys and values; backward reads them again with the gradient, and writes three gradients.
    moved = 2 * (touched_bytes([query]) + touched_bytes([key])) * (2 if backward else 1)
    name = f"{kernel}_attention" + ("_backward" if backward else "")
    times = BACKWARD_ATTENTION if backward else 1
    launch(Operator(name, ATTENTION, short(query.dtype), int(flops * times), moved))


def _cpu_attention(args: Sequence, kwargs: dict) -> int:
    """Forward: query, key, value, dropout, causal. Shapes: batch, heads, tokens, head size.

    The kernel leaves out blocks of keys that lie whole above the diagonal (PyTorch's FlashAttentionKernel.cpp).
    """
    query, key = args[0], args[1]
    whole, keys = 4 * query.numel() * key.shape[2], key.shape[2]
    if not kwargs.get("is_causal", len(args) > 4 and args[4]):
        return whole
    blocks = range(
        _CPU_KEYS, keys + _CPU_KEYS, _CPU_KEYS
    )  # queries of a block see the keys up to its end
    return (
        whole
        * sum(min(end, keys) * (min(end, keys) - end + _CPU_KEYS) for end in blocks)
        // keys**2
    )


def _cpu_attention_backward(args: Sequence, kwargs: dict) -> int:
    """Backward: gradient, query, key, value, output, sums, dropout, causal."""
    return int(BACKWARD_ATTENTION * _cpu_attention((args[1], args[2], None, None, args[7]), {}))


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def touched_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that reading tensors touches: what is expanded is there once."""
    return sum(
        prod(size for size, step in zip(item.shape, item.stride(), strict=True) if step)
        * item.element_size()
        if item.layout is torch.strided
        else item._nnz() * item.element_size()
        for item in tensors
    )


def _made_bytes(func: Any, output: Any) -> int:
    if any(item.alias_info is not None for item in func._schema.returns):  # in place
        return 0
    return max((touched_bytes([item]) for item in _tensors([output])), default=0)


def _is_causal(schema: Any, args: Sequence, kwargs: dict) -> bool:
    """Whether attention leaves out what lies above the diagonal, as compiled code asks ATen for it."""
    given = {
        argument.name: value for argument, value in zip(schema.arguments, args, strict=False)
    } | kwargs
    return bool(given.get("is_causal", False))


def _launches_nothing(func: Any) -> bool:
    schema = func._schema
    written = any(
        item.alias_info is not None and item.alias_info.is_write for item in schema.arguments
    )
    view = not written and any(item.alias_info is not None for item in schema.returns)
    return view or schema.name.startswith(_NO_KERNEL)


def _shapes(values: Iterable[Any]) -> tuple:
    shapes: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            try:
                shapes += (value.shape, value.stride(), value.dtype)
            except RuntimeError:  # a sparse tensor has no strides
                shapes += (value.shape, value.dtype)
        elif isinstance(value, (list, tuple)):
            shapes.append(_shapes(value))
        elif isinstance(value, bool):  # such as whether attention is causal
            shapes.append(value)
    return tuple(shapes)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield getattr(value, "_local_tensor", value)
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _product_shape(name: str, factors: Sequence[torch.Tensor], output: Any) -> tuple[int, ...]:
    """``(matrices, rows, columns, inner)`` of a plain product; () of a convolution."""
    if (
        "convolution" in name
        or not isinstance(output, torch.Tensor)
        or len(factors) < 2
        or output.dim() < 2
    ):
        return ()
    matrices = prod(output.shape[:-2])
    return matrices, output.shape[-2], output.shape[-1], factors[-1].shape[-2]
