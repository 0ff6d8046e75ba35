"""The time of a step, from kernels whose times one can work out by hand."""

from dataclasses import replace

import pytest

from dryfit.cards.gpus import catalogue
from dryfit.engine.collectives import GpuGroup
from dryfit.engine.costs import COLLECTIVE, MEMORY, PRODUCT, CostRecorder, Operator
from dryfit.hours.links import collective_seconds
from dryfit.hours.step_time import kernel_time, simulate, speed_of, step_time

CARD = replace(
    speed_of("a100-80gb"),
    peak_flops={"bfloat16": 1e12},
    memory_bytes_per_second=1e9,
    link_bytes_per_second=1e9,
    cache_bytes=0,
    multiprocessors=1,
    product=1.0,
    memory=1.0,
    link=1.0,
    contention=0.0,
    prologue=0.0,
    launch_seconds=1.0,
    collective_seconds=1.0,
    shortest_kernel_seconds=0.0,
)
SLOW, QUICK = Operator("slow", MEMORY, "", 0, 10 * 10**9), Operator("quick", MEMORY, "", 0, 10**6)
SENT = Operator("sent", COLLECTIVE, "", 0, 5 * 10**9)


def launches(*calls: tuple[Operator, int], waits=()) -> CostRecorder:
    costs = CostRecorder(0)
    costs.on = True
    for number, (operator, stream) in enumerate(calls):
        for at, waiter, other, until in waits:
            if at == number:
                costs.wait(waiter, other, until)
        costs.launch(operator, stream)
    return costs


def test_streams_run_beside_each_other_unless_one_waits():
    assert simulate(launches((SLOW, 0), (SLOW, 0)), CARD)[0] == pytest.approx(1 + 10 + 10)
    assert simulate(launches(*[(QUICK, 0)] * 5), CARD)[0] == pytest.approx(5 + 1e-3)
    beside = launches((SENT, 1), (SLOW, 0))
    assert simulate(beside, CARD)[0] == pytest.approx(2 + 10)
    waiting = launches((SENT, 1), (SLOW, 0), waits=[(1, 0, 1, 1)])
    seconds, busy = simulate(waiting, CARD)
    assert seconds == pytest.approx(1 + 5 + 10)
    assert busy["collectives"] == pytest.approx(5) and busy["memory"] == pytest.approx(10)
    waiting = launches((SENT, 1), (QUICK, 0), waits=[(1, None, 1, 1)])
    assert simulate(waiting, CARD)[0] == pytest.approx(1 + 5 + 1 + 1e-3)
    waits = [(2, 0, 1, 1)]  # for the first collective, not the second
    costs = launches((SENT, 1), (SENT, 1), (QUICK, 0), waits=waits)
    assert simulate(costs, CARD)[0] == pytest.approx(1 + 5 + 5)
    taken = simulate(launches((SENT, 1), (SLOW, 0)), replace(CARD, contention=0.5))[0]
    assert taken == pytest.approx(max(2, 2.5) + 10)


def test_tiles_and_the_longer_of_computing_and_moving_count():
    card = replace(CARD, multiprocessors=100)
    full = Operator("mm", PRODUCT, "bfloat16", 2 * 2560 * 1280 * 64, 0, (1, 2560, 1280, 64))
    over = full._replace(flops=2 * 2560 * 1290 * 64, shape=(1, 2560, 1290, 64))
    assert kernel_time(full, card)[0] == pytest.approx(full.flops / 1e12)  # 100 tiles of 256 x 128
    assert (
        kernel_time(over, card)[0] > 1.05 * kernel_time(full, card)[0]
    )  # ten columns more, another wave
    narrow = Operator("mm", PRODUCT, "bfloat16", 2 * 128 * 128 * 64, 10**9, (1, 128, 128, 64))
    assert kernel_time(narrow, CARD) == (1.0, "memory")
    assert kernel_time(narrow._replace(bytes=0), CARD)[1] == PRODUCT


def test_the_speeds_of_cards():
    assert [name for name in catalogue() if speed_of(name) is None] == []
    t4 = speed_of("t4")
    assert t4.peak_flops["bfloat16"] == t4.peak_flops["float32"] < t4.peak_flops["float16"] / 5
    product = Operator("mm", PRODUCT, "bfloat16", 2 * 128 * 128 * 64, 10**9, (1, 128, 128, 64))
    slow, fast = (step_time(launches((product, 0)), speed_of(name)) for name in ("t4", "a100-80gb"))
    assert "rate of fp32, 8.1 TFLOPS instead of the 65 of fp16" in slow.warnings[0]
    assert not fast.warnings
    assert step_time(launches((SLOW, 0)), speed_of("24 GiB")) is None


