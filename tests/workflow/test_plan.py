"""Plans from nothing: what each configuration would run, and how a wrong one ends."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dryfit.common.device import cuda_devices
from dryfit.common.files import read_report
from tests.dryfit.scenario.models_server import COMMIT, ModelsServer
from tests.end_to_end import chain
from tests.workflow.plan import make_believe, planned, planned_text, recorded_params, snakemake

TINY = chain.CONFIGURATION.relative_to(chain.ROOT)


@pytest.fixture
def project(tmp_path):
    """A fresh checkout, without results."""
    return chain.checkout(tmp_path)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """What the default configuration plans."""
    return planned(chain.checkout(tmp_path_factory.mktemp("default")))


def test_the_default_run_plans_the_whole_chain(default):
    assert {
        *("acquire_dataset", "clean_dataset", "screen_dataset", "split_dataset", "encode_dataset"),
        *("download_gguf", "describe_model", "fetch_weights"),
        *(
            "profile_adapters",
            "profile_full",
            "trace_memory",
            "measure_memory",
            "compare_memory",
            "gate_memory",
        ),
        *("train_adapter", "merge_adapter", "verify_merge"),
        *("evaluate_base", "evaluate_tuned", "compare_merged", "compare_models"),
        *("draw_memory", "draw_figures", "render_documents", "render_memory_profile"),
    } <= default
    assert (
        not {"export_gguf", "prepare_publication", "upload_publication"} & default
    )  # each is asked for by name


@pytest.mark.parametrize(
    ("words", "text", "rules", "others"),
    [
        (
            ["--configfile", "config/qwen2.5-coder-7b.yaml"],
            "",
            {"fetch_weights", "train_adapter"},
            {"download_gguf"},
        ),
        # A cluster, before anything is there whose size decides the GPU.
        (
            ["--configfile", "own.yaml"],
            "cluster: {gpus: profiles/slurm/gpus.yaml}",
            {"train_adapter", "evaluate_tuned"},
            set(),
        ),
        (["export"], "", {"export_gguf"}, set()),
        (["publish"], "", {"prepare_publication"}, {"upload_publication"}),
        (
            ["--configfile", "own.yaml", "--", "publish"],
            "publish: {adapter: owner/name, upload: true}",
            {"upload_publication"},
            set(),
        ),
        # A step on several GPUs is trained, and not measured by one process.
        (
            ["--configfile", "own.yaml"],
            "training: {parallel: {strategy: ddp, gpus: 2}}",
            {"trace_memory", "gate_memory", "train_adapter", "compare_memory"},
            {"measure_memory"},
        ),
    ],
)
def test_what_another_configuration_or_target_plans(project, words, text, rules, others):
    (project / "own.yaml").write_text(text, encoding="utf-8")
    found = planned(project, *words)
    assert rules <= found and not others & found


def test_a_person_can_follow_the_rule_graph(project):
    """A later report carries earlier ones, so that few arrows lead into the documents."""
    for configuration in ((), ("--configfile", TINY), ("--configfile", "config/cpu-hour.yaml")):
        assert snakemake(project, "--rulegraph", *configuration).stdout.count("->") <= 60


def test_the_benchmark_is_asked_and_its_answers_are_executed_only_on_request(project, default):
    hour = "--configfile", "config/cpu-hour.yaml"
    rules = planned(project, *hour)
    assert "fetch_benchmark" in rules and "execute_answers" not in rules
    assert rules | {"execute_answers"} == planned(project, "execute", *hour)
    assert "execute_answers" in planned(
        project, "results/smollm2-135m-hour-r16/evaluation/execution.json", *hour
    )
    executed = planned(project, "--configfile", "config/intercode-alfa.yaml")
    assert {"fetch_benchmark", "execute_answers"} <= executed
    assert default == executed - {"fetch_benchmark", "execute_answers"}


def profiling(project, model):
    (project / "model.yaml").write_text(f"memory: {{model: {model}}}\n", encoding="utf-8")
    return "--configfile", "model.yaml"


@pytest.mark.thorough
def test_a_model_of_the_hub_is_profiled_and_only_its_job_asks_the_hub(
    project, monkeypatch, tmp_path
):
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    config = json.loads(
        (chain.ROOT / "config" / "models" / "qwen3-0.6b.json").read_text(encoding="utf-8")
    )
    with ModelsServer({"Owner/Tiny": config, "owner/closed": "gated"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        target = "results/memory/owner--tiny/full-bf16/estimate.json"
        assert {"fetch_configuration"} < planned(project, *profiling(project, "Owner/Tiny"))
        assert server.requests == []
        done = snakemake(project, target, *profiling(project, "Owner/Tiny"))
        assert done.returncode == 0, done.stderr
        fetched = read_report(project / "results/memory/owner--tiny/fetched.json")
        assert fetched["commit"] == COMMIT and fetched["repository"] == "Owner/Tiny"
        scenario = read_report(project / target)["scenario"]
        assert (
            scenario["model_name"] == "Owner/Tiny"
            and scenario["model"]["hidden_size"] == config["hidden_size"]
        )
        done = snakemake(
            project, "results/memory/owner--closed/config.json", *profiling(project, "owner/closed")
        )
        assert done.returncode == 1 and "gated" in done.stderr and "HF_TOKEN" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is never a sandbox")
def test_a_sandbox_that_is_not_there_stops_before_anything_is_computed(
    project, tmp_path, monkeypatch
):
    (tmp_path / "bin").mkdir()
    for path in Path("/usr/bin").iterdir():
        if path.name != "bwrap":
            (tmp_path / "bin" / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = snakemake(project, "--configfile", "config/intercode-alfa.yaml")
    assert (
        done.returncode == 1
        and "Nothing was executed" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert "apt-get install bubblewrap" in done.stderr and not (project / "results").exists()


ORDER = """
import json
from pathlib import Path
from scripts.runs.alone import jobs
for job in jobs(Path("config/config.yaml"), cores=2):
    said = {"rule": job.rule.name, "priority": job.rule.priority, "before_gate": job.resources.get("before_gate", 0)}
    said["threads"] = job.threads
    limits = {name: job.rule.workflow.global_resources[name].value for name in ("gpu", "before_gate")}
    print(json.dumps({**said, "inputs": list(map(str, job.input)), "outputs": list(map(str, job.output))}))
