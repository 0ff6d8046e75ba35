"""Answers that are kept: shown again as they were, and never where something that decides them has changed."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dryfit.ask.command import main
from dryfit.ask.question import QuestionOptions, question
from dryfit.common import kept
from dryfit.common.kept import KeptAnswer
from dryfit.hours.run_time import Run
from tests.dryfit.ask.conftest import TINY

ROOT = Path(__file__).resolve().parents[3]
WORDS = ("tiny/config.json", "--gpu", "24GiB")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers are kept; the working directory has a model's configuration and a file of accelerate."""
    monkeypatch.setenv("DRYFIT_CACHE", str(tmp_path / "kept"))
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    Path("tiny", "config.json").write_text(json.dumps(TINY))
    Path("accelerate.yaml").write_text(
        yaml.safe_dump({"distributed_type": "NO", "mixed_precision": "bf16"})
    )
    return tmp_path / "kept"


def asked(**options) -> object:
    return question(
        ["tiny/config.json", "accelerate.yaml"], QuestionOptions(gpu="24GiB", **options)
    )


def keep(text: str = "FITS\n", status: int = 0) -> None:
    KeptAnswer(WORDS, asked()).give(lambda: print(text, end="") or status)


@pytest.mark.parametrize("status", [0, 1])
def test_an_answer_is_shown_again_with_its_exit_status(folder, capsys, status) -> None:
    keep("FITS?\n", status)
    assert capsys.readouterr().out == "FITS?\n"
    assert KeptAnswer(WORDS, asked()).show() == status
    shown = capsys.readouterr()
    assert shown.out == "FITS?\n" and not shown.err


def changed_model() -> None:
    Path("tiny", "config.json").write_text(json.dumps({**TINY, "vocab_size": 1001}))


def changed_file_beside() -> None:
    Path("accelerate.yaml").write_text(
        yaml.safe_dump({"distributed_type": "NO", "mixed_precision": "fp16"})
    )


@pytest.mark.parametrize("change", [changed_model, changed_file_beside])
def test_a_changed_file_is_asked_about_anew(folder, change) -> None:
    keep()
    change()
    assert KeptAnswer(WORDS, asked()).show() is None


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "other",
    [
        lambda: KeptAnswer((*WORDS, "--json"), asked()),
        lambda: KeptAnswer(WORDS, asked(sequence_length=511)),
        lambda: KeptAnswer(WORDS, asked(settings=["optimizer=adamw_8bit"])),
        lambda: KeptAnswer(WORDS, [asked(), Run(rows=10)]),
    ],
    ids=["form", "length", "setting", "run"],
)
def test_another_question_is_another_answer(folder, other) -> None:
    keep()
    assert other().show() is None


def other_folder(monkeypatch, tmp_path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    shutil.copytree("tiny", copy / "tiny")
    shutil.copy("accelerate.yaml", copy)
    monkeypatch.chdir(copy)


def variable(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")


def python(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "version", sys.version + " of another day")


def package(monkeypatch, tmp_path) -> None:
    (tmp_path / "site" / "peft-99.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def code(monkeypatch, tmp_path) -> None:
    copy = tmp_path / "library"
    shutil.copytree(kept._CODE / "cards", copy / "cards")
    monkeypatch.setattr(kept, "_CODE", copy)
    keep()
    with open(copy / "cards" / "gpus.py", "a") as module:
        module.write("# a line\n")


def data(monkeypatch, tmp_path) -> None:
    copy = tmp_path / "library"
    shutil.copytree(kept._CODE / "data", copy / "data")
    monkeypatch.setattr(kept, "_CODE", copy)
    keep()
    cards = next(copy.rglob("gpus.yaml"))
    cards.write_text(cards.read_text() + "\n# a price\n")


@pytest.mark.few(2)
@pytest.mark.parametrize("change", [other_folder, variable, python, package, code, data])
def test_what_decides_an_answer_beside_the_question(folder, monkeypatch, tmp_path, change) -> None:
    keep()
    assert KeptAnswer(WORDS, asked()).show() == 0
    change(monkeypatch, tmp_path)
    assert KeptAnswer(WORDS, asked()).show() is None


def test_a_reinstalled_package_of_the_same_version_is_another(
    folder, monkeypatch, tmp_path
) -> None:
    installed = tmp_path / "site" / "peft-99.0.dist-info"
    installed.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    keep()
    os.utime(installed, (1, 1))
    assert KeptAnswer(WORDS, asked()).show() is None


def test_an_edited_package_is_another(folder, monkeypatch, tmp_path) -> None:
    """In a checkout that Python's path names; of PyTorch too, whose wheel alone counts by its version."""
    for name in ("peft", "torch"):
        module = tmp_path / "checkout" / name / "tuners" / "layer.py"
        module.parent.mkdir(parents=True)
        (module.parents[1] / "__init__.py").write_text("")
        module.write_text("RANK = 1")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "checkout"))
    for name in ("peft", "torch"):
        keep()
        assert KeptAnswer(WORDS, asked()).show() == 0
        (tmp_path / "checkout" / name / "tuners" / "layer.py").write_text("RANK = 16")
        assert KeptAnswer(WORDS, asked()).show() is None


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("FITS", "FAST"),
        lambda text: text.replace('"status": 0', '"status": 1'),
        lambda text: "[]",
        lambda text: "",
    ],
    ids=["cut", "other words", "other status", "another value", "empty"],
)
def test_a_damaged_file_is_not_used_and_is_replaced(folder, capsys, damage) -> None:
    keep()
    (path,) = folder.glob("*.json")
    path.write_text(damage(path.read_text()))
    capsys.readouterr()
    assert KeptAnswer(WORDS, asked()).show() is None
    said = capsys.readouterr()
    assert (
        not said.out
        and said.err.count("\n") == 1
        and str(path) in said.err
        and "damaged" in said.err
    )
    keep()
    assert KeptAnswer(WORDS, asked()).show() == 0


