"""C extensions where a card is simulated: modules whose functions allocate what the extension's would.

An extension can't run on ``meta``: it asks for addresses. What it allocates stands in its C++ source, mostly in a few
lines: outputs, and scratch that is gone when it returns. So a table says it, function by function, and whoever imports
the extension inside :func:`.simulation.simulated` gets a module made of the table, installed or not. An answer names
each that was called.

An extension without an entry is refused by name. Whoever knows its source adds an entry before the package is
imported::

    @extension("my_package_cuda", "forward", source="csrc/my_package.cpp of version 1.2")
    def my_package_forward(inputs, weight):
        scratch = inputs.new_empty(inputs.numel(), dtype=torch.float32)  # gone when the function returns
        return torch.empty_like(inputs)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from math import ceil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import costs
from .card import Simulation, active_simulation
from .cuda_rules import flash_padding
from .errors import TraceError
from .patching import patched
from .tracker import Tracker

Function = Callable[..., Any]
_TABLE: dict[str, dict[str, Function]] = {}
_SOURCES: dict[str, str] = {}
# Modules in Python whose functions call an extension, and that rarely can be installed without it.
_WRITTEN = {"flash_attn_interface": "flash_attention_3"}
IN_PYTHON = frozenset(str(Path(__file__).with_name(f"{name}.py")) for name in _WRITTEN.values())
# Repositories of Hugging Face's `kernels` that are such a module.
_HUB = {
    "varunneal/flash-attention-3": "flash_attn_interface",
    "kernels-community/flash-attn3": "flash_attn_interface",
}
_LOOKS_LIKE_ONE = re.compile(r"(^|[._])(cuda|C)$")
_ENTRY = (
    "Before it is imported write `from dryfit.engine.extensions import extension`, and under"
    ' `@extension("{}", "{}", source="its C++ file")` a function that allocates what the extension\'s does and returns'
    " its outputs."
)


class MissingExtension(TraceError, ModuleNotFoundError):
    """A C extension is imported of which the table says nothing."""


class MissingFunction(TraceError, AttributeError):
    """The table has no such function of an extension."""


def extension(module: str, name: str, *, source: str) -> Callable[[Function], Function]:
    """Say what a function of a C extension allocates.

    ``module``, ``name``: as they are imported and called. ``source``: where what it allocates stands; an answer says
    it.

    Returns a decorator. The function takes what the extension's takes. It makes the outputs with operators of PyTorch
    and returns them; what it makes and drops is scratch.
    """

    def add(function: Function) -> Function:
        _SOURCES[module] = source
        _TABLE.setdefault(module, {})[name] = function
        return function

    return add


def stands_in(module: str, source: str) -> None:
    """Tell the traces that are under way that a module's stand-in was called."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Tracker):
            mode.warn(f"in the place of {module} ran what it allocates, after {source}")


@contextmanager
def extensions(simulation: Simulation) -> Iterator[None]:
    """Let imports of C extensions find the table's, and name those that are missing."""
    replaced = {name: sys.modules.pop(name) for name in [*_TABLE, *_WRITTEN] if name in sys.modules}
    first, last = _Table(), _Missing(simulation)
    sys.meta_path.insert(0, first)
    sys.meta_path.append(last)
    try:
        with patched(_hub()):
            yield
    finally:
        sys.meta_path.remove(first)
        sys.meta_path.remove(last)
        for name in [
            name for name, module in sys.modules.items() if isinstance(module, ExtensionModule)
        ]:
            del sys.modules[name]
        sys.modules.update(replaced)


def _hub() -> list[tuple[Any, str, Any]]:
    """``get_kernel`` of the package ``kernels``, where it is installed; else the table stands in for it whole."""
    if not _installed("kernels"):
        return []
    kernels = import_module("kernels")
    load = kernels.get_kernel

    def get_kernel(repository: str, *args: Any, **kwargs: Any) -> Any:
        return _get_kernel(repository) if repository in _HUB else load(repository, *args, **kwargs)

    return [(kernels, "get_kernel", get_kernel)]


class ExtensionModule(ModuleType):
    """A module in the place of a C extension, or of one that can't be installed without."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingFunction(
            f"The table of C extensions has no function {name} of {self.__name__}.",
            _ENTRY.format(self.__name__, name),
        )


class _Table(MetaPathFinder, Loader):
    """Finds what the table has, before what is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        found = name in _TABLE or name in _WRITTEN or (name == "kernels" and not _installed(name))
        return ModuleSpec(name, self) if found else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ExtensionModule(spec.name)
        if spec.name == "kernels":
            module.get_kernel = _get_kernel
        elif spec.name in _WRITTEN:
            written = import_module(f".{_WRITTEN[spec.name]}", __package__)
            vars(module).update({each: getattr(written, each) for each in written.__all__})
        else:
            vars(module).update(
                {each: _told(spec.name, each, own) for each, own in _TABLE[spec.name].items()}
            )
        return module

    def exec_module(self, module: ModuleType) -> None:
        """All is there already."""


