"""Triton kernels where a card is simulated: a launch does nothing, the Python around it allocates as ever.

A launch computes into tensors that are there already. So it is enough that it does nothing: whoever calls it makes
every tensor. Written for Triton 3.7 to 3.9.

* ``JITFunction.run`` calls the hooks and the grid's function, and compiles and starts nothing. The names of kernels
  that ran are in the report.
* ``Autotuner.run`` stays. Its benchmark is replaced by what it would allocate: the 256 MiB that ``do_bench`` clears
  between two runs (``triton/backends/nvidia/driver.py``, ``get_empty_cache_for_benchmark``), and what the kernel's
  hooks copy. The configuration that :attr:`~.card.Simulation.choose` names wins. No timing is written to disk or stays
  in the process, where a GPU would believe it later.
* Triton's driver knows the card.

A kernel in CUDA that a program hands to ``torch.cuda._compile_kernel`` is a launch too, and is not compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .card import Card, FakeStream, Simulation
from .kernel_costs import launched_kernel
from .patching import patched
from .tracker import Tracker

FLUSHED_BYTES = 256 * 2**20
# What a launch gives back: nobody knows the registers of what was never compiled.
_KERNEL = SimpleNamespace(
    n_regs=32, n_spills=0, metadata=SimpleNamespace(shared=0, num_warps=4), asm={}
)


@contextmanager
def no_launches(simulation: Simulation) -> Iterator[None]:
    """Let launches do nothing, and Triton know the card."""
    import triton.testing
    from torch._library.triton import set_wrap_triton_enabled
    from triton.runtime import autotuner, driver, jit

    kind = autotuner.Autotuner
    places = [
        (jit.JITFunction, "run", _launch),
        (triton.testing, "do_bench", _benchmark),
        (triton.testing, "do_bench_cudagraph", _benchmark),
        (kind, "run", _tuned(kind.run, simulation)),
        (kind, "prune_configs", _ordered(kind.prune_configs, simulation)),
        (kind, "do_bench", property(lambda tuner: _benchmark)),
    ]
    if hasattr(kind, "check_disk_cache"):
        places.append(
            (kind, "check_disk_cache", lambda tuner, key, configs, bench: bench() and False)
        )
    before = driver._active
    with ExitStack() as stack:
        stack.enter_context(patched(places))
        stack.enter_context(set_wrap_triton_enabled(False))
        driver.set_active(_driver(simulation.card))
        try:
            yield
        finally:
            driver._active = before
            for tuner, cache in simulation.tuners:
                tuner.cache = cache


def _launch(kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> Any:
    """In the place of ``JITFunction.run``."""
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    given = {name: each.default for name, each in kernel.signature.parameters.items()}
    given |= dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    missing = [name for name in kernel.arg_names if given[name] is inspect.Parameter.empty]
    if missing:
        raise TypeError(f"The kernel {kernel.__name__} is launched without {', '.join(missing)}.")
    if warmup:
        return _KERNEL
    if callable(grid):
        grid(given)
    written = [
        each if isinstance(each, torch.Tensor) else getattr(each, "base", None)
        for each in given.values()
    ]
    tensors = [
        each for each in written if isinstance(each, torch.Tensor)
    ]  # the base is a TensorDescriptor's
    _launched(kernel.__name__, "triton", tensors, given)
    return _KERNEL


class _Compiled:
    """In the place of a kernel that ``torch.cuda._compile_kernel`` has compiled."""

    def __init__(self, source: str, name: str, *args: Any, **kwargs: Any) -> None:
        self._name = name

    def set_shared_memory_config(self, count: int) -> None:
        """What a block may take is the card's affair."""

    def __call__(
        self, grid: Any = None, block: Any = None, args: Any = (), *more: Any, **asked: Any
    ) -> None:
        _launched(
            self._name, "cuda", [each for each in args or () if isinstance(each, torch.Tensor)]
        )


def compiled_kernels() -> list[tuple[Any, str, Any]]:
    """Kernels in CUDA's own language, which NVRTC would compile."""
    return [(torch.cuda, "_compile_kernel", _Compiled)]


def _launched(
    name: str, language: str, tensors: list[torch.Tensor], given: Mapping[str, Any] | None = None
) -> None:
    """Tell those who listen of a launch: a kernel may have written into any of its tensors."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Tracker):
            mode.kernels_run[name] += 1
            mode.kernels_launched += 1
            if mode.values is not None:
                mode.values.forget(tensors)
    launched_kernel(language, name, tensors, given)


def _tuned(original: Callable, simulation: Simulation) -> Callable:
    """``Autotuner.run`` with a memory of its own for what is chosen here."""
    met: set[int] = set()

    def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        if id(tuner) not in met:
            met.add(id(tuner))
            simulation.tuners.append((tuner, tuner.cache))
            tuner.cache = {}
        return original(tuner, *args, **kwargs)

    return run


def _ordered(original: Callable, simulation: Simulation) -> Callable:
    """``Autotuner.prune_configs`` with the one that is to win first: all take the same time, and the first wins."""

    def prune(tuner: Any, given: dict) -> list:
        configurations = list(original(tuner, given))
        name = getattr(tuner.base_fn, "__name__", "kernel")
        best = configurations.pop(simulation.choose(name, configurations))
        simulation.chosen[name] = len(configurations) + 1, str(best)
        return [best, *configurations]

    return prune


def _benchmark(call: Callable, *args: Any, quantiles: Any = None, **kwargs: Any) -> Any:
    """In the place of ``do_bench``: the kernel's hooks once, what is cleared between two runs, and no time."""
    call()
    cleared = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int, device="meta")
    call()
    del cleared
    return [1.0] * len(quantiles) if quantiles else 1.0


def _driver(card: Card) -> SimpleNamespace:
    """A driver of Triton that knows a card and has none."""
    from triton.backends.compiler import GPUTarget

    given = card.properties()
    properties = {
        "max_shared_mem": given.shared_memory_per_block_optin,
        "multiprocessor_count": given.multi_processor_count,
        "warpSize": given.warp_size,
        "max_num_regs": given.regs_per_multiprocessor,
        "sm_clock_rate": 1_410_000,
        "mem_clock_rate": 1_593_000,
        "mem_bus_width": 5120,
    }
    target = GPUTarget("cuda", 10 * card.capability[0] + card.capability[1], given.warp_size)
    return SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
        get_current_target=lambda: target,
        get_current_device=torch.cuda.current_device,
        set_current_device=lambda device: None,
        get_current_stream=lambda device=None: 0,
        get_device_capability=lambda device=0: card.capability,
        get_active_torch_device=lambda: torch.device("meta"),
        get_device_interface=lambda: torch.cuda,
        get_benchmarker=lambda: _benchmark,
        get_empty_cache_for_benchmark=lambda: torch.empty(
            FLUSHED_BYTES // 4, dtype=torch.int, device="meta"
        ),
        clear_cache=lambda cache: None,
        Stream=FakeStream,
    )