def test_bytes_that_are_no_text_are_damage(folder, capsys) -> None:
    keep()
    next(folder.glob("*.json")).write_bytes(b"\xff\xfe")
    assert KeptAnswer(WORDS, asked()).show() is None and "damaged" in capsys.readouterr().err


def test_an_error_and_a_question_without_an_answer_are_not_kept(folder) -> None:
    with pytest.raises(ZeroDivisionError):
        KeptAnswer(WORDS, asked()).give(lambda: print("half") or 1 // 0)
    assert KeptAnswer(WORDS, asked()).give(lambda: 3) == 3
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_no_error(folder, monkeypatch, capsys) -> None:
    Path("a-file").write_text("")
    for named in ("a-file/kept", ""):
        monkeypatch.setenv("DRYFIT_CACHE", named)
        keep()
        assert KeptAnswer(WORDS, asked()).show() is None
    assert not capsys.readouterr().err


def test_without_a_name_the_folder_is_the_users_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("DRYFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.folder() == tmp_path / "dryfit" / "answers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept.folder() == tmp_path / ".cache" / "dryfit" / "answers"


def test_the_folder_stays_small_and_the_answer_that_was_asked_for_last_stays(
    folder, monkeypatch
) -> None:
    answers = [KeptAnswer((*WORDS, str(number)), asked()) for number in range(4)]
    for day, answer in enumerate(answers[:3], 1):
        answer.give(lambda: print("x" * 1000) or 0)
        os.utime(answer._path, (day, day))
    assert answers[0].show() == 0  # so it is not the oldest any more
    monkeypatch.setattr(kept, "MOST_BYTES", 2500)
    answers[3].give(lambda: print("x" * 1000) or 0)
    assert [answer.show() for answer in answers] == [0, None, None, 0]


def _ask_often(number: int) -> set[tuple[int | None, int]]:
    answer, seen = KeptAnswer(WORDS, "the question"), set()
    for _ in range(40):
        answer.give(lambda: print("x" * 100_000) or 0)
        seen.add((answer.show(), number))
    return seen


def test_processes_that_ask_the_same_at_once_get_whole_answers(folder, capfd) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        seen = set().union(*pool.map(_ask_often, range(2)))
    assert {status for status, _ in seen} == {0}
    assert "damaged" not in capfd.readouterr().err
    assert [path.name for path in folder.iterdir()] == [
        f"{KeptAnswer(WORDS, 'the question')._key[:32]}.json"
    ]


def _command(*words: str) -> subprocess.CompletedProcess:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'torch._dynamo.convert_frame', 'torch.distributed.tensor._ops', 'scipy')\n"
        "atexit.register(lambda: print(*(name for name in heavy if name in sys.modules), file=sys.stderr))\n"
        "from dryfit.ask.command import run\n"
        "run()\n"
    )
    program = [sys.executable, "-c", code, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
def test_the_command_answers_the_second_time_as_the_first_without_torch(folder, capsys) -> None:
    words = ("tiny/config.json", "--gpu", "0.66GiB", "-s", "300")
    first, again = _command(*words), _command(*words)
    assert first.returncode == again.returncode == 0, first.stderr
    assert first.stdout == again.stdout and first.stdout.startswith("FITS")
    assert again.stderr.split() == []
    # A step on one GPU that is not compiled imports neither the compiler nor sharded tensors nor scipy.
    assert first.stderr.splitlines()[-1].split() == ["torch", "transformers"]
    assert len(list(folder.iterdir())) == 1
    assert main(words) == 0  # this process has an environment of its own
    kept_in = {path.stat().st_ino for path in folder.iterdir()}
    assert main([*words, "--fresh"]) == 0
    assert capsys.readouterr().out == 2 * first.stdout
    assert (
        len({path.stat().st_ino for path in folder.iterdir()} - kept_in) == 1
    )  # the answer that is kept is a new one
