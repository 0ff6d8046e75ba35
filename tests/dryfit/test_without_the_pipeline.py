"""The library and its tests stand alone: nothing of Snakemake, and nothing of the pipeline, is needed for them."""

import os
import subprocess

import pytest

from tests.repository import ROOT
from tests.warm import launchers

WITHOUT = """
import sys

def refused(name):
    return name.partition(".")[0] in ("snakemake", "scripts", "validation")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if refused(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in filter(refused, list(sys.modules)):  # another test's command may have brought Snakemake to the server
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.thorough
def test_the_librarys_tests_are_collected_without_snakemake_and_without_the_pipeline(
    tmp_path,
) -> None:
    """All of them are imported, in a process that has torch and transformers already."""
    (tmp_path / "collect.py").write_text(WITHOUT)
    command = [
        f"{launchers()}/python",
        f"{tmp_path}/collect.py",
        "tests/dryfit",
        "--collect-only",
        "-q",
    ]
    command += ["-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    collected = int(done.stdout.strip().splitlines()[-1].split()[0])
    assert collected > 1000
    command[2] = "tests/unit/runs/test_runs.py"  # of the pipeline: what is refused is refused
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode != 0
