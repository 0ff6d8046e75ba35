"""Transcription with transformers' Seq2SeqTrainer: all weights under autocast, or LoRA.

- the encoder hears 30 s of audio whatever is said in them, and the answer is as long as answer_tokens says
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForSpeechSeq2Seq,
    BitsAndBytesConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

model = "openai/whisper-large-v3"
micro_batch = 16  # recordings of a batch
answer_tokens = 448  # of the longest answer
precision = "bf16"  # bf16 | fp16 | fp32
rank = 0  # of LoRA; 0 trains all weights
quantization = "none"  # none | nf4
gradient_checkpointing = True
optimizer = "adamw"  # adamw | adamw_8bit

four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
network = AutoModelForSpeechSeq2Seq.from_pretrained(
    model, dtype=torch.float32, quantization_config=four_bit if quantization == "nf4" else None
)
network.config.use_cache = False
if quantization != "none":
    network = prepare_model_for_kbit_training(
        network, use_gradient_checkpointing=gradient_checkpointing
    )
if rank:
    network = get_peft_model(network, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
frames = 2 * network.config.max_source_positions
sounds = torch.zeros(network.config.num_mel_bins, frames)
rows = [{"input_features": sounds, "labels": torch.ones(answer_tokens, dtype=torch.long)}] * (
    2 * micro_batch
)
settings = Seq2SeqTrainingArguments(
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
Seq2SeqTrainer(network, settings, train_dataset=rows).train()
