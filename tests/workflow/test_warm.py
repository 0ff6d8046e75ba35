"""Commands that are forked from a server with the packages imported behave as processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import launchers

SHOWN = """
import json, os, sys
houses = ("scripts", "tests", "validation", "dryfit")
ours = sorted(name for name in sys.modules if name.partition(".")[0] in houses)
shown = {"argv": sys.argv[1:], "folder": os.getcwd(), "import": sys.path[0], "input": sys.stdin.read()}
shown |= {"name": __name__, "ours": ours, "threads": os.environ.get("OMP_NUM_THREADS")}
json.dump(shown, sys.stdout)
print("said", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def python() -> Path:
    return Path(launchers(), "python")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "shown.py").write_text(SHOWN, encoding="utf-8")
    return tmp_path / "shown.py"


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["script", "module", "module, nothing of the folder"])
def test_a_command_is_what_python_makes_of_it(
    python: Path, script: Path, tmp_path: Path, how: str
) -> None:
    arguments = {"script": [script, "a", "-b"], "module": ["-m", "shown", "a"]}.get(
        how, ["-P", "-m", "shown", "a"]
    )
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(script.parent) if "nothing" in how else "",
    }
    done = [
        subprocess.run(
            [start, *arguments],
            cwd=tmp_path,
            env=environ,
            input="in",
            capture_output=True,
            text=True,
        )
        for start in (python, sys.executable)
    ]
    assert done[0].stdout == done[1].stdout and '"ours": []' in done[0].stdout
    assert [one.stderr for one in done] == ["said\n"] * 2 and [one.returncode for one in done] == [
        0,
        0,
    ]


def test_threads_are_those_of_the_commands_environment(python: Path, tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(
        "import torch; print(torch.get_num_threads())", encoding="utf-8"
    )
    for count in ("1", "2"):
        environ = {**os.environ, "OMP_NUM_THREADS": count}
        assert (
            subprocess.check_output([python, tmp_path / "threads.py"], env=environ, text=True)
            == f"{count}\n"
        )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, ""),
    ],
)
def test_a_child_that_dies_takes_nothing_with_it(
    python: Path, tmp_path: Path, text: str, status: int, said: str
) -> None:
    """Another command runs beside it, from before to after."""
    (tmp_path / "dies.py").write_text(text, encoding="utf-8")
    (tmp_path / "waits.py").write_text("print(input() + input())", encoding="utf-8")
    waits = [python, tmp_path / "waits.py"]
    with subprocess.Popen(
        waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as beside:
        beside.stdin.write("be")
        done = subprocess.run([python, tmp_path / "dies.py"], capture_output=True, text=True)
        assert beside.communicate("fore\nafter\n")[0] == "beforeafter\n"
    assert done.returncode == status and done.stderr.endswith(said)


def test_a_command_that_is_ended_ends_the_work(python: Path, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import os; print(os.getpid(), flush=True); input()", encoding="utf-8"
    )
    waits = [python, tmp_path / "waits.py"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ended:
        child = int(ended.stdout.readline())
        assert child != ended.pid
        ended.kill()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the work goes on")


@pytest.mark.thorough
def test_what_packages_would_read_otherwise_gets_a_process_of_its_own(
    python: Path, tmp_path: Path
) -> None:
    (tmp_path / "hub.py").write_text(
        "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)", encoding="utf-8"
    )
    for value in ("0", "1"):
        environ = {**os.environ, "HF_HUB_OFFLINE": value}
        assert (
            subprocess.check_output([python, tmp_path / "hub.py"], env=environ, text=True)
            == f"{value == '1'}\n"
        )
    assert (
        subprocess.check_output(
            [python, "-I", "-c", "import sys; print(sys.flags.isolated)"], text=True
        )
        == "1\n"
    )
