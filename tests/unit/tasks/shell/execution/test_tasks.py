"""The benchmark as it is read from its wheel."""

import zipfile
from types import SimpleNamespace

import pytest

from dryfit.common.errors import UserError
from scripts.tasks.shell.benchmark import Task
from scripts.tasks.shell.execution.sandbox import Sandbox
from scripts.tasks.shell.execution.tasks import mixed, read_wheel
from tests.unit.tasks.shell.execution.benchmark import ROWS, write_wheel


def test_requests_commands_levels_and_file_systems(tmp_path):
    tasks, states = read_wheel(write_wheel(tmp_path / "icalfa.whl"))
    assert [task["id"] for task in tasks] == list(range(len(ROWS)))
    assert {task["request"] for task in tasks} == {row[0] for row in ROWS}
    first = tasks[0]
    assert (first["command"], first["alternatives"], first["level"], first["state"]) == (
        *("cat /data/greeting", ["sed -n p /data/greeting"], "easy", "fs-1"),
    )
    assert set(states) == {"fs-1", "fs-2"} and states["fs-1"].environment == {"COLOUR": "dark red"}


def test_the_sample_is_in_an_order_that_nobody_chose_and_that_more_tasks_do_not_change(tmp_path):
    tasks, _ = read_wheel(write_wheel(tmp_path / "icalfa.whl"))
    order = [task["id"] for task in mixed(tasks)]
    assert sorted(order) == list(range(len(ROWS))) != order
    assert [task["id"] for task in mixed(tasks[:4])] == [number for number in order if number < 4]


def test_a_wheel_of_another_form_is_explained(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(UserError, match="no tasks"):
        read_wheel(tmp_path / "x.whl")
    (tmp_path / "y.whl").write_bytes(b"no archive")
    with pytest.raises(UserError, match="form that is known"):
        read_wheel(tmp_path / "y.whl")


def test_a_wheel_of_another_digest_is_refused_and_leaves_nothing(tmp_path):
    names = {name: str(tmp_path / name) for name in ("tasks", "states", "license", "report")}
    with pytest.raises(UserError, match="pip could not fetch") as error:
        Task({}).fetch_benchmark(
            {"requirement": "icalfa==0.3.6", "sha256": "0" * 64}, SimpleNamespace(**names)
        )
    assert "benchmark: null" in error.value.allowed and not list(tmp_path.iterdir())


def test_the_file_systems_are_made_by_the_benchmark_on_the_bare_root(tmp_path):
    tasks, states = read_wheel(write_wheel(tmp_path / "icalfa.whl"))
    try:
        with Sandbox(states, workers=2) as sandbox:
            said = [
                one["stdout"]
                for one in sandbox.run((task["state"], task["command"]) for task in tasks)
            ]
            (root,) = sandbox.run(
                [("fs-1", "ls -a / /etc; stat -c %a /tmp; ls -l /setup_nl2b_fs_1.sh; id -un")]
            )
    except UserError as error:
        pytest.skip(str(error))
    by_request = dict(zip((task["request"] for task in tasks), said, strict=True))
    assert (
        by_request["show the greeting"] == "it's me\n"
        and by_request["show the colour"] == "dark red\n"
    )
    words = root["stdout"].split()
    assert {"home", "var", ".dockerenv", "passwd", "1777", "-rwxr-xr-x", "root"} <= set(words), root
