"""Liger's own kernels, with the installed release, against what its benchmark measured of them on an A100.

``tests/nightly/test_liger_releases.py`` has all 97 rows, each with the release that it was measured with.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.repository import ROOT
from validation import modules
from validation.liger_package import release_of, results

# One size of each kernel whose buffers are today what they were when it was measured.
SAME = ["cross_entropy-4096", "geglu-1024", "layer_norm-1024", "swiglu-1024", "distill_cosine-1024"]


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="`make test-kernels` runs it")
def test_a_size_of_ligers_kernels_takes_what_was_measured():
    rows = [row for row in modules.read() if row["id"].removeprefix("a100-") in SAME]
    found = list(results(rows))
    assert len(found) == len(SAME)
    for row in found:
        assert abs(row["predicted_bytes"] - row["measured_bytes"]) <= modules.NEAR, row


def test_each_row_has_a_release_that_is_not_older_than_the_row():
    for row in modules.read():
        version, release = (tuple(map(int, text.split("."))) for text in (row["liger_version"], release_of(row)))
        assert release >= version, row["id"]


def test_the_command_names_the_releases():
    command = [sys.executable, "-m", "validation.liger_package", "--releases"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == sorted({release_of(row) for row in modules.read()})
