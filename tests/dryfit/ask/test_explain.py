"""What is alive at the peak, by name: the parts are the whole, and a person finds each tensor."""

import json

import pytest

from dryfit.ask.command import main
from dryfit.ask.explain import explain, table
from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from tests.dryfit.decoders import DECODERS


@pytest.fixture(scope="module")
def answer():
    fields = {"sequence_length": 512, "micro_batch": 2, "precision": "bf16"}
    return explain(Scenario.from_mapping({"model": DECODERS["qwen2"], **fields}), count=100_000)


def test_the_tensors_are_the_peak_each_with_its_module_and_line(answer):
    rounding = answer["components"]["allocator_rounding"]
    assert (
        sum(row["bytes"] for row in answer["tensors"]) + rounding == answer["peak_allocated_bytes"]
    )
    sizes = [row["bytes"] for row in answer["tensors"]]
    assert sizes == sorted(sizes, reverse=True)
    mlp = [
        row
        for row in answer["tensors"]
        if row["shape"] == [2, 512, 96] and row["component"] == "activations"
    ]
    assert mlp and all(row["dtype"] in ("bfloat16", "float32") for row in mlp)
    assert any(".layers.1.mlp" in row["module"] and ".py:" in row["line"] for row in mlp)
    weight = next(row for row in answer["tensors"] if row["component"] == "weights_4bit")
    assert weight["module"].endswith("_proj.base_layer") and weight["operator"] == "weight"
    adapter = next(row for row in answer["tensors"] if row["component"] == "adapters")
    assert "lora_" in adapter["module"]
    assert f"in the {answer['peak_phase']} phase" in table(
        {**answer, "tensors": answer["tensors"][:2]}
    )


def test_layers_that_are_alike_are_one_line():
    fields = {"sequence_length": 64, "model": DECODERS["qwen2"]}
    rows = explain(Scenario.from_mapping(fields), layers=True, count=1000)["tensors"]
    assert {row["times"] for row in rows if row["component"] == "weights_4bit"} == {2}
    assert any(".layers.*.mlp.down_proj" in row["module"] for row in rows)


@pytest.mark.thorough
def test_a_table_for_people_and_json_for_programs(tmp_path, capsys):
    (tmp_path / "model.json").write_text(json.dumps(DECODERS["qwen2"]))
    file = tmp_path / "scenario.yaml"
    file.write_text("model: model.json\nsequence_length: 64\n")
    assert main(["explain", str(file), "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(
        number for number, line in enumerate(lines) if line.startswith("peak ") and "phase" in line
    )
    assert lines[begin + 5].endswith("%") and lines[begin + 1].split()[:2] == ["bytes", "times"]
    assert main(["explain", str(file), "--json", "--layers"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["tensors"]) == 10 and any(row["times"] == 2 for row in answer["tensors"])
    with pytest.raises(UserError, match="does not use --count; explain does"):
        main([str(file), "--count", "3"])
