"""The fake group: what it exchanges is there, is needed, and is undone."""

import inspect

import pytest
import torch
import torch.distributed.pipelining.stage  # whose functions are patched where they are imported, too
import transformers.distributed.tensor_parallel  # noqa: F401  whose plans are patched where they are imported
from torch import distributed as dist

from dryfit.common.errors import UserError
from dryfit.engine import fake_device, fake_group, fake_pipeline
from dryfit.engine.errors import TraceError
from dryfit.tracing.prepare import prepare
from dryfit.tracing.trace import trace
from tests.dryfit.tracing.several_gpus import scenario

FSDP1 = scenario("full", "fsdp1")
FROZEN = scenario(
    "lora", "fsdp1"
)  # in the root nothing is trained, so that only the end of backward gives it back
FSDP2 = scenario("full", "fsdp2")
OFFLOADED = scenario("full", "fsdp2", offload="cpu")
UNUSED = scenario("lora", "fsdp2").changed(
    gradient_checkpointing=False
)  # nothing asks for the embedding's gradient
DDP = scenario("full", "ddp")


def load(report):
    return report["phases"]["load"]


def late(report):
    return report["reserved_range_bytes"][1]


def collectives(report):
    return report["components"].get("collective_buffers", 0)


# Each exchanged attribute: its parameters, and what a step without it does: fail, or another figure than with it.
PATCHES = {
    "_get_accelerator": (None, FSDP1, RuntimeError),
    "data_ptr": (
        None,
        FROZEN,
        lambda with_it, without: without["phases"]["optimizer"] > with_it["phases"]["optimizer"],
    ),
    "_no_dispatch_record_stream": (
        ("tensor", "stream"),
        FSDP1,
        lambda with_it, without: (
            late(with_it) > late(without) == without["reserved_range_bytes"][0]
        ),
    ),
    "wait": (None, DDP, None),  # see test_stashes.py
    "current_stream": (("device",), UNUSED, UserError),
    "_validate_no_meta_params": (("self",), FSDP2, UserError),
    "_validate_cpu_offload_params": (("self",), OFFLOADED, UserError),
    "_init_sharded_param": (
        ("self", "param", "device", "shard_placement_fn", "mesh_info"),
        OFFLOADED,
        lambda with_it, without: load(with_it) < load(without),
    ),
    "all_gather_inputs": (
        None,
        OFFLOADED,
        lambda with_it, without: with_it["events"] > without["events"],
    ),
    "foreach_reduce": (
        None,
        FSDP2,
        lambda with_it, without: collectives(with_it) > collectives(without),
    ),
    "_move_module_to_device": (
        ("module", "ignored_params", "ignored_buffers", "device_from_device_id"),
        FSDP1,
        None,  # see below
    ),
    "_move_states_to_device": (
        ("params", "buffers", "device"),
        FSDP2,
        lambda with_it, without: load(with_it) > load(without),
    ),
    "__init__": (None, DDP, UserError),
    "_pre_forward": (
        ("self", "inputs", "kwargs"),
        DDP,
        lambda with_it, without: collectives(with_it) > collectives(without),
    ),
    # Without it DDP compares memory that the simulated group left unwritten: chance decides whether that fails.
    "_verify_param_shape_across_processes": (None, DDP, None),
    # Of meshes of several dimensions: see test_pairs.py and tests/dryfit/tracing/test_meshes.py.
    "send": (None, None, None),
    "recv": (None, None, None),
    "set_device_index": (("device",), None, None),
    "is_rng_supported_mesh": (("device_mesh",), None, None),
    "_from_local_last_dim_shard": (("local", "mesh", "size"), None, None),
}


def test_the_tables_have_every_patch_of_something_that_is_there():
    with fake_group.fake_group(2) as device:
        names = {name for _, name, _ in fake_group._patches(device)}
    assert names == set(PATCHES)
    assert len(fake_group.PATCHES) == len(names) + 1  # and torch.meta
    patches = fake_pipeline.pipeline_patches()
    assert all(callable(getattr(place, name)) for place, name, _ in patches)
    assert [f"{place.__name__}.{name}" for place, name, _ in patches] == list(fake_pipeline.PATCHES)
    for place, name, _ in fake_group._patches(fake_device.FakeDevice(2)):
        if PATCHES[name][0] is not None and PATCHES[name][1] is None:
            assert tuple(inspect.signature(getattr(place, name)).parameters) == PATCHES[name][0], (
                name
            )


