"""What reruns when something changes: the table in the README, each row on a dry run over a finished run."""

import os

import pytest
import yaml

from tests.workflow.plan import edited, planned, snakemake

pytestmark = pytest.mark.end_to_end  # stands on the finished run

DATASET = {"acquire_dataset", "clean_dataset", "screen_dataset", "split_dataset", "check_splits"}
MODEL = {"download_gguf", "describe_model", "fetch_weights"}
DOCUMENTS = {"draw_figures", "render_card", "render_memory_profile", "render_publication"}
TUNED = {"merge_adapter", "verify_merge", "evaluate_tuned", "compare_models"}


@pytest.fixture
def plan(finished_run, tmp_path):
    """A function: differences from the finished run's configuration (and files edited) to the rules planned."""

    def plan_with(differences=None, *arguments):
        path = tmp_path / "differences.yaml"
        path.write_text(yaml.safe_dump(differences or {}), encoding="utf-8")
        return planned(finished_run.project, "--configfile", *finished_run.configfiles, str(path), *arguments)

    return plan_with


def test_nothing_changed_nothing_runs(plan):
    assert plan() == set()


def test_a_changed_rank_plans_exactly_what_depends_on_it(plan):
    rules = plan({"lora": {"rank": 4}})
    assert not rules & (DATASET | MODEL | {"encode_dataset", "evaluate_base"})
    assert {"train_adapter", "gate_memory", "trace_memory", "measure_memory", *TUNED, *DOCUMENTS} <= rules


def test_going_back_to_the_old_rank_runs_nothing(plan, finished_run, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("lora: {rank: 4}\n", encoding="utf-8")
    name = yaml.safe_load((finished_run.project / finished_run.configfiles[-1]).read_text(encoding="utf-8"))
    target = f"results/{name['run']['name']}-r4/memory/training/gate.json"
    done = snakemake(finished_run.project, "--configfile", *finished_run.configfiles, str(other), "--", target)
    assert done.returncode == 0, done.stderr[-3000:]
    assert plan() == set()


def test_swapped_rank_and_alpha_rerun(plan):
    assert "train_adapter" in plan({"lora": {"rank": 16, "alpha": 8}})


def test_a_changed_alpha_trains_again(plan):
    rules = plan({"lora": {"alpha": 5}})
    assert {"train_adapter", *TUNED} <= rules
    assert not rules & (DATASET | MODEL | {"encode_dataset", "evaluate_base"})


def test_a_changed_learning_rate_trains_again_and_leaves_memory_alone(plan):
    rules = plan({"training": {"learning_rate": 5.0e-4}})
    assert {"train_adapter", *TUNED} <= rules
    assert not rules & (DATASET | MODEL | {"encode_dataset", "evaluate_base", "trace_memory", "gate_memory"})


def test_a_changed_sequence_length_does_not_clean_again(plan):
    rules = plan({"training": {"sequence_length": 96}})
    assert {"encode_dataset", "train_adapter", "trace_memory"} <= rules
    assert not rules & (DATASET | MODEL | {"evaluate_base"})


def test_a_changed_system_prompt_encodes_again_and_no_more_of_the_data(plan):
    rules = plan({"prompt": {"system": "Answer with a command."}})
    assert {"encode_dataset", "train_adapter", "evaluate_base"} <= rules
    assert not rules & (DATASET | MODEL)


def test_a_changed_evaluation_does_not_train(plan):
    rules = plan({"evaluation": {"max_new_tokens": 9}})
    assert {"evaluate_base", "evaluate_tuned", "compare_models"} <= rules
    assert not rules & (DATASET | MODEL | {"train_adapter", "merge_adapter"})


def test_order_of_keys_runs_nothing(finished_run, tmp_path):
    config = yaml.safe_load((finished_run.project / "config" / "config.yaml").read_text(encoding="utf-8"))

    def reverse(value):
        return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    path = tmp_path / "reversed.yaml"
    path.write_text(yaml.safe_dump(reverse(config), sort_keys=False), encoding="utf-8")
    assert planned(finished_run.project, "--configfile", str(path), *finished_run.configfiles) == set()


def test_a_touch_of_all_code_and_templates_runs_nothing(plan, finished_run):
    for folder in ("scripts", "rules", "config", "envs"):
        for path in (finished_run.project / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                os.utime(path)
    os.utime(finished_run.project / "Snakefile")
    assert plan() == set()


def test_a_changed_template_renders_only_documents(plan, finished_run):
    template = finished_run.project / "config" / "templates" / "MODEL_CARD.md.j2"
    with edited(template, "#", "##"):
        rules = plan()
    assert rules and rules <= DOCUMENTS


def test_a_comment_in_a_script_runs_nothing(plan, finished_run):
    with edited(finished_run.project / "scripts" / "training" / "train.py", "\n\n\n", "\n\n\n# A comment.\n"):
        assert plan() == set()


@pytest.mark.parametrize(
    ("module", "old", "new", "expected", "spared"),
    [
        (
            "common/statistics.py",
            "resamples: int = 2000",
            "resamples: int = 1999",
            {"evaluate_base", "evaluate_tuned", "compare_models"},
            DATASET | MODEL | {"train_adapter", "merge_adapter"},
        ),
        (
            "training/step.py",
            "CHUNK_TOKENS = 256",
            "CHUNK_TOKENS = 128",
            {"trace_memory", "measure_memory", "train_adapter"},
            DATASET | MODEL | {"encode_dataset", "evaluate_base"},
        ),
        (
            "common/chat.py",
            "IGNORED = -100",
            "IGNORED = -101",
            {"encode_dataset", "evaluate_base", "train_adapter"},
            DATASET | MODEL,
        ),
    ],
)
def test_a_changed_helper_reruns_the_rules_that_import_it(plan, finished_run, module, old, new, expected, spared):
    with edited(finished_run.project / "scripts" / module, old, new):
        rules = plan()
    assert expected <= rules
    assert not rules & spared


def test_a_changed_pin_reruns_what_runs_in_that_environment(plan, finished_run):
    with edited(finished_run.project / "envs" / "torch.yaml", "peft==", "peft==0."):
        rules = plan()
    assert {"train_adapter", "fetch_weights"} <= rules
    assert "clean_dataset" not in rules
