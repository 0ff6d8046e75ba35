"""`dryfit run --vary`: the largest value of a program's argument at which it fits."""

import json

import pytest

from dryfit.program.largest import MOST_RUNS, largest
from tests.dryfit.program.test_run import asked, refused

PROGRAM = """import argparse
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--length", type=int)
length = parser.parse_args().length
assert length <= LIMIT, "the model has no more positions"
model = torch.nn.Linear(1024, 1024, bias=False).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    (model(torch.empty(1024, length, 1024, device="cuda")) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("needs", "first", "multiple", "expected"),
    [
        (lambda value: 100 + 7 * value, 64, 64, 128),
        (lambda value: 100 + 7 * value, 1024, 64, 128),
        (lambda value: 100 + value * value, 1, 1, 30),
        (lambda value: 100 + value * value, 500, 1, 30),
        (lambda value: 2000, 8, 1, None),
        (lambda value: 999 + value, 1, 1, 1),
    ],
    ids=["from below", "from above", "bent", "bent, from above", "nothing fits", "the smallest"],
)
def test_the_border_is_found_and_was_run(needs, first, multiple, expected):
    tried = largest(lambda value: (needs(value), needs(value) <= 1000), 1000, first, multiple)
    assert tried.largest == expected and len(tried.fits) < MOST_RUNS
    assert expected is None or tried.too_large == expected + multiple


@pytest.mark.thorough
def test_a_search_ends_where_nothing_is_too_large_or_a_setting_decides_nothing():
    tried = largest(lambda value: (value, True), 1000, 8, 1)
    assert (
        len(tried.fits) == MOST_RUNS
        and tried.too_large is None
        and tried.largest == max(tried.fits)
    )
    tried = largest(lambda value: (10, True), 1000, 8, 1)
    assert tried.is_flat and len(tried.fits) == 2


@pytest.mark.thorough
def test_a_programs_largest_length(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM.replace("LIMIT", "10**6"))
    done = asked(
        tmp_path, "--yes", "--json", "--vary", "length", "--gpu", "4090", "train.py", "--length=256"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["too_large"] == found["largest"] + 64
    sizes = {run["value"]: run["required_bytes"] for run in found["runs"]}
    assert (
        sizes[found["largest"]] < sizes[found["too_large"]]
        and sizes[found["largest"]] <= found["gpu"]["usable_bytes"]
    )


@pytest.mark.thorough
def test_a_length_that_a_program_refuses_is_too_large(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM.replace("LIMIT", "300"))
    done = asked(
        tmp_path, "--yes", "--vary", "length:100", "--gpu", "4090", "train.py", "--length", "200"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FITS up to length 300") and "no more positions" in done.stdout
    for words in (), ("--gpu", "4090", "--all-gpus"):
        assert "takes one GPU" in refused(
            tmp_path, *words, "--vary", "length", "train.py", "--length", "200"
        )
