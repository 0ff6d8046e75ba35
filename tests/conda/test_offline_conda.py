"""When the conda on PATH is taken, and when one is built (test_chain.py creates environments)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.conda.offline_conda import conda_setup

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a conda can be built on Linux alone"
)

FAKE = """\
#!/bin/sh
case "$1" in
    --version) echo "conda {version}" ;;
    search) exit {status} ;;
esac
"""


@pytest.mark.parametrize(
    ("version", "status", "origin"),
    [
        ("24.7.1", 0, "found"),
        ("26.1.0", 0, "found"),
        ("24.7.0", 0, "offline"),
        ("24.11.0", 1, "offline"),
    ],
    ids=["oldest", "newer", "too old", "conda-forge out of reach"],
)
def test_conda_on_path_is_taken_when_it_serves(
    version: str, status: int, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "conda"
    program.parent.mkdir()
    program.write_text(FAKE.format(version=version, status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    setup = conda_setup(Path(__file__).resolve().parents[2] / ".conda-test")
    assert setup.origin == origin
    assert (setup.environ["PATH"] == os.environ["PATH"]) == (origin == "found")