def test_a_card_without_measurements_gives_no_range_and_says_why():
    unmeasured, measured = (
        step_time(launches((SLOW, 0)), speed_of(name), tokens=100)
        for name in ("rtx-4090", "a100-80gb")
    )
    assert unmeasured.range is None and "assumed" in unmeasured.basis
    low, high = measured.range
    assert low < measured.seconds_per_step < high
    assert measured.tokens_per_second == pytest.approx(100 / measured.seconds_per_step)
    assert sum(measured.shares.values()) == pytest.approx(1, abs=1e-3)


def test_micro_batches_that_a_trace_leaves_out_are_added():
    costs = CostRecorder(0)
    for phase in (
        "inputs",
        "forward",
        "backward",
        "between",
        "forward",
        "backward",
        "between",
        "optimizer",
    ):
        costs.mark(phase, 0)
        if phase in ("forward", "backward"):
            costs.launch(SLOW)
    short, long = (
        step_time(costs, speed_of("a100-80gb"), micro_batches_left_out=left) for left in (0, 6)
    )
    one = short.seconds_per_step / 2
    assert short.seconds_per_micro_batch == pytest.approx(one, rel=0.01)
    assert long.seconds_per_step == pytest.approx(8 * one, rel=0.01)


# --- GPUs that talk to each other ---------------------------------------------------------------------------------

NODES = replace(CARD, link_bytes_per_second=400e9, network_bytes_per_second=50e9, gpus_per_node=8)


@pytest.mark.parametrize(
    ("name", "ranks", "seconds"),
    [
        (
            "c10d::_allgather_base_",
            range(8),
            7 / 400,
        ),  # inside a node: seven of eight parts over its links
        ("c10d::allreduce_", range(8), 2 * 7 / 400),
        (
            "c10d::_allgather_base_",
            range(0, 64, 8),
            7 / 50,
        ),  # one of each node: through one adapter
        (
            "c10d::_allgather_base_",
            range(32),
            8 * 31 / 32 / 400,
        ),  # eight adapters together are as fast as the links
        ("c10d::_allgather_base_", [0, 1, 8, 9], 8 * 3 / 4 / 100),
        (
            "c10d::alltoall_base_",
            range(16),
            8 * 8 / 16 / 50,
        ),  # what goes to the other node, through one's own
        ("c10d::send", range(4), 8 / 400),
        ("c10d::send", range(0, 32, 8), 8 / 50),
    ],
)
def test_a_collective_takes_what_its_group_and_the_links_between_them_say(name, ranks, seconds):
    operator = Operator(name, COLLECTIVE, "", 0, 8 * 10**9, group=GpuGroup("tp", tuple(ranks)))
    assert collective_seconds(operator, NODES.links) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("name", "ranks", "seconds"),
    [
        ("c10d::_allgather_base_", range(8), 7 / (7 * 64)),  # over seven links at once
        ("c10d::_allgather_base_", range(2), 4 / 64),
        ("c10d::send", range(4), 8 / 64),  # to one other, over one link
        (
            "c10d::_allgather_base_",
            range(16),
            8 * 15 / 16 / 400,
        ),  # eight adapters are slower than seven links
    ],
)
def test_a_group_of_cards_with_a_link_to_each_other_uses_as_many_as_it_has(name, ranks, seconds):
    """The MI300X: 64 GB/s one way on each of seven links."""
    assert speed_of("mi300x").links.to_each and not speed_of("h200").links.to_each
    card = replace(NODES, link_bytes_per_second=64e9, link_to_each=True)
    operator = Operator(name, COLLECTIVE, "", 0, 8 * 10**9, group=GpuGroup("tp", tuple(ranks)))
    assert collective_seconds(operator, card.links) == pytest.approx(seconds)


def test_what_is_exchanged_is_said_by_the_group_that_talks():
    near, far = GpuGroup("tp", (0, 1)), GpuGroup("fsdp", (0, 8, 16, 24))
    sums = Operator("c10d::allreduce_", COLLECTIVE, "", 0, 10**9, group=near)
    gathered = Operator("c10d::_allgather_base_", COLLECTIVE, "", 0, 4 * 10**9, group=far)
    step = launches((sums, 0), (SLOW, 0), (sums, 0), (gathered, 1))
    shard, tensor = step_time(step, NODES).exchanges
    assert (shard["axis"], shard["gpus"], shard["on_node"], shard["sent_bytes"]) == (
        "shard",
        4,
        1,
        3 * 10**9,
    )
    assert (tensor["axis"], tensor["on_node"], tensor["collectives"]) == ("tensor", 2, 2)
    assert tensor["sent_bytes"] == 2 * 10**9 and tensor["seconds"] == pytest.approx(2 / 400)
