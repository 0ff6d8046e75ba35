"""Collectives that a program starts: what they allocate, and what NCCL keeps of those that it doesn't wait for."""

import pytest
import torch
from torch import distributed as dist
from torch import nn

from dryfit.engine.fake_group import fake_group
from dryfit.engine.patching import on_meta
from dryfit.engine.stashes import Stashes
from dryfit.engine.trace import Options, trace_step

MIB = 2**20
GPUS, ROUNDS = 8, 3
PART = MIB  # bytes that each GPU sends


def traced(how: str):
    """Rounds of a large tensor that is dropped, and a list that is gathered after it."""

    def step(batch):
        parts = [torch.empty(PART, dtype=torch.uint8, device="meta") for _ in range(GPUS)]
        for _ in range(ROUNDS):
            large = torch.empty(64 * MIB, dtype=torch.uint8, device="meta")
            del large
            work = dist.all_gather(parts, batch[0], async_op=how != "at once")
            if how == "the work":
                work.wait()
            elif how == "its future":
                work.get_future().wait()

    with fake_group(GPUS), on_meta():
        sent = torch.empty(PART, dtype=torch.uint8)
        return trace_step(nn.Module(), None, step, [sent], Options(steps=1))


@pytest.mark.parametrize("how", ["at once", "the work"])
def test_what_a_program_has_waited_for_is_free(how):
    report = traced(how)
    assert report.peak_allocated_bytes == (64 + GPUS + 1) * MIB
    assert report.peak_allocated_range_bytes is None and not report.warnings


def test_what_is_waited_for_is_free_and_what_is_not_is_held():
    """Two earlier rounds hold the tensor of all parts that NCCL gathers into, when the third is at its peak."""
    report = traced("its future")
    lowest, highest = report.peak_allocated_range_bytes
    assert lowest == report.peak_allocated_bytes == (64 + GPUS + 1) * MIB
    assert highest - lowest == (ROUNDS - 1) * GPUS * MIB
    (said,) = report.warnings
    assert "Call work.wait()" in said and f"up to {(ROUNDS - 1) * GPUS} MiB more" in said
    # A call lets go of what was started so many launches before it.
    stashes = Stashes()
    events = [(1, 10), (-1, 0), (2, 10), (-2, 0), (3, 10), (-3, 0)]
    for moment, launches, kept in ((1, 0, [1]), (3, 600, [2]), (5, 1200, [3])):
        stashes.start(moment, launches, kept)
    assert stashes.delayed(events, lead=0) == events
    assert stashes.delayed(events, lead=1000) == [(1, 10), (2, 10), (3, 10), (-1, 0)]
    stashes.waited(4)
    assert stashes.delayed(events, lead=1000) == [(1, 10), (2, 10), (-1, 0), (3, 10)]
    stashes = Stashes()
    stashes.start(1, 0, [1])
    stashes.start(2, 0, ())
    stashes.waited(2)
    assert stashes.delayed([(1, 10), (-1, 0), (2, 5)]) == [(1, 10), (2, 5)]
    stashes.waited(3)
    assert stashes.delayed([(1, 10), (-1, 0), (2, 5), (3, 1)]) == [(1, 10), (2, 5), (-1, 0), (3, 1)]
    assert Stashes().delayed([(1, 10)]) is None


def test_the_upper_end_holds_what_two_short_steps_leave_while_nccls_thread_sleeps():
    """Four steps of 1,500 launches: at 1,024 launches one of them would be held, and three are."""
    stashes, told = Stashes(), []
    events = [event for one in range(1, 5) for event in ((one, 10), (-one, 0))]
    for one in range(4):
        stashes.start(2 * one + 1, 2000 * one, [one + 1])

    def peak_of(moved):
        sizes, alive = dict(events), [0]
        for identity, _ in moved:
            alive.append(alive[-1] + (sizes[identity] if identity > 0 else -sizes[-identity]))
        return max(alive)

    assert peak_of(stashes.delayed(events)) == 20
    assert stashes.range_of(10, events, peak_of, told.append, 4) == {
        "peak_allocated_range_bytes": (10, 40)
    }
    assert "where a step takes 50 ms" in told[0]
