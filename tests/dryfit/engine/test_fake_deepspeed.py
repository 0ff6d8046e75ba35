"""DeepSpeed in the fake group: what is exchanged is there, is needed, and is undone."""

import inspect
import os

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.engine import fake_deepspeed
from dryfit.engine.fake_device import FakeDevice
from dryfit.engine.fake_group import fake_group
from dryfit.hours.step_time import speed_of
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace
from tests.dryfit.tracing.several_gpus import SMALL, scenario

pytest.importorskip(
    "deepspeed", reason="`make test-deepspeed` runs it where deepspeed is installed"
)

ZERO2, ZERO3 = scenario("full", "zero2", zero=SMALL), scenario("full", "zero3", zero=SMALL)
ULYSSES = scenario(
    "full", "zero2", parallel={"strategy": "zero2", "gpus": 2, "ulysses": 2}, zero=SMALL
)
TIGHT = scenario("lora", "zero3", sequence_length=128, zero=SMALL)


@pytest.fixture(autouse=True)
def by_the_package(monkeypatch):
    monkeypatch.setattr(Scenario, "zero_by_rules", False)


def load(report):
    return report["phases"]["load"]


def at(component, phase="backward"):
    return lambda report: report["components_by_phase"][phase].get(component, 0)


def less(figure):
    """Without it the figure is smaller."""
    return lambda with_it, without: figure(without) < figure(with_it)


# Each exchanged attribute, in order: its parameters, and what a step without it does: fail, or another figure than
# with it. None: see below.
PATCHES = [
    ("ds_accelerator", None, ZERO2, UserError),
    ("linear", None, ZERO3, None),
    ("record_stream", None, ZERO3, UserError),
    ("to", ("self", "args", "kwargs"), ZERO2, less(load)),
    (
        "_convert_to_zero_parameters",
        ("self", "param_list"),
        ZERO3,
        less(lambda report: report["events"]),
    ),
    ("wait", None, TIGHT, less(at("unsharded_parameters"))),
    ("wait", None, TIGHT, less(at("unsharded_parameters"))),
    ("_all_gather", None, ZERO3, less(at("unsharded_parameters"))),
    ("zeros_like", None, ZERO2, lambda with_it, without: load(without) > load(with_it)),
    ("setup_buckets", ("self",), ZERO2, less(at("collective_buffers"))),
    (
        "assert_ints_same_as_other_ranks",
        None,
        ZERO3,
        lambda with_it, without: with_it["events"] < without["events"],
    ),
    (
        "_dim_zero_all_to_all",
        ("group", "input"),
        ULYSSES,
        lambda with_it, without: opaque(without) and not opaque(with_it),
    ),
    ("initialize_sequence_parallel", ("sequence_parallel_size",), ULYSSES, None),
]


def opaque(report):
    """Operators into which the tracker does not see."""
    return [warning for warning in report["warnings"] if "is opaque" in warning]


def test_the_table_has_every_patch():
    with fake_group(2) as device:
        names = [name for _, name, _ in fake_deepspeed._patches(device, "cuda")]
    assert names == [name for name, *_ in PATCHES]
    assert [key.rpartition(".")[2] for key in fake_deepspeed.PATCHES] == names


@pytest.mark.parametrize("number", [number for number, patch in enumerate(PATCHES) if patch[3]])
def test_each_patch_is_there_and_is_needed(number, monkeypatch):
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "create_op_builder", lambda *_: None)  # it would compile
    name, parameters, step, otherwise = PATCHES[number]
    patches = fake_deepspeed._patches
    place = patches(FakeDevice(2), "cuda")[number][0]
    if parameters is not None:
        assert tuple(inspect.signature(getattr(place, name)).parameters) == parameters

    def others(device, target):
        found = patches(device, target)
        return found[:number] + found[number + 1 :]

    if inspect.isclass(otherwise):
        monkeypatch.setattr(fake_deepspeed, "_patches", others)
        with pytest.raises(otherwise):
            trace(step, timeline=False)
        return
    with_it = trace(step, timeline=False)
    monkeypatch.setattr(fake_deepspeed, "_patches", others)
    assert otherwise(with_it, trace(step, timeline=False))


def test_what_ulysses_exchanges_is_counted_by_its_group():
    """Queries, keys and values of a layer there, and what attention gives back; the same of their gradients."""
    speed = speed_of("h100-80gb")
    step = scenario(
        "full", "zero2", gpus=4, parallel={"strategy": "zero2", "gpus": 4, "ulysses": 2}
    )
    found = trace(
        step.changed(gradient_checkpointing=False), timeline=False, timed_on={"h100-80gb": speed}
    )
    (row,) = [row for row in found["times"]["h100-80gb"]["exchanges"] if row["axis"] == "ulysses"]
    hidden = (
        4 * 2 * 32 * 128
    )  # of a GPU's part: rows, tokens, width; keys and values have half of the heads
    heads = 3 * 2 * (hidden + 2 * hidden // 2 + hidden) // 2
    assert (
        row["gpus"] == 2 and heads <= row["sent_bytes"] < 1.05 * heads
    )  # positions and the loss besides


def test_everything_is_undone(monkeypatch):
    """The linear function too, which ZeRO-3 exchanges for good."""
    from deepspeed.comm import comm
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    patches = fake_deepspeed._patches(FakeDevice(2), "cuda")

    def state():
        return (
            [
                (place, name, getattr(place, name), name in vars(place))
                for place, name, _ in patches
            ],
            [dict(vars(module)) for module in (comm, groups, parallel_state_sp)],
            {name: os.environ.get(name) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE")},
        )

    with fake_group(2) as device, fake_deepspeed.fake_deepspeed(device):
        pass  # DeepSpeed is imported
    before = state()
    trace(ZERO3, timeline=False)
    trace(ULYSSES, timeline=False)
    assert state() == before
    with (
        pytest.raises(ZeroDivisionError),
        fake_group(3) as device,
        fake_deepspeed.fake_deepspeed(device),
    ):
        assert os.environ["WORLD_SIZE"] == "3"
        raise ZeroDivisionError
    assert state() == before
    monkeypatch.setattr(
        fake_deepspeed, "patched", lambda found: _patched([p for p in found if p[1] != "linear"])
    )
    trace(ZERO3, timeline=False)
    linear, torch.nn.functional.linear = torch.nn.functional.linear, patches[1][2]
    assert linear is not torch.nn.functional.linear


_patched = fake_deepspeed.patched


def test_nothing_is_said_on_standard_output(capfd):
    trace(ZERO2, timeline=False)
    trace(ZERO3, timeline=False)
    assert capfd.readouterr().out == ""