@pytest.mark.few(3, 3)
@pytest.mark.parametrize("name", [name for name in PATCHES if PATCHES[name][2]])
def test_each_patch_is_there_and_is_needed(name, monkeypatch):
    parameters, step, otherwise = PATCHES[name]
    patches = fake_group._patches
    for place, found, _ in patches(fake_device.FakeDevice(2)):
        if found == name and parameters is not None:
            assert tuple(inspect.signature(getattr(place, name)).parameters) == parameters
    if inspect.isclass(otherwise):
        monkeypatch.setattr(
            fake_group, "_patches", lambda device: [p for p in patches(device) if p[1] != name]
        )
        with pytest.raises(otherwise):
            trace(step, timeline=False)
        return
    with_it = trace(step, timeline=False)
    monkeypatch.setattr(
        fake_group, "_patches", lambda device: [p for p in patches(device) if p[1] != name]
    )
    assert otherwise(with_it, trace(step, timeline=False))


def test_fsdp1s_weights_come_in_their_order_and_buffers_with_them(monkeypatch):
    def arrived():
        with fake_group.fake_group(2):
            return prepare(FSDP1).histories[0].events

    with_it, patches = arrived(), fake_group._patches
    place = next(
        place
        for place, name, _ in patches(fake_device.FakeDevice(2))
        if name == "_move_module_to_device"
    )
    assert (
        tuple(inspect.signature(place._move_module_to_device).parameters)
        == PATCHES["_move_module_to_device"][0]
    )
    monkeypatch.setattr(
        fake_group,
        "_patches",
        lambda device: [p for p in patches(device) if p[1] != "_move_module_to_device"],
    )
    assert len(with_it) > len(
        arrived()
    )  # without it only what the weights are put together from is seen


def test_without_a_device_module_nothing_can_be_divided(monkeypatch):
    with fake_group.fake_group(2) as device:
        del torch.meta
        try:
            with pytest.raises(AttributeError):
                torch.distributed.fsdp.fully_shard(
                    torch.nn.Linear(4, 4, device="meta"), mesh=dist.init_device_mesh("meta", (2,))
                )(torch.empty(1, 4, device="meta"))
        finally:
            torch.meta = device


def test_everything_is_undone(monkeypatch):
    def state():
        patched = fake_group._patches(fake_device.FakeDevice(2))
        tables = (
            dist.Backend.backend_list,
            dist.Backend.default_device_backend_map,
            dist.Backend._plugins,
        )
        return (
            [
                (place, name, getattr(place, name), name in vars(place))
                for place, name, _ in patched
            ],
            [repr(table) for table in tables],
            hasattr(torch, "meta"),
            dist.is_initialized(),
        )

    before = state()
    with pytest.raises(ZeroDivisionError), fake_group.fake_group(3):
        assert dist.get_world_size() == 3 and fake_device.active().device_count() == 3
        raise ZeroDivisionError
    assert state() == before
    assert fake_device.active() is None


def test_what_a_group_of_processes_refuses():
    again = fake_group.fake_group(2)
    with (
        fake_group.fake_group(2),
        pytest.raises(TraceError, match="belongs to a process group"),
        again,
    ):
        pass
    from dryfit.step.parallel import parallelize

    with fake_group.fake_group(2), pytest.raises(UserError, match="2 processes") as caught:
        parallelize(torch.nn.Linear(2, 2), scenario("full", "ddp", gpus=4), "meta")
    assert caught.value.write == "parallel: {strategy: ddp, gpus: 2}"
    from dryfit.step.parallel import parallelize

    with fake_group.fake_group(2), pytest.raises(UserError, match="runs on no CPU") as caught:
        parallelize(torch.nn.Linear(2, 2), FSDP1, "cpu")
    assert caught.value.write == "parallel: {strategy: fsdp2, gpus: 2}"
