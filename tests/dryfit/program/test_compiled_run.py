"""Whole programs that compile their step: followed with Triton, and refused in words without it."""

from importlib.util import find_spec

import pytest

from tests.dryfit.program.test_run import answered, program, refused

COMPILED = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)
    def forward(self, inputs):
        return nn.functional.gelu(self.down(nn.functional.gelu(self.up(inputs)))).square().mean()

model = torch.compile(Block().cuda())
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(5):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(torch.randn(512, 256, device="cuda"))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"{loss:.4f}")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_compiled_program_takes_less_than_without_the_compiler(tmp_path):
    compiled = answered(tmp_path, program(tmp_path, COMPILED))
    eager = answered(
        tmp_path,
        program(tmp_path, COMPILED.replace("torch.compile(Block().cuda())", "Block().cuda()")),
    )
    assert (
        compiled["trace"]["compiled"]["graphs"] == 2 and not compiled["trace"]["compiled"]["breaks"]
    )
    assert compiled["training"]["peak_allocated_bytes"] < eager["training"]["peak_allocated_bytes"]
    assert not compiled["warnings"] and not eager["warnings"]
    alone, both = ("one GPU (measured: ddp on 8 GPUs)", "compile no (measured: model)")
    assert alone in compiled["evidence"]["text"] and both in eager["evidence"]["text"]


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_region_that_is_wrapped_for_modes_takes_the_same(tmp_path):
    wrapped = COMPILED.replace(
        ".cuda())", ".cuda(), options={'wrap_inductor_compiled_regions': True})"
    )
    one, other = (answered(tmp_path, program(tmp_path, text)) for text in (COMPILED, wrapped))
    assert (
        other["trace"]["compiled"]["graphs"] == 2
        and one["trace"]["phases"] == other["trace"]["phases"]
    )


ORTHOGONAL = """
import torch

@torch.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
def orthogonal(gradient):
    update = gradient.bfloat16()
    return (update @ update.mT @ update).type_as(gradient)

weight = torch.nn.Parameter(torch.randn(128, 512, device="cuda"))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(4):
    (torch.randn(64, 128, device="cuda") @ weight).square().mean().backward()
    weight.grad = orthogonal(weight.grad)
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_outputs_of_cuda_graphs_lie_on_the_card(tmp_path):
    """Inductor's graph trees ask each output, as they do in Muon's update of modded-nanogpt (noallreduce)."""
    answer = answered(tmp_path, program(tmp_path, ORTHOGONAL))
    assert answer["trace"]["compiled"]["graphs"] == 1


@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_graph_break_is_told(tmp_path):
    broken = COMPILED.replace(
        "        return nn", "        torch._dynamo.graph_break()\n        return nn"
    )
    answer = answered(tmp_path, program(tmp_path, broken))
    assert any(
        "graph break" in warning and "program.py:" in warning for warning in answer["warnings"]
    )


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_what_a_compiled_function_asks_the_card_is_a_constant(tmp_path):
    asks = """        count = torch.cuda.get_device_properties("cuda").multi_processor_count * torch.cuda.device_count()
        assert count == 132 and torch.cuda.get_device_capability() == (9, 0)
        return nn"""
    whole = COMPILED.replace("        return nn", asks).replace(
        "Block().cuda()", "Block().cuda(), fullgraph=True"
    )
    answer = answered(tmp_path, "--gpu", "h100-80gb", program(tmp_path, whole))
    assert answer["trace"]["compiled"]["graphs"] == 2 and not answer["trace"]["compiled"]["breaks"]


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_process_that_is_not_the_first_compiles_for_its_own_card(tmp_path):
    own = """import os, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
"""
    text = own + COMPILED.replace(
        "self.up(inputs)", "self.up(inputs + torch.ones(256, device=inputs.device))"
    )
    text = text.replace(
        "torch.compile(Block().cuda())",
        "DistributedDataParallel(torch.compile(Block().to(device)))",
    )
    name = program(tmp_path, text.replace('device="cuda"', "device=device"))
    answers = [answered(tmp_path, "--gpus", "2", "--ranks", rank, name) for rank in ("0", "1")]
    assert [answer["rank"] for answer in answers] == [0, 1]
    assert answers[0]["trace"]["compiled"] == answers[1]["trace"]["compiled"]
    assert answers[0]["trace"]["phases"] == answers[1]["trace"]["phases"]


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_a_compiled_program_without_triton(tmp_path):
    told = refused(tmp_path, program(tmp_path, COMPILED))
    assert "Triton is not installed" in told and "dryfit[run]" in told and "program.py:16" in told
