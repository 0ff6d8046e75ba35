"""One of several processes: torchrun's variables, a group, collectives, objects, DDP."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
local = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(local)
dist.init_process_group("nccl", device_id=torch.device(local))
assert dist.get_world_size() == world == torch.cuda.device_count() and dist.get_backend() == "nccl"
dist.barrier()
found = [None] * world
dist.all_gather_object(found, {"rank": rank})
assert found[-1] == {"rank": rank}
assert torch.cuda.current_device() == local
total = torch.ones(4, device=f"cuda:{local}")
assert (
    total.device == torch.device("cuda", local) == torch.ones(1).cuda().device
    and total.get_device() == local
)
dist.all_reduce(total, op=dist.ReduceOp.AVG)
group = dist.new_group(list(range(world)), backend="nccl")
dist.broadcast(total, src=0, group=group)
model = DistributedDataParallel(nn.Linear(1024, 1024).to(local), device_ids=[local])
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(10):
    model(torch.randn(16, 1024, device=local)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
