"""What programs ask a card: memory, properties, streams, events, seeds, a scaler, a file for the card, threads."""

import subprocess
import tempfile
import threading

import pynvml
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

assert torch.cuda.device_count() == 1 and torch.cuda.get_device_name(0).startswith("NVIDIA")
assert torch.cuda.get_device_capability() >= (8, 0) and torch.cuda.is_bf16_supported()
assert torch.cuda.get_device_properties(0).total_memory > 2**34
torch.manual_seed(1)
torch.cuda.manual_seed_all(1)
print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True).stdout)
query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
assert int(subprocess.check_output(query, text=True).split(",")[1]) > 2**14

pynvml.nvmlInit()
card = pynvml.nvmlDeviceGetHandleByIndex(0)
assert pynvml.nvmlDeviceGetCount() == 1 and pynvml.nvmlDeviceGetName(
    card
) == torch.cuda.get_device_name(0)
assert pynvml.nvmlDeviceGetMemoryInfo(card).free == torch.cuda.mem_get_info()[0]
pynvml.nvmlShutdown()

free, total = torch.cuda.mem_get_info()
assert 0 < free <= total
block = torch.empty(2**20, device="cuda:0")
assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 2**22
assert (
    torch.cuda.memory_reserved() == 20 * 2**20 and torch.cuda.mem_get_info()[0] == free - 20 * 2**20
)
del block
assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_allocated() == 2**22
torch.cuda.reset_peak_memory_stats()
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() == torch.cuda.max_memory_allocated() == 0
assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0

begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
begin.record()
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    product = torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
product.record_stream(torch.cuda.current_stream())
end.record()
torch.cuda.synchronize()
assert begin.elapsed_time(end) > 0
with torch.cuda.nvtx.range("a range"):
    pass

model = nn.Linear(512, 512).cuda()
assert next(model.parameters()).device == torch.device("cuda", 0)
with tempfile.NamedTemporaryFile() as file:
    torch.save(nn.Linear(512, 512).state_dict(), file.name)
    model.load_state_dict(torch.load(file.name, map_location="cuda"))
before = torch.cuda.memory_allocated()
own = nn.Linear(4096, 4096, device="meta")
assert own.weight.device.type == "meta" and torch.cuda.memory_allocated() == before
assert own.to_empty(device="cuda").weight.is_cuda and torch.cuda.memory_allocated() > before + 2**26
del own
kept = []
thread = threading.Thread(target=lambda: kept.append(torch.empty(2**20, device="cuda")))
before = torch.cuda.memory_allocated()
thread.start()
thread.join()
assert torch.cuda.memory_allocated() == before + 2**22

scaler, optimizer = (
    torch.amp.GradScaler("cuda"),
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
)
rows = DataLoader(
    TensorDataset(torch.randn(64, 512)), batch_size=8, num_workers=2, pin_memory=True, shuffle=True
)
for (row,) in rows:
    with torch.autocast("cuda", dtype=torch.float16):
        loss = model(row.cuda(non_blocking=True)).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
