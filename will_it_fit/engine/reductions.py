"""What PyTorch's reductions (sums, means, norms, maxima) need on CUDA besides their outputs; torch-free arithmetic.

Where few outputs are made of many numbers, several blocks of threads share an output, and each leaves its part in
global memory: ATen ``native/cuda/Reduce.cuh`` (2.4 to 2.13), ``setReduceConfig``, ``global_memory_size``,
``gpu_reduce_kernel``. Over the first dimension, as in the gradient of a bias, that room is multiplied by the width of a
block, and reaches 112 MiB on an A100. A tensor of more than 2 GiB is reduced in halves, which meet in an accumulator of
their own where the output is narrower than the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from .cuda_rules import Capability

# The most streaming multiprocessors of a card, by compute capability: those of config/gpus.yaml.
_MOST_PROCESSORS = {
    (7, 0): 80, (7, 5): 72, (8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148, (10, 3): 148, (12, 0): 188,
    (12, 1): 48,
}  # fmt: skip
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
class Kind:
    """A kind of reduction.

    Attributes
    ----------
    accumulates
        Bytes of what a thread keeps: None, as wide as the input.
    narrow_accumulates
        The same for inputs of up to four bytes; None: no other.
    unroll
        Values that a thread reads at a time.
    in_output
        Whether an output can hold parts of the result.
    """

    accumulates: int | None = None
    narrow_accumulates: int | None = None
    unroll: int = 4
    in_output: bool = True

    def width(self, element: int) -> int:
        """Bytes that a thread keeps for an input of elements so wide."""
        if element <= 4 and self.narrow_accumulates:
            return self.narrow_accumulates
        return self.accumulates or element


# Sums are kept in fp32 or wider; a maximum with its index as a pair; mean, deviation and two counts as WelfordData.
SUM, LARGEST = Kind(8, 4), Kind()
WITH_INDEX, MOMENTS = Kind(16, in_output=False), Kind(32, 16, unroll=2, in_output=False)
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


def kind_of(operator: str, overload: str) -> Kind | None:
    """Of an operator of ATen; None: it is no reduction of this kernel."""
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
    kind: Kind,
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
    narrow = not kind.in_output or output < 4  # of fp16 and bf16 no partial sum is written into the output
    accumulator = prod(each.size for each in dimensions if not each.reduced) * width
    made = [accumulator] if in_halves and narrow and output < width else []
    parts = [_parts(each, element, width, kind.unroll, capability, processors) for each in _launches(dimensions)]
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
    kept = [each for each in given if not each.reduced]  # in the order of the output, which is contiguous
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
    furthest = max(range(len(dimensions)), key=lambda index: (dimensions[index].size - 1) * dimensions[index].stride)
    split = dimensions[furthest]
    halves = {split.size // 2, split.size - split.size // 2}
    return set().union(
        *(
            _launches((*dimensions[:furthest], split._replace(size=half), *dimensions[furthest + 1 :]))
            for half in halves
        )
    )


def _parts(
    dimensions: Sequence[_Dimension], element: int, width: int, unroll: int, capability: Capability, processors: int
) -> tuple[int, ...]:
    """What the blocks that share an output leave in global memory, and a counter for each group of outputs."""
    gone = [each for each in dimensions if each.reduced]
    kept = [each for each in dimensions if not each.reduced]
    outputs, inputs = prod(each.size for each in kept), prod(each.size for each in gone)
    if not gone:
        return ()
    along = not kept or gone[0].stride < kept[0].stride  # threads beside each other read one output's numbers
    across, down = (inputs, outputs) if along else (outputs, inputs)
    vector = 1
    if (gone if along else kept)[0].stride == element:
        if along:
            across //= unroll if across >= 128 and len(gone) == 1 else 1
        else:
            others = [each.stride // element for each in dimensions if each is not kept[0]]
            vector = next(count for count in (4, 2, 1) if not any(n % count for n in (kept[0].size, *others)))
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
    width, height = (threads if count >= threads else 1 << max(count, 1).bit_length() - 1 for count in (across, down))
    rows = min(height, threads // min(width, _WARP))
    return min(width, threads // rows), rows
