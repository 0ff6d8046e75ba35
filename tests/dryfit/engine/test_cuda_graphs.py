"""CUDA graphs where a card is simulated: what a warm-up, a capture and a replay allocate, and in which pool.

What PyTorch documents of them is tried here (https://docs.pytorch.org/docs/stable/notes/cuda.html, "Graph memory
management"): no published figure of a step with ``reduce-overhead`` names all its settings.
"""

from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from torch import nn

from dryfit.engine.allocator import MIB
from dryfit.engine.card import H100
from dryfit.engine.components import WORKSPACES
from dryfit.engine.errors import CompiledError
from dryfit.engine.patching import on_meta
from dryfit.engine.replay import replay
from dryfit.engine.report import make_report
from dryfit.engine.simulation import simulated
from dryfit.engine.trace import Options, trace_step
from tests.dryfit.engine.test_compiled_steps import Perceptron

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
ROWS, WORKSPACE = 65_536, 32 * MIB + 512  # cuBLAS's on a Hopper card, with what is rounded
WIDE, NARROW = (
    ROWS * 256 * 4,
    ROWS * 64 * 4,
)  # bytes of what lies between the two layers, and of a batch


def traced(build, steps=3, compiled="follow"):
    """The report, the tracker and the allocator's first span by phase and step."""
    kept = {}

    def report(tracker, *args, **options):
        kept["tracker"] = tracker
        return make_report(tracker, *args, **options)

    with simulated(H100):
        with on_meta():
            model, optimizer, step, batch = build()
        found = trace_step(
            model, optimizer, step, batch, Options(compiled=compiled, steps=steps, report=report)
        )
    tracker = kept["tracker"]
    marks = [(f"{phase} {number}", index) for phase, number, index in tracker.marks]
    run = replay(tracker.events, marks, streams=tracker.streams)
    return found, tracker, {span.phase: span for span in reversed(run.spans)}


without_compiler = partial(traced, steps=2, compiled=Options().compiled)


def made(tracker, phase, *, private):
    """Bytes of what a phase of a step allocates, from 4 MiB on, in the pool of graphs or beside it."""
    marks = [*tracker.marks, ("", -1, len(tracker.events))]
    ((first, last),) = [(mark[2], after[2]) for mark, after in pairwise(marks) if mark[:2] == phase]
    return [
        count
        for identity, count in tracker.events[first:last]
        if count >= 4 * MIB
        and tracker.components[identity] != WORKSPACES
        and (tracker.streams.get(identity, 0) < 0) == private
    ]


def stepping(mode: str, times: int = 1, layers: int = 1, keeps_zeros: bool = False):
    model = nn.Sequential(*(Perceptron() for _ in range(layers)))
    for layer in model:
        layer.compile(mode=mode)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(rows):
        for _ in range(times):
            model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keeps_zeros)

    return model, optimizer, step, torch.empty(ROWS, 64)


@with_triton
def test_a_step_is_warmed_up_recorded_and_replayed():
    """First in the pool, without copies; then with the batch copied into it; then nothing is allocated for it."""
    found, tracker, spans = traced(partial(stepping, "reduce-overhead"))
    default, plain, _ = traced(partial(stepping, "default"))
    in_pool = lambda name: made(tracker, name, private=True)  # noqa: E731
    assert len(in_pool(("forward", 0))) == 4 and len(in_pool(("backward", 0))) >= 3
    assert in_pool(("forward", 1)) == [NARROW, *in_pool(("forward", 0))], "the batch is copied"
    assert in_pool(("backward", 1)) == [NARROW, *in_pool(("backward", 0))], (
        "and the gradient of the outputs"
    )
    for phase in ("forward", "backward"):
        together = in_pool((phase, 0)) + made(tracker, (phase, 0), private=False)
        assert sorted(together) == sorted(made(plain, (phase, 0), private=False)), (
            "as without graphs"
        )
        assert in_pool((phase, 2)) == [] and made(tracker, (phase, 2), private=False) != [], (
            "what isn't compiled"
        )
    assert tracker.replayed == {2}
    peaks = [
        max(spans[f"{phase} {step}"].peak_allocated_bytes for phase in ("forward", "backward"))
        for step in (0, 1)
    ]
    assert found.peak_allocated_bytes == max(peaks) == peaks[1]
    assert any("CUDA graphs are replayed" in text and "step 2" in text for text in found.warnings)
    assert not default.warnings and found.compiled["breaks"] == {}


@with_triton
def test_what_graphs_hold_is_in_a_pool_that_nothing_else_uses():
    """The pool keeps its segments: eager code beside it, and an emptied cache, get none of them."""
    _, tracker, _ = traced(partial(stepping, "reduce-overhead"))
    sizes = {identity: count for identity, count in tracker.events if identity > 0}
    private = {identity for identity, stream in tracker.streams.items() if stream < 0}
    assert sum(sizes[one] >= WIDE for one in private) >= 2 * 3, "three large tensors, twice"
    assert not any(sizes[one] >= WIDE for one in sizes.keys() - private)
    alone = [event for event in tracker.events if abs(event[0]) in private]
    pool = replay(alone, streams=tracker.streams)
    emptied = replay([*alone, (0, 0)], streams=tracker.streams)
    assert emptied.reserved_bytes == pool.reserved_bytes >= 3 * WIDE
    assert replay([*alone, (0, 0)]).reserved_bytes < pool.reserved_bytes, (
        "the general pool gives it back"
    )


