"""Each way to divide a step between two processes: what the simulated group says, and what two gloo processes take."""

import json
import subprocess
from collections import Counter

import pytest
import torch
from torch import distributed as dist
from torch.distributed import _functional_collectives as functional_collectives

from dryfit.engine.costs import COLLECTIVE, CostRecorder
from dryfit.engine.errors import TraceError
from dryfit.engine.fake_device import active
from dryfit.engine.fake_group import fake_group
from dryfit.engine.fake_pipeline import ranks_in_turn
from dryfit.engine.trace import Options, trace_step
from dryfit.engine.tracker import Tracker
from tests.dryfit.engine.pairs import BUILDS, ROWS, TOKENS, WIDTH, WORDS, figures
from tests.repository import ROOT
from tests.tiers import selected
from tests.warm import launchers


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """By rank and strategy, what two processes measured."""
    folder, names = tmp_path_factory.mktemp("pairs"), sorted(selected(request, "name"))
    command = [f"{launchers()}/python", "-m", "tests.dryfit.engine.pairs", str(folder), *names]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def traced(name: str, rank: int, target: str = "cpu", **options):
    with fake_group(2, rank), torch.device("meta"):
        taken = BUILDS[name]("meta", rank)
        return trace_step(
            taken.model, taken.optimizer, taken.step, taken.batch, Options(target=target, **options)
        )


@pytest.mark.few(0, 7)
@pytest.mark.parametrize("name", BUILDS)
def test_two_processes_take_what_the_group_says(name, measured):
    """To the byte, for each rank, in every phase."""
    with ranks_in_turn():
        found = [figures(traced(name, rank)) for rank in range(2)]
    assert found == [measured[rank][name] for rank in range(2)]


@pytest.mark.thorough
def test_equal_meshes_of_former_groups_are_forgotten():
    """DTensor keeps plans by mesh; one of another group compares equal, and has other ranks and names."""
    plans = [
        ("tensor and sequence", 0),
        ("experts and FSDP2", 1),
        ("tensor and sequence", 1),
        ("1F1B", 0),
    ] * 2
    found = [figures(traced(*plan)) for plan in plans]
    assert found[:4] == found[4:]


def test_a_stage_that_is_told_no_shapes_says_what_to_write():
    with pytest.raises(TraceError, match="Stage 1 of the pipeline does not know") as caught:
        traced("1F1B, shapes unknown", 1)
    assert "ranks_in_turn" in str(caught.value)


def sent(name: str, rank: int = 0) -> dict[str, int]:
    """By operator, what a step sends."""
    costs = traced(name, rank, costs=True, report=lambda tracker, *_, **__: tracker.costs)
    totals: Counter = Counter()
    for index in costs.calls:
        operator = costs.operators[index]
        if operator.kind == COLLECTIVE:
            totals[operator.name.partition("::")[2]] += round(operator.moved_bytes)
    return dict(totals)


@pytest.mark.thorough
def test_what_each_strategy_sends():
    hidden, keys = 4 * ROWS * TOKENS * WIDTH, 2 * 4 * ROWS * TOKENS // 2 * WIDTH
    assert (
        sent("1F1B")["send"] == sent("1F1B")["recv_"] == 4 * hidden
    )  # four micro-batches, there and back
    assert sent("1F1B", 1) == sent("1F1B")
    # Forward: the embedding and two layers' two outputs. Backward: the inputs of each divided product, head included.
    assert sent("tensor")["all_reduce"] == (1 + 2 * 2 + 2 * 5 + 1) * hidden
    assert sent("tensor")["all_gather_into_tensor"] == 4 * ROWS * TOKENS * WORDS // 2
    ring = sent("ring, all-to-all")[
        "all_to_all_single"
    ]  # keys and values once a layer, with their gradients back
    assert ring % keys == 0 and ring >= 2 * 2 * keys
    rows = 4 * ROWS * TOKENS * WIDTH // 2
    assert sent("experts")["all_to_all_single"] == 2 * 4 * rows


def test_collectives_are_counted_by_the_group_that_talks():
    """An all-gather over two of eight sends a half; over all of them seven eighths."""
    costs = {}
    for axis in ("inner", "outer", None):
        recorder = CostRecorder(0, gpus=8)
        recorder.mark("forward", 0)
        with fake_group(8, rank=5):
            mesh = dist.init_device_mesh("meta", (4, 2), mesh_dim_names=("outer", "inner"))
            group = mesh[axis].get_group() if axis else dist.group.WORLD
            whole = torch.empty(64 * group.size(), device="meta")
            tracker = Tracker(("meta",), device=active())
            tracker.costs = recorder
            with tracker:
                dist.all_gather_into_tensor(whole, torch.empty(64, device="meta"), group=group)
                dist.all_reduce(torch.empty(64, device="meta"), group=group)
                dist.all_to_all_single(
                    torch.empty(64, device="meta"), torch.empty(64, device="meta"), group=group
                )
        costs[axis] = [
            operator.moved_bytes for operator in recorder.operators if operator.kind == COLLECTIVE
        ]
    assert costs == {"inner": [256, 256, 128], "outer": [768, 384, 192], None: [1792, 448, 224]}


def test_what_is_sent_lives_until_it_is_waited_for():
    """A functional collective's work holds its input: freed too early, the peak would be too low."""
    with fake_group(2):
        tracker = Tracker(("meta",), device=active())
        with tracker:
            given = torch.empty(64, device="meta")
            arriving = functional_collectives.all_gather_tensor(given, 0, dist.group.WORLD)
            del given
            assert (
                sum(identity > 0 for identity, _ in tracker.events) == 2
                and len(tracker.events) == 2
            )
            functional_collectives.wait_tensor(arriving)
            assert len(tracker.events) == 3
            unwaited = torch.ops._c10d_functional.all_gather_into_tensor(
                arriving, 2, dist.group.WORLD.group_name
            )
            del arriving
            before = len(tracker.events)
            del unwaited
            assert len(tracker.events) == before + 2
