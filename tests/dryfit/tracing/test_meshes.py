"""Scenarios on meshes: each GPU's bytes against real processes, and what the answer says of GPUs that differ."""

import json
import subprocess

import pytest

from dryfit.ask.text import host_lines
from dryfit.common.errors import UserError
from dryfit.engine.report import make_report
from dryfit.hours.step_time import speed_of
from dryfit.tracing import layers, scenario_trace
from dryfit.tracing import trace as traces
from dryfit.tracing.checkpoints import checkpoint, saving
from dryfit.tracing.prepare import prepare
from dryfit.tracing.ranks import kinds_of_ranks
from dryfit.tracing.trace import Recorder, trace
from tests.dryfit.tracing.mesh_steps import (
    EACH_NIGHT,
    EXPERTS,
    LAYERS,
    LLAMA,
    SAVED,
    STEPS,
    UNLUCKY,
    scenario,
)
from tests.repository import ROOT
from tests.tiers import selected
from tests.warm import launchers

SIZES = {name: scenario(name).parallel.gpus for name in STEPS}


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """By the number of GPUs and the rank, what as many processes measured of each step that is asked for."""
    names = [*sorted({*selected(request, "name"), SAVED, "expert"}), UNLUCKY]
    counts = sorted({SIZES[name] for name in names[:-1]})
    return {
        count: in_processes(tmp_path_factory.mktemp(f"meshes-{count}"), count, *names)
        for count in counts
    }


def in_processes(folder, count, *names):
    """By rank, what as many processes measured of the steps.

    Few steps a process: gloo's heap was once damaged after some twenty groups.
    """
    found = [{} for _ in range(count)]
    for first in range(0, len(names), 6):
        (own := folder / f"from-{first}").mkdir()
        some = names[first : first + 6]
        command = [
            f"{launchers()}/python",
            "-m",
            "tests.dryfit.tracing.mesh_steps",
            str(own),
            str(count),
            *some,
        ]
        subprocess.run(command, cwd=ROOT, check=True, timeout=600)
        for rank, measured in enumerate(found):
            measured |= json.loads((own / f"{rank}.json").read_text())
    return found


@pytest.mark.few(0, 10)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.nightly if name in EACH_NIGHT else ()) for name in STEPS],
)
def test_each_process_takes_what_the_group_says(name, measured, tmp_path):
    """To the byte, in every phase; each kind of GPU is traced once, and all of its kind have to be like it.

    On a busy machine gloo's thread may hold a finished buffer into the next phase: no process takes less than the
    trace says, and of those of a kind one takes just that. Where none does, the processes take the step again.
    """
    step = scenario(name)
    rows = trace(step, "cpu", timeline=False)["ranks"]
    assert sorted(rank for row in rows for rank in row["ranks"]) == list(range(step.parallel.gpus))
    expected = {tuple(row["ranks"]): row["phases"] for row in rows}
    runs = [measured[SIZES[name]]]
    while expected != (least := {kind: least_phases(runs, kind, name) for kind in expected}):
        assert len(runs) < 4, (expected, least)
        (folder := tmp_path / str(len(runs))).mkdir()
        runs.append(in_processes(folder, SIZES[name], name))


def least_phases(runs, ranks, name):
    found = [run[rank][name]["phases"] for run in runs for rank in ranks]
    return {phase: min(one[phase] for one in found) for phase in found[0]}


@pytest.mark.thorough
@pytest.mark.parametrize("cpu_offload", [True, False])
def test_a_full_state_dict_takes_what_the_group_says(cpu_offload, measured):
    """To the byte; with ``cpu_offload`` rank 0 keeps all of it on its host, which here is the device."""
    for rank in (0, 1):
        peak, resident, saved = saving(scenario(SAVED), "cpu", cpu_offload=cpu_offload, rank=rank)
        if cpu_offload and rank == 0:
            peak = resident + saved
        assert measured[2][rank][f"saved, {cpu_offload}"] == peak


@pytest.mark.thorough
def test_what_saving_and_loading_take():
    step = scenario("fsdp2 x context").changed(precision="bf16", gradient_checkpointing=True)
    found, whole = checkpoint(step), trace(step, timeline=False)["parameters"] * 2
    assert found.saved_bytes == found.file_pages_bytes == whole
    assert found.saving_gpu_bytes < whole / 5 < whole <= found.saving_on_gpu_bytes < 1.02 * whole
    assert found.loading_host_bytes < 1024  # the weights are pages of their files
    with_adapters = scenario("context, LoRA").changed(precision="bf16")
    assert (
        checkpoint(with_adapters).loading_host_bytes
        > 4 * trace(with_adapters, timeline=False)["trainable_parameters"] - 1
    )
    assert checkpoint(scenario("1f1b")) is None