print(json.dumps(limits))
"""


@pytest.mark.thorough
def test_nothing_that_costs_comes_before_the_runs_price(project):
    """What price and gate wait for goes first and keeps the download waiting, on any number of cores."""
    command, environ = [sys.executable, "-c", ORDER], {**os.environ, "PYTHONPATH": str(chain.ROOT)}
    done = subprocess.run(
        command, cwd=project, env=environ, capture_output=True, text=True, check=True
    )
    *jobs, limits = done.stdout.splitlines()
    jobs = [json.loads(line) for line in jobs]
    maker = {path: job for job in jobs for path in job["outputs"]}
    early = [job for job in jobs if job["rule"] in ("check_resources", "gate_memory")]
    for job in early:  # grows while it is walked
        early += [
            maker[path] for path in job["inputs"] if path in maker and maker[path] not in early
        ]
    assert {"acquire_dataset", "describe_model", "encode_dataset", "trace_memory"} <= {
        job["rule"] for job in early
    }
    assert not [job for job in early if job["priority"] < 99 or job["before_gate"] != 1]
    late = [
        job
        for job in jobs
        if job["rule"] in ("evaluate_base", "fetch_weights", "measure_memory", "train_adapter")
    ]
    assert len(late) == 4 and not [job for job in late if job["priority"] >= 99]
    threads = {job["rule"]: job["threads"] for job in jobs}
    assert (threads["train_adapter"], threads["evaluate_base"]) == (2, 1)  # of two cores
    priority = {job["rule"]: job["priority"] for job in jobs}
    assert (
        priority["fetch_weights"]
        == priority["train_adapter"]
        > priority["evaluate_base"]
        == priority["plan_memory"]
    )
    assert json.loads(limits) == {"gpu": 1, "before_gate": 1000}, "without a profile too"
    (download,) = [job["before_gate"] for job in late if job["rule"] == "fetch_weights"]
    profile = yaml.safe_load((project / "profiles/default/config.yaml").read_text(encoding="utf-8"))
    assert f"before_gate={download}" in profile["resources"]


@pytest.mark.thorough
def test_a_path_says_what_its_job_does(project):
    """The configured rank is 16."""
    adapter = "results/smollm2-135m-r64/adapter/adapter_model.safetensors"
    make_believe(project, adapter)
    assert "'rank': 64" in recorded_params(project, adapter)
    assert "'rank': 64" in recorded_params(
        project, "results/smollm2-135m-r64/memory/training/trace.json"
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("results/dataset/another/clean.jsonl", "dataset.name: embedded"),
        (
            "results/smollm2-135m-r16/memory/another/trace.json",
            "full-fp32, full-bf16-mixed, full-bf16-fp32-states, full-bf16, qlora",
        ),
    ],
)
def test_a_path_that_the_configuration_does_not_know_is_an_error_that_shows_what_it_knows(
    project, path, known
):
    (project / path).parent.mkdir(parents=True)
    (project / path).write_text(
        '{"of": "another configuration"}'
    )  # what lies there must not pass for the answer
    done = snakemake(project, "--dry-run", path)
    assert done.returncode == 1 and known in done.stderr and "Traceback" not in done.stderr, (
        done.stderr[-3000:]
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainning: {}", ["Unknown key: trainning"]),
        (
            "training: {epochs: 2}\nlora: {rank: 8}\ntraining: {max_steps: 9}",
            ["'training' stands here twice", "1 and 3"],
        ),
    ],
)
def test_a_wrong_configuration_stops_at_the_start(project, text, words):
    (project / "wrong.yaml").write_text(text, encoding="utf-8")
    done = snakemake(project, "--dry-run", "--configfile", "wrong.yaml")
    assert done.returncode != 0
    for word in words:
        assert word in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_values_on_the_command_line_have_the_schemas_types(project):
    """Snakemake reads what stands in a mapping as text."""
    training = "training={learning_rate: 1.0e-3, max_steps: null, gradient_checkpointing: true}"
    said = planned_text(project, "--config", "lora={rank: [8, 4], alpha: 16}", training)
    assert "results/smollm2-135m-r8/" in said and "results/smollm2-135m-r4/" in said
    done = snakemake(project, "--dry-run", "--config", "lora={rank: many}")
    assert done.returncode == 1 and "Wrong value for lora.rank" in done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout in which the tiny run passes as finished, and its files."""
    folder = chain.checkout(tmp_path_factory.mktemp("made"))
    return folder, make_believe(folder, "--configfile", TINY)


