"""What tests of several folders stand on."""

import fcntl
import gc
import os
import resource
import time
from pathlib import Path

import pytest

from tests import tiers

os.environ.setdefault(
    "GOMP_SPINCOUNT", "3000"
)  # before torch is imported; scripts/common/job.py says why
# Inductor would compile a program for each kind of vectors, to see that g++ can: seconds, anew in each followed step.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ["DRYFIT_CACHE"] = ""  # each test asks anew; tests of kept answers name a folder
gc.set_threshold(100_000, 50, 50)  # as an answer sets it before its imports
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # one core for each worker; jobs of a chain set their own number

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


BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-time", action="store_true", help="write how long this takes into tests/tiers.json"
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Where a whole tier runs: about how long that takes."""
    tier = tiers.TIERS.get(config.option.markexpr)
    return (
        f"{tier}: {tiers.expected(tier)}"
        if tier and config.args_source is not config.ArgsSource.ARGS
        else None
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """With --record-time: keep what this process and all that it started have taken."""
    gc.freeze()  # pytest collects garbage five times when it ends: seconds each, with PyTorch's modules in memory
    if config.option.record_time and "PYTEST_XDIST_WORKER" not in os.environ:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        found = config.pluginmanager.get_plugin("terminalreporter").stats
        tests = sum(len(found.get(end, ())) for end in ("passed", "skipped", "failed", "xfailed"))
        core_seconds = sum(one.ru_utime + one.ru_stime for one in used)
        tiers.record(
            tiers.TIERS[config.option.markexpr], tests, time.monotonic() - BEGUN, core_seconds
        )


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m says
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first; else the order stays. Mark the cases that `make test` leaves out."""
    tiers.mark(items)

    def turn(item: pytest.Item) -> int:
        return next(
            (number for number, start in enumerate(FIRST) if item.nodeid.startswith(start)),
            len(FIRST),
        )

    items.sort(key=turn)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkout in which the chain has run with the tiny configuration, and what Snakemake said.

    All workers of a session share it: read it, or edit a copy.
    """
    from tests.end_to_end import (
        chain,
    )  # here, so that the library's tests run where no Snakemake is

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
