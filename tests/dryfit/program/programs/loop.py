"""A usual training loop: autocast, a printed loss, the best one kept, evaluation after each update."""

import torch
from torch import nn

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
best = 10.0
for step in range(100):
    inputs = torch.randn(64, 256).pin_memory().to(device, non_blocking=True)
    assert inputs.is_cuda and inputs.device.type == "cuda"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = (model(inputs) - inputs).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if loss.item() < best:
        best = loss.item()
    print(step, f"{loss.item():.3f} {loss:.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        model(torch.randn(8192, 256, device="cuda"))
    model.train()
raise SystemExit("it took all its steps")
