"""What reruns when something changes: the table in docs/guide.md, each row on a dry run over a run that passes as made.

That a real run leaves nothing to do is tests/end_to_end's to show.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.end_to_end import chain
from tests.workflow.plan import (
    edited,
    make_believe,
    planned,
    planned_jobs,
    planned_text,
    recorded_params,
    snakemake,
)

DATASET = {"acquire_dataset", "clean_dataset", "screen_dataset", "split_dataset"}
MODEL = {"download_gguf", "describe_model", "fetch_weights"}
RANKED_MEMORY = {
    "profile_adapters",
    "trace_memory",
    "measure_memory",
    "compare_memory",
    "gate_memory",
    "plan_memory",
    "check_resources",
}
DOCUMENTS = {
    "draw_memory",
    "draw_figures",
    "record_provenance",
    "render_documents",
    "render_memory_profile",
}
TRAINED = {"train_adapter", "merge_adapter", "verify_merge", "evaluate_tuned", "compare_models"}
TRAINED |= {"compare_merged"}
ASKED = {"evaluate_base", "evaluate_tuned", "compare_models"}
TINY = chain.CONFIGURATION.relative_to(chain.ROOT)
Plan = Callable[..., set[str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the tiny chain passes as made. Tests put back what they edit."""
    folder = chain.checkout(tmp_path_factory.mktemp("reruns"))
    make_believe(folder, "--configfile", TINY)
    return folder


@pytest.fixture
def plan(project: Path, tmp_path: Path) -> Plan:
    """A function from differences to the finished run's configuration to the rules that a dry run plans."""

    def plan_with(differences: dict | None = None) -> set[str]:
        path = tmp_path / "differences.yaml"
        path.write_text(yaml.safe_dump(differences or {}), encoding="utf-8")
        return planned(project, "--configfile", TINY, path)

    return plan_with


def test_nothing_changed_nothing_runs(plan):
    assert plan() == set()


def test_a_changed_rank_plans_exactly_what_depends_on_it(plan, project, tmp_path):
    assert plan({"lora": {"rank": 8}}) == RANKED_MEMORY | TRAINED | DOCUMENTS
    # Of the memory profile, only the scenarios with adapters; of the data, nothing.
    path = tmp_path / "rank.yaml"
    path.write_text("lora: {rank: 8}\n", encoding="utf-8")
    said = snakemake(project, "--dry-run", "--configfile", TINY, path)
    missing = re.findall(r"Missing output files: ([^;\n]+)", said.stdout + said.stderr)
    run = f"results/{chain.SETTINGS['run']['name']}-r8/"
    assert missing and all(
        output.startswith(run) for outputs in missing for output in outputs.split(", ")
    )


@pytest.mark.thorough
def test_going_back_to_the_old_rank_runs_nothing(plan, project, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("lora: {rank: 8}\n", encoding="utf-8")
    gate = f"results/{chain.SETTINGS['run']['name']}-r8/memory/training/gate.json"
    assert gate in make_believe(project, "--configfile", TINY, other, "--", gate)
    assert plan() == set()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("differences", "expected", "spared"),
    [
        (
            "training: {learning_rate: 5.0e-4}",
            TRAINED,
            DATASET | MODEL | {"evaluate_base", "trace_memory"},
        ),
        (
            "training: {validate_every_steps: 1, early_stopping_patience: 2, schedule: wsd}",
            TRAINED,
            DATASET | MODEL | RANKED_MEMORY | {"evaluate_base", "encode_dataset"},
        ),
        (
            "training: {sequence_length: 80}",
            {"encode_dataset", "trace_memory"},
            DATASET | MODEL | {"evaluate_base"},
        ),
        (
            "prompt: {system: Answer with a command.}",
            {"encode_dataset", "evaluate_base"},
            DATASET | MODEL,
        ),
        (
            "evaluation: {max_new_tokens: 9}",
            ASKED,
            DATASET | MODEL | {"train_adapter", "merge_adapter"},
        ),
    ],
)
def test_a_changed_setting_reruns_what_reads_it(plan, differences, expected, spared):
    rules = plan(yaml.safe_load(differences))
    assert expected <= rules and not rules & spared


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ("training: {threads: 2}", set()),
        ("lora: {alpha: 5}", TRAINED),  # it scales the update, and takes no memory
        ("lora: {rslora: true}", TRAINED),
        ("lora: {alpha_pattern: {q_proj: 5}}", TRAINED),
        ("lora: {initialization: gaussian}", TRAINED),
        ("model: {license: mit, title: Another title}", set()),
        ("dataset: {benchmark: {requests: 5}}", {*ASKED, "compare_merged", "check_resources"}),
        ("evaluation: {execution: bubblewrap}", {"execute_answers"}),
        ("merging: {compare_requests: 5}", {"compare_merged"}),
    ],
)
def test_a_changed_setting_reruns_exactly_these_beside_documents(plan, differences, expected):
    assert plan(yaml.safe_load(differences)) - DOCUMENTS == expected


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("differences", "jobs"),
    [
        ("model: {license: mit}", 2),
        ("model: {title: Another title}", 2),
        ("training: {report_to: [tensorboard]}", 2),
        ("lora: {alpha: 5}", 9),
        ("training: {learning_rate: 5.0e-4}", 9),
        ("run: {seed: 7}", 11),
        ("evaluation: {requests: 5}", 8),
        ("memory: {gpu: t4}", 7),
        ("prompt: {system: Answer with a command.}", 13),
        ("dataset: {split: {seed: 43}}", 14),
        ("training: {sequence_length: 320}", 15),
        ("lora: {rank: 12}", 18),
        ("lora: {rank: [4, 12]}", 21),
    ],
)
def test_a_changed_setting_plans_so_many_jobs(project, tmp_path, differences, jobs):
    path = tmp_path / "differences.yaml"
    path.write_text(differences, encoding="utf-8")
    found = planned_jobs(project, "--configfile", TINY, path)
    assert sum(found.values()) == jobs, found


