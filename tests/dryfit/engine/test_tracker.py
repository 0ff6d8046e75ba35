"""The tracker sees each storage once, from its allocation to its end."""

from itertools import accumulate

import pytest
import torch

from dryfit.engine.components import (
    ACTIVATIONS,
    COLLECTIVES,
    GRADIENTS,
    INPUTS,
    LOGITS_AND_LOSS,
    TEMPORARIES,
    WORKSPACES,
)
from dryfit.engine.errors import NoValues
from dryfit.engine.shapes import Shapes
from dryfit.engine.tracker import Tracker


def sizes(tracker: Tracker) -> list[int]:
    return [count for identity, count in tracker.events if identity > 0]


def alive(tracker: Tracker) -> int:
    held = {identity: count for identity, count in tracker.events if identity > 0}
    for identity, _ in tracker.events:
        held.pop(-identity, None)
    return sum(held.values())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_allocations_and_ends_in_order(device):
    with Tracker((device,)) as tracker:
        a = torch.zeros(10, device=device)
        b = a + 1
        del a
        c = b.to(torch.float64)
        del b, c
    assert tracker.events == [(1, 40), (2, 40), (-1, 0), (3, 80), (-2, 0), (-3, 0)]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_views_and_writes_in_place_allocate_nothing(device):
    with Tracker((device,)) as tracker:
        a = torch.zeros(4, 6, device=device)
        views = [
            a.view(24),
            a.t(),
            a[1:],
            a.unsqueeze(0),
            a.detach(),
            *a.split(2),
            a.expand(2, 4, 6),
        ]
        a.add_(1).mul_(a).copy_(a)
        a.zero_()
        assert sizes(tracker) == [96]
        del a
        assert alive(tracker) == 96
        del views
        assert alive(tracker) == 0


def test_what_is_recorded_and_for_how_long():
    with Tracker(("meta",)) as tracker:
        part = torch.empty(1000, device="meta")[:1]
        assert alive(tracker) == 4000
        del part
    assert alive(tracker) == 0
    with Tracker(("meta",)) as tracker:
        torch.zeros(10)
    assert tracker.events == []
    weight = torch.empty(3, device="meta")
    tracker = Tracker(("meta",), first_id=100)
    tracker.add(weight, "weights_fp32", identity=5)
    del weight
    assert tracker.events == [(-5, 0)]
    tracker = Tracker(("meta",))
    a = torch.empty(3, device="meta")
    tracker.add(a, INPUTS)
    tracker.close()
    del a
    assert tracker.events == [(1, 12)]
    with pytest.raises(NoValues), Tracker(("meta",)):
        torch.empty(3, device="meta").nonzero()
    assert Shapes() is not None
    tracker = Tracker(("meta",))
    with tracker:
        tensor = torch.empty(8, device="meta")
        tracker.name(tensor, COLLECTIVES)
        tracker.label(tensor, GRADIENTS)
    assert list(tracker.components.values()) == [COLLECTIVES]
    tracker, tensor = Tracker(("meta",)), torch.empty(8, device="meta")
    tracker.leave_on_host(tensor)
    tracker.add(tensor, ACTIVATIONS)
    assert tracker.events == []
    tracker.arrived(tensor)
    assert tracker.events == [(1, 32)]


def test_autograd_holds_what_backward_needs():
    x = torch.empty(8, 8, device="meta", requires_grad=True)
    with Tracker(("meta",)) as tracker:
        tracker.add(x.data, "weights_fp32")
        loss = (x.exp() * 2).sum()
        assert alive(tracker) == 256 + 256 + 4  # x, exp(x), which its backward needs, and the loss
        loss.backward()
        tracker.label(x.grad, GRADIENTS)
        del loss
    assert alive(tracker) == 256 + 256
    assert GRADIENTS in tracker.components.values()


def test_what_was_there_before_is_added_once():
    weight = torch.empty(3, device="meta")
    tracker = Tracker(("meta",), first_id=7)
    tracker.add(weight, "weights_fp32")
    tracker.add(weight.view(3, 1), "weights_fp32")
    assert tracker.events == [(7, 12)]
    with tracker:
        weight.add_(1)
    del weight
    assert tracker.events == [(7, 12), (-7, 0)]


def test_components_follow_phase_and_shape():
    with Tracker(("meta",), vocabulary=11) as tracker:
        kept = []
        tracker.mark("forward")
        kept += [torch.empty(5, 4, device="meta"), torch.empty(5, 11, device="meta")]
        tracker.mark("backward")
        with torch.no_grad():
            kept.append(torch.empty(2, device="meta"))
        kept.append(torch.empty(3, device="meta"))  # recomputed
        tracker.mark("optimizer")
        kept.append(torch.empty(5, 11, device="meta"))
        tracker.label(kept[0], INPUTS)
    assert list(tracker.components.values()) == [
        INPUTS,
        LOGITS_AND_LOSS,
        TEMPORARIES,
        ACTIVATIONS,
        TEMPORARIES,
    ]


