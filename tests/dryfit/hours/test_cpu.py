"""A step's seconds on a processor, from rates that one can multiply by hand; the probes themselves run."""

import pytest
import torch

from dryfit.engine.costs import ATTENTION, MEMORY, PRODUCT, CostRecorder, Operator
from dryfit.hours.cpu import ATTENTION as SHARES
from dryfit.hours.cpu import NEW_FROM_BYTES, Cpu, Probes, one_thread
from dryfit.hours.step_time import step_time

SPEED = Cpu(
    product_flops={"float32": 1e11, "bfloat16": 1e10},
    copied_bytes_per_second=1e10,
    new_bytes_per_second=2e9,
    unpacked_bytes_per_second=5e9,
    launch_seconds=1.0,
)


def test_what_a_cpu_computes_moves_makes_and_unpacks():
    assert SPEED.seconds(Operator("aten::mm", PRODUCT, "float32", 10**11, 10**10)) == pytest.approx(
        1 + 1
    )
    assert SPEED.seconds(Operator("aten::mm", PRODUCT, "bfloat16", 10**11, 0)) == pytest.approx(10)
    unknown = SPEED.seconds(Operator("aten::mm", PRODUCT, "float64", 10**11, 0))
    assert unknown == pytest.approx(10)  # a dtype that was not probed: as slow as the slowest
    small, large = (
        Operator("aten::mul", MEMORY, "", 0, 0, made_bytes=size) for size in (2**20, NEW_FROM_BYTES)
    )
    assert SPEED.seconds(small) == 0 and SPEED.seconds(large) == pytest.approx(NEW_FROM_BYTES / 2e9)
    assert SPEED.seconds(
        Operator("bitsandbytes::dequantize_4bit", MEMORY, "", 0, 10**10)
    ) == pytest.approx(2)
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for way, backward in (("", False), ("_backward", True)):
        found = SPEED.seconds(Operator(name + way, ATTENTION, "float32", 10**11, 0))
        assert found == pytest.approx(1 / SHARES[backward])


def test_views_take_time_too_and_a_step_says_what_limits_it():
    costs = CostRecorder(0)
    costs.mark("forward", 0)
    value = torch.ones(4, 4)
    costs.note(torch.ops.aten.mul.Tensor, (value, value), {}, value * value)
    costs.note(
        torch.ops.aten.t.default, (value,), {}, value.t()
    )  # seen to launch nothing, and then known
    costs.note(torch.ops.aten.t.default, (value,), {}, value.t())
    seconds, busy = SPEED.simulate(costs)
    assert (len(costs.calls), costs.without_kernel) == (1, 2)
    assert seconds == pytest.approx(3 + busy[MEMORY])
    found = step_time(costs, SPEED)
    assert found.limited_by == "Python and PyTorch, between operators" and found.range is not None


def test_probes_find_a_rate_for_each_thing_and_leave_the_threads_as_they_were():
    threads = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
        probes = Probes(("float32",), "nf4")
        probes.run(0.01)
        found = probes.found()
    assert torch.get_num_threads() == threads
    rates = [
        *found.product_flops.values(),
        found.copied_bytes_per_second,
        found.new_bytes_per_second,
        found.unpacked_bytes_per_second,
        1 / found.launch_seconds,
    ]
    assert all(rate > 0 for rate in rates)
    assert Cpu(**found.to_mapping()) == found
