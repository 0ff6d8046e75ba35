"""Classes of images with transformers' Trainer: all weights under autocast, or LoRA.

- each image is cut to size x size pixels before it comes to the card
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

model = "google/vit-base-patch16-224"
micro_batch = 32  # images of a batch
size = 224  # pixels of a side
classes = 10
precision = "bf16"  # bf16 | fp16 | fp32
rank = 0  # of LoRA; 0 trains all weights
gradient_checkpointing = False
optimizer = "adamw"  # adamw | adamw_8bit

network = AutoModelForImageClassification.from_pretrained(
    model, num_labels=classes, ignore_mismatched_sizes=True, dtype=torch.float32
)
if rank:
    network = get_peft_model(
        network, LoraConfig(r=rank, target_modules="all-linear", modules_to_save=["classifier"])
    )
rows = [{"pixel_values": torch.zeros(3, size, size), "labels": 0}] * (2 * micro_batch)
settings = TrainingArguments(
    "trained",
    per_device_train_batch_size=micro_batch,
    max_steps=2,
    bf16=precision == "bf16",
    fp16=precision == "fp16",
    gradient_checkpointing=gradient_checkpointing,
    optim={"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}[optimizer],
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,
)
Trainer(network, settings, train_dataset=rows).train()
