"""What CUDA's kernels allocate beyond their outputs, as arithmetic: no torch, so that every engine can ask.

On a GPU some operators need memory of their own while they run, some are fused, and cuBLAS keeps workspaces. Each rule
is read in the source that it names, none is fitted. Dtypes are ``fp32``, ``fp16`` and ``bf16``; a capability is the
GPU's compute capability, ``(7, 5)`` for a T4; sizes are bytes. The sizes of blocks and segments are the allocator's
(:func:`will_it_fit.engine.allocator.round_size`, ``segment_size``).

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
products with 8-bit weights     bitsandbytes' own Python code: :mod:`will_it_fit.engine.bitsandbytes_layers`
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
``_fft_c2c``, ``_fft_r2c``,     the plan's work area, for the call: ATen ``native/cuda/SpectralOps.cpp``,
``_fft_c2r``                    ``_exec_fft``; cuFFT alone knows its size, at most 8 complex numbers for each of the
                                signals: cuFFT API reference, "Fourier Transform Setup". A range, as with cuDNN
sums, means, norms, maxima      parts of an output that blocks of threads share: :mod:`will_it_fit.engine.reductions`
``_softmax``, ``_log_softmax``  before 1.11 kept their input besides their output: ``tools/autograd/derivatives.yaml``
                                of 1.10, ``_softmax_backward_data(grad, result, dim, self)``
==============================  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Collection

from .allocator import MIB

Capability = tuple[int, int]
DEFAULT_CAPABILITY: Capability = (8, 0)  # of a GPU that the scenario doesn't name
WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of an element
KERNELS = ("flash", "mem_efficient", "math")  # of scaled_dot_product_attention, the one that is preferred first
PLATFORMS = {"linux": KERNELS, "windows": ("mem_efficient", "math")}  # which of them PyTorch is built with
READ_IN = ("2.4", "2.14")  # the oldest and the newest PyTorch whose source the rules were read in
CUFFT_WORST_NUMBERS = 8  # complex numbers of work area for each element of the signals
CUBLASLT_WORKSPACE_BYTES = MIB
LOG_SUM_EXP_ALIGNMENT = 32  # kAlignLSE: queries of the memory-efficient kernel's log-sum-exp
HALF_TO_FLOAT = ("fp16",)  # whose softmax with its result in fp32 is one kernel, without a cast before it
BIAS_ALIGNMENT = 8  # pad_bias: keys of the mask that the memory-efficient kernel adds


def up(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def cublas_workspace_bytes(capability: Capability) -> int:
    """Bytes of a thread's cuBLAS workspace."""
    return 32 * MIB if capability == (9, 0) else 2 * 4096 * 1024 + 8 * 16 * 1024


def minor_version(torch_version: str) -> tuple[int, ...]:
    """Major and minor number of a version of PyTorch."""
    return tuple(int(part) for part in torch_version.split(".")[:2])


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


def embedding_backward_bytes(indices: int, words: int, hidden: int, index_width: int = 8) -> list[int]:
    """Temporaries of an embedding's gradient.

    Sorted and original indices, segment tables, and one fp32 row for each run of equal indices (10 at most,
    NROWS_PER_THREAD). How many runs there are depends on the text; counted as if every token were another word.
    """
    if indices <= 3072:  # one kernel without temporaries
        return []
    segments = min(indices, words)
    partial = segments + indices // 10
    return [*[indices * index_width] * 2, *[segments * 8] * 3, partial * hidden * 4]


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
    if "flash" in enabled and modern and dtype != "fp32" and head == value_head and head <= 256 and not masked:
        return "flash"
    aligned = head * WIDTH[dtype] % 16 == 0 and value_head * WIDTH[dtype] % 16 == 0
    if "mem_efficient" in enabled and not grouped and aligned and (modern or dtype != "bf16"):
        return "mem_efficient"
    return "math" if "math" in enabled else None


def efficient_workspace_bytes(queries: int, keys: int, head: int, dtype: str, capability: Capability) -> int:
    """Bytes for each head of the memory-efficient kernel's backward workspace (``workspace_size``).

    The gradient of the query is always summed in fp32 (splitting the keys is enabled), those of key and value only
    where they don't fit the registers.
    """
    rows, columns, in_registers = _efficient_block(dtype, head, capability)
    blocks = -(-queries // rows) * -(-head // columns)
    count = blocks * (16 + rows * columns * 4)  # GradQTempStorage: lock, counter, padding, fp32 accumulator
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
    if capability in ((8, 6), (8, 9), (12, 0)):  # 99 KB of shared memory: the block of 128 x 128 doesn't fit
        return (128, 64, True) if head <= 96 and capability != (12, 0) else (64, 64, False)
    return (128, 128, True) if head <= 128 else (128, 64, False)


def flash_padding(tokens: int, head: int) -> tuple[int, int]:
    """Length and head size that FlashAttention-2's backward sums gradients of queries in."""
    return up(tokens, 128), up(head, 32 if head <= 128 else 64)
