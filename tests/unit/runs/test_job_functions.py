"""Functions of wildcards: what rules give Snakemake, called here as Snakemake calls them."""

import inspect
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dryfit.common import device
from dryfit.common.errors import UserError
from dryfit.common.files import write_report
from scripts.common.code_digests import ROOT
from scripts.runs.job_functions import (
    JobFunctions,
    asks_for_execution,
    code,
    exit_on_user_error,
    needed_by_evaluation,
    needed_by_step,
    threads_beside,
)
from scripts.runs.job_paths import DATASET, JobPaths

RUN = "smollm2-135m-r16"
WILDCARDS = {"run": RUN}
GIB = 1024**3


def functions(text: str = "{}") -> JobFunctions:
    """Those of the default configuration with differences."""
    return JobFunctions(yaml.safe_load(text))


def on_a_cluster(folder: Path) -> JobFunctions:
    """The same on a cluster of two kinds of GPU."""
    path = folder / "gpus.yaml"
    path.write_text(
        "- {gpu: a100-80gb, partition: large}\n- {gpu: t4, gres: t4, partition: gpu}\n",
        encoding="utf-8",
    )
    return functions(f"cluster: {{gpus: {path}}}")


def test_wildcards_and_targets_are_those_of_each_run() -> None:
    asked = functions()
    assert (
        asked.path_of(f"{DATASET}/acquire.json")(WILDCARDS)
        == "results/dataset/embedded/acquire.json"
    )
    assert asked.path_of("{run}/a", "{run}/b")(WILDCARDS) == [f"{RUN}/a", f"{RUN}/b"]
    assert asked.from_settings(lambda settings: settings["lora"]["rank"])(WILDCARDS) == 16
    assert (
        asked.settings_section("memory", "gate")(WILDCARDS)
        == asked.runs.named[RUN]["memory"]["gate"]
    )
    assert (
        asked.from_job(JobPaths.step_comparison)(WILDCARDS)
        == f"results/{RUN}/memory/qlora/compare.json"
    )
    assert not {"cluster", "publish"} & set(functions().runs.named[RUN])
    assert functions("cluster: {container: 'docker://image'}").container == "docker://image"
    assert functions().container is None
    asked = functions("lora: {rank: [4, 8]}")
    assert asked.each_run("results/{run}/a")(None) == [
        "results/smollm2-135m-r4/a",
        "results/smollm2-135m-r8/a",
    ]
    assert len(asked.each_run(JobPaths.exports)(None)) == 4


def test_one_run_is_published_at_a_time() -> None:
    assert functions().each_run(functions().publication)(None) == [
        f"results/{RUN}/publish/plan.json"
    ]
    uploaded = functions("publish: {upload: true}")
    assert (
        uploaded.publication(JobPaths.of(uploaded.runs, WILDCARDS))
        == f"results/{RUN}/publish/published.json"
    )
    two = functions("lora: {rank: [4, 8]}")
    with pytest.raises(UserError, match="Only one run can be published"):
        two.publication(JobPaths.of(two.runs, {"run": "smollm2-135m-r4"}))


def test_an_error_for_people_ends_snakemake_with_the_message_alone() -> None:
    with pytest.raises(SystemExit, match="no run of this name: other-r1"):
        functions().path_of("{run}")({"run": "other-r1"})
    with pytest.raises(SystemExit, match=r"memory\.model is not a model"):
        exit_on_user_error(functions, "memory: {model: qwen}")


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["execute"], True),
        (["mine_execute"], True),
        (["results/x-r4/evaluation/execution.json"], True),
        (["results/x-r4/evaluation/execution.jsonl"], True),
        (["all", "--config", "execution=1"], False),
        (["executed"], False),
    ],
)
def test_only_a_command_that_names_execution_runs_answers(
    arguments: list[str], asked: bool
) -> None:
    assert asks_for_execution(shlex.join(arguments)) is asked


def test_execution_and_paths_follow_the_settings() -> None:
    assert not functions().executes()
    benchmark = f"{{requirement: icalfa==0.3.6, sha256: {'a' * 64}, license: MIT, requests: 4}}"
    asked = functions(
        f"{{evaluation: {{execution: bubblewrap}}, dataset: {{benchmark: {benchmark}}}}}"
    )
    assert asked.executes()
    measured = functions().paths_where(
        lambda settings: settings["training"]["parallel"]["gpus"] == 1
    )
    one, two = (
        measured("results/{run}/a.json"),
        measured("results/{run}/a.json", "results/{run}/b.json"),
    )
    assert one(WILDCARDS).endswith("/a.json") and len(two(WILDCARDS)) == 2
    assert functions().paths_where(lambda settings: None)("results/{run}/a.json")(WILDCARDS) == []


