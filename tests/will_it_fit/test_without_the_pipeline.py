"""The library and its tests stand alone: nothing of Snakemake, and nothing of the pipeline, is needed for them."""

import subprocess
import sys

from tests.repository import ROOT

WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("snakemake", "scripts", "validation"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_librarys_tests_are_collected_without_snakemake_and_without_the_pipeline() -> None:
    """All of them are imported, which takes torch and transformers ten seconds."""
    command = [sys.executable, "-c", WITHOUT, "tests/will_it_fit", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    collected = int(done.stdout.strip().splitlines()[-1].split()[0])
    assert collected > 1000
    command[3] = "tests/unit/runs/test_runs.py"  # of the pipeline: what is refused is refused
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0
