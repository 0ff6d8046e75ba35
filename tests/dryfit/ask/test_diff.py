"""A training file at two revisions: what its step takes more, the comment, the action and the hook."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dryfit.ask.command import main
from dryfit.common.errors import UserError
from dryfit.data import data_path
from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[3]
AXOLOTL = {
    "base_model": "./small.json",
    "adapter": "lora",
    "lora_r": 16,
    "lora_target_linear": True,
    "sequence_len": 256,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "bf16": True,
    "gradient_checkpointing": True,
}
LLAMA_FACTORY = {
    "model_name_or_path": "./small.json",
    "stage": "sft",
    "finetuning_type": "lora",
    "cutoff_len": 256,
    "template": "default",
    "bf16": True,
}


def git(*words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True,
        capture_output=True,
    )


def commit(name: str, content: object) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    git("add", "-A")
    git("commit", "-q", "-m", name)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository with a small model and two versions of an axolotl file, the second with longer rows."""
    monkeypatch.chdir(tmp_path)
    model = json.loads(data_path("models", "smollm2-135m.json").read_text()) | {
        "num_hidden_layers": 2
    }
    git("init", "-q", "-b", "main")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.json").write_text(json.dumps(model))
    commit("configs/train.yml", AXOLOTL)
    commit("configs/train.yml", AXOLOTL | {"sequence_len": 1024, "lora_r": 64})
    return tmp_path


def answered(capsys, *words: str) -> tuple[int, str]:
    status = main(["diff", *words])
    return status, capsys.readouterr().out


def test_a_diff_says_what_each_setting_and_each_component_adds(repository, capsys) -> None:
    status, out = answered(
        capsys, "main~1", "main", "--file", "configs/train.yml", "--gpu", "8GiB", "--json"
    )
    found = json.loads(out)
    assert status == 0 and found["after"]["fits"] and not found["over_most"]
    settings = {one["field"]: one for one in found["settings"]}
    assert list(settings) == ["lora", "sequence_length"]
    assert (
        settings["sequence_length"]["before"] == 256
        and settings["sequence_length"]["after"] == 1024
    )
    assert sum(one["more_bytes"] for one in settings.values()) == found["more_bytes"] > 0
    assert (
        found["more_bytes"] == found["after"]["required_bytes"] - found["before"]["required_bytes"]
    )
    parts = found["after"]["peak_allocated_bytes"] - found["before"]["peak_allocated_bytes"]
    assert (
        abs(sum(found["components"].values()) - parts) < 2**22
        and found["components"]["logits_and_loss"] > 0
    )
    assert found["after"]["evidence"]["text"]


@pytest.mark.thorough
def test_the_exit_status_follows_the_rule(repository, capsys) -> None:
    words = ("main~1", "main", "--file", "configs/train.yml")
    assert answered(capsys, *words)[0] == 0  # no GPU is named
    status, out = answered(capsys, *words, "--gpu", "0.9GiB")
    assert status == 1 and "no longer fits" in out
    status, out = answered(capsys, *words, "--gpu", "8GiB", "--most", "10MiB")
    assert status == 1 and "more than the 10.0 MiB that --most allows" in out
    status, out = answered(
        capsys, "main", "main~1", "--file", "configs/train.yml", "--gpu", "0.9GiB"
    )
    assert status == 0 and "fits now" in out and " less " in out


@pytest.mark.thorough
def test_a_card_that_only_the_later_version_names_is_no_change_of_the_verdict(
    repository, capsys
) -> None:
    step = {"model": "./small.json", "method": "lora", "sequence_length": 256}
    commit("configs/step.yml", step)
    commit("configs/step.yml", step | {"gpu": "8GiB"})
    _, out = answered(capsys, "main~1", "main", "--file", "configs/step.yml")
    assert ": it fits on a GPU of 8 GiB" in out and "fits now" not in out
    commit("configs/step.yml", step | {"gpu": "0.3GiB"})
    _, out = answered(capsys, "main~1", "main", "--file", "configs/step.yml")
    assert ": it does not fit on" in out and "fit, as before" not in out and "no longer" not in out


@pytest.mark.thorough
def test_the_working_tree_is_compared_without_a_head_and_nothing_changed_is_said(
    repository, capsys
) -> None:
    status, out = answered(capsys, "main", "--file", "configs/train.yml")
    assert status == 0 and "takes as much as before" in out
    Path("configs/train.yml").write_text(yaml.safe_dump(AXOLOTL | {"sequence_len": 2048}))
    assert "1024 -> 2048" in answered(capsys, "main", "--file", "configs/train.yml")[1]


@pytest.mark.thorough
def test_a_model_that_changed_under_its_name_takes_what_it_takes(repository, capsys) -> None:
    model = json.loads(Path("configs/small.json").read_text())
    Path("configs/small.json").write_text(json.dumps(model | {"num_hidden_layers": 4}))
    found = json.loads(answered(capsys, "main", "--file", "configs/train.yml", "--json")[1])
    assert found["settings"] == [] and found["more_bytes"] > 0


