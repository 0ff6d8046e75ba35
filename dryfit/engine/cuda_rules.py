"""What CUDA's kernels allocate beyond their outputs, as arithmetic: no torch, so that every engine can ask.

On a GPU some operators need memory of their own while they run, some are fused, and cuBLAS keeps workspaces. Each rule
is read in the source that it names, none is fitted. Dtypes are ``fp32``, ``fp16`` and ``bf16``; a capability is the
GPU's compute capability, ``(7, 5)`` for a T4; sizes are bytes. The sizes of blocks and segments are the allocator's
(:func:`dryfit.engine.allocator.round_size`, ``segment_size``).

==============================  ==================================================================================
operator                        on CUDA, and where it says so
==============================  ==================================================================================
``_softmax_backward_data``      gradient times output as a tensor of its own, once its output is there: ATen
                                ``native/cuda/SoftMax.cu``, ``softmax_backward_cuda_out`` (2.4 to 2.14)
``softmax``, ``log_softmax``    of half with ``dtype=float32``: one kernel with ``half_to_float``, no cast, only for
                                half: ATen ``native/SoftMax.cpp``, ``softmax`` and ``log_softmax``
``dropout``                     one kernel that keeps a mask of one byte an element instead of noise of the input's
                                dtype: ATen ``native/Dropout.cpp``, ``dropout``, ``is_fused_kernel_acceptable``
``embedding_dense_backward``    over 3,072 indices: sorted copies and fp32 partial sums: ATen ``native/cuda/
                                Embedding.cu``, ``EmbeddingBackwardKernel.cu``
matrix products                 a cuBLAS workspace for each thread that multiplies (forward, autograd): ATen
                                ``cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``: 8,519,680 bytes
                                (``:4096:2:16:8``), 32 MiB on compute capability 9.0
products with a bias            through cublasLt, 1 MiB more for each thread: ``parseCUDABlasLtWorkspaceSize``; ATen
                                ``native/cuda/Blas.cpp``, ``addmm_out_cuda_impl``; before 2.7 for each product, freed
                                after it: ``cuda/CUDABlas.cpp``, ``gemm_and_bias``
``bitsandbytes::gemm_4bit``     dequantizes the weight, for nested statistics the absmax twice: bitsandbytes 0.50
                                ``backends/cuda/ops.py``, ``_dequant_linear_fallback`` (its fused kernel takes over
                                for few tokens only: 1,536 at most, mostly under 128)
products with 8-bit weights     bitsandbytes' own Python code: :mod:`dryfit.engine.bitsandbytes_layers`
``scaled_dot_product_           the fused kernel that takes the tensors, else a formula: ATen ``native/transformers/
attention``                     attention.cpp``, ``cuda/sdp_utils.cpp``
memory-efficient attention      output, fp32 log-sum-exp for queries padded to 32; backward: gradients, fp32 delta,
                                and a workspace: ATen ``native/transformers/cuda/attention.cu``,
                                ``attention_backward.cu``, ``mem_eff_attention/kernel_forward.h``,
                                ``kernel_backward.h``, ``kernels/cutlassB.h``
FlashAttention-2                output, fp32 log-sum-exp; backward: gradients, fp32 row sums and query gradient with
                                the length padded to 128 and the head to 32, keys' and values' gradients for every
                                query head when they are grouped: ATen ``native/transformers/cuda/flash_attn/
                                flash_api.cpp``, ``mha_fwd``, ``mha_bwd``; the package flash-attn has the same
                                None for Windows: CMakeLists.txt, ``USE_FLASH_ATTENTION`` (``NOT MSVC``)
``sort``                         up to 4,096 values a row in place, beside a row of indices. Longer rows by cub, which
                                takes keys and values a second time: ATen ``native/cuda/Sort.cpp``, ``SortStable.cu``;
                                cub ``dispatch_radix_sort.cuh`` (its histograms and look-back are left out: 1 to 2 %)
``native_group_norm``           two fp32 numbers a channel of each sample; backward three, and two a group: ATen
                                ``native/cuda/group_norm_kernel.cu``
``index_put`` that adds         its indices six times, since they are sorted: ATen ``native/cuda/Indexing.cu``,
                                ``index_put_with_sort_kernel``
LSTM, GRU, RNN                  one call of cuDNN: :mod:`dryfit.engine.recurrent`
``_fft_c2c``, ``_fft_r2c``,     the plan's work area, for the call: ATen ``native/cuda/SpectralOps.cpp``,
``_fft_c2r``                    ``_exec_fft``; cuFFT alone knows its size, at most 8 complex numbers for each of the
                                signals: cuFFT API reference, "Fourier Transform Setup". A range, as with cuDNN
sums, means, norms, maxima      where few outputs are made of many numbers, several blocks of threads share an output
                                and leave their parts in global memory: over the first dimension, as for a bias, 112 MiB
                                on an A100: ATen ``native/cuda/Reduce.cuh``, ``setReduceConfig``,
                                ``global_memory_size``. A tensor of more than 2 GiB is reduced in halves, which meet
                                in an accumulator where the output is narrower than the sums: ``gpu_reduce_kernel``
``_softmax``, ``_log_softmax``  before 1.11 kept their input besides their output: ``tools/autograd/derivatives.yaml``
                                of 1.10, ``_softmax_backward_data(grad, result, dim, self)``
==============================  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from .allocator import MIB

Capability = tuple[int, int]
DEFAULT_CAPABILITY: Capability = (8, 0)  # of a GPU that the scenario doesn't name
WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of an element
KERNELS = (
    "flash",
    "mem_efficient",
    "math",
)  # of scaled_dot_product_attention, the one that is preferred first
PLATFORMS = {
    "linux": KERNELS,
    "windows": ("mem_efficient", "math"),
}  # which of them PyTorch is built with
READ_IN = ("2.4", "2.14")  # the oldest and the newest PyTorch whose source the rules were read in
CUFFT_WORST_NUMBERS = 8  # complex numbers of work area for each element of the signals
CUBLASLT_WORKSPACE_BYTES = MIB
LOG_SUM_EXP_ALIGNMENT = 32  # kAlignLSE: queries of the memory-efficient kernel's log-sum-exp
HALF_TO_FLOAT = (
    "fp16",
)  # whose softmax with its result in fp32 is one kernel, without a cast before it
BIAS_ALIGNMENT = 8  # pad_bias: keys of the mask that the memory-efficient kernel adds


def up(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def cublas_workspace_bytes(capability: Capability) -> int:
    """Bytes of a thread's cuBLAS workspace."""
    return 32 * MIB if capability == (9, 0) else 2 * 4096 * 1024 + 8 * 16 * 1024


