"""Liger's own kernels, with the installed release, against what its benchmark measured of them on an A100.

``tests/nightly/test_liger_commits.py`` has all 97 rows, each with the commit that it came with.
"""

import subprocess
from importlib.util import find_spec

import pytest

from dryfit.common.errors import UserError
from validation import modules
from validation.liger_package import COMMITS, commit_of, package_of, results
from validation.liger_scripts import FLUSHED_BYTES, ScriptProcess, ScriptRun, measured

# One size of each kernel whose buffers are today what they were when it was measured.
SAME = ["cross_entropy-4096", "geglu-1024", "layer_norm-1024", "swiglu-1024", "distill_cosine-1024"]


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="`make test-kernels` runs it")
def test_a_size_of_ligers_kernels_takes_what_was_measured():
    rows = [row for row in modules.read() if row["id"].removeprefix("a100-") in SAME]
    found = list(results(rows))
    assert len(found) == len(SAME)
    for row in found:
        assert abs(row["predicted_bytes"] - row["measured_bytes"]) <= modules.NEAR, row


def test_each_row_has_a_commit_and_each_commit_a_row():
    assert {commit_of(row) for row in modules.read()} == set(COMMITS.values())


def test_a_commits_package_is_taken_from_a_checkout(tmp_path):
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "src" / "liger_kernel").mkdir(parents=True)
    git("init", "--quiet")
    commits = []
    for text in ("old = 1", "new = 1"):
        (tmp_path / "src" / "liger_kernel" / "ops.py").write_text(text)
        git("add", ".")
        git("-c", "user.name=somebody", "-c", "user.email=a@b", "commit", "--quiet", "-m", text)
        commits.append(git("rev-parse", "HEAD"))
    package_of(tmp_path, commits[0], tmp_path / "old")
    assert (tmp_path / "old" / "liger_kernel" / "ops.py").read_text() == "old = 1"
    with pytest.raises(UserError, match="with its history"):
        package_of(tmp_path, "0123456789", tmp_path / "none")


MIB = 2**20


def run(*sizes: int) -> ScriptRun:
    """A weight of 64 MiB, and steps that make tensors in the forward pass, each beside the others, and one after it."""
    events, steps, identity = [(1, 64 * MIB)], [], 1
    for _ in range(3):
        begin = len(events)
        made = range(identity + 1, identity + 1 + len(sizes))
        events += zip(made, sizes, strict=True)
        steps.append((begin, len(events)))
        identity = made.stop
        events += [(identity, 32 * MIB), (-identity, 0), *((-one, 0) for one in made)]
    return ScriptRun(events, steps, [])


def test_what_was_freed_before_decides_how_large_a_block_is():
    """21 MiB get a segment of 22, whose last MiB is too small to be cut off; of a larger free block they get 21."""
    odd, large = run(21 * MIB), run(43 * MIB)
    (alone,) = measured([("odd", odd, odd)], speed_first=False)
    _, after = measured([("large", large, large), ("odd", odd, odd)], speed_first=False)
    assert alone[1] == (64 + 22 + 32) * MIB and after[1] == (64 + 21 + 32) * MIB


def test_a_process_keeps_workspaces_and_frees_the_rest():
    process = ScriptProcess()
    product = ScriptRun(
        [(1, 8 * MIB), (2, 512), (3, 1024), (-3, 0)] + [(4, 512), (-4, 0)] * 2,
        [(1, 3), (4, 5), (6, 7)],
        [1],
    )
    process.speed(product, forward_only=True)
    process.speed(product, forward_only=False)
    process.memory(product, "product")
    assert process.peaks() == {"product": 8 * MIB + 1024}
    assert FLUSHED_BYTES == 256_000_000