@with_triton
def test_workspaces_of_cublas_go_with_each_warm_up_and_capture():
    _, tracker, spans = traced(partial(stepping, "reduce-overhead"))
    _, plain, default = traced(partial(stepping, "default"))
    held = lambda spans: spans["inputs 2"].start_allocated_bytes  # noqa: E731
    assert held(default) - held(spans) == pytest.approx(2 * WORKSPACE, abs=MIB)
    assert tracker.library_workspaces == [] != plain.library_workspaces


@with_triton
def test_layers_with_one_code_are_recorded_one_by_one():
    """Each has parameters of its own, at addresses of their own: so each is recorded, and all are warmed up before."""
    found, tracker, spans = traced(partial(stepping, "reduce-overhead", layers=4))
    assert found.compiled["graphs"] == 4 and tracker.replayed == {2}, (
        "the first layer's batch needs no gradient"
    )
    kept = spans["backward 1"].start_allocated_bytes - spans["forward 1"].start_allocated_bytes
    assert kept > 4 * 2 * WIDE, "what four layers keep for the backward pass"
    assert (
        spans["backward 2"].start_allocated_bytes - spans["forward 2"].start_allocated_bytes < WIDE
    )


@with_triton
def test_another_shape_is_recorded_beside_in_the_same_pool():
    def build():
        model, optimizer, step, batch = stepping("reduce-overhead")
        model[0].compile(mode="reduce-overhead", dynamic=False)
        count = iter(range(9))
        return (
            model,
            optimizer,
            lambda rows: step(rows if next(count) < 3 else rows[: ROWS // 2]),
            batch,
        )

    found, tracker, spans = traced(build, steps=6)
    assert found.compiled["graphs"] == 4 and tracker.replayed == {2, 5}
    assert {stream for stream in tracker.streams.values() if stream < 0} == {-1}
    assert spans["backward 4"].peak_allocated_bytes < spans["backward 1"].peak_allocated_bytes
    assert found.peak_allocated_bytes == spans["backward 1"].peak_allocated_bytes
    at = tracker.start(3)
    pools = [
        [event for event in events if tracker.streams.get(abs(event[0]), 0) < 0]
        for events in (tracker.events[:at], tracker.events)
    ]
    whole, both = (replay(events, streams=tracker.streams).peak_reserved_bytes for events in pools)
    assert whole == both, "the half fits into what the whole has left"


@with_triton
@pytest.mark.parametrize("how", [{"times": 2}, {"keeps_zeros": True}])
def test_gradients_that_are_kept_are_refused_as_by_pytorch(how):
    """They lie in the pool, and the next forward pass overwrites them (PyTorch's message names the same ways out)."""
    with pytest.raises(CompiledError, match="gradient that a CUDA graph has made") as caught:
        traced(partial(stepping, "reduce-overhead", **how))
    assert "gradient accumulation" in str(caught.value)


@with_triton
def test_a_graph_beside_what_is_replayed_is_recorded_over_living_outputs():
    """A new function after two that are replayed: their outputs get memory of their own in the pool again."""

    def build():
        one, two = (torch.compile(layer, mode="reduce-overhead") for layer in (first, second))
        count = iter(range(9))

        def step(rows):
            with torch.no_grad():
                features = one(rows)
                if next(count) > 2:
                    two(features)

        return nn.Sequential(first, second), None, step, torch.empty(ROWS, 64)

    with on_meta():
        first, second = nn.Linear(64, 256), nn.Linear(256, 64)
    _, tracker, spans = traced(build, steps=6)
    assert spans["forward 2"].peak_allocated_bytes - spans["forward 2"].start_allocated_bytes < WIDE
    beside = spans["forward 3"].peak_allocated_bytes - spans["forward 3"].start_allocated_bytes
    assert WIDE + ROWS * 64 * 4 <= beside < 2 * WIDE + ROWS * 64 * 4 + 2 * WORKSPACE
    assert max(tracker.replayed) == 5


def test_graphs_that_a_program_captures_itself():
    """``torch.cuda.graph``: what is made inside lies in the graph's pool, and a replay allocates nothing."""

    def build():
        model, rows, made = nn.Linear(64, 256), torch.empty(ROWS, 64), []

        def step():
            if not made:
                graph = torch.cuda.CUDAGraph()
                with torch.no_grad(), torch.cuda.graph(graph):
                    assert torch.cuda.is_current_stream_capturing()
                    made.extend((graph, model(rows).relu()))
            assert not torch.cuda.is_current_stream_capturing()
            made[0].replay()

        return model, None, step, None

    found, tracker, spans = without_compiler(build)
    assert (
        tracker.replayed == {1}
        and found.peak_allocated_bytes == spans["forward 0"].peak_allocated_bytes
    )
    assert found.peak_allocated_bytes >= 2 * WIDE
    last = spans["inputs 1"]
    assert last.peak_allocated_bytes == last.start_allocated_bytes < 2 * WIDE


def test_callables_that_pytorch_makes_graphs_of():
    """Forward and backward of a module, warmed up and captured by ``torch.cuda.make_graphed_callables``' own code."""

    def build():
        model, rows, made = Perceptron(), torch.empty(ROWS, 64, requires_grad=True), []

        def step():
            if not made:
                made.append(torch.cuda.make_graphed_callables(model, (rows,)))
            made[0](rows).sum().backward()
            model.zero_grad()

        return model, None, step, None

    _, tracker, spans = without_compiler(build)
    assert tracker.replayed == {1}
    assert (
        spans["backward 1"].peak_allocated_bytes - spans["forward 1"].start_allocated_bytes < WIDE
    )
