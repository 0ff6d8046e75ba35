"""What wildcards name: settings and paths, without Snakemake."""

import json
from pathlib import Path

import pytest
import yaml

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from scripts.common.code_digests import ROOT
from scripts.runs import run_scenarios
from scripts.runs.configuration import with_defaults
from scripts.runs.job_paths import BASE, ENCODED, JobPaths, project_file, project_files
from scripts.runs.run_scenarios import answer_settings
from scripts.runs.runs import Runs

RUN = "smollm2-135m-r16"
# The data of config/cpu-hour.yaml, which has a benchmark and examples; a mapping that is still open.
HOUR = f"{{dataset: {json.dumps(read_yaml(ROOT / 'config' / 'cpu-hour.yaml')['dataset'])}"


def paths(text: str = "{}", **names: str) -> JobPaths:
    """The paths of a job with these wildcards, of the default configuration with differences."""
    return JobPaths.of(Runs(with_defaults(yaml.safe_load(text))), names)


def test_a_run_fills_in_dataset_model_length_rank_and_exports() -> None:
    job = paths(run=RUN)
    assert job.fill(f"{BASE}/config.json", f"{ENCODED}/train.parquet") == [
        "results/models/smollm2-135m-instruct/config.json",
        "results/dataset/embedded/encoded/smollm2-135m-instruct-448/train.parquet",
    ]
    assert paths(run="smollm2-135m-r64").settings["lora"]["rank"] == 64
    kinds = [Path(path).parent.name for path in paths(run=RUN).exports()]
    assert kinds == ["f32", "q8_0"]
    halved = paths("merging: {dtype: bfloat16}", run=RUN).exports()
    assert [Path(path).parent.name for path in halved] == ["bf16", "q8_0"]
    assert answer_settings(paths(run=RUN).settings)["benchmark"] == 0
    assert answer_settings(paths(f"{HOUR}}}", run=RUN).settings)["benchmark"] is None, "all"


@pytest.mark.parametrize(
    "names",
    [
        {"run": RUN},
        {"profiled": "qwen2.5-coder-7b"},
        {"dataset": "embedded"},
        {"dataset": "embedded", "model": "smollm2-135m-instruct"},
    ],
)
def test_each_kind_of_wildcards_names_the_settings(names: dict[str, str]) -> None:
    assert paths(**names).settings["dataset"]["name"] == "embedded"


def test_the_profile_divides_into_scenarios_with_a_rank_and_without() -> None:
    assert paths(run=RUN).profile_comparisons() == [
        "results/memory/qwen2.5-coder-7b/full-fp32/compare.json",
        "results/memory/qwen2.5-coder-7b/full-bf16-mixed/compare.json",
        "results/memory/qwen2.5-coder-7b/full-bf16-fp32-states/compare.json",
        "results/memory/qwen2.5-coder-7b/full-bf16/compare.json",
        f"results/{RUN}/memory/qlora/compare.json",
    ]
    assert paths(run=RUN).step_comparison() == f"results/{RUN}/memory/qlora/compare.json"
    job = paths(run=RUN)
    assert job.profiled_config().endswith("config/models/qwen2.5-coder-7b.json")
    with_rank, without = job.scenarios_of_profile(True), job.scenarios_of_profile(False)
    assert (list(with_rank), list(without)) == (
        ["qlora"],
        ["full-fp32", "full-bf16-mixed", "full-bf16-fp32-states", "full-bf16"],
    )
    assert with_rank["qlora"]["lora"]["rank"] == 16 and "model" not in with_rank["qlora"]
    assert paths(run=RUN, scenario="training").step_config().endswith("/config.json")
    with pytest.raises(
        UserError, match="full-fp32, full-bf16-mixed, full-bf16-fp32-states, full-bf16, qlora"
    ):
        paths(run=RUN, scenario="another").step_config()


def test_what_the_configuration_leaves_out_is_no_input() -> None:
    job = paths("merging: {compare_requests: 0}", run=RUN)
    assert job.by_execution(False) == job.more_evaluations(False) == job.merging_comparison() == []
    full = paths(f"{HOUR}, evaluation: {{execution: bubblewrap}}}}", run=RUN)
    assert len(full.more_evaluations(False)) == 2 and len(full.merging_comparison()) == 2


def test_a_score_is_an_input_once_it_is_asked_for_or_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job, score = paths(f"{HOUR}}}", run=RUN), Path(f"results/{RUN}/evaluation/execution.json")
    assert job.by_execution(False) == [] and job.by_execution(True) == job.executed() == str(score)
    score.parent.mkdir(parents=True)
    score.touch()
    assert job.by_execution(False) == str(score) and len(job.more_evaluations(False)) == 2
    without = paths(run=RUN)
    assert without.by_execution(False) == []
    with pytest.raises(UserError, match="no answers to run"):
        without.by_execution(True)


def test_a_data_file_is_an_input_once_it_is_there(tmp_path: Path) -> None:
    there, missing = tmp_path / "there.jsonl", tmp_path / "missing.jsonl"
    there.touch()
    sources = f"[{{type: files, license: MIT, paths: [{there}, {missing}]}}]"
    found = paths(f"dataset: {{sources: {sources}}}", run=RUN).source_files()
    assert str(there) in found and str(missing) not in found


@pytest.mark.parametrize(
    ("written", "device", "dtype"),
    [
        ("auto", "cpu", "bfloat16"),
        ("auto", "cuda", "auto"),
        ("float32", "cpu", "float32"),
    ],
)
def test_models_answer_in_bf16_on_a_processor_that_is_faster_in_it(
    written: str, device: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_scenarios, "multiplies_bf16", lambda: True)
    settings = paths(
        f"{{evaluation: {{dtype: {written}}}, training: {{device: {device}}}}}", run=RUN
    ).settings
    assert answer_settings(settings)["dtype"] == dtype
    monkeypatch.setattr(run_scenarios, "multiplies_bf16", lambda: False)
    assert answer_settings(settings)["dtype"] == written


def test_files_of_the_project_are_relative_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert project_file("config/gpus.yaml") == "config/gpus.yaml"
    monkeypatch.chdir(tmp_path)
    assert project_file("config/gpus.yaml") == str(ROOT / "config/gpus.yaml")
    assert project_files("config/gpus.y*ml") == [str(ROOT / "config/gpus.yaml")]
