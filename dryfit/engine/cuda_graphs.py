"""CUDA graphs where a card is simulated: private pools of memory, and tensors that don't own theirs.

While a graph is captured, what is allocated comes out of a pool that belongs to graphs alone
(``c10/cuda/CUDACachingAllocator.cpp``, Note [Interaction with CUDA graph capture]). The pool keeps its segments as long
as the graph lives. A replay allocates nothing: it computes at the addresses of its capture. So a tracker hears the
capture, and nothing of a replay; :mod:`.allocator` takes a pool for a stream of its own that gives nothing back.

``torch.compile``'s modes ``reduce-overhead`` and ``max-autotune`` record with Inductor's CUDA graph trees. Their own
code runs here (``torch/_inductor/cudagraph_trees.py``): it warms each function up in the pool, records it at its next
call, where inputs that move are copied into the pool, and then replays it. It tells tensors apart by their addresses,
so each storage that a tracker follows has one. What a capture takes outside PyTorch's allocator (a node of a graph has
parameters on the GPU) is not counted. Written for torch 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .errors import CompiledError
from .patching import patched
from .tracker import Tracker, _StorageEnd

TREES = "torch._inductor.cudagraph_trees"
_ADDRESS_BITS = 48  # of what a storage's id gives: more than any storage has bytes
Handle = tuple[int, int]


class PrivatePools:
    """The pools of a trace's graphs, by PyTorch's handles."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._numbers = tracker, count(1)
        self._entered: list[int] = []  # pools that were current before
        self.capturing = False
        self.heard: Callable[[], None] = lambda: None  # called before a graph is replayed again
        self._moved: dict[
            int, int
        ] = {}  # addresses of storages whose memory was allocated anew, by the new id

    def handle(self) -> Handle:
        """A pool that no graph has used yet."""
        return 0, next(self._numbers)

    def begin(self, pool: Handle) -> None:
        """Allocate from a pool from now on."""
        self._entered.append(self._tracker.pool)
        self._tracker.pool = self._tracker._kernels.stream = -pool[1]

    def end(self) -> None:
        """Allocate again from where it was before."""
        self._tracker.pool = self._tracker._kernels.stream = self._entered.pop()

    @contextmanager
    def used(self, device: int, mem_pool: Handle, stream: Any) -> Iterator[None]:
        """In the place of the trees' ``_use_cuda_memory_pool_manager``."""
        self.begin(mem_pool)
        try:
            yield
        finally:
            self.end()

    # --- storages, by the addresses that they would have on the card ----------------------------------------------

    def address(self, storage: torch.UntypedStorage) -> int:
        """Where a storage lies; 0: it is empty, or nobody follows it."""
        identity = self._tracker._ids.get(storage._cdata, 0) if storage.nbytes() else 0
        return self._moved.get(identity, identity << _ADDRESS_BITS)

    def at_address(self, address: int, device: Any, size: int) -> torch.UntypedStorage:
        """A storage that doesn't own its memory: ``_construct_storage_from_data_pointer``."""
        storage = torch.UntypedStorage(size, device="meta")
        self._borrow(storage, address >> _ADDRESS_BITS)
        return storage

    def tensor(self, metadata: dict[str, Any], storage: torch.UntypedStorage) -> torch.Tensor:
        """A tensor over a storage: ``_construct_CUDA_Tensor_From_Storage_And_Metadata``."""
        with _disable_current_modes():
            made = torch.empty(0, dtype=metadata["dtype"], device="meta")
            return made.set_(
                storage, metadata["storage_offset"], metadata["size"], metadata["stride"]
            )

    def restore(self, device: int, pool: Handle, stale: list[int], alive: list[int]) -> None:
        """Let replayed outputs own their memory again, so that a graph is recorded beside them.

        ``_cuda_setCheckpointPoolState``. The pool's blocks are cut as they were there; here by the allocator's rule.
        """
        for reference in alive:
            storage = torch.UntypedStorage._new_with_weak_ptr(reference)
            key, tracker = storage._cdata, self._tracker
            if tracker._ids[key] in tracker._ends:  # it owns it
                continue
            address, before = self.address(storage), tracker._ids[key]
            self.begin(pool)
            tracker._same.pop(key)
            tracker._follow(
                storage, key, tracker.allocate(storage.nbytes(), tracker.components[before])
            )
            self.end()
            self._moved[tracker._ids[key]] = address

    def free(self, reference: int) -> None:
        """Free a storage's memory while tensors still have it: ``_free_And_Remove_DeleterFn``."""
        storage = torch.UntypedStorage._new_with_weak_ptr(reference)
        identity = self._tracker._ids[storage._cdata]
        if self._tracker._ends.pop(identity, None) is not None:
            self._tracker.free(identity)
            self._borrow(storage, identity)

    def _borrow(self, storage: torch.UntypedStorage, identity: int) -> None:
        """A storage lies in memory that it doesn't own: its end frees nothing."""
        end = _StorageEnd(storage, self._tracker._no_more)
        end.identity, end.key = identity, storage._cdata
        self._tracker._ids[end.key], self._tracker._same[end.key] = identity, (end, None)

    def clear_workspaces(self) -> None:
        """Free those of cuBLAS, ``_cuda_clearCublasWorkspaces``: who needs one allocates it anew."""
        for identity in self._tracker.library_workspaces:
            self._tracker.free(identity)
        self._tracker.library_workspaces.clear()
        self._tracker._kernels.forget_workspaces()

    def replayed(self) -> None:
        """A graph is replayed, and not for the first time."""
        self.heard()
        self._tracker.replayed.add(self._tracker.marks[-1][1])

    def same_addresses(
        self, tensors: list[Any], addresses: list[int | None], indices: list[int]
    ) -> bool:
        """``_tensors_data_ptrs_at_indices_equal``."""
        return all(_address_of(self, tensors[index]) == addresses[index] for index in indices)


