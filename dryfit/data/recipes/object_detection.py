"""Boxes of objects with transformers' Trainer, as its run_object_detection.py.

- images are size x size pixels, the longest side that occurs, with objects boxes each
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

import torch
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments

model = "facebook/detr-resnet-50"
micro_batch = 8  # images of a batch
size = 800  # pixels of a side
objects = 10  # of an image
classes = 80
precision = "bf16"  # bf16 | fp16 | fp32
optimizer = "adamw"  # adamw | adamw_8bit

network = AutoModelForObjectDetection.from_pretrained(
    model, num_labels=classes, ignore_mismatched_sizes=True, dtype=torch.float32
)
boxes = {
    "class_labels": torch.zeros(objects, dtype=torch.long),
    "boxes": torch.full((objects, 4), 0.5),
}
row = {"pixel_values": torch.zeros(3, size, size), "labels": boxes}


def collated(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "pixel_mask": torch.ones(len(rows), size, size, dtype=torch.long),
        "labels": [row["labels"] for row in rows],
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
Trainer(network, settings, train_dataset=[row] * (2 * micro_batch), data_collator=collated).train()
