"""Steps that ``torch.compile`` has compiled, followed on ``meta``.

Inductor decides about buffers when it compiles: AOTAutograd's partitioner says what is kept for the backward pass, and
the wrapper that Inductor writes allocates, reuses and deletes buffer by buffer. Neither needs a GPU:

* Dynamo and AOTAutograd see a tensor on ``meta`` as a fake tensor of the target. Guards, partitioner and Inductor's
  passes run unchanged.
* Inductor's wrapper allocates on ``meta``, where the tracker hears it, and the kernels that it calls do nothing.
* For ``cuda`` a card is simulated (:mod:`.simulation`); it decides about split reductions. Which kernel attention
  takes is the engine's choice, since a CPU build can't ask CUDA.
* Everything that the engine has exchanged for the program's sake (attention, norms, autocast) is PyTorch's own
  wherever Dynamo's frames run (:func:`.patching.as_it_was`).

Whatever the compiler didn't take is in :class:`Compiled`, and an answer says it: a graph break, a skipped frame.
Written for torch 2.13.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import device_interface, trace_rules
from torch._dynamo.variables import streams
from torch._dynamo.variables import torch as dynamo_torch
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._higher_order_ops import wrap
from torch._inductor import (
    async_compile,
    codecache,
    compile_fx,
    output_code,
    select_algorithm,
    utils,
)
from torch._inductor import config as inductor_config
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.fx_passes import joint_graph, pad_mm
from torch._inductor.runtime import hints
from torch._prims import rng_prims
from torch._subclasses import fake_tensor
from torch._subclasses.meta_utils import MetaTensorDescriber
from torch.fx.experimental import proxy_tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .accelerator import accelerator
from .attention import by_operator, cuda_kernel
from .card import active_simulation
from .cuda_graphs import trees
from .errors import CompiledError, TraceError
from .extensions import IN_PYTHON
from .frames import Compiled, frames, real_autocast, unheard
from .kernel_costs import compiling, inductor_kernel, with_estimate
from .patching import as_it_was, patched
from .tracker import Tracker

# States of generators are tensors on the host: a build without CUDA has none of its generators. Neither takes memory.
_FUNCTORCH = {
    "enable_autograd_cache": False,
    "fake_tensor_allow_meta": True,
    "graphsafe_rng_functionalization": False,
}
_REFUSED = "Inductor compiles this step with {}: {}."


@contextmanager
def followed(tracker: Tracker, target: str) -> Iterator[None]:
    """Follow what is compiled inside.

    ``tracker``: hears what the compiled code allocates; ``tracker.compiled`` gets what the compiler took. ``target``:
    ``cuda``, where a card is simulated, or ``cpu``: Inductor's C++.

    Raises :class:`TraceError` if no card is simulated, or Triton is missing.
    """
    simulation = active_simulation()
    if target == "cuda":
        if simulation is None:
            raise TraceError(
                "A compiled step is followed for a GPU only where its card is simulated.",
                "Write `with simulated(card):` around building and tracing.",
            )
        if not torch.utils._triton.has_triton_package():
            raise TraceError(
                "Inductor writes Triton for a GPU, and triton is not installed.",
                'On Linux: pip install "dryfit[run]"',
            )
    record = tracker.compiled = Compiled()
    with (
        as_it_was()
    ):  # its tables name PyTorch's functions: of those that are there when they are made
        trace_rules.clear_lru_cache()
        for known in (torch.rms_norm, torch.nn.functional.linear, followed):
            trace_rules.lookup(known)
    trace_rules.add(__package__)
    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.callback(torch._dynamo.reset)  # what was compiled here runs nothing
        stack.enter_context(_out_variants())
        stack.enter_context(inductor_config.patch(force_disable_caches=True, compile_threads=1))
        stack.enter_context(functorch_config.patch(_FUNCTORCH))
        stack.enter_context(dynamo_config.patch(inline_torch_dispatch_torch_compile=False))
        stack.enter_context(patched([*_seen_as(target, record), *_wrappers(tracker, target)]))
        rules = [
            (trace_rules, "clear_lru_cache", lambda: None),
            (trace_rules, "check_file", _stand_ins_are_traced()),
        ]
        stack.enter_context(patched(rules))
        if target == "cuda":
            stack.enter_context(_for_inductor(simulation))
            stack.enter_context(trees(tracker.graphs))
        stack.enter_context(patched(real_autocast(target), hidden=True))
        stack.enter_context(patched(frames(record, target)))
        with record.hearing():
            yield
        for text in record.told():
            tracker.warn(text)


# --- Dynamo and AOTAutograd: the program's tensors on meta, seen as the target's -----------------------------------


def _seen_as(target: str, record: Compiled) -> list[tuple[Any, str, Any]]:
    """Fake tensors of tensors on ``meta`` lie on the target; all the rest of the compiler follows from that."""
    simulation, folder = active_simulation(), joint_graph.UniformValueConstantFolder
    device = simulation.device if target == "cuda" else torch.device("cpu")
    describe, run = MetaTensorDescriber.describe_tensor, folder.run
    compile_graph, compile_inner = compile_fx.compile_fx, compile_fx.compile_fx_inner

    def describe_tensor(describer: Any, *args: Any, **kwargs: Any) -> Any:
        found = describe(describer, *args, **kwargs)
        return dataclasses.replace(found, device=device) if found.device.type == "meta" else found

    def inner(
        *args: Any, **kwargs: Any
    ) -> Any:  # the backward pass is compiled when it is first run
        _refuse_on_processors(target)
        record.graphs += 1
        with (
            _believing(target),
            _disable_current_modes(),
            as_it_was(),
            unheard(),
            compiling(args[0]),
        ):
            return compile_inner(*args, **kwargs)

    def outer(graph: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for part in (
            graph.modules() if target == "cuda" and isinstance(graph, torch.fx.GraphModule) else ()
        ):
            if isinstance(part, torch.fx.GraphModule):
                for node in part.graph.nodes:
                    if node.target is torch._C._nn.scaled_dot_product_attention:
                        node.target = attention
                part.recompile()
        if not args:  # its default was bound when it was defined
            kwargs.setdefault("inner_compile", inner)
        return compile_graph(graph, inputs, *args, **kwargs)

    def fold(graph: Any, *args: Any) -> Any:  # constants are worked out on the device
        with _MadeOnHost():
            return run(graph, *args)

    return [
        (folder, "run", fold),
        (MetaTensorDescriber, "describe_tensor", describe_tensor),
        (compile_fx, "compile_fx", outer),
        (
            partitioners,
            "functionalize_rng_ops",
            _states_before_meshes(partitioners.functionalize_rng_ops),
        ),
    ]


def _states_before_meshes(functionalize: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of the partitioner's ``functionalize_rng_ops``: what it adds stands where tensors are looked for.

    A mesh is an input of what is compiled. Where random numbers are drawn again in the backward pass, PyTorch 2.13
    hands the generator's state over behind the mesh, and then takes the one for the other. Its own CUDA generators go
    another way, and don't meet this.
    """
    from torch._functorch._aot_autograd.graph_compile import is_opaque_node, is_sym_node

    def order(node: Any) -> int:
        return 2 if is_sym_node(node) else int(is_opaque_node(node))

    def functionalized(*args: Any, **kwargs: Any) -> Any:
        forward, backward = functionalize(*args, **kwargs)
        output = next(iter(forward.graph.find_nodes(op="output")))
        kept = list(output.args[0])
        first = next((at for at, node in enumerate(kept) if order(node) == 1), len(kept))
        output.args = ([*kept[:first], *sorted(kept[first:], key=order)],)
        inputs = list(backward.graph.find_nodes(op="placeholder"))
        tangent = next(node for node in inputs if "tangent" in node.name)
        for node in inputs[: inputs.index(tangent)]:
            if order(node) == 1:
                tangent.prepend(node)
        for module in (forward, backward):
            module.recompile()
        return forward, backward

    return functionalized