def minor_version(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in version.split(".")[:2])


def keeps_cublaslt_workspace(torch_version: str) -> bool:
    """Whether a version of PyTorch keeps the workspace of cublasLt, or takes a new one for each product."""
    return minor_version(torch_version) >= (2, 7)


def fuses_rms_norm(torch_version: str) -> bool:
    """Whether ``functional.rms_norm`` is one kernel where input and weight have one dtype (pytorch, pull 153666)."""
    return minor_version(torch_version) >= (2, 9)


def softmax_keeps_its_input(torch_version: str) -> bool:
    """Whether softmax keeps its input for the backward pass, and not its output alone (pytorch 1.11 stopped that)."""
    return minor_version(torch_version) < (1, 11)


def older_than_the_rules(torch_version: str) -> str | None:
    """A warning where a version of PyTorch is older than those whose source the rules were read in; else None."""
    if minor_version(torch_version) >= minor_version(READ_IN[0]):
        return None
    return (
        f"the rules of CUDA's kernels were read in PyTorch {READ_IN[0]} to {READ_IN[1]}; {torch_version} is older, and"
        " its kernels may take more or less"
    )


def cufft_worst_bytes(elements: int, complex_width: int) -> int:
    """The largest work area that cuFFT takes for signals of so many ``elements``, each complex number so wide."""
    return CUFFT_WORST_NUMBERS * elements * complex_width


