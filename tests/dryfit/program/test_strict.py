"""Faults that a GPU would find, and programs that are right: the first end with CUDA's error, the others do not."""

import json

import pytest

from tests.dryfit.program.test_run import answered, asked, program, refused

# A program runs each entry in turn; a fault must raise, by a word of CUDA's or PyTorch's error.
FAULTS = {
    "ids on the host": ("embedding(ids_on_host)", "same device"),
    "a model on the host": ("nn.Linear(64, 64)(x)", "same device"),
    "a batch on the host": ("linear(torch.randn(8, 64))", "same device"),
    "a mask on the host": ("torch.where(torch.ones(8, 64, dtype=torch.bool), x, x)", "same device"),
    "a loss against targets on the host": (
        "nn.functional.mse_loss(x, torch.zeros(8, 64))",
        "same device",
    ),
    "tensors joined": ("torch.cat([x, torch.zeros(8, 64)])", "same device"),
    "an index on the card into the host": ("torch.zeros(100)[ids]", "same device"),
    "an array of what is on the card": ("x.numpy()", "Tensor.cpu()"),
    "an array through NumPy": ("np.asarray(x)", "Tensor.cpu()"),
    "classes of 32 bits": (
        "nn.functional.cross_entropy(x, ids.int())",
        "not implemented for 'Int'",
    ),
    "a mask of another dtype": (
        "attention(q, q, q, attn_mask=mask.half())",
        "Expected attn_mask dtype",
    ),
    "a large model on the host": (
        "nn.Linear(2048, 2048)(torch.randn(8, 2048, device='cuda'))",
        "same device",
    ),
}
CONTROLS = {
    "a number of the host": "x * torch.tensor(2.0) + torch.tensor(1)",
    "an index of the host into the card": "x[torch.tensor([0, 1])]",
    "a mask of the host into the card": "x[torch.tensor([True] * 8)]",
    "a copy": "x.copy_(torch.zeros(8, 64)); torch.zeros(8, 64).copy_(x)",
    "there and back": "x.cpu().numpy(); x.to('cpu').tolist(); x.detach().cpu().float().to('cuda') + x",
    "a scheduler and a scaler": (
        "scaler = torch.amp.GradScaler('cuda'); scaler.scale(linear(x).sum()).backward(); scaler.step(optimizer);"
        " scaler.update(); optimizer.zero_grad()"
    ),
    "clipping": "linear(x).sum().backward(); nn.utils.clip_grad_norm_(linear.parameters(), 1.0); optimizer.zero_grad()",
    "a state that comes back": "optimizer.load_state_dict(optimizer.state_dict())",
    "autocast": "torch.autocast('cuda', dtype=torch.bfloat16).__enter__(); linear(x); embedding(ids)",
    "choices of what was brought to the host": "(x.cpu() > 0).nonzero(); x.cpu()[x.cpu() > 0]",
    "attention": "attention(q, q, q, is_causal=True)",
    "masks": "attention(q.half(), q.half(), q.half(), attn_mask=mask); attention(q, q, q, attn_mask=mask > 0)",
    "what the host counts is counted once": (
        "counted = torch.zeros(2); counted += 1; counted.add_(counted)\nif counted.tolist() != [2, 2]: raise TypeError"
    ),
    "classes": "nn.functional.cross_entropy(x, ids)",
    "an average of the model": "torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)([x], [x.clone()], 1)",
}
TEXT = """
import json
import numpy as np, torch
from torch import nn
attention = nn.functional.scaled_dot_product_attention
linear, embedding = nn.Linear(64, 64).cuda(), nn.Embedding(100, 64).cuda()
optimizer = torch.optim.AdamW(linear.parameters())
for _ in range(2):
    x, ids_on_host = torch.randn(8, 64, device="cuda"), torch.randint(100, (8,))
    ids, q, mask = ids_on_host.cuda(), x.view(1, 8, 8, 8), torch.ones(8, 8, device="cuda")
    for kind, line in LINES.items():
        try:
            exec(line)
        except (RuntimeError, TypeError) as error:
            print("RAISED", json.dumps([kind, str(error)]))
        torch.set_autocast_enabled("cuda", False)
    linear(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_faults_raise_and_what_is_right_does_not(tmp_path):
    lines = {kind: line for kind, (line, _) in FAULTS.items()} | CONTROLS
    text = TEXT.replace("LINES", repr(lines))
    line = text.splitlines().index("            exec(line)") + 1
    done = asked(tmp_path, "--yes", "--answer", f"program.py:{line}=0.5", program(tmp_path, text))
    assert done.returncode == 0, done.stderr
    said = done.stderr
    raised = dict(json.loads(line[7:]) for line in said.splitlines() if line.startswith("RAISED "))
    assert raised.keys() & CONTROLS.keys() == set(), raised
    assert raised.keys() == FAULTS.keys()
    for kind, (_, word) in FAULTS.items():
        assert word in raised[kind], raised[kind]


@pytest.mark.thorough
def test_the_error_of_a_model_left_on_the_host_names_the_line(tmp_path):
    text = """
