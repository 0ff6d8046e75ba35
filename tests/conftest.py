"""What tests of several folders stand on."""

from __future__ import annotations

import fcntl
import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch is imported; scripts/common/job.py says why
# Inductor would compile a program for each kind of vectors, to see that g++ can: seconds, anew in each followed step.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ["DRYFIT_CACHE"] = ""  # each test asks anew; tests of kept answers name a folder
gc.set_threshold(100_000, 50, 50)  # as an answer sets it before its imports
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core for each worker; jobs of a chain set their own number

# A worker takes whole files. What takes minutes begins first, so that no worker is left with it at the end; the chain
# first of all, and what reads it later, when it is finished. One worker after the other takes what is next.
FIRST = (
    "tests/end_to_end/test_chain.py",
    "tests/workflow",
    "tests/docs/test_commands.py",
    "tests/end_to_end/test_same_again.py",
    "tests/end_to_end",
    "tests/dryfit/tracing",
    "tests/dryfit/step",
    "tests/unit/training",
    "tests/dryfit/engine",
    "tests/unit/merging",
    "tests/dryfit/planner",
    "tests/validation",
    "tests/dryfit/ask",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first; else the order stays."""

    def turn(item: pytest.Item) -> int:
        return next((number for number, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

    items.sort(key=turn)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkout in which the chain has run with the tiny configuration, and what Snakemake said.

    All workers of a session share it: read it, or edit a copy.
    """
    from tests.end_to_end import chain  # here, so that the library's tests run where no Snakemake is

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    project, said = folder / "chain", folder / "chain.txt"
    with open(folder / "chain.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            assert not project.exists(), "the chain failed in another worker"
            chain.checkout(project)
            said.write_text(chain.finished(project), encoding="utf-8")
    return project, said.read_text(encoding="utf-8")
