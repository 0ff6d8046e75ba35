"""`dryfit run --ranks`: processes that take different memory, each run alone."""

import pytest

from tests.dryfit.program.test_run import PROGRAMS, answered, asked, program, refused

MIB = 2**20
UNEVEN = """
import os, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
assert dist.get_rank() == rank == int(os.environ["RANK"])
model = torch.nn.Linear(1024, 1024, bias=False).cuda()
if rank == 2:
    statistics = torch.zeros(2**20, 16, device="cuda")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(64, 1024, device=f"cuda:{rank}")).sum().backward()
    dist.all_reduce(model.weight.grad)
    optimizer.step()
    optimizer.zero_grad()
"""


def test_the_process_that_needs_most_is_the_answer(tmp_path):
    name = program(tmp_path, UNEVEN)
    answer = answered(tmp_path, "--gpus", "4", "--gpu", "4090", "--ranks", "all", name)
    peaks = {row["rank"]: row["peak_allocated_bytes"] for row in answer["ranks"]}
    assert answer["rank"] == 2 and answer["trace"]["peak_allocated_bytes"] == peaks[2]
    assert peaks == {0: peaks[0], 1: peaks[0], 2: peaks[0] + 64 * MIB, 3: peaks[0]}
    one = answered(tmp_path, "--gpus", "4", name)
    assert one["rank"] == 0 and [row["rank"] for row in one["ranks"]] == [0]
    assert one["trace"]["peak_allocated_bytes"] == peaks[0]


def test_the_ranks_in_words(tmp_path):
    done = asked(
        tmp_path,
        "--yes",
        "--gpus",
        "4",
        "--gpu",
        "4090",
        "--ranks",
        "0,2",
        program(tmp_path, UNEVEN),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "on the GPU of rank 2" in lines[0] and "as rank 2 of 4 processes" in lines[1]
    assert any(
        "required by rank" in line and "rank 0 " in line and "rank 2 " in line for line in lines
    )


@pytest.mark.thorough
def test_a_process_that_is_not_the_first_has_its_own_card(tmp_path):
    answer = answered(tmp_path, "--gpus", "4", "--ranks", "3", str(PROGRAMS / "ranks.py"))
    assert (
        answer["rank"] == 3
        and answer["trace"]["components"]["collective_buffers"] >= 4 * 1024 * 1025
    )


SPLIT = """
import os, torch, torch.distributed as dist
dist.init_process_group("nccl")
torch.cuda.set_device(dist.get_rank())
rank, layers = dist.get_rank(), [torch.nn.Linear(1024, 1024, bias=False).cuda() for _ in range(1 + dist.get_rank())]
settings = [{"rows": 32}] if rank == 0 else [None]
dist.broadcast_object_list(settings, src=0)
given = [None]
dist.scatter_object_list(given, [10, 11] if rank == 0 else None, src=0)
assert given == ([10] if rank == 0 else [None])
optimizer = torch.optim.SGD([layer.weight for layer in layers], lr=0.1)
for _ in range(3):
    sum(layer(torch.randn(8, 1024, device="cuda")).sum() for layer in layers).backward()
    optimizer.step()
"""


@pytest.mark.thorough
def test_objects_that_another_process_sends_are_told(tmp_path):
    name = program(tmp_path, SPLIT)
    answer = answered(tmp_path, "--gpus", "2", "--ranks", "all", name)
    assert answer["rank"] == 1 and answer["trace"]["components"]["weights_fp32"] == 2 * 4 * MIB
    told = [
        warning
        for warning in answer["warnings"]
        if "receives objects of another process" in warning
    ]
    assert [line.partition(" ")[0] for line in told] == ["program.py:7", "program.py:9"]
    assert not answered(tmp_path, "--gpus", "2", name)["warnings"]


@pytest.mark.thorough
def test_a_process_that_fails_is_named(tmp_path):
    failing = UNEVEN.replace(
        "if rank == 2:", "if rank == 1:\n    raise ValueError('an odd rank')\nif rank == 2:"
    )
    told = refused(tmp_path, "--gpus", "2", "--ranks", "all", program(tmp_path, failing))
    assert "an odd rank" in told and "the process of rank 1, program.py:9" in told


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "words", [("--ranks", "all,1"), ("--gpus", "2", "--ranks", "2"), ("--ranks", "1")]
)
def test_ranks_that_are_not_there(tmp_path, words):
    told = refused(tmp_path, *words, program(tmp_path, UNEVEN))
    assert "a process that the program does not have" in told and "--ranks all" in told
