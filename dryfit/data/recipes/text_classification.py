"""Classes of texts with transformers' Trainer: all weights under autocast, or LoRA.

- every row of the batch is as long as sequence_length says, the longest that occurs, and carries a padding mask
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

model = "google-bert/bert-base-uncased"
micro_batch = 16  # rows of a batch
sequence_length = 512  # tokens of a row
classes = 2
precision = "bf16"  # bf16 | fp16 | fp32
rank = 0  # of LoRA; 0 trains all weights
gradient_checkpointing = False
optimizer = "adamw"  # adamw | adamw_unfused | adamw_8bit

network = AutoModelForSequenceClassification.from_pretrained(
    model, num_labels=classes, dtype=torch.float32
)
if rank:
    network = get_peft_model(network, LoraConfig("SEQ_CLS", r=rank, target_modules="all-linear"))
tokens = torch.ones(sequence_length, dtype=torch.long)
mask = (torch.arange(sequence_length) < sequence_length - 1).long()
rows = [{"input_ids": tokens, "attention_mask": mask, "labels": 0}] * (2 * micro_batch)
settings = TrainingArguments(
    "trained",
    per_device_train_batch_size=micro_batch,
    max_steps=2,
    bf16=precision == "bf16",
    fp16=precision == "fp16",
    gradient_checkpointing=gradient_checkpointing,
    optim={
        "adamw": "adamw_torch_fused",
        "adamw_unfused": "adamw_torch",
        "adamw_8bit": "adamw_bnb_8bit",
    }[optimizer],
    save_strategy="no",
    report_to="none",
)
Trainer(network, settings, train_dataset=rows).train()
