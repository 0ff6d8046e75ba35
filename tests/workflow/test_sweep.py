"""Plans of sweeps over a run that passes as made: what runs share is made once, a new rank makes its own jobs alone."""

from pathlib import Path

import pytest
import yaml

from tests.end_to_end import chain
from tests.workflow.plan import make_believe, planned_jobs

RANKED = {
    *(
        "profile_adapters",
        "trace_memory",
        "measure_memory",
        "compare_memory",
        "gate_memory",
        "plan_memory",
    ),
    *(
        "train_adapter",
        "merge_adapter",
        "verify_merge",
        "evaluate_tuned",
        "compare_models",
        "record_provenance",
    ),
    *("compare_merged", "check_resources"),
    *("draw_memory", "draw_figures", "render_documents", "render_memory_profile"),
}
SWEPT = {"summarize_sweep", "draw_sweep", "render_sweep"}


def configuration(project: Path, name: str, **differences) -> Path:
    path = project / f"{name}.yaml"
    path.write_text(yaml.safe_dump(differences), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout in which a sweep over three ranks of the default passes as made, and the plan that it began with."""
    project = chain.checkout(tmp_path_factory.mktemp("sweep"))
    three = configuration(project, "three", lora={"rank": [4, 8, 16]})
    plan = planned_jobs(project, "--configfile", three)
    make_believe(project, "--configfile", three)
    return project, plan


def test_three_ranks_make_the_dataset_and_the_base_evaluation_once(made):
    _, plan = made
    once = {"acquire_dataset", "clean_dataset", "screen_dataset", "split_dataset", "encode_dataset"}
    once |= {
        "download_gguf",
        "describe_model",
        "fetch_weights",
        "evaluate_base",
        "profile_full",
        *SWEPT,
    }
    assert {plan[rule] for rule in once} == {1}
    assert {plan[rule] for rule in RANKED} == {3}


def test_nothing_to_do_and_one_rank_alone_is_nothing_to_do_either(made):
    project, _ = made
    assert planned_jobs(project, "--configfile", "three.yaml") == {}
    assert planned_jobs(project) == {}, "the default's rank is one of the three"


@pytest.mark.thorough
def test_a_fourth_rank_plans_its_own_jobs_and_the_sweeps_documents(made):
    project, _ = made
    four = configuration(project, "four", lora={"rank": [4, 8, 16, 32]})
    plan = planned_jobs(project, "--configfile", four)
    assert plan.keys() == RANKED | SWEPT
    assert plan == dict.fromkeys(RANKED | SWEPT, 1)


@pytest.mark.thorough
def test_a_swept_learning_rate_shares_the_dataset_and_the_base(made):
    project, _ = made
    rates = configuration(project, "rates", sweep={"training.learning_rate": [1e-3, 4e-3]})
    plan = planned_jobs(project, "--configfile", rates)
    assert plan["train_adapter"] == 2 and plan["render_sweep"] == 1
    assert "encode_dataset" not in plan and "evaluate_base" not in plan
