"""Transcription by CTC with transformers' Trainer: all weights under autocast, the convolutions in front frozen.

- a batch is padded to its longest recording, of seconds s at 16 kHz; one letter of text for each 80 ms
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

import torch
from transformers import AutoModelForCTC, Trainer, TrainingArguments

model = "facebook/wav2vec2-base-960h"
micro_batch = 8  # recordings of a batch
seconds = 15  # of the longest recording
precision = "bf16"  # bf16 | fp16 | fp32
gradient_checkpointing = True
optimizer = "adamw"  # adamw | adamw_8bit

network = AutoModelForCTC.from_pretrained(
    model, ctc_loss_reduction="mean", mask_time_prob=0.0, dtype=torch.float32
)
if hasattr(network, "freeze_feature_encoder"):
    network.freeze_feature_encoder()
letters = torch.ones(int(12.5 * seconds), dtype=torch.long)
rows = [{"input_values": torch.zeros(16_000 * seconds), "labels": letters}] * (2 * micro_batch)
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
)
Trainer(network, settings, train_dataset=rows).train()