@pytest.mark.thorough
def test_a_comment_has_no_markdown_of_the_files_making(repository, capsys) -> None:
    commit(
        "configs/own.yml",
        {"model": "small.json", "sequence_length": 256, "model_name": "x` | <img src=y>"},
    )
    commit(
        "configs/own.yml", {"model": "small.json", "sequence_length": 512, "model_name": "z` | <b>"}
    )
    status, out = answered(capsys, "main~1", "main", "--file", "configs/own.yml", "--markdown")
    assert status == 0 and out.startswith("### ℹ️ Memory of `configs/own.yml`")
    assert (
        "| `sequence_length` | `256` | `512` | +" in out and "<img" not in out and "<b>" not in out
    )


def test_a_new_file_is_answered_alone_and_one_that_is_gone_is_no_failure(
    repository, capsys
) -> None:
    commit("configs/new.yml", AXOLOTL)
    assert "The file is new" in answered(capsys, "main~1", "main", "--file", "configs/new.yml")[1]
    assert answered(capsys, "main", "main~1", "--file", "configs/new.yml") == (
        0,
        "configs/new.yml is gone in main~1: there is no step to ask about.\n",
    )


def test_two_tools_a_wrong_revision_a_missing_file_and_a_wrong_size_are_refused(repository) -> None:
    commit("configs/train.yml", LLAMA_FACTORY)
    with pytest.raises(
        UserError, match="two tools: axolotl in main~1, LLaMA-Factory in main"
    ) as caught:
        main(["diff", "main~1", "main", "--file", "configs/train.yml"])
    assert "dryfit configs/train.yml" in str(caught.value)
    for words, said in (
        (("nothing", "--file", "configs/train.yml"), "git refuses"),
        (("--file=configs/train.yml", "--", "--output=x"), "does not begin with a hyphen"),
        (("main", "--file", "no.yml"), "Neither version has the file"),
        (("main", "--file", "configs/train.yml", "--most", "much"), "`--most` takes a size"),
        (("main", "--file", "configs/train.yml", "--most", ""), "`--most` takes a size"),
    ):
        with pytest.raises(UserError, match=said):
            main(["diff", *words])


def test_a_wrong_value_is_told_with_its_version(repository) -> None:
    commit("configs/train.yml", AXOLOTL | {"micro_batch_size": "many"})
    with pytest.raises(UserError, match=r"configs/train\.yml: micro_batch_size in main"):
        main(["diff", "main~1", "main", "--file", "configs/train.yml"])


def test_the_hook_names_what_does_not_fit(repository, capsys) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["entry"].split() == ["dryfit", "check"]
    files = ["configs/train.yml", "configs/small.json"]
    assert main(["check", "--gpu", "rtx-4090", *files]) == 0
    assert capsys.readouterr().out.startswith("configs/train.yml: FITS")
    assert main(["check", "--gpu", "0.4GiB", *files]) == 1
    assert "configs/train.yml: DOES NOT FIT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.yml", None, "isn't there"),
        ("other.yml", "on: push\n", "No tool is known"),
        ("list.yml", "- 1\n", "list.yml"),
        ("broken.yml", "a: [1\n", "broken.yml"),
        ("twice.yml", "base_model: a\nbase_model: b\nadapter: lora\n", "base_model"),
    ],
)
def test_the_hook_lets_nothing_through_that_it_does_not_understand(
    repository, capsys, name, content, said
) -> None:
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UserError, match=said):
        main(["check", "--gpu", "rtx-4090", name, "configs/train.yml"])
    assert (
        "configs/train.yml: FITS" in capsys.readouterr().out
    )  # the other files have their answers


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("bash") is None, reason="the action's script is bash")
def test_the_actions_script_runs_and_no_input_is_part_of_a_script(repository, tmp_path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    assert action["runs"]["using"] == "composite"
    scripts = {step["name"]: step["run"] for step in action["runs"]["steps"] if "run" in step}
    assert not any("${{" in script for script in scripts.values())
    shims = tmp_path / "bin"
    shims.mkdir()
    command = shims / "dryfit"
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{launchers()}/python" -P -m dryfit.ask "$@"\n'
    )
    command.chmod(0o755)
    files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    environment = {
        **os.environ,
        **{name: str(path) for name, path in files.items()},
        "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}",
        "RUNNER_TEMP": str(tmp_path),
        "BASE": "main~1",
        "HEAD": "main",
        "FILE": "configs/train.yml",
        "GPU": "0.9GiB",
        "MOST": "$(touch hacked)",
    }
    refused = subprocess.run(
        ["bash", "-e", "-c", scripts["Compare"]], env=environment, capture_output=True, text=True
    )
    assert (
        refused.returncode == 2
        and "`--most` takes a size" in refused.stderr
        and not Path("hacked").exists()
    )
    done = subprocess.run(
        ["bash", "-e", "-c", scripts["Compare"]],
        env=environment | {"MOST": ""},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "status=1" in files["GITHUB_OUTPUT"].read_text()
    assert "### ❌ Memory of `configs/train.yml`" in files["GITHUB_STEP_SUMMARY"].read_text(
        encoding="utf-8"
    )
