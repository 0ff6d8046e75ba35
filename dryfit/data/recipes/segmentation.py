"""A class for each pixel with transformers' Trainer, as its run_semantic_segmentation.py.

- images and their maps are size x size pixels
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

import torch
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments

model = "nvidia/mit-b5"
micro_batch = 8  # images of a batch
size = 512  # pixels of a side
classes = 150
precision = "bf16"  # bf16 | fp16 | fp32
optimizer = "adamw"  # adamw | adamw_8bit

network = AutoModelForSemanticSegmentation.from_pretrained(
    model, num_labels=classes, ignore_mismatched_sizes=True, dtype=torch.float32
)
row = {
    "pixel_values": torch.zeros(3, size, size),
    "labels": torch.zeros(size, size, dtype=torch.long),
}
settings = TrainingArguments(
    "trained",
    per_device_train_batch_size=micro_batch,
    max_steps=2,
    bf16=precision == "bf16",
    fp16=precision == "fp16",
    optim={"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}[optimizer],
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,
)
Trainer(network, settings, train_dataset=[row] * (2 * micro_batch)).train()
