"""What kernels cost that do nothing here: those that Inductor writes, and those of packages that Triton launches.

Inductor estimates how many bytes a kernel of its own reads and writes, for its own benchmarks: slices count as slices,
what is changed in place counts twice. Here each kernel carries that estimate. Of any other kernel every tensor that it
is given counts once. Operations count where the kernel is known: attention, products of matrices, a head and its loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from .card import active_simulation
from .costs import ATTENTION, BACKWARD_ATTENTION, MEMORY, PRODUCT, Operator, launch, touched_bytes
from .origins import short
from .tracker import Tracker

_ESTIMATE = re.compile(r"'kernel_num_gb': ([0-9.e+-]+)")
_TEMPLATE = "triton_tem_"  # torch/_inductor/select_algorithm.py: what begins a template's name
# liger-kernel 0.8.5, ops/cross_entropy.py: logits are read for the sum and again for the gradient, which takes their
# place. cut-cross-entropy 25.1.1, cce_lse_forward.py and cce_backward.py: products of embeddings and classifier, one
# forward; backward that one again and two for the gradients.
_LOGITS_TOUCHED = {"liger_cross_entropy_kernel": 3}
_HEAD_PRODUCTS = {"_cce_lse_forward_kernel": 1, "_cce_backward_kernel": 3}


def with_estimate(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """In the place of ``TritonKernel.inductor_meta_per_kernel``: with Inductor's estimate of the bytes."""

    def meta(kernel: Any) -> dict[str, Any]:
        return {**original(kernel), "kernel_num_gb": kernel.estimate_kernel_num_bytes() / 1e9}

    return meta


# By the name of the operator, what a graph that is being compiled asks of FlexAttention: elements of its queries, keys
# of a head, dtype. Inductor's kernels may get queries and keys as one buffer, which says nothing of heads.
_asked: list[dict[str, tuple[int, int, str]]] = [{}]


@contextmanager
def compiling(graph: Any) -> Iterator[None]:
    """Know the sizes of a graph's FlexAttention while Inductor writes its kernels; one size for a graph, its first."""
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # it imports sympy

    found: dict[str, tuple[int, int, str]] = {}
    for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
        name = getattr(node.target, "__name__", "")
        if "flex_attention" in name and name not in found:
            query, key = (each.meta["val"] for each in node.args[:2])
            sizes = [optimization_hint(size, 1) for size in query.shape]
            found[name] = prod(sizes), optimization_hint(key.shape[-2], 1), short(query.dtype)
    _asked.append(found)
    try:
        yield
    finally:
        _asked.pop()


def inductor_kernel(tracker: Tracker, name: str, source: str = "") -> Callable[..., None]:
    """A kernel of Inductor's that does nothing, and costs what it would read, write and compute.

    ``tracker``: counts the launch. ``name``, ``source``: the kernel's, as Inductor wrote it. Its estimate is that of
    the sizes that were compiled first; other sizes of a dynamic shape cost in proportion to the kernel's tensors.
    """
    told = _ESTIMATE.search(source)
    estimate = round(float(told[1]) * 1e9) if told else None
    first: list[int] = []
    asked = _asked[-1].get(
        "flex_attention_backward" if "flex_attention_backward" in name else "flex_attention"
    )

    def run(*args: Any, **kwargs: Any) -> None:
        tracker.kernels_launched += 1
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        moved = touched_bytes(tensors)
        first.append(moved) if not first else None
        if estimate is not None and first[0]:
            moved = estimate * moved // first[0]
        launch(
            _of_template(name, tensors, moved, asked)
            or Operator(f"inductor::{name}", MEMORY, "", 0, moved)
        )

    return run


def _of_template(
    name: str, tensors: Sequence[torch.Tensor], moved: int, asked: tuple[int, int, str] | None
) -> Operator | None:
    """Attention or a product of matrices that Inductor has as a template; None: another kernel."""
    if not name.startswith(_TEMPLATE):
        return None
    if "flex_attention" in name and asked is not None:
        return _flexible_attention(name, *asked, moved)
    matrices = [each for each in tensors if each.dim() >= 2]
    if "mm" not in name or len(matrices) < 3:
        return None
    rows, columns, inner = matrices[0].shape[-2], matrices[1].shape[-1], matrices[0].shape[-1]
    shape = (matrices[0].numel() // (rows * inner), rows, columns, inner)
    return Operator(
        f"inductor::{name}", PRODUCT, short(matrices[0].dtype), 2 * prod(shape), moved, shape
    )


def _flexible_attention(name: str, queries: int, keys: float, dtype: str, moved: int) -> Operator:
    """FlexAttention of so many elements of queries, each head with so many keys.

    How many keys a query sees is in the values of its mask, which nobody computes here. The simulation says it
    (``attended_keys``); else it is half of them, as where the mask is causal alone.
    """
    simulation = active_simulation()
    told = simulation.attended_keys if simulation is not None else None
    seen = keys / 2 if told is None else min(told, keys)
    flops = 4 * queries * seen * (BACKWARD_ATTENTION if "backward" in name else 1)
    return Operator(f"inductor::{name}", ATTENTION, dtype, int(flops), moved)


def launched_kernel(
    language: str,
    name: str,
    tensors: Sequence[torch.Tensor],
    given: Mapping[str, Any] | None = None,
) -> None:
    """Record a launch of a package's kernel by the tensors that it was given; ``given``: all arguments by name."""
    moved = touched_bytes(tensors)
    if name in _LOGITS_TOUCHED:
        logits = max(tensors, key=torch.Tensor.numel)
        moved += (_LOGITS_TOUCHED[name] - 1) * touched_bytes([logits])
    if name in _HEAD_PRODUCTS and given is not None:
        rows, hidden = given["E"].shape
        flops = 2 * rows * hidden * given["C"].shape[0] * _HEAD_PRODUCTS[name]
        launch(Operator(f"{language}::{name}", PRODUCT, short(given["E"].dtype), flops, moved))
        return
    launch(Operator(f"{language}::{name}", MEMORY, "", 0, moved))