def test_every_file_is_asked_for_by_a_rule_or_is_what_the_run_is_for(made):
    """The class behind "nothing to be done" over a hole: a file that nobody reads would never be missed."""
    project, paths = made
    table = snakemake(project, "--detailed-summary", "--configfile", TINY).stdout
    rows = list(csv.DictReader(table[table.index("output_file\t") :].splitlines(), delimiter="\t"))
    read = {path for row in rows for path in row["input-file(s)"].split(",")}
    asked = re.search(
        r"^rule all:\n +input: (.*)$",
        planned_text(project, "--forceall", "--configfile", TINY),
        re.MULTILINE,
    )
    assert set(paths) - read <= set(asked[1].split(", "))  # what is asked for may be read besides


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("target", "missing", "rules"),
    [
        ("all", "results/dataset/tiny/raw.rejected.jsonl", {"acquire_dataset", "clean_dataset"}),
        (
            "merge",
            f"{chain.RUN}/adapter/adapter_model.safetensors",
            {"train_adapter", "merge_adapter"},
        ),
        (
            f"{chain.RUN}/MODEL_CARD.md",
            f"{chain.RUN}/memory/qlora/trace.json",
            {"profile_adapters", "render_documents"},
        ),
    ],
)
def test_what_a_failed_job_has_taken_away_is_missed_by_each_target(made, target, missing, rules):
    project, _ = made
    aside = (project / missing).rename(project / "aside")
    try:
        assert rules <= planned(project, "--configfile", TINY, "--", target)
    finally:
        aside.rename(project / missing)


