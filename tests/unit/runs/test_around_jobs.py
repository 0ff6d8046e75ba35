"""What a command refuses before its first job, and what it removes."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dryfit.common import device
from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_jsonl, write_report
from scripts.common.damage import refuse_damaged
from scripts.runs.around_jobs import (
    Job,
    before_the_first,
    planned_writes,
    refuse_unrecorded,
    results_of,
    summary,
)
from scripts.runs.configuration import with_defaults
from scripts.runs.runs import Runs

RUN = "smollm2-135m-r16"
TRAINING = Job("train_adapter", {"run": RUN}, [f"results/{RUN}/training.json"], True)


def runs(text: str = "{}") -> Runs:
    return Runs(with_defaults(yaml.safe_load(text)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_writes_are_added_by_run_and_the_shared_base_comes_first() -> None:
    jobs = [
        TRAINING,
        Job("export_gguf", {"run": RUN, "type": "q8_0"}, [], False),
        Job("clean_dataset", {"dataset": "embedded"}, [], False),
        Job("fetch_weights", {"model": "smollm2-135m-instruct"}, [], False),
    ]
    base, run = planned_writes(jobs, runs())
    assert (base.name, base.stages) == ("smollm2-135m-instruct", ["base model"])
    assert (run.name, run.stages, run.exports) == (RUN, ["training", "export"], ["q8_0"])
    assert planned_writes(jobs, runs("memory: {gate: {override: true}}")) == []


@pytest.mark.skipif(device.cuda_devices() > 0, reason="here is a GPU")
def test_a_missing_gpu_is_refused_on_this_machine_and_not_on_a_clusters() -> None:
    wanted = runs("training: {device: cuda}")
    with pytest.raises(UserError, match="No CUDA device"):
        before_the_first([TRAINING], [], wanted, True)
    before_the_first([TRAINING], [], wanted, False)
    before_the_first([TRAINING._replace(rule="gate_memory")], [], wanted, True)


def test_a_tracker_that_is_not_installed_stops_before_anything_runs() -> None:
    wanted = runs("training: {report_to: [wandb]}")
    with pytest.raises(UserError, match="not installed: wandb"):
        before_the_first([TRAINING], [], wanted, True)
    before_the_first([TRAINING], [], wanted, False, own_packages=False)
    before_the_first([TRAINING._replace(rule="merge_adapter")], [], wanted, False)


def test_a_missing_sandbox_is_refused_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert shutil.which("bwrap") is None
    with pytest.raises(UserError, match="Nothing was executed"):
        before_the_first([Job("execute_answers", {"run": RUN}, [], False)], [], runs(), True)


def test_documents_that_will_be_rendered_are_removed_and_costly_results_marked(
    folder: Path,
) -> None:
    card, report = Path(f"results/{RUN}/MODEL_CARD.md"), Path(f"results/{RUN}/training.json")
    for path in (card, report):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before_the_first(
        [TRAINING, Job("render_documents", {"run": RUN}, [str(card)], False)], [], runs(), True
    )
    assert not card.exists() and report.exists()
    assert str(report) in (card.parent / "OUTDATED.txt").read_text()


def test_a_score_whose_answers_are_made_again_is_emptied_and_made_again_on_request(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    Path(".snakemake").mkdir()
    answers, score = (
        f"results/{RUN}/evaluation/answers.jsonl",
        f"results/{RUN}/evaluation/execution.json",
    )
    for path in (answers, f"{score}l"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [{"answer": "ls"}])
    write_report(score, {"tuned": 3}, f"{score}l")
    asked_again = Job("evaluate_tuned", {"run": RUN}, [answers], False)
    run_again = Job("execute_answers", {"run": RUN}, [f"{score}l", score], False)
    before_the_first([], [], runs(), False)
    before_the_first([asked_again, run_again], [], runs(), False)
    assert read_report(score, f"{score}l")["tuned"] == 3 and not capsys.readouterr().err
    before_the_first([asked_again], [], runs(), False)
    assert "tuned" not in read_report(score, f"{score}l") and not Path(f"{score}l").read_text()
    assert (
        "score is dropped" in capsys.readouterr().err
        and Path(score).stat().st_mtime < Path(answers).stat().st_mtime
    )
    before_the_first([asked_again], [], runs(), False)
    assert not capsys.readouterr().err
    assert refuse_damaged([f"results/{RUN}"]) == []


def test_a_result_that_nothing_records_is_refused(folder: Path) -> None:
    report = f"results/{RUN}/training.json"
    Path(report).parent.mkdir(parents=True)
    Path(report).touch()
    known = SimpleNamespace(
        metadata=lambda path: object(), _filter_incomplete_keys=lambda keys: set()
    )
    paths = [report, "results/not-made-yet.json"]
    refuse_unrecorded(paths, known)
    known.metadata = lambda path: None
    with pytest.raises(UserError, match="no record") as error:
        refuse_unrecorded(paths, known)
    assert error.value.where == report and f"rm {report} " in error.value.write
    known._filter_incomplete_keys = set  # a job was killed
    refuse_unrecorded(paths, known)


def test_only_what_lies_among_the_results_is_a_result_and_nothing_has_no_summary() -> None:
    assert results_of([TRAINING._replace(outputs=[".snakemake/x", "results/y"])]) == ["results/y"]
    assert list(summary(runs(), set())) == []
