"""Products in fewer bits, by torchao's own layers: what is predicted is what a CPU measures, to the byte."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS
from tests.dryfit.tracing.mesh_steps import FLOAT8_STEPS
from tests.dryfit.tracing.mesh_steps import scenario as on_a_mesh
from tests.repository import ROOT
from tests.tiers import selected

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="`make test-optimizers` runs it"
)
ON_A_CPU = [
    {"float8": "tensorwise"},
    {"float8": "rowwise"},
    {"float8": "rowwise_with_gw_hp"},
    {"qat": "mxfp4"},
]


def scenario(**fields) -> Scenario:
    common = {
        "model": DECODERS["qwen2"],
        "method": "full",
        "precision": "bf16",
        "sequence_length": 64,
        "micro_batch": 2,
    }
    return Scenario.from_mapping({**common, **fields})


@pytest.mark.few(0, 3)
@needs_torchao
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("fields", ON_A_CPU, ids=str)
def test_a_step_is_traced_to_the_byte(fields, checkpointing):
    asked = scenario(**fields, gradient_checkpointing=checkpointing)
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    assert predicted["phases"] == measured["phases"]
    assert predicted["components"] == measured["components"]


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """What two processes with gloo measured of each step on a mesh, by rank."""
    folder, names = tmp_path_factory.mktemp("float8"), sorted(selected(request, "name"))
    command = [sys.executable, "-m", "tests.dryfit.tracing.mesh_steps", str(folder), "2", *names]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.few(0, 2)
@needs_torchao
@pytest.mark.parametrize("name", FLOAT8_STEPS)
def test_two_processes_take_what_the_group_says(name, measured):
    """To the byte, in every phase of each process, as tests/dryfit/tracing/test_meshes.py compares them."""
    answer = trace(on_a_mesh(name), "cpu", timeline=False)
    for row in answer.get("ranks") or [{"ranks": [0, 1], "phases": answer["phases"]}]:
        found = [measured[rank][name]["phases"] for rank in row["ranks"]]
        assert row["phases"] == {phase: min(one[phase] for one in found) for phase in found[0]}


@needs_torchao
def test_weights_that_are_gathered_in_8_bits_take_half():
    wide = on_a_mesh("float8, fsdp2").changed(gradient_checkpointing=False)
    narrow = wide.changed(parallel={**wide.to_mapping()["parallel"], "float8_all_gather": True})
    found = [
        trace(step, timeline=False)["components_by_phase"]["forward"] for step in (wide, narrow)
    ]
    gathered, in_8_bits = (one["unsharded_parameters"] for one in found)
    assert in_8_bits < 0.75 * gathered  # embedding and head stay in 16 bits


@needs_torchao
def test_it_takes_no_less_than_16_bits_and_says_why():
    plain, small = (
        trace(scenario(), "cpu", timeline=False),
        trace(scenario(float8="rowwise"), "cpu", timeline=False),
    )
    assert small["peak_allocated_bytes"] >= plain["peak_allocated_bytes"]
    assert any("without the compiler" in note for note in small["notes"])


@needs_torchao
def test_nvfp4_is_traced_and_needs_a_gpu_to_be_measured():
    asked = scenario(qat="nvfp4")
    assert trace(asked, timeline=False)["peak_allocated_bytes"] > 0
    with pytest.raises(UserError, match="NVFP4 layers") as caught:
        measure(asked, "cpu")
    assert "mxfp4" in caught.value.allowed


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed here")
def test_without_torchao_the_requirement_is_named():
    with pytest.raises(UserError, match="needs the package torchao") as caught:
        trace(scenario(float8="rowwise"), timeline=False)
    assert "dryfit[optimizers]" in caught.value.write


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"float8": "rowwise", "method": "qlora"}, "full fine-tuning"),
        ({"qat": "nvfp4", "parallel": {"strategy": "fsdp2", "gpus": 2}}, "on one GPU"),
        ({"float8": "rowwise", "parallel": {"strategy": "zero3", "gpus": 2}}, "with FSDP2"),
        ({"float8": "rowwise", "qat": "mxfp4"}, "exchanges the same layers"),
        ({"float8": "blockwise"}, "float8"),
    ],
)
def test_what_it_is_not_predicted_with_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        scenario(**fields)