@pytest.mark.thorough
def test_the_code_is_one_digest_and_missing_inputs_are_named_beside_it() -> None:
    params, gone = code("memory/trace.py"), ["results/missing.json"]
    digest = params["code"]
    assert digest(WILDCARDS, input=[]) != code("memory/compare.py")["code"](WILDCARDS, input=[])
    assert digest(WILDCARDS, input=[]) == digest(WILDCARDS, input=gone)
    assert "missing.json" in params["missing"](WILDCARDS, input=gone)
    assert params["missing"](WILDCARDS, input=[]) == "missing: nothing"


def test_without_a_cluster_nothing_is_asked_of_one() -> None:
    asked = functions()
    assert asked.on_cluster("gres", needed_by_step)(WILDCARDS, None) is None
    assert asked.minutes_of_training(WILDCARDS, None) == 720
    assert asked.gpus_of_cluster(WILDCARDS, None) == []
    assert [threads_beside(cores) for cores in (None, 1, 2, 4, 9, 64)] == [8, 1, 1, 3, 8, 8]
    asked = functions()
    for function in (
        asked.minutes_of_training,
        asked.gpus_of_cluster,
        asked.on_cluster("gres", needed_by_step),
    ):
        assert list(inspect.signature(function).parameters) == ["wildcards", "input"]


def test_a_job_takes_no_gpu_where_the_processor_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    several = "training: {loss: full, packing: none, rows_per_step: null, parallel: {strategy: ddp, gpus: 2}, "
    for found, place, here, takes in (
        (0, "auto", True, 0),
        (2, "auto", True, 2),
        (2, "cpu", True, 0),
        (0, "cuda", True, 2),  # refused before the first job
        (0, "auto", False, 2),  # another machine may have them
    ):
        monkeypatch.setattr(device, "cuda_devices", lambda found=found: found)
        asked = JobFunctions(yaml.safe_load(f"{several}device: {place}}}"), lambda here=here: here)
        assert asked.gpus_of_training(WILDCARDS) == asked.gpus_of_this_machine(WILDCARDS) == takes
        assert (
            asked.gpu(WILDCARDS)
            == asked.gpu({"model": "smollm2-135m-instruct", "dataset": "embedded"})
            == bool(takes)
        )
    hub = (ROOT / "config/qwen2.5-coder-7b.yaml").read_text(encoding="utf-8")
    monkeypatch.setattr(device, "cuda_devices", lambda: 0)
    asked = functions(hub)
    assert asked.gpu({"run": next(iter(asked.runs.named))}) == 1, (
        "two models of any size may not fit the host's memory"
    )


def test_on_a_cluster_a_job_asks_for_the_smallest_gpu_that_holds_it(tmp_path: Path) -> None:
    asked = on_a_cluster(tmp_path)
    assert asked.gpus_of_cluster(WILDCARDS, None) == ["t4", "a100-80gb"]
    assert asked.gpus_of_this_machine(WILDCARDS) is None
    for size, partition, gres in ((GIB, "gpu", "t4"), (40 * GIB, "large", None)):
        report = tmp_path / f"{partition}.json"
        write_report(report, {"trace": {"required_bytes": size}, "hours": None})
        step = SimpleNamespace(get=lambda name, report=report: str(report), gate=str(report))
        assert asked.on_cluster("partition", needed_by_step)(WILDCARDS, step) == partition
        assert asked.on_cluster("gres", needed_by_step)(WILDCARDS, step) == gres
        assert asked.minutes_of_training(WILDCARDS, step) == 720
    weights = tmp_path / "weights.json"
    write_report(weights, {"bytes": 30 * GIB})
    weights.with_suffix("").mkdir()
    job = {"weights": str(weights.with_suffix(""))}
    assert asked.on_cluster("partition", needed_by_evaluation)(WILDCARDS, job) == "large"
    weights.write_text(json.dumps({"bytes": GIB}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"weights\.json"):
        asked.on_cluster("partition", needed_by_evaluation)(WILDCARDS, job)


def test_runs_whose_profiles_have_other_scenarios_are_refused() -> None:
    """The answers for all scenarios are outputs of one job, and a rule has the same outputs in each run."""
    assert functions().names_in_profile() == (
        ["qlora"],
        ["full-fp32", "full-bf16-mixed", "full-bf16"],
    )
    one, other = (
        "{model: llama-3.2-1b}",
        "{model: qwen3-0.6b, scenarios: {full-bf16: {method: lora}}}",
    )
    asked = functions(f"sweep: [{{memory: {one}}}, {{memory: {other}}}]")
    with pytest.raises(
        UserError, match="differ in the scenarios of their memory profile"
    ) as caught:
        asked.names_in_profile()
    assert "full-bf16" in caught.value.found and "--configfile" in caught.value.write