ALFA = yaml.safe_load((chain.ROOT / "config" / "intercode-alfa.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "existing", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["a run", "nothing"]
)
def test_after_a_benchmark_is_added_the_same_command_has_nothing_to_do(tmp_path, existing):
    """The rows are read again, by a job whose input another job of the same command is still to make."""
    project = chain.checkout(tmp_path / "project")
    few = {"dataset": {"name": "few", "sources": chain.SETTINGS["dataset"]["sources"]}}
    benchmark = {"dataset": {"benchmark": ALFA["dataset"]["benchmark"]}}
    for name, content in (("few", few), ("benchmark", benchmark)):
        path = project / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    plain = ("--configfile", "few.yaml", "--", "dataset")
    asked = ("--configfile", "few.yaml", "benchmark.yaml", "--", "dataset")
    for words in (plain, asked) if existing else (asked,):
        done = snakemake(project, *words)
        assert done.returncode == 0, done.stderr[-3000:]
    params = recorded_params(project, "results/dataset/few/acquire.json")
    assert "missing: nothing" in params
    assert planned_jobs(project, *asked) == {}


@pytest.mark.thorough
def test_order_of_keys_runs_nothing(project, tmp_path):
    config = yaml.safe_load((project / "config" / "config.yaml").read_text(encoding="utf-8"))

    def reverse(value):
        return (
            {key: reverse(value[key]) for key in reversed(value)}
            if isinstance(value, dict)
            else value
        )

    path = tmp_path / "reversed.yaml"
    path.write_text(yaml.safe_dump(reverse(config), sort_keys=False), encoding="utf-8")
    assert planned(project, "--configfile", str(path), TINY) == set()


def test_a_touch_of_all_code_and_templates_runs_nothing(plan, project):
    for folder in ("scripts", "dryfit", "rules", "config", "envs"):
        for path in (project / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                os.utime(path)
    os.utime(project / "Snakefile")
    assert plan() == set()


def rewritten(path, old, new):
    """A file with other contents of the same size and a time of long ago, as ``cp -p`` or ``rsync -t`` leave it."""
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    os.utime(path, (10**9, 10**9))
    return content


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("file", "old", "new", "expected", "spared"),
    [
        (
            "config/gpus.yaml",
            b"24",
            b"25",
            {"profile_full", "profile_adapters", "gate_memory", "check_resources"},
            DATASET | MODEL,
        ),
        (
            "config/screen/exfiltration.yaml",
            b"level: critical",
            b"level: medium  ",
            {"screen_dataset", "split_dataset", "evaluate_base"},
            MODEL | {"acquire_dataset", "clean_dataset"},
        ),
        (
            "config/templates/MODEL_CARD.md.j2",
            b"#",
            b"-",
            {"render_documents"},
            DATASET | MODEL | TRAINED,
        ),
    ],
)
def test_a_file_with_other_contents_reruns_whatever_its_time(
    plan, project, file, old, new, expected, spared
):
    content = rewritten(project / file, old, new)
    try:
        rules = plan()
    finally:
        (project / file).write_bytes(content)
    assert expected <= rules and not rules & spared


@pytest.mark.thorough
def test_data_and_a_model_of_ones_own_rerun_by_their_contents(tmp_path):
    project = chain.checkout(tmp_path)
    source = {"type": "files", "license": "unknown", "paths": ["own.csv"]}
    model = {
        "name": "own",
        "title": "Own",
        "license": "mit",
        "source": {"type": "folder", "path": "model"},
    }
    own = {"dataset": {"name": "own", "sources": [source]}, "model": model, "run": {"name": "own"}}
    (project / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    (project / "own.csv").write_text("request,command\nlist the files,ls\n", encoding="utf-8")
    (project / "model").mkdir()
    (project / "model" / "config.json").write_bytes(
        (project / "config/models/llama-3.2-1b.json").read_bytes()
    )
    (project / "model" / "model-00001-of-00002.safetensors").write_bytes(bytes(10**7))
    make_believe(project, "--configfile", "own.yaml")

    def plan() -> set[str]:
        return planned(project, "--configfile", "own.yaml")

    rewritten(project / "own.csv", b"list the files", b"show the files")
    assert plan() >= DATASET and not MODEL & plan()
    rewritten(project / "own.csv", b"show the files", b"list the files")
    rewritten(project / "model" / "model-00001-of-00002.safetensors", bytes(10**6), b"x" * 10**6)
    rules = plan()
    assert {"fetch_weights", "train_adapter", "merge_adapter", "evaluate_base"} <= rules
    assert not rules & {*DATASET, "describe_model", "encode_dataset"}


REWORDED = [
    (
        "scenario/contradictions.py",
        "the objective is the loss",
        "an objective is a loss of its own",
    ),
    (
        "scenario/fields.py",
        "Tokens of a row of the batch.",
        "How many tokens a row of the batch has.",
    ),
    ("common/device.py", "No CUDA device was found", "There is no CUDA device"),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("module", "old", "new"), REWORDED, ids=lambda text: text[:20])
def test_a_reworded_message_runs_nothing(plan, project, module, old, new):
    with edited(project / "dryfit" / module, old, new):
        assert plan() == set()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("module", "old", "new", "expected", "spared"),
    [
        (
            "scripts/common/statistics.py",
            "RESAMPLES = 2000",
            "RESAMPLES = 1999",
            {"evaluate_base", "evaluate_tuned", "compare_models"},
            DATASET | MODEL | {"train_adapter", "merge_adapter"},
        ),
        (
            "dryfit/step/step.py",
            "    1024  #",
            "    1025  #",
            # The evaluation packs its rows as the step does.
            {"profile_full", "trace_memory", "measure_memory", "train_adapter", "evaluate_base"},
            DATASET | MODEL | {"encode_dataset"},
        ),
        (
            "dryfit/common/chat.py",
            "IGNORED = -100",
            "IGNORED = -101",
            {"encode_dataset", "evaluate_base", "train_adapter"},
            DATASET | MODEL,
        ),
    ],
)
def test_a_changed_helper_reruns_the_rules_that_import_it(
    plan, project, module, old, new, expected, spared
):
    with edited(project / module, old, new):
        rules = plan()
    assert expected <= rules
    assert not rules & spared


def test_the_reason_names_the_module_that_has_changed(project):
    with edited(
        project / "scripts" / "common" / "statistics.py", "RESAMPLES = 2000", "RESAMPLES = 1999"
    ):
        said = planned_text(project, "--configfile", TINY)
    assert "scripts/common/statistics.py" in said and "scripts/evaluation/evaluate.py" not in said


@pytest.mark.thorough
def test_a_score_is_kept_and_nothing_is_run_unasked(plan, project, tmp_path):
    """Asked for by name once; then it is a file that no job makes, whatever changes."""
    other = tmp_path / "executed.yaml"
    other.write_text("lora: {rank: 8}\n", encoding="utf-8")
    asked = ("--configfile", TINY, other, "--", "execute")
    score = f"results/{chain.SETTINGS['run']['name']}-r8/evaluation/execution.json"
    assert score in make_believe(project, *asked)
    assert plan({"lora": {"rank": 8}}) == set()
    changed = plan({"lora": {"rank": 8, "alpha": 5}})
    assert TRAINED | {"render_documents"} <= changed and "execute_answers" not in changed
    other.write_text("lora: {rank: 8, alpha: 5}\n", encoding="utf-8")
    assert "execute_answers" in planned(project, *asked)