@pytest.mark.thorough
def test_an_answer_says_what_a_host_takes_and_who_is_traced_once():
    step = scenario("fsdp2 x context").changed(
        precision="bf16", gpu={"name": "h100-80gb", "count": 4}
    )
    traced = scenario_trace.traced(step).trace
    host, beside = traced["host"], traced["checkpoint"]
    assert (host["processes"], host["saving_bytes"]) == (4, beside["saved_bytes"])
    assert host["loading_bytes"] >= beside["loading_host_bytes"]
    (line,) = host_lines(host)
    assert line.startswith("host memory: 4 processes on a host") and "at most, while" in line
    answer = trace(scenario("fsdp2 x tensor"), timeline=False)
    (row,) = answer["ranks"]
    assert row["ranks"] == [0, 1, 2, 3] and row["place"] == ""
    assert not [note for note in answer["notes"] if "needs most" in note]
    note = [
        note for note in trace(scenario("expert"), timeline=False)["notes"] if "experts" in note
    ]
    assert len(note) == 1 and "as many tokens" in note[0]
    speeds = {"h100-80gb": speed_of("h100-80gb")}
    steps = {count: scenario("1f1b").changed(gradient_accumulation=count) for count in (2, 8)}
    found = {
        count: trace(step, timeline=False, timed_on=speeds)["times"]["h100-80gb"]
        for count, step in steps.items()
    }
    assert "pipeline's wait" in found[2]["basis"]
    each = {count: time["seconds_per_step"] / count for count, time in found.items()}
    assert each[2] > each[8]


@pytest.mark.thorough
def test_the_range_of_experts_ends_where_one_gpu_gets_all_tokens(measured):
    bounds = trace(scenario("expert"), "cpu", timeline=False)["bounds"]
    even, (unlucky, lucky) = measured[2][0]["expert"], [one[UNLUCKY] for one in measured[2]]
    assert bounds["lowest_bytes"] == max(even["phases"].values())
    assert bounds["highest_bytes"] == max(unlucky["phases"].values())
    assert max(lucky["phases"].values()) < bounds["lowest_bytes"] < bounds["highest_bytes"]


def test_the_answer_is_that_of_the_gpu_that_needs_most():
    answer = trace(scenario("1f1b"), timeline=False)
    first, last = answer["ranks"]
    assert (first["place"], last["place"]) == ("stage 1 of 2", "stage 2 of 2")
    most = max(answer["ranks"], key=lambda row: row["required_bytes"])
    assert all(
        answer[key] == most[key] for key in ("required_bytes", "peak_allocated_bytes", "peak_phase")
    )
    (note,) = [note for note in answer["notes"] if "needs most" in note]
    assert most["place"] in note and all(row["place"] in note for row in answer["ranks"])
    peaks = [row["peak_allocated_bytes"] for row in answer["ranks"]]
    assert Recorder()(scenario("1f1b")).peak_bytes() == pytest.approx(
        max(peaks), rel=1e-3
    )  # without rounding
    assert min(peaks) < 0.95 * max(peaks)


def test_ranks_that_are_alike_are_one_kind_and_what_no_plan_divides_is_refused():
    first, between, last = kinds_of_ranks(scenario("context of four"))
    assert (first.ranks, between.ranks, last.ranks) == ((0,), (1, 2), (3,))
    assert [kind.one_text for kind in (first, between, last)] == [False, False, True]
    assert [kind.place for kind in kinds_of_ranks(scenario("interleaved"))] == [
        "stages 1 and 3 of 4",
        "stages 2 and 4 of 4",
    ]
    model = {
        "model_type": "gpt_neo",
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "vocab_size": 128,
    }
    model["attention_types"] = [[["global"], 2]]
    with pytest.raises(UserError, match="transformers can't divide this architecture") as caught:
        trace(scenario("tensor").changed(model=model), timeline=False)
    assert caught.value.write == "parallel: {strategy: fsdp2, gpus: 2}"


def test_a_mesh_divides_what_it_says():
    """Tensor halves matrices; a pipeline's halves hold half of the layers; replicas hold as much as two GPUs would."""
    weights = {}
    for name in ("tensor", "1f1b", "fsdp2 x tensor"):
        answer = trace(scenario(name), "cpu", timeline=False)
        weights[name] = answer["components"]["weights_fp32"], answer["parameters"]
    tensor, whole = weights["tensor"]
    assert whole * 2 < tensor < whole * 2.02  # 4 bytes of half of the elements, and the norms whole
    assert weights["fsdp2 x tensor"][0] == pytest.approx(whole, rel=0.01)
    pipeline, whole = weights["1f1b"]
    assert pipeline == pytest.approx(whole * 2, rel=0.01)


PHI = LLAMA | {"model_type": "phi3", "pad_token_id": None}


@pytest.mark.parametrize(
    ("model", "part"), [(PHI, "qkv_proj"), (EXPERTS, "mlp.experts")], ids=["phi3", "mixture"]
)
def test_a_layer_that_the_plan_for_sequence_parallel_does_not_know_is_refused(model, part):
    with pytest.raises(UserError, match="does not know this architecture's layers") as caught:
        trace(scenario("tensor, sequence").changed(model=model), timeline=False)
    assert part in str(caught.value) and "sequence_parallel: false" in str(caught.value)


@pytest.mark.few(0, 1)
@pytest.mark.parametrize("name", ["fsdp2 x tensor", "fsdp2 x tensor, sequence, loss, autocast"])
def test_layers_of_a_divided_model_are_composed(name, monkeypatch):
    """A deep model's step from shallow ones' is the step itself."""
    monkeypatch.setattr(layers, "WORTH", 5)  # though one of few layers is traced sooner
    record, composed = layers.Composed.record, []
    monkeypatch.setattr(
        layers.Composed, "record", lambda *given: composed.append(record(*given)) or composed[-1]
    )
    deep = scenario(name).changed(model=LAYERS | {"num_hidden_layers": 9})
    kind = kinds_of_ranks(deep)[0]
    whole, _ = traces._stepped(
        deep, "cpu", lambda each: prepare(each, "cpu"), kind, report=make_report
    )
    assert trace(deep, "cpu", timeline=False)["phases"] == whole.phases
    (only,) = composed
    assert only is not None