def _address_of(pools: PrivatePools, tensor: torch.Tensor) -> int:
    start = pools.address(tensor.untyped_storage())
    return start and start + tensor.storage_offset() * tensor.element_size()


@contextmanager
def cuda_graphs(tracker: Tracker) -> Iterator[PrivatePools]:
    """``torch.cuda.CUDAGraph`` and what belongs to it, as a tracker hears it."""
    pools = PrivatePools(tracker)

    class CudaGraph:
        """In the place of ``torch.cuda.CUDAGraph``."""

        def __init__(self, keep_graph: bool = False) -> None:
            self._pool: Handle | None = None
            self._new = True

        def capture_begin(self, pool: Handle | None = None, *_: Any, **__: Any) -> None:
            self._pool = pool or pools.handle()
            pools.begin(self._pool)
            pools.capturing = True

        def capture_end(self) -> None:
            pools.end()
            pools.capturing = False

        def pool(self) -> Handle | None:
            return self._pool

        def replay(self) -> None:
            if not self._new:
                pools.replayed()
            self._new = False

        reset = instantiate = register_generator_state = debug_dump = enable_debug_mode = (
            lambda self, *_: None
        )

    modules = (torch.cuda, torch.cuda.graphs)
    places = [(module, "CUDAGraph", CudaGraph) for module in modules]
    places += [(module, "graph_pool_handle", pools.handle) for module in modules]
    places += [
        (module, "is_current_stream_capturing", lambda: pools.capturing) for module in modules
    ]
    places += [
        (torch._C, "_host_emptyCache", lambda: None),
        (torch._C, "_cuda_clearCublasWorkspaces", pools.clear_workspaces),
    ]
    with patched(places):
        yield pools


@contextmanager
def trees(pools: PrivatePools) -> Iterator[None]:
    """Inductor's CUDA graph trees over simulated pools."""
    from torch._inductor import cudagraph_trees

    nothing = lambda *_: None  # noqa: E731
    addresses = {torch.Tensor: partial(_address_of, pools), torch.UntypedStorage: pools.address}
    asked = [
        (kind, "data_ptr", _asked_by_trees(kind.data_ptr, address))
        for kind, address in addresses.items()
    ]
    own = {
        "_use_cuda_memory_pool_manager": pools.used,
        "_update_current_stream_external_object": nullcontext,
        "disable_conv_cache_emptying": nullcontext,
        "ControlFlowOpWarmupDispatchMode": nullcontext,
        "CUDAGraphCaptureControlFlowOpDispatchMode": nullcontext,
        "_set_cached_tensors_enabled": torch._C._set_cached_tensors_enabled,
    }
    of_c = {
        "_construct_storage_from_data_pointer": pools.at_address,
        "_construct_CUDA_Tensor_From_Storage_And_Metadata": pools.tensor,
        "_cuda_getCheckpointState": lambda device, pool: pool,
        "_cuda_setCheckpointPoolState": pools.restore,
        "_cuda_checkPoolLiveAllocations": lambda device, pool, alive: True,
        "_cuda_cudaCachingAllocator_raw_delete": nothing,
        "_cuda_cudaCachingAllocator_is_enabled": lambda: True,
        "_free_And_Remove_DeleterFn": pools.free,
        "_has_Standard_Deleter": lambda storage: True,
        "_set_storage_access_error_msg": _overwritten,
        "_set_storage_data_ptr_access_error_msg": _overwritten,
        "_tensors_data_ptrs_at_indices_equal": pools.same_addresses,
    }
    places = [(cudagraph_trees, name, function) for name, function in own.items()]
    places += [(torch._C, name, function) for name, function in of_c.items()]
    with patched(asked, hidden=True), patched(places):
        try:
            yield
        finally:
            cudagraph_trees.reset_cudagraph_trees()


def _overwritten(item: Any, message: str) -> None:
    """Tensors that graphs have made are overwritten by the next pass; who reads one then gets ``message``.

    A gradient that is still there is added to, or zeroed; another output may be one that nobody reads any more.
    """
    if "gradient tensor" in message:
        raise CompiledError(
            "A gradient that a CUDA graph has made is kept while the next pass overwrites it, and PyTorch stops there.",
            "Set gradients to None before each forward pass, allocate them before the first one, or write"
            " torch.compile's mode='default': CUDA graphs and gradient accumulation don't go together otherwise.",
        )


def _by_trees(depth: int = 2) -> bool:
    return sys._getframe(depth).f_globals.get("__name__") in (
        TREES,
        "torch._inductor.cudagraph_utils",
    )


def _asked_by_trees(original: Any, address: Any) -> Any:
    def data_ptr(item: Any) -> int:
        return address(item) if _by_trees() else original(item)

    return data_ptr