def dequantization_bytes(elements: int, width: int, scales: int) -> list[int]:
    """What a product with a 4-bit weight unpacks, in order.

    ``elements`` of the weight to ``width`` bytes each, and before them its ``scales`` twice in fp32 where they are
    quantized too (0: they are not).
    """
    return [*([scales * 4] * 2 if scales else []), elements * width]


def embedding_backward_bytes(
    indices: int, words: int, hidden: int, index_width: int = 8
) -> list[int]:
    """Temporaries of an embedding's gradient.

    Sorted and original indices, segment tables, and one fp32 row for each run of equal indices (10 at most,
    NROWS_PER_THREAD). How many runs there are depends on the text; counted as if every token were another word.
    """
    if indices <= 3072:  # one kernel without temporaries
        return []
    segments = min(indices, words)
    partial = segments + indices // 10
    return [*[indices * index_width] * 2, *[segments * 8] * 3, partial * hidden * 4]


SORTED_IN_PLACE = 4096  # should_use_small_sort
_INDEX_WIDTH = 8
_ROWS_BY_SEGMENTS, _VALUES_ONE_BY_ONE = 128, 1_000_000  # do_launch_stable_sort_kernel


def sort_bytes(values: int, row: int, width: int, *, last: bool) -> list[int]:
    """Temporaries of a sort of so many ``values`` in rows of ``row``, each ``width`` bytes wide.

    ``last``: whether a row's values lie side by side; else values and indices are sorted in copies that do.
    """
    if not values:
        return []
    if row <= SORTED_IN_PLACE:
        return [row * _INDEX_WIDTH]
    copies = [] if last else [values * width, values * width, values * _INDEX_WIDTH]
    rows = values // row
    again = (
        0 if width == 1 else width + _INDEX_WIDTH
    )  # cub's second buffers; keys of a byte take one pass
    if rows == 1 or row >= _VALUES_ONE_BY_ONE:
        return [*copies, row * _INDEX_WIDTH, row * again]
    if (
        rows < _ROWS_BY_SEGMENTS
    ):  # pairs of segment and index, twice, and the sorted keys that nobody reads
        return [*copies, *[values * _INDEX_WIDTH] * 2, values * width, values * again]
    return [*copies, values * _INDEX_WIDTH, values * (width + _INDEX_WIDTH)]


def group_norm_bytes(
    samples: int, channels: int, groups: int, positions: int, *, backward: bool
) -> list[int]:
    """Temporaries of a group norm in fp32; ``positions``: numbers of a channel."""
    of_channels, of_groups = 4 * samples * channels, 4 * samples * groups
    if backward:
        return [*([of_channels] * 3 if positions > 1 else []), of_groups, of_groups]
    return [of_channels] * 2 if positions > 1 else []


def index_put_bytes(indices: int) -> list[int]:
    """Temporaries of an ``index_put`` that adds: indices in one number, in order, sorted; and cub's second buffers."""
    return [indices * _INDEX_WIDTH] * 6


# Operators whose CUDA kernels take memory that no rule here knows. The list was made by hand from the files of ATen's
# native/cuda whose host code calls cub, thrust, cuSOLVER or MAGMA, or makes buffers of its own, without the operators
# that have a rule and without those that a trace refuses (`nonzero`, `unique`).
_SOLVERS = (
    "_linalg_det _linalg_eigh _linalg_eigvals _linalg_slogdet _linalg_solve_ex _linalg_svd cholesky cholesky_inverse"
    " cholesky_solve geqrf linalg_cholesky_ex linalg_eig linalg_householder_product linalg_inv_ex linalg_ldl_factor_ex"
    " linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp linalg_qr"
    " linalg_solve_triangular lu_unpack ormqr triangular_solve"
)
_WITH_BUFFERS = (
    "_cdist_backward _ctc_loss _ctc_loss_backward _embedding_bag _embedding_bag_dense_backward"
    " _embedding_bag_forward_only bincount histc kthvalue median mode multinomial nanmedian randperm segment_reduce"
    " topk"
)
_UNKNOWN = {
    **dict.fromkeys(
        (f"aten::{name}" for name in _SOLVERS.split()), "cuSOLVER's and MAGMA's workspaces"
    ),
    **dict.fromkeys(
        (f"aten::{name}" for name in _WITH_BUFFERS.split()),
        "what its CUDA kernel takes while it runs",
    ),
}