def _stand_ins_are_traced() -> Any:
    """In the place of ``trace_rules.check_file``: what stands in for a package in Python is compiled as the package."""
    check = trace_rules.check_file

    def checked(filename: str | None, *more: Any, **kwargs: Any) -> Any:
        if filename in IN_PYTHON:
            return trace_rules.SkipResult(False, "a stand-in for a package")
        return check(filename, *more, **kwargs)

    return checked


@contextmanager
def _believing(target: str) -> Iterator[None]:
    if target == "cuda":
        with accelerator():
            yield
    else:
        yield


def _refuse_on_processors(target: str) -> None:
    """Modes in which Inductor asks a GPU, or benchmarks on this processor."""
    if target != "cpu":
        return
    hint = "Write torch.compile's mode='default', or compiled='eager' for the figure without the compiler."
    if inductor_config.triton.cudagraphs:
        raise CompiledError(
            _REFUSED.format("CUDA graphs (mode reduce-overhead)", "a processor has none"), hint
        )
    if inductor_config.max_autotune or inductor_config.max_autotune_gemm:
        raise CompiledError(
            _REFUSED.format("max-autotune", "its benchmarks on a processor are not modelled"), hint
        )


class _MadeOnHost(TorchDispatchMode):
    """Tensors that are made on the GPU, or brought there, are made on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args = tuple(_CPU if isinstance(each, torch.device) else each for each in args)
        kwargs = {
            name: _CPU if isinstance(each, torch.device) else each
            for name, each in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


_CPU = torch.device("cpu")


def _moved(dispatch: Any) -> Any:
    """In the place of ``FakeTensorMode.dispatch``, which would move a constant to the card where ``to`` comes whole.

    So it comes in the code of custom operators, below autograd, which takes it apart elsewhere.
    """
    whole = {
        getattr(torch.ops.aten.to, name)
        for name in torch.ops.aten.to.overloads()
        if name != "other"
    }

    def dispatched(mode: Any, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func not in whole:
            return dispatch(mode, func, types, args, kwargs or {})
        with mode:
            return func.decompose(*args, **(kwargs or {}))

    return dispatched


def _constants(unset: Any) -> Any:
    """In the place of ``unset_fake_temporarily``, in which constants are worked out: on the device, but for this."""

    @contextmanager
    def unset_fake() -> Iterator[Any]:
        with unset() as mode, _MadeOnHost():
            yield mode

    return unset_fake


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **scale_and_groups: Any,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` of fake tensors on ``cuda``, as ATen ``attention.cpp`` takes it apart."""
    mask, card = attn_mask, active_simulation().card
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(
            mask.logical_not(), float("-inf")
        )
    kernel = cuda_kernel(query, key, value, mask, card.capability, card.platform)
    if mask is not None and kernel == SDPBackend.EFFICIENT_ATTENTION:
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    return by_operator(kernel, query, key, value, mask, dropout_p, is_causal, **scale_and_groups)