@pytest.mark.thorough
def test_a_failed_run_fails_again_and_leaves_no_old_document(tmp_path):
    """A file of one's own whose header breaks, over a finished run."""
    project = chain.checkout(tmp_path)
    source = {"type": "files", "license": "unknown", "paths": ["own.csv"]}
    own = {"dataset": {"name": "own", "sources": [source]}, "run": {"name": "own"}}
    (project / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    (project / "own.csv").write_text("request,command\nlist the files,ls\n", encoding="utf-8")
    make_believe(project, "--configfile", "own.yaml")
    (project / "own.csv").write_text("question,answer\nlist the files,ls\n", encoding="utf-8")
    card, adapter = (
        "results/own-r16/MODEL_CARD.md",
        "results/own-r16/adapter/adapter_model.safetensors",
    )
    for _ in range(2):
        done = snakemake(project, "--configfile", "own.yaml")
        assert done.returncode == 1 and "request" in done.stderr, done.stderr[-2000:]
        assert not (project / card).exists()
        assert (project / adapter).exists(), "what cost time stays"
        assert adapter in (project / "results" / "own-r16" / "OUTDATED.txt").read_text(
            encoding="utf-8"
        )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("target", "differences", "words"),
    [
        (
            "all",
            {
                "memory": {
                    "scenarios": {
                        "qlora": {"method": "qlora", "precision": "bf16", "sequence_length": 10**8}
                    }
                }
            },
            ["memory.scenarios.qlora", "at most 16777216", "sequence_length: 512"],
        ),
        (
            "gate",
            {"lora": {"target_modules": ["nosuch_proj"]}},
            ["nosuch_proj", "q_proj", "write:"],
        ),
    ],
    ids=["too long", "no such module"],
)
def test_what_can_not_be_stops_the_same_command_each_time_and_touches_nothing(
    made, tmp_path, target, differences, words
):
    project, paths = made
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(differences), encoding="utf-8")
    before = {path: (project / path).stat().st_mtime_ns for path in paths}
    for _ in range(2):
        done = snakemake(project, "--configfile", TINY, tmp_path / "wrong.yaml", "--", target)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert all(word in done.stderr for word in words), done.stderr[-2000:]
    assert {path: (project / path).stat().st_mtime_ns for path in paths} == before


@pytest.mark.thorough
def test_results_without_a_record_do_not_pass_as_new(made, tmp_path):
    """Of an older version, or copied without their .snakemake: Snakemake would go by their times alone."""
    project, _ = made
    other = chain.checkout(tmp_path / "other")
    shutil.copytree(project / "results", other / "results")
    done = snakemake(other, "--configfile", TINY)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "has no record of what a result was made with" in done.stderr
        and "mv results" in done.stderr
    )
    assert snakemake(other, "--configfile", TINY, "--touch", "--forceall").returncode == 0, (
        "what the message offers"
    )
    assert planned(other, "--configfile", TINY) == set()
    for spoil in (lambda path: path.write_text("{"), Path.unlink):
        for path in (other / ".snakemake" / "metadata").rglob("*"):
            if path.is_file():
                spoil(path)
        done = snakemake(other, "--configfile", TINY, "--dry-run")
        assert done.returncode == 1 and "no record of what a result was made with" in done.stderr, (
            done.stderr[-2000:]
        )


@pytest.mark.skipif(cuda_devices() > 0, reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_stops_before_anything_is_touched(made):
    project, paths = made
    (project / "cuda.yaml").write_text("training: {device: cuda}\n", encoding="utf-8")
    before = {path: (project / path).stat().st_mtime_ns for path in paths}
    done = snakemake(project, "--configfile", TINY, "cuda.yaml")
    assert (
        done.returncode == 1 and "No CUDA device" in done.stderr and "device: auto" in done.stderr
    )
    assert {path: (project / path).stat().st_mtime_ns for path in paths} == before
