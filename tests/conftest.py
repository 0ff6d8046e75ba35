"""What tests of several folders stand on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.end_to_end import chain

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch is imported; scripts/common/job.py says why


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkout in which the chain has run with the tiny configuration, and what Snakemake said."""
    project = chain.checkout(tmp_path_factory.mktemp("chain"))
    return project, chain.snakemake(project)