# --- Inductor's wrapper: its allocations on meta, kernels that do nothing -------------------------------------------


def _wrappers(tracker: Tracker, target: str) -> list[tuple[Any, str, Any]]:
    """What a wrapper calls: it allocates on ``meta``, where the tracker hears it."""
    load, guards = codecache.PyCodeCache.load_by_key_path.__func__, torch._C._dynamo.guards
    check = guards.assert_size_stride
    named = re.compile(rf"device\(type='{target}'(, index=\d+)?\)")

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def compared(tensor: torch.Tensor, size: Any, stride: Any, *name: Any) -> None:
        """A custom operator's outputs may be laid out otherwise than its shape function says: as large, and told."""
        try:
            check(tensor, size, stride, *name)
        except AssertionError as error:
            if tuple(tensor.shape) != tuple(size):
                raise
            tracker.warn(
                f"{' '.join(map(str, name)) or 'an operator'}: {str(error).splitlines()[0]}"
            )

    def load_by_key_path(cls: Any, key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        """A wrapper names its device where it calls ATen: such operators run on ``meta``."""
        with open(path, encoding="utf-8") as file:
            text = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(named.sub("device(type='meta')", text))
        return load(cls, key, path, *args, **kwargs)

    def named_kernel(compiler: Any, name: str, source: Any = "", *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(
            run=inductor_kernel(tracker, name, source if isinstance(source, str) else "")
        )

    compiler = async_compile.AsyncCompile
    return [
        (compiler, "triton", named_kernel),
        (compiler, "multi_kernel", named_kernel),
        (
            compiler,
            "cpp_pybinding",
            lambda compiler, *args, **kwargs: inductor_kernel(tracker, "cpp"),
        ),
        (
            TritonKernel,
            "inductor_meta_per_kernel",
            with_estimate(TritonKernel.inductor_meta_per_kernel),
        ),
        (guards, f"_empty_strided_{target}", empty),
        (guards, "assert_alignment", lambda *args: None),
        (guards, "assert_size_stride", compared),
        (codecache.PyCodeCache, "load_by_key_path", classmethod(load_by_key_path)),
        (output_code, "is_in_torch_dispatch_mode", _in_a_programs_mode),
    ]


def _in_a_programs_mode(*_: Any, **__: Any) -> bool:
    """Whether a dispatch mode is on beside the engine's own: a wrapped region is called in another way under one."""
    stack = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return any(
        type(mode).__module__.partition(".")[0] != __name__.partition(".")[0] for mode in stack
    )


@contextmanager
def _out_variants() -> Iterator[None]:
    """Give ``meta`` the products in float8 that write where they are told, which a wrapper calls."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_mm.out", lambda *args, out, **kwargs: out, "Meta")
    try:
        yield
    finally:
        library._destroy()


# What Dynamo works out while it traces a program that asks for its card.
_CONSTANTS = (
    "is_available",
    "is_initialized",
    "current_device",
    "device_count",
    "get_device_properties",
)
_CONSTANTS += ("get_device_capability", "get_device_name", "is_bf16_supported")


@contextmanager
def _for_inductor(simulation: Any) -> Iterator[None]:
    interface = device_interface.CudaInterface
    device_interface.get_interface_for_device("cuda")  # registers all of them
    names = (
        "current_device",
        "device_count",
        "exchange_device",
        "maybe_exchange_device",
        "get_device_properties",
    )
    names += ("is_bf16_supported", "memory_allocated", "set_device", "synchronize")
    asked = {
        "exchange_device": "_exchange_device",
        "maybe_exchange_device": "_maybe_exchange_device",
    }
    places = [
        (interface, name, staticmethod(getattr(torch.cuda, asked.get(name, name))))
        for name in names
    ]
    properties = simulation.card.properties()
    places += [
        (interface, "get_raw_stream", staticmethod(lambda index: 0)),
        (interface.Worker, "get_device_properties", staticmethod(lambda device=None: properties)),
        (interface.Worker, "current_device", staticmethod(lambda: simulation.index)),
        (fake_tensor.FakeTensorMode, "avoid_device_init", True),
        (fake_tensor.FakeTensorMode, "dispatch", _moved(fake_tensor.FakeTensorMode.dispatch)),
        (fake_tensor, "init_gpu_context", lambda device: None),
        (
            streams.SymbolicStreamState,
            "__init__",
            lambda state: setattr(state, "cur_stream_stack", deque()),
        ),
        (pad_mm, "get_cached_should_pad", lambda key: simulation.pads),
        (proxy_tensor, "unset_fake_temporarily", _constants(proxy_tensor.unset_fake_temporarily)),
        (select_algorithm.AlgorithmSelectorCache, "do_autotuning", _autotuned(simulation)),
        (
            select_algorithm.AlgorithmSelectorCache,
            "make_precompile_fn",
            lambda *args, **kwargs: lambda: None,
        ),
    ]
    folded = {
        **dynamo_torch.constant_fold_functions,
        **{getattr(torch.cuda, name): None for name in _CONSTANTS},
    }
    places.append((dynamo_torch, "constant_fold_functions", folded))
    caches = (hints.DeviceProperties.create, utils.get_max_num_sms, utils.is_big_gpu)
    with patched(places), inductor_config.patch(benchmark_epilogue_fusion=False):
        for function in caches:
            function.cache_clear()
        with accelerator(), _disable_current_modes(), as_it_was(), unheard():
            for device in (
                simulation.device,
                None,
            ):  # patterns make constants, elsewhere than here on the GPU
                joint_graph.lazy_init(device)
        yield
    for function in caches:
        function.cache_clear()


def _autotuned(simulation: Any) -> Any:
    """In the place of ``max-autotune``'s benchmarks: cuBLAS wins, or the first of Inductor's templates.

    What the benchmarks allocate themselves is not counted: they run while the first step compiles.
    """

    def tuned(cache: Any, name: str, *args: Any, **kwargs: Any) -> dict[Any, float]:
        choices = next(
            each
            for each in args
            if isinstance(each, list) and each and hasattr(each[0], "output_node")
        )
        own = [isinstance(each, select_algorithm.TritonTemplateCaller) for each in choices]
        wins = next((at for at, each in enumerate(own) if each == simulation.templates), 0)
        simulation.chosen[name] = len(choices), choices[wins].name
        return {each: 1.0 if at == wins else 2.0 for at, each in enumerate(choices)}

    return tuned


_STATE_BYTES = {
    False: 16,
    True: 5056,
}  # of a generator of CUDA (seed and offset), and of the CPU's (Mersenne twister)


def _with_generator(tracker: Tracker, *args: Any, saving: bool, **kwargs: Any) -> Any:
    """An operator and the state of its generator, which is a tensor of the host: as it was, or as it is given."""
    operator, *args = args if saving else args[1:]
    with tracker:
        size = _STATE_BYTES["cpu" in tracker._devices]
        state = torch.empty(
            size, dtype=torch.uint8, device="cpu"
        )  # where one is given, that of now is kept meanwhile
        output = operator(*args, **kwargs)
    return (state, output) if saving else output


def _compiled_region(tracker: Tracker, region: Any, inputs: Any, name: str | None = None) -> Any:
    """What Inductor's ``wrap_inductor_compiled_regions`` hands to dispatch modes: a wrapper, which runs as ever."""
    with tracker:
        return region(inputs)


rng_prims.run_and_save_rng_state.py_impl(Tracker)(partial(_with_generator, saving=True))


rng_prims.run_with_rng_state.py_impl(Tracker)(partial(_with_generator, saving=False))
wrap.inductor_compiled_code.py_impl(Tracker)(_compiled_region)
