"""Texts from texts with transformers' Seq2SeqTrainer, as its run_summarization.py and run_translation.py.

- every row reads sequence_length tokens and writes answer_tokens, the longest that occur
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

model = "google/flan-t5-large"
micro_batch = 8  # rows of a batch
sequence_length = 512  # tokens that are read
answer_tokens = 128  # tokens that are written
precision = "bf16"  # bf16 | fp16 | fp32
rank = 0  # of LoRA; 0 trains all weights
gradient_checkpointing = False
optimizer = "adamw"  # adamw | adamw_8bit | adafactor

network = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32)
if rank:
    network = get_peft_model(network, LoraConfig("SEQ_2_SEQ_LM", r=rank))
tokens = torch.ones(sequence_length, dtype=torch.long)
mask = (torch.arange(sequence_length) < sequence_length - 1).long()
rows = [
    {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": torch.ones(answer_tokens, dtype=torch.long),
    }
]
settings = Seq2SeqTrainingArguments(
    "trained",
    per_device_train_batch_size=micro_batch,
    max_steps=2,
    bf16=precision == "bf16",
    fp16=precision == "fp16",
    gradient_checkpointing=gradient_checkpointing,
    optim={"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "adafactor": "adafactor"}[
        optimizer
    ],
    save_strategy="no",
    report_to="none",
)
Seq2SeqTrainer(network, settings, train_dataset=rows * (2 * micro_batch)).train()
