"""Classes of images with timm's models and its optimizer, as its train.py: all weights under autocast.

- each image is cut to size x size pixels; AdamW
- the weights are in fp32; bf16 and fp16 are autocast over them
"""

import timm
import torch
from timm.optim import create_optimizer_v2

model = "timm/resnet50.a1_in1k"
micro_batch = 128  # images of a batch
size = 224  # pixels of a side
classes = 1000
precision = "bf16"  # bf16 | fp16 | fp32
gradient_checkpointing = False
channels_last = False

network = timm.create_model(model.partition("/")[2], pretrained=False, num_classes=classes).cuda()
network.set_grad_checkpointing(gradient_checkpointing)
layout = torch.channels_last if channels_last else torch.contiguous_format
network = network.to(memory_format=layout)
optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-3)
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
for _ in range(2):
    images = torch.zeros(micro_batch, 3, size, size).cuda().contiguous(memory_format=layout)
    labels = torch.zeros(micro_batch, dtype=torch.long).cuda()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