def test_marks_give_the_phases_of_each_step():
    tracker = Tracker(("meta",))
    for step in range(2):
        for phase in ("forward", "backward"):
            tracker.mark(phase, step)
            tracker.free(tracker.allocate(1, TEMPORARIES))
    tracker.mark("end", 2)
    assert tracker.start(1) == 4
    assert tracker.spans(1) == [("forward", 4, 6), ("backward", 6, 8)]


def test_kernels_tell_what_cannot_be_seen():
    class Kernels:
        first = True

        def unknown(self, func):
            return "a kernel" if func is torch.ops.aten.empty.memory_format else None

        def concerns(self, func):
            return func is torch.ops.aten.add.Tensor

        def persistent(self, func, args, kwargs):
            new, self.first = [100] if self.first else [], False
            return new

        def keep(self, func, args, output):
            pass

        def temporaries(self, func, args, kwargs):
            return [7], [9]

    with Tracker(("meta",), kernels=Kernels()) as tracker:
        a = torch.empty(1, device="meta")
        b = a + 1
    assert sizes(tracker) == [4, 100, 7, 4, 9]
    assert alive(tracker) == 108
    assert tracker.components[2] == WORKSPACES and tracker.components[3] == TEMPORARIES
    assert list(tracker.warnings) == ["a kernel"]
    del a, b


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a @ b,
        lambda a, b: (a.t() @ b.t()).t() + 1,
        lambda a, b: torch.nn.functional.layer_norm(a, (6,)),
        lambda a, b: torch.cat([a, b.t()]),
        lambda a, b: a.to(torch.bfloat16).softmax(-1, dtype=torch.float32),
        lambda a, b: torch.ops.aten._unsafe_view(a, (3, 8)),
        lambda a, b: torch.topk(a, 2).values,
        lambda a, b: a.sum(0, keepdim=True).expand(4, 6).contiguous(),
        lambda a, b: torch._foreach_mul([a, a], 2.0)[1],
    ],
)
def test_remembered_shapes_are_those_of_the_operators(function):
    a, b = torch.empty(4, 6, device="meta"), torch.empty(6, 4, device="meta")
    expected = function(a, b)
    with Tracker(("meta",)) as tracker:
        tracker.add(a, INPUTS)
        tracker.add(b, INPUTS)
        results = [function(a, b) for _ in range(3)]
        count = len(sizes(tracker)) - 2
    for result in results:
        assert (result.shape, result.stride(), result.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )
    assert count % 3 == 0
    assert len({result.untyped_storage()._cdata for result in results}) == (1 if count == 0 else 3)


def test_a_block_is_not_shared_with_its_own_stream():
    tracker = Tracker(("meta",))
    with tracker:
        own, others = torch.empty(8, device="meta"), torch.empty(8, device="meta")
        tracker.used_by_another_stream(own, 0)
        tracker.used_by_another_stream(others, 1)
        del own, others
        tracker.waited()
    assert set(tracker.reusable) == {2}


def test_what_stands_for_a_tensor_of_the_cpu_lives_as_it_does():
    with Tracker(("meta", "cpu")) as tracker:
        tensor = torch.ones(8)
        moved = tensor.to("meta")
        assert alive(tracker) == 32
        del tensor
        assert alive(tracker) == 32
        del moved
        assert alive(tracker) == 0
        tensor = torch.ones(8)
        moved = tensor.to("meta")
        del moved
        assert alive(tracker) == 32
    with Tracker(("meta", "cpu")) as tracker:
        tensor = torch.ones(8)
        moved = tensor.to("meta")
        tracker.left(moved)
        assert alive(tracker) == 32
        del moved
        del tensor
        assert alive(tracker) == 0
        assert not tracker.ids


WORDS = torch.arange(256)[:, None] % 7
PICKED = {
    "gather": lambda x: x.gather(1, WORDS),
    "rows": lambda x: x[torch.arange(64)],
    "rows by a mask": lambda x: x[torch.arange(256) % 2 == 0],
    "index_select": lambda x: x.index_select(0, torch.arange(64)),
    "max": lambda x: x.max(1).values,
    "topk": lambda x: x.topk(2, 1).values,
    "trace": lambda x: x.trace(),
}


@pytest.mark.parametrize("pick", PICKED.values(), ids=PICKED)
def test_gradients_of_what_was_picked_take_what_the_allocator_says(pick):
    """PyTorch's profiler listens to the CPU's allocator, without a dispatch mode, which changes what autograd makes."""
    tensor = torch.randn(256, 256, requires_grad=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        pick(tensor).sum().backward()
    events = seen.profiler.kineto_results.events()
    allocated = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    gradient, tensor.grad = tensor.grad, None
    with Tracker(("cpu",)) as tracker:
        pick(tensor).sum().backward()
    held = dict(tracker.events)
    tracked = max(accumulate(count if one > 0 else -held[-one] for one, count in tracker.events))
    assert abs(tracked - allocated) < 8192  # indices that come and go; the gradient takes 262,144
    assert torch.equal(tensor.grad, gradient)