class _Missing(MetaPathFinder):
    """Comes last: refuses what looks like a C extension, which nobody has found."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if not _LOOKS_LIKE_ONE.search(name) or name.partition(".")[0] == "torch" or not _imports():
            return
        self._simulation.missing.append(name)
        raise MissingExtension(
            f"The C extension {name} has no entry in the table of what extensions allocate.",
            _ENTRY.format(name, "forward"),
        )


def _imports() -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code.co_name.startswith("_find_and_load"):
            return True
        frame = frame.f_back
    return False


def _installed(name: str) -> bool:
    finders = [finder for finder in sys.meta_path if not isinstance(finder, (_Table, _Missing))]
    return any(finder.find_spec(name, None) is not None for finder in finders)


def _told(module: str, name: str, function: Function) -> Function:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        stands_in(module, _SOURCES[module])
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        costs.memory_kernel(f"{module}::{name}", *tensors)
        return function(*args, **kwargs)

    return call


def _get_kernel(repository: str, *args: Any, **kwargs: Any) -> Any:
    """``kernels.get_kernel``, which downloads a compiled extension with its Python."""
    if repository not in _HUB:
        raise MissingExtension(
            f"kernels.get_kernel({repository!r}) downloads a C extension, of which the table says nothing.",
            f"It knows {', '.join(_HUB)}. Write your program with one of them, or with torch's own attention.",
        )
    module = import_module(_HUB[repository])
    return SimpleNamespace(
        **{_HUB[repository]: module}, **{name: getattr(module, name) for name in vars(module)}
    )


# --- flash-attn 2: csrc/flash_attn/flash_api.cpp ------------------------------------------------------------------

_FLASH_2 = partial(
    extension, "flash_attn_2_cuda", source="flash-attn's csrc/flash_attn/flash_api.cpp, 2.7 and 2.8"
)


@_FLASH_2("fwd")
def flash_forward(
    q,
    k,
    v,
    out,
    alibi_slopes,
    p_dropout,
    softmax_scale,
    causal,
    left,
    right,
    softcap,
    return_softmax,
    *rest,
):
    """Batches of one length: batch, tokens, heads, head size."""
    batch, tokens, heads, head = q.shape
    out = torch.empty_like(q) if out is None else out
    sums = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    kept = _kept(q, return_softmax, batch, tokens, k.shape[1])
    splits = 1 if p_dropout else _splits(batch * heads, tokens, k.shape[1], head)
    if splits > 1:  # few heads and many keys: each part of the keys has outputs of its own
        parts = splits, batch, heads, tokens
        shapes = parts, (*parts, flash_padding(1, head)[1])
        scratch = [q.new_empty(shape, dtype=torch.float32) for shape in shapes]  # noqa: F841
    costs.attention("flash", q, k, tokens_dim=1, causal=causal, backward=False)
    return out, sums, kept, q.new_empty(2, dtype=torch.int64)


@_FLASH_2("varlen_fwd")
def flash_varlen_forward(
    q,
    k,
    v,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    leftpad_k,
    block_table,
    alibi_slopes,
    max_seqlen_q,
    max_seqlen_k,
    p_dropout,
    softmax_scale,
    zero_tensors,
    causal,
    left,
    right,
    softcap,
    return_softmax,
    *rest,
):
    """Texts one after the other: tokens of all, heads, head size."""
    out = torch.empty_like(q) if out is None else out
    sums = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    kept = _kept(q, return_softmax, cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k)
    return out, sums, kept, q.new_empty(2, dtype=torch.int64)


@_FLASH_2("bwd")
def flash_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    alibi_slopes,
    p_dropout,
    softmax_scale,
    causal,
    left,
    right,
    softcap,
    deterministic,
    *rest,
):
    """Gradients of :func:`flash_forward`, into what is given."""
    batch, tokens, heads, head = q.shape
    grads = _gradients((dq, dk, dv), (q, k, v))
    padded, wide = flash_padding(tokens, head)
    row = q.new_empty((batch, heads, padded), dtype=torch.float32)
    sums = _deterministic(deterministic, batch, heads)
    scratch = [q.new_empty((*sums, batch, padded, heads, wide), dtype=torch.float32)]
    if k.shape[2] != heads:  # queries that share keys: a gradient for each, then their sum
        scratch += [each.new_empty((batch, k.shape[1], heads, head)) for each in (k, v)]
    costs.attention("flash", q, k, tokens_dim=1, causal=causal, backward=True)
    return *grads, row


@_FLASH_2("varlen_bwd")
def flash_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    alibi_slopes,
    max_seqlen_q,
    max_seqlen_k,
    p_dropout,
    softmax_scale,
    zero_tensors,
    causal,
    left,
    right,
    softcap,
    deterministic,
    *rest,
):
    """Gradients of :func:`flash_varlen_forward`: each text's rows are 128 apart from the next one's."""
    (total, heads, head), batch = q.shape, cu_seqlens_q.shape[0] - 1
    grads = _gradients((dq, dk, dv), (q, k, v))
    padded, wide = total + 128 * batch, flash_padding(1, head)[1]
    row = q.new_empty((heads, padded), dtype=torch.float32)
    sums = _deterministic(deterministic, batch, heads)
    scratch = [q.new_empty((*sums, padded, heads, wide), dtype=torch.float32)]
    if k.shape[1] != heads:
        scratch += [each.new_empty((k.shape[0], heads, head)) for each in (k, v)]
    return *grads, row


def _gradients(given: tuple, of: tuple) -> list[torch.Tensor]:
    return [
        torch.empty_like(each) if own is None else own for own, each in zip(given, of, strict=True)
    ]


def _kept(q: torch.Tensor, asked: bool, batch: int, queries: int, keys: int) -> torch.Tensor:
    """Probabilities, which a test of dropout asks for."""
    padded = [flash_padding(tokens, 1)[0] for tokens in (queries, keys)]
    return q.new_empty((batch, q.shape[-2], *padded) if asked else 0)


def _deterministic(asked: bool, batch: int, heads: int) -> tuple[int, ...]:
    """How many sums of the queries' gradients there are, where their order may not be chance."""
    return (ceil(active_simulation().card.multiprocessors / (batch * heads)),) if asked else ()


