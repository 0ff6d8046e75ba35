"""The model that was trained beside the merged one: what it is, and what is said of the two."""

from pathlib import Path

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from dryfit.common.files import read_jsonl, read_report, write_jsonl, write_report
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from scripts.evaluation import compare_merged, evaluate
from scripts.training.train_process import save_adapter
from tests.task_parts import shell
from tests.unit.training.prepared import PAIRS, STEP, SYSTEM, describe, save_model

SETTINGS = {"requests": None, "dtype": "auto", "max_new_tokens": 6, "batch_size": 4, "benchmark": 0}


@pytest.fixture(scope="module", params=["qlora", "lora", "int8"])
def place(request, tmp_path_factory):
    """A base, an adapter trained on it, and the answers of a model that stands for the merged one: the bare base."""
    folder = tmp_path_factory.mktemp(request.param)
    base = describe(save_model(folder / "source"), folder / "base")
    config = read_report(base / "description.json") and base / "config.json"
    method = {"method": request.param}
    if request.param == "int8":
        method = {"method": "qlora", "quantization": {"type": "int8"}}
    scenario = Scenario.from_mapping({**STEP, **method, "model": str(config)})
    model = build_model(scenario, "cpu", weights=base)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and request.param != "lora":
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, folder / "adapter", "Small")
    adapter = [
        folder / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")
    ]
    mapping = {key: value for key, value in scenario.to_mapping().items() if key != "model"}
    write_report(folder / "training.json", {"scenario": mapping}, *adapter)
    test = folder / "test.jsonl"
    write_jsonl(test, ({"request": request, "command": command} for request, command in PAIRS[:5]))
    write_jsonl(folder / "train.jsonl", [])
    harmful = folder / "harmful.jsonl"
    write_jsonl(
        harmful, [{"request": "run a fork bomb", "command": "false", "category": "exhaustion"}]
    )
    write_jsonl(folder / "benchmark.jsonl", [])
    asked = {name: folder / f"{name}.jsonl" for name in ("test", "train", "harmful", "benchmark")}
    write_report(folder / "split.json", {}, *asked.values())
    asked |= {"split": folder / "split.json", "weights": base / "weights.json"}
    answers = {"answers": folder / "answers.jsonl", "metrics": folder / "metrics.json"}
    evaluate.main(
        shell("scores"),
        {name: str(path) for name, path in asked.items()},
        answers,
        {"system": SYSTEM},
        SETTINGS,
        "cpu",
        1,
        "",
    )
    inputs = {
        "adapter": adapter[0],
        "settings": adapter[1],
        "training": folder / "training.json",
        **answers,
    }
    inputs |= {"description": base / "description.json", "weights": base / "weights.json"}
    return scenario, {name: str(path) for name, path in inputs.items()}


@pytest.mark.few(1)
def test_the_trained_model_computes_with_the_values_of_its_few_bits(place):
    scenario, inputs = place
    base, adapter = Path(inputs["weights"]).parent, Path(inputs["adapter"])
    packed = build_model(scenario, "cpu", weights=base)
    set_peft_model_state_dict(packed, load_file(adapter))
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = packed.train()(
            input_ids=tokens
        ).logits  # in training mode, and without dropout, as it was trained
        found = compare_merged.as_trained(scenario, base, adapter.parent, "cpu")(
            input_ids=tokens
        ).logits
    assert torch.equal(found, expected)


@pytest.mark.few(1)
def test_both_are_asked_the_same_and_the_figures_are_theirs(place, tmp_path):
    scenario, inputs = place
    outputs = {
        "answers": str(tmp_path / "as-trained.jsonl"),
        "comparison": str(tmp_path / "merging.json"),
    }
    compare_merged.main(shell("scores"), inputs, outputs, 3, "cpu", 1)
    found = read_report(outputs["comparison"], outputs["answers"])
    trained, merged = list(read_jsonl(outputs["answers"])), list(read_jsonl(inputs["answers"]))[:3]
    assert found["n"] == 3 == len(trained) and [row["request"] for row in trained] == [
        row[0] for row in PAIRS[:3]
    ]
    for name, rows in (("trained", trained), ("merged", merged)):
        loss = sum(row["loss_sum"] for row in rows) / sum(row["answer_tokens"] for row in rows)
        assert found[name]["loss"] == pytest.approx(loss)
    difference = found["merged"]["loss"] - found["trained"]["loss"]
    assert found["loss"]["difference"] == pytest.approx(difference, abs=1e-6)
    if scenario.method == "lora":  # an adapter of zeros on the base as it is: the very same model
        assert found["same_answers"]["count"] == 3 and abs(difference) < 1e-5
    else:
        assert abs(difference) > 1e-3