def unknown_temporaries(operator: str) -> str | None:
    """A warning about an ATen operator whose kernel takes memory that no rule knows; None for all others."""
    if operator not in _UNKNOWN:
        return None
    name = operator.removeprefix("aten::").removeprefix("_")
    return f"the step runs {name}, and {_UNKNOWN[operator]} is not counted: the peak may be higher while it runs"


def attention_kernel(
    dtype: str,
    head: int,
    value_head: int,
    *,
    grouped: bool,
    masked: bool,
    capability: Capability,
    enabled: Collection[str] = KERNELS,
) -> str | None:
    """Which kernel ``scaled_dot_product_attention`` takes among the ``enabled`` ones; None if none of them can.

    FlashAttention needs compute capability 8.0, 16-bit types, one head size for all of 256 at most, and no mask; the
    memory-efficient kernel takes no grouped keys and values, head sizes in whole 16 bytes, and bf16 from 8.0 on; else
    the plain formula.

    Parameters
    ----------
    dtype, head, value_head
        Of the queries, and the head size of the values.
    grouped
        Whether several query heads share a key head.
    masked
        Whether a mask is given (causality alone is none).
    """
    modern = capability >= (8, 0)
    if (
        "flash" in enabled
        and modern
        and dtype != "fp32"
        and head == value_head
        and head <= 256
        and not masked
    ):
        return "flash"
    aligned = head * WIDTH[dtype] % 16 == 0 and value_head * WIDTH[dtype] % 16 == 0
    if "mem_efficient" in enabled and not grouped and aligned and (modern or dtype != "bf16"):
        return "mem_efficient"
    return "math" if "math" in enabled else None


