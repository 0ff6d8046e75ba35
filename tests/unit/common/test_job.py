"""What a job shows and what only its log holds."""

import subprocess
import sys

import pytest

from scripts.common.code_digests import ROOT

SCRIPT = """
import os, sys, warnings
from types import SimpleNamespace
from dryfit.common.errors import UserError
from scripts.common.job import job
from dryfit.common.terminal import log

with job(SimpleNamespace(rule="a_rule", log=["logs/a.log"])):
    warnings.warn("a library's warning", FutureWarning)
    print("a library's print")
    os.write(2, b"from C\\n")
    log.info("what we say")
    {end}
print("after it")
"""


def run(folder, end):
    """Run the script in a folder: what it printed, and its log."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    return done, (folder / "logs" / "a.log").read_text()


def test_what_libraries_print_stays_in_the_log(tmp_path):
    done, log = run(tmp_path, "pass")
    assert done.returncode == 0 and done.stdout == "after it\n"
    assert "what we say" in done.stderr and "rule a_rule: done" in done.stderr
    for said in ("a library's warning", "a library's print", "from C"):
        assert said in log and said not in done.stderr
    assert log.index("from C") < log.index("what we say") < log.index("done in"), (
        "in order, nothing overwritten"
    )


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("raise UserError('wrong', write='right')", "write:   right"),
        ("raise ValueError('a bug')", "ValueError: a bug"),
        (
            "raise ValueError('I/O error: No space left on device (os error 28)')",
            "os error 28)). Free some space",
        ),
    ],
)
def test_a_failure_is_told_in_both_places(tmp_path, end, words):
    done, log = run(tmp_path, end)
    assert done.returncode == 1 and words in done.stderr and words in log
    assert ("Traceback" in done.stderr) == ("a bug" in end)


@pytest.mark.parametrize(
    ("main", "status", "words"),
    [
        ("lambda: 1", 1, ""),
        ("lambda: 1 / 0", 3, "ZeroDivisionError"),
        ("lambda: __import__('nosuch')", 3, "ModuleNotFoundError"),
        ("lambda: __import__('warnings').warn('soon', FutureWarning)", 0, ""),
    ],
)
def test_a_command_that_crashes_gives_no_answer(tmp_path, main, status, words):
    code = f"from dryfit.common.terminal import command\ncommand({main})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and words in done.stderr and (words or not done.stderr)
