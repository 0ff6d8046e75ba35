"""What reductions need on CUDA, against figures worked out from Reduce.cuh by hand, and what others measured of it."""

import pytest
import torch

from dryfit.cards.gpus import catalogue
from dryfit.engine.card import A100, H100
from dryfit.engine.cuda_rules import (
    MOMENTS,
    SUM,
    WITH_INDEX,
    cublas_workspace_bytes,
    most_processors,
    reduction_bytes,
    threads_of_processor,
)
from dryfit.engine.kernels import CudaKernels
from dryfit.engine.simulation import simulated
from dryfit.engine.trace import Options, trace_step
from dryfit.hours.step_time import speed_of

MIB = 2**20
aten = torch.ops.aten


def bytes_of(
    shape, reduced, element=4, output=4, kind=SUM, capability=(8, 0), processors=108, strides=None
):
    strides = strides or torch.empty(shape, device="meta").stride()
    return reduction_bytes(
        tuple(shape), strides, frozenset(reduced), element, output, kind, capability, processors
    )


@pytest.mark.parametrize(
    ("hidden", "mib"), [(1024, 16), (2048, 32), (4096, 64), (8192, 108), (16384, 112), (32768, 112)]
)
def test_rows_are_summed_in_the_room_that_ligers_benchmark_measured(hidden, mib):
    """RMSNorm's weight gradient is summed over 2,048 rows of fp32: what its six published figures have in common.

    Of the 4,096: 32 threads of 4 outputs are side by side and 4 below each other, so a thread has 512 values and a
    launch 32 groups of outputs. 108 multiprocessors of 2,048 threads hold 1,728 blocks, 54 for each group; but no more
    than 512/16 = 32 share an output. 4 bytes x 4,096 outputs x 32 shares x 128.
    """
    room, counters = bytes_of((2048, hidden), [0])
    assert room == mib * MIB and counters == hidden // 128 * 4


def test_the_room_of_a_sum_by_its_shape_and_kind():
    room, _ = bytes_of(
        (2048 * 4096,), [0]
    )  # 16,384 values for each of 512 threads, four blocks for each of 108
    assert room == 4 * 432
    assert bytes_of((2048, 4096), [1]) == ()  # 2,048 outputs: 8 values for each thread
    assert bytes_of((1, 4096), [0]) == bytes_of((2048, 1), [1]) == bytes_of((0, 4), [0]) == ()
    assert bytes_of((4, 512, 4096), [0, 1]) == bytes_of((2048, 4096), [0])
    assert bytes_of((4096, 2048), [1], strides=(1, 4096)) == bytes_of((2048, 4096), [0])
    assert bytes_of((2048, 1, 4096), [0]) == bytes_of((2048, 4096), [0])
    # 8,192 rows of a vocabulary of 151,936 in bf16: two launches of 4,096 rows, 1,024 values for each thread.
    made = bytes_of((8192, 151_936), [0], element=2, output=2)
    assert made == (151_936 * 4, 4 * 151_936 * 4 * 128, 151_936 // 128 * 4)
    assert (
        len(bytes_of((8192, 151_936), [0], element=2, output=4)) == 2
    )  # the output holds fp32 already
    summed, *_ = bytes_of((2048, 4096), [0])
    assert (
        bytes_of((2048, 4096), [0], kind=WITH_INDEX)[0]
        == 4 * summed
        == bytes_of((2048, 4096), [0], kind=MOMENTS)[0]
    )


def test_the_gradient_of_a_bias_takes_it_while_it_is_summed():
    tall = torch.empty(2048, 4096, device="meta")
    assert CudaKernels((8, 0)).temporaries(aten.sum.dim_IntList, (tall, [0], True)) == (
        [],
        [64 * MIB, 128],
    )
    assert CudaKernels((8, 0)).temporaries(aten.sum.dim_IntList, (tall, [-1])) == ([], [])
    with torch.device("meta"):
        layer, batch = torch.nn.Linear(4096, 4096), torch.empty(2048, 4096)
    layer.weight.requires_grad_(False)
    report = trace_step(
        layer, None, lambda: layer(batch).square().sum().backward(), options=Options()
    )
    # the weight, the bias and its gradient, the input, its product, the square's gradient, and a number for the loss
    held = 64 * MIB + 2 * 16_384 + 3 * 32 * MIB
    assert report.peak_allocated_bytes - cublas_workspace_bytes((8, 0)) - held - 64 * MIB in range(
        2048, 2**21
    )


def test_sums_in_another_dtype_and_on_another_card():
    labels = torch.empty(16_384, dtype=torch.bool, device="meta")
    assert CudaKernels().temporaries(aten.sum.default, (labels,)) == ([], [8 * 16_384])
    narrow = torch.empty(16, 16, dtype=torch.bfloat16, device="meta")
    assert CudaKernels().temporaries(aten.sum.default, (narrow,), {"dtype": torch.float32}) == (
        [],
        [],
    )
    assert CudaKernels().temporaries(aten.sum.default, (narrow,), {"dtype": torch.float64}) == (
        [],
        [2048],
    )
    assert CudaKernels().temporaries(aten.max.default, (labels,)) == ([], [])
    tall = torch.empty(2048, 16384, device="meta")
    with simulated(A100):
        assert CudaKernels((8, 0)).temporaries(aten.sum.dim_IntList, (tall, [0]))[1][0] == 112 * MIB
    with simulated(H100):
        assert CudaKernels((9, 0)).temporaries(aten.sum.dim_IntList, (tall, [0]))[1][0] == 136 * MIB


def test_no_card_of_the_catalogue_has_more_multiprocessors_than_its_capability():
    for gpu in catalogue().values():
        if gpu.capability and (speed := speed_of(gpu.name)):
            assert speed.multiprocessors <= most_processors(gpu.capability), gpu.name
    assert [threads_of_processor(each) for each in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0))] == [
        1024,
        2048,
        1536,
        2048,
        1536,
    ]