def efficient_workspace_bytes(
    queries: int, keys: int, head: int, dtype: str, capability: Capability
) -> int:
    """Bytes for each head of the memory-efficient kernel's backward workspace (``workspace_size``).

    The gradient of the query is always summed in fp32 (splitting the keys is enabled), those of key and value only
    where they don't fit the registers.
    """
    rows, columns, in_registers = _efficient_block(dtype, head, capability)
    blocks = -(-queries // rows) * -(-head // columns)
    count = blocks * (
        16 + rows * columns * 4
    )  # GradQTempStorage: lock, counter, padding, fp32 accumulator
    if not in_registers:
        count += 2 * up(keys, columns) * up(head, rows) * 4
    return up(count, 16)


def _efficient_block(dtype: str, head: int, capability: Capability) -> tuple[int, int, bool]:
    """Block of queries, block of keys, and whether key and value gradients stay in registers.

    ``cutlassB.h`` lists the kernels by block sizes and largest head; the first that the GPU's shared memory holds is
    taken.
    """
    if dtype == "fp32":
        return (64, 64, False)
    if head <= 64:
        return (64, 64, True)
    if capability < (8, 0):
        return (128, 64, head <= 128)
    if capability in (
        (8, 6),
        (8, 9),
        (12, 0),
    ):  # 99 KB of shared memory: the block of 128 x 128 doesn't fit
        return (128, 64, True) if head <= 96 and capability != (12, 0) else (64, 64, False)
    return (128, 128, True) if head <= 128 else (128, 64, False)


def flash_padding(tokens: int, head: int) -> tuple[int, int]:
    """Length and head size that FlashAttention-2's backward sums gradients of queries in."""
    return up(tokens, 128), up(head, 32 if head <= 128 else 64)


# The most streaming multiprocessors of a card, by compute capability: those of config/gpus.yaml.
_MOST_PROCESSORS = {
    (7, 0): 80,
    (7, 5): 72,
    (8, 0): 108,
    (8, 6): 84,
    (8, 9): 142,
    (9, 0): 132,
    (10, 0): 148,
    (10, 3): 148,
    (12, 0): 188,
    (12, 1): 48,
}
_ADDRESSED_BYTES = 2**31 - 1  # by 32 bits, in one launch
_THREADS, _WARP = 512, 32  # max_reduce_threads
_LEAST_VALUES, _MOST_VALUES = 16, 256  # for each thread


def threads_of_processor(capability: Capability) -> int:
    """Resident threads of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications"."""
    return {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536}.get(
        capability, 1536 if capability >= (11, 0) else 2048
    )


def most_processors(capability: Capability) -> int:
    """Of the largest card of a compute capability, for a card that is not known: more of them use more room."""
    return _MOST_PROCESSORS.get(capability, max(_MOST_PROCESSORS.values()))


@dataclass(frozen=True)
class ReductionKind:
    """A kind of reduction."""

    accumulates: int | None = None  # bytes of what a thread keeps: None, as wide as the input
    narrow_accumulates: int | None = None  # the same for inputs of up to four bytes; None: no other
    unroll: int = 4  # values that a thread reads at a time
    in_output: bool = True  # whether an output can hold parts of the result

    def width(self, element: int) -> int:
        """Bytes that a thread keeps for an input of elements so wide."""
        if element <= 4 and self.narrow_accumulates:
            return self.narrow_accumulates
        return self.accumulates or element


# Sums are kept in fp32 or wider; a maximum with its index as a pair; mean, deviation and two counts as WelfordData.
SUM, LARGEST = ReductionKind(8, 4), ReductionKind()
WITH_INDEX, MOMENTS = (
    ReductionKind(16, in_output=False),
    ReductionKind(32, 16, unroll=2, in_output=False),
)
_KINDS = {
    f"aten::{name}": kind
    for kind, names in {
        SUM: "sum nansum mean prod linalg_vector_norm",
        LARGEST: "amax amin any all",
        WITH_INDEX: "argmax argmin",
        MOMENTS: "var std var_mean std_mean",
    }.items()
    for name in names.split()
}


def kind_of(operator: str, overload: str) -> ReductionKind | None:
    """The kind of an ATen operator; None for one that PyTorch's reduction kernel does not run."""
    if operator in ("aten::max", "aten::min"):
        return {"": LARGEST, "dim": WITH_INDEX}.get(overload)
    return _KINDS.get(operator)


class _Dimension(NamedTuple):
    size: int
    stride: int  # of the input, in bytes
    reduced: bool


@lru_cache(maxsize=4096)
def reduction_bytes(
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    reduced: frozenset[int],
    element: int,
    output: int,
    kind: ReductionKind,
    capability: Capability,
    processors: int,
) -> tuple[int, ...]:
    """Bytes of each thing that exists while a reduction runs, besides its outputs.

    Parameters
    ----------
    sizes, strides
        Of the input, in elements.
    reduced
        The dimensions that go.
    element, output
        Bytes of an element of the input and of the output.
    processors
        Multiprocessors of the card.
    """
    dimensions = _dimensions(sizes, strides, reduced, element)
    if not dimensions or not prod(sizes):
        return ()
    width = kind.width(element)
    in_halves = not _addressable(dimensions)
    narrow = (
        not kind.in_output or output < 4
    )  # of fp16 and bf16 no partial sum is written into the output
    accumulator = prod(each.size for each in dimensions if not each.reduced) * width
    made = [accumulator] if in_halves and narrow and output < width else []
    parts = [
        _parts(each, element, width, kind.unroll, capability, processors)
        for each in _launches(dimensions)
    ]
    return (*made, *max(parts, key=sum))


def _dimensions(
    sizes: Sequence[int], strides: Sequence[int], reduced: frozenset[int], element: int
) -> tuple[_Dimension, ...]:
    """As TensorIterator orders and joins them: reduced ones first, the fastest first, neighbours as one."""
    given = [
        _Dimension(size, stride * element, index in reduced)
        for index, (size, stride) in enumerate(zip(sizes, strides, strict=True))
        if size != 1
    ][::-1]
    gone = sorted((each for each in given if each.reduced), key=lambda each: each.stride)
    kept = [
        each for each in given if not each.reduced
    ]  # in the order of the output, which is contiguous
    return (*_joined(gone), *_joined(kept))


def _joined(dimensions: Sequence[_Dimension]) -> list[_Dimension]:
    joined: list[_Dimension] = []
    for each in dimensions:
        if joined and joined[-1].size * joined[-1].stride == each.stride:
            joined[-1] = joined[-1]._replace(size=joined[-1].size * each.size)
        else:
            joined.append(each)
    return joined


def _addressable(dimensions: Sequence[_Dimension]) -> bool:
    extent = 1 + sum((each.size - 1) * each.stride for each in dimensions)
    return max(extent, prod(each.size for each in dimensions)) <= _ADDRESSED_BYTES


def _launches(dimensions: tuple[_Dimension, ...]) -> set[tuple[_Dimension, ...]]:
    """What each launch reduces: the whole, or halves of the dimension that reaches furthest, until all are small."""
    if _addressable(dimensions):
        return {dimensions}
    furthest = max(
        range(len(dimensions)),
        key=lambda index: (dimensions[index].size - 1) * dimensions[index].stride,
    )
    split = dimensions[furthest]
    halves = {split.size // 2, split.size - split.size // 2}
    return set().union(
        *(
            _launches(
                (*dimensions[:furthest], split._replace(size=half), *dimensions[furthest + 1 :])
            )
            for half in halves
        )
    )


def _parts(
    dimensions: Sequence[_Dimension],
    element: int,
    width: int,
    unroll: int,
    capability: Capability,
    processors: int,
) -> tuple[int, ...]:
    """What the blocks that share an output leave in global memory, and a counter for each group of outputs."""
    gone = [each for each in dimensions if each.reduced]
    kept = [each for each in dimensions if not each.reduced]
    outputs, inputs = prod(each.size for each in kept), prod(each.size for each in gone)
    if not gone:
        return ()
    along = (
        not kept or gone[0].stride < kept[0].stride
    )  # threads beside each other read one output's numbers
    across, down = (inputs, outputs) if along else (outputs, inputs)
    vector = 1
    if (gone if along else kept)[0].stride == element:
        if along:
            across //= unroll if across >= 128 and len(gone) == 1 else 1
        else:
            others = [each.stride // element for each in dimensions if each is not kept[0]]
            vector = next(
                count for count in (4, 2, 1) if not any(n % count for n in (kept[0].size, *others))
            )
            across //= vector
    block_width, block_height = _block(across, down, _THREADS // vector)
    step_input, step_output = (block_width, 1) if along else (1, block_width)
    if -(-inputs // step_input) < min(block_height * _LEAST_VALUES, _MOST_VALUES):
        return ()  # each warp has outputs of its own
    step_input *= block_height
    values = -(-inputs // step_input)
    grid = -(-(outputs // vector) // step_output)
    aimed = processors * (threads_of_processor(capability) // (block_width * block_height))
    if values < _MOST_VALUES or grid > aimed:
        return ()
    shares = max(min(-(-aimed // grid), -(-values // _LEAST_VALUES)), -(-values // _MOST_VALUES))
    if shares <= 1:
        return ()
    return width * outputs * shares * (1 if along else block_width * vector), 4 * grid


def _block(across: int, down: int, threads: int) -> tuple[int, int]:
    width, height = (
        threads if count >= threads else 1 << max(count, 1).bit_length() - 1
        for count in (across, down)
    )
    rows = min(height, threads // min(width, _WARP))
    return min(width, threads // rows), rows
