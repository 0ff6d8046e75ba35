"""Steps on several GPUs: against real processes, PyTorch's own memory tracker, and what must hold between them."""

import json
import re
import subprocess
from functools import partial
from unittest import mock

import pytest

from dryfit.common.errors import UserError
from dryfit.engine.allocator import MIB, OutOfMemory
from dryfit.engine.capacities import capacities
from dryfit.engine.fake_group import fake_group
from dryfit.engine.kernels import dispatch
from dryfit.engine.replay import replay
from dryfit.engine.trace import Options, trace_step
from dryfit.step.step import random_step
from dryfit.tracing.checkpoints import checkpoint
from dryfit.tracing.hosts import offloaded_bytes
from dryfit.tracing.prepare import prepare
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS
from tests.dryfit.tracing.gloo_steps import STEPS
from tests.dryfit.tracing.several_gpus import scenario
from tests.repository import ROOT
from tests.tiers import selected
from tests.warm import launchers


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """What two processes with gloo measured, by rank and the step's number."""
    return in_processes(
        tmp_path_factory.mktemp("gloo"), *map(str, sorted(selected(request, "number")))
    )


def in_processes(folder, *numbers):
    command = [
        f"{launchers()}/python",
        "-m",
        "tests.dryfit.tracing.gloo_steps",
        str(folder),
        "torch",
        *numbers,
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "number", range(len(STEPS)), ids=["-".join([*step[:2], *step[2]]) for step in STEPS]
)
def test_two_processes_take_what_the_fake_group_says(number, measured, tmp_path):
    """To the byte, in every phase. On a busy machine gloo's thread may hold a finished buffer into the next phase: then
    both processes take the step again."""
    method, strategy, fields = STEPS[number]
    report = trace(scenario(method, strategy, **fields), "cpu", timeline=False)
    expected = report["phases"] | {"resident": report["resident_bytes"]}
    steps = [measured[rank][str(number)] for rank in range(2)]
    while expected != (least := least_bytes(steps)):
        assert len(steps) < 8, (expected, least)
        (folder := tmp_path / str(len(steps))).mkdir()
        steps += [one[str(number)] for one in in_processes(folder, str(number))]


def least_bytes(steps):
    found = [step["phases"] | {"resident": step["resident_bytes"]} for step in steps]
    return {phase: min(one[phase] for one in found) for phase in found[0]}