def _splits(sequences: int, queries: int, keys: int, head: int) -> int:
    """Into how many parts the keys are split: the fewest with 85 % of what the best keeps the processors busy."""
    processors = 2 * active_simulation().card.multiprocessors
    blocks, of_keys = (
        sequences * ceil(queries / 64),
        ceil(keys / (256 if head <= 64 else 128 if head <= 128 else 64)),
    )
    if blocks >= 0.8 * processors:
        return 1
    busy = {}
    for splits in range(1, min(128, processors, of_keys) + 1):
        if splits == 1 or ceil(of_keys / splits) != ceil(of_keys / (splits - 1)):
            waves = blocks * splits / processors
            busy[splits] = waves / ceil(waves)
    return next(splits for splits, share in busy.items() if share >= 0.85 * max(busy.values()))


# --- causal-conv1d: csrc/causal_conv1d.cpp ------------------------------------------------------------------------

_CONVOLUTION = partial(
    extension, "causal_conv1d_cuda", source="causal-conv1d's csrc/causal_conv1d.cpp, 1.5 to 1.7"
)


@_CONVOLUTION("causal_conv1d_fwd")
@_CONVOLUTION("causal_conv1d_update")
def convolution(*args):
    """Writes into what is given."""


@_CONVOLUTION("causal_conv1d_bwd")
def convolution_backward(x, weight, bias, dout, *args):
    """Writes into what is given; where the order of sums may not be chance, into a sum for each chunk first."""
    if torch.are_deterministic_algorithms_enabled():
        (batch, channels, tokens), width = x.shape, weight.shape[-1]
        last = x.stride(1) == 1 and x.stride(2) > 1  # channels lie side by side
        chunks = (
            (batch, ceil(tokens / (64 if tokens <= 128 else 128)), channels)
            if last
            else (batch, channels)
        )
        sums = [x.new_empty((*chunks, width), dtype=torch.float32)]
        if bias is not None:
            sums.append(x.new_empty(chunks, dtype=torch.float32))


# --- mamba-ssm: csrc/selective_scan/selective_scan.cpp ------------------------------------------------------------

_SCAN = partial(
    extension,
    "selective_scan_cuda",
    source="mamba-ssm's csrc/selective_scan/selective_scan.cpp, 2.2 and 2.3",
)


@_SCAN("fwd")
def scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """States at the end of each chunk of 2,048 tokens, and outputs; with a gate they come twice."""
    gated = [] if z is None else [torch.empty_like(z)]
    out = torch.empty_like(delta)
    states = u.new_empty((*u.shape[:2], ceil(u.shape[2] / 2048), 2 * A.shape[1]), dtype=A.dtype)
    return [out, states, *gated]


@_SCAN("bwd")
def scan_backward(
    u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z
):
    """Gradients; those of B and C are summed in fp32 where they differ from token to token."""
    gated = [] if z is None else [torch.empty_like(z) if dz is None else dz]
    again = [torch.empty_like(out)] if z is not None and recompute_out_z else []
    grads = [torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)]
    sums = [
        torch.zeros_like(each, dtype=torch.float32 if each.dim() >= 3 else None) for each in (B, C)
    ]
    of_skip, of_bias = (
        None if each is None else torch.zeros_like(each) for each in (D, delta_bias)
    )
    of_inputs = [sums[0].to(B.dtype), sums[1].to(C.dtype)]
    return [*grads, *of_inputs, of_skip, of_bias, *gated, *again]