import torch
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(8, 64).cuda()).sum().backward()
optimizer.step()
"""
    said = refused(tmp_path, program(tmp_path, text))
    assert "Expected all tensors to be on the same device" in said and "cuda:0 and cpu" in said
    assert "program.py:5" in said


QLORA_DDP = """
import os, torch
import bitsandbytes as bnb
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("nccl")
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
layer = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
model = nn.Sequential(layer, nn.Linear(256, 8, bias=False, dtype=torch.bfloat16)).to("cuda")
layer.weight.requires_grad_(False)
assert {each.device.type for each in model.parameters()} == {"cuda"}
try:
    dist.all_reduce(torch.ones(4))
except RuntimeError as error:
    assert "No backend type associated with device type cpu" in str(error)
else:
    raise SystemExit("NCCL took a tensor of the host")
dist.barrier()
model = DistributedDataParallel(model, device_ids=[int(os.environ["LOCAL_RANK"])])
optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
for _ in range(5):
    model(torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.thorough
def test_a_quantized_model_trains_in_ddp_and_nccl_takes_what_is_on_the_card(tmp_path):
    answer = answered(tmp_path, "--gpus", "2", program(tmp_path, QLORA_DDP), fresh=True)
    assert answer["trace"]["components"]["weights_4bit"] == 256 * 256 // 2
    assert answer["program"]["updates"] == 2


THREADS = """
import os, threading, torch
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
errors = []
def load(own):
    try:
        if own:
            torch.cuda.set_device(1)
        torch.zeros(8).to("cuda"), torch.zeros(8).cuda(), torch.zeros(8, device="cuda")
    except RuntimeError as error:
        errors.append(str(error))
for own in (True, False):
    thread = threading.Thread(target=load, args=(own,))
    thread.start()
    thread.join()
torch.zeros(8, device="cuda")
assert len(errors) == 1 and "which is cuda:0 there, and its card is cuda:1" in errors[0], errors
weight = torch.nn.Parameter(torch.zeros(8, device="cuda"))
optimizer = torch.optim.SGD([weight])
for _ in range(3):
    weight.sum().backward()
    optimizer.step()
"""


@pytest.mark.thorough
def test_a_threads_own_card_is_the_first(tmp_path):
    assert (
        answered(tmp_path, "--gpus", "2", "--ranks", "1", program(tmp_path, THREADS))["rank"] == 1
    )


@pytest.mark.thorough
def test_a_process_that_has_chosen_no_card_has_the_first(tmp_path):
    text = 'import torch\nweight = torch.zeros(8, device="cuda")\n'
    said = refused(tmp_path, "--gpus", "2", "--ranks", "1", program(tmp_path, text))
    assert "The process asks for `cuda`, which is cuda:0 there, and its card is cuda:1" in said