@pytest.mark.thorough
def test_pytorchs_own_tracker_counts_the_same():
    """``FSDPMemTracker`` knows no blocks, no reserved memory and no workspaces: the rest is equal, by component too."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    step = scenario("full", "fsdp2", gpus=4, precision="bf16", sequence_length=256)
    with fake_group(4):
        ready = prepare(step)
        one_step = random_step(ready.model, ready.optimizer, step, "meta", max_grad_norm=None)
        options = Options(histories=ready.histories, label=ready.label)
        report = trace_step(ready.model, ready.optimizer, one_step, options=options)
        ready = prepare(step)
        one_step = random_step(ready.model, ready.optimizer, step, "meta", max_grad_norm=None)
        tracker = FSDPMemTracker(ready.model, ready.optimizer)
        one_text = mock.patch(
            "transformers.masking_utils.find_packed_sequence_indices", lambda *_: None
        )
        with dispatch("cuda", (8, 0)), one_text, tracker:
            one_step()
            tracker.reset_mod_stats()
            one_step()
        (peak,) = (
            peak
            for device, peak in tracker.get_tracker_snapshot("peak").items()
            if device.type == "meta"
        )
    peak = {str(kind).rpartition(".")[2]: count for kind, count in peak.items()}
    found = report.components
    assert (
        peak["Total"]
        == report.peak_allocated_bytes - found["workspaces"] - found["allocator_rounding"]
    )
    assert peak["UNSHARDED_PARAM"] == found["unsharded_parameters"]
    assert peak["ALL_GATHER"] + peak["REDUCE_SCATTER"] == found["collective_buffers"]
    assert peak["OPT"] == found["optimizer_states"]


def test_what_is_divided_and_what_is_not():
    """Weights, gradients and states by the number of GPUs; DDP adds the trained bytes to those of one GPU."""
    alone = trace(scenario("full", "none", gpus=1), timeline=False)
    ddp = trace(scenario("full", "ddp"), timeline=False)
    parts = {gpus: trace(scenario("full", "fsdp2", gpus=gpus), timeline=False) for gpus in (2, 4)}
    trained = alone["components"]["weights_fp32"]
    assert ddp["components"]["collective_buffers"] == pytest.approx(trained, rel=0.01)
    for gpus, report in parts.items():
        states = report["components_by_phase"]["optimizer"]["optimizer_states"]
        assert states == pytest.approx(
            alone["components_by_phase"]["optimizer"]["optimizer_states"] / gpus, rel=0.01
        )
    assert (
        parts[4]["peak_allocated_bytes"]
        < parts[2]["peak_allocated_bytes"]
        < ddp["peak_allocated_bytes"]
    )
    assert {report["trainable_parameters"] for report in (alone, ddp, *parts.values())} == {684928}


@pytest.mark.thorough
def test_gathered_weights_can_be_kept_or_offloaded():
    options = {"method": "lora", "strategy": "fsdp2", "gradient_checkpointing": True}
    divided = trace(scenario(**options), timeline=False)
    parallel = {"strategy": "fsdp2", "gpus": 2, "reshard_after_forward": False}
    kept = trace(scenario(**options | {"parallel": parallel}), timeline=False)
    offloaded = trace(scenario(**options, offload="cpu"), timeline=False)
    peaks = [report["peak_allocated_bytes"] for report in (offloaded, divided, kept)]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3
    assert not {"weights_fp32", "adapters", "optimizer_states"} & {
        name for name, size in offloaded["components"].items() if size > 1000
    }


def test_sums_of_16_bit_gradients_in_fp32_take_twice_as_much():
    sizes = {}
    for wide in (False, True):
        parallel = {"strategy": "fsdp2", "gpus": 2, "reduce_in_fp32": wide}
        report = trace(
            scenario("full", "fsdp2", precision="bf16", parallel=parallel), timeline=False
        )
        sizes[wide] = report["components"]["collective_buffers"]
    assert sizes[True] - sizes[False] == 369152  # one layer's gradients in bf16, once more
    with pytest.raises(UserError, match="FSDP2 alone"):
        scenario("full", "ddp", parallel={"strategy": "ddp", "gpus": 2, "reduce_in_fp32": True})


@pytest.mark.thorough
def test_packed_bytes_are_not_divided_and_a_note_says_so():
    reports = {}
    for storage in ("uint8", "bf16"):
        step = scenario("qlora", "fsdp2", precision="bf16", quantization={"storage": storage})
        reports[storage] = trace(step, timeline=False)
    packed = {storage: report["components"]["weights_4bit"] for storage, report in reports.items()}
    saved = packed["uint8"] - packed["bf16"]
    assert packed["uint8"] == 2 * packed["bf16"]
    assert [
        f"saves {saved:,} bytes on each of 2 GPUs" in note for note in reports["uint8"]["notes"]
    ] == [True]
    assert reports["bf16"]["notes"] == []


@pytest.mark.thorough
def test_fsdp1_leaves_a_range_and_gradients_go_once_a_step_or_each_time():
    report = trace(
        scenario("qlora", "fsdp1", precision="bf16", quantization={"storage": "bf16"}),
        timeline=False,
    )
    assert report["components"]["unsharded_parameters"] > 0
    low, high = trace(scenario("full", "fsdp1"), timeline=False)["reserved_range_bytes"]
    assert low < high
    for strategy in ("ddp", "fsdp2"):
        once = trace(scenario("full", strategy), "cpu", timeline=False)
        twice = trace(scenario("full", strategy, gradient_accumulation=4), "cpu", timeline=False)
        gradients = once["components_by_phase"]["optimizer"]["gradients"]
        assert twice["components_by_phase"]["optimizer"]["gradients"] == gradients


# --- the allocator over several streams ---------------------------------------------------------------------------


def test_streams_share_no_blocks_and_one_capacity():
    events = [(1, 30 * MIB), (-1, 0), (2, 30 * MIB), (-2, 0), (3, 30 * MIB)]
    for run in (replay, partial(replay, expandable_segments=True)):
        assert run(events).peak_reserved_bytes == pytest.approx(30 * MIB, abs=20 * MIB)
        two = run(events, streams={2: 7})
        assert two.peak_reserved_bytes == pytest.approx(60 * MIB, abs=20 * MIB)
        assert two.peak_allocated_bytes == 30 * MIB
    assert (
        capacities(events, {2: 7}).required_bytes == 30 * MIB
    )  # a full GPU gives the other stream's segment back
    assert replay(events, streams={2: 7}, capacity_bytes=30 * MIB).retries == 2
    with pytest.raises(OutOfMemory):
        replay([(1, 30 * MIB), (2, 30 * MIB)], streams={2: 7}, capacity_bytes=50 * MIB)


def test_all_on_one_other_stream_is_as_on_the_first():
    step = scenario("lora", "none", gpus=1, precision="bf16")
    events = prepare(step).histories[0].events
    streams = {identity: 3 for identity, _ in events if identity > 0}
    assert replay(events, streams=streams) == replay(events)
    assert capacities(events, streams) == capacities(events)


def test_the_page_shows_what_runs():
    page = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(compile(block, "docs/several-gpus.md", "exec"), names)
    report = names["report"]
    layer = 4 * (1024 * 1024 + 1024)
    assert report.components["optimizer_states"] == 2 * 4 * layer // 8
    assert report.phases["load"] < 2 * layer  # one layer comes after the other


@pytest.mark.thorough
def test_a_language_model_alone_is_divided_without_the_blocks_of_its_tower():
    """Qwen3.5 names its tower's blocks among those that are not split, and without images it has none."""
    model = {
        **DECODERS["qwen2"],
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    one, two = (
        trace(
            scenario("full", strategy, model=model, parallel={"strategy": strategy, "gpus": gpus}),
            timeline=False,
        )
        for strategy, gpus in (("none", 1), ("fsdp2", 2))
    )
    assert two["resident_bytes"] < 0.6 * one["resident_bytes"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_are_cast_to_fp32_on_the_host_before_they_are_divided(method):
    """accelerate's ``fsdp2_prepare_model`` does it, and the model comes to the GPU unit by unit afterwards."""
    cast = scenario(method, "fsdp2", precision="bf16", autocast="bf16")
    load = trace(cast, timeline=False)["phases"]["load"]
    if method == "full":
        assert (
            load
            == trace(scenario("full", "fsdp2", precision="bf16-mixed"), timeline=False)["phases"][
                "load"
            ]
        )
    whole = sum(
        4 * parameter.numel() for parameter in prepare(cast.changed(parallel={})).model.parameters()
    )
    assert load < 0.9 * whole


def test_attention_that_sdpa_has_not_is_followed_where_a_model_is_divided():
    """gpt-oss has sinks: FlashAttention's own package runs, and nothing else of the answer asks for sdpa."""
    sinks = {**DECODERS["mixtral"], "model_type": "gpt_oss", "head_dim": 16, "sliding_window": 32}
    step = scenario(
        "full", "fsdp2", precision="bf16", autocast="bf16", model=sinks, attention="flash"
    )
    assert checkpoint(step).saved_bytes > 0
    assert (
        offloaded_bytes(step.changed(parallel={"strategy": "fsdp2", "gpus": 2, "offload": "cpu"}))
        > 0
    )
