import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained(
    "Qwen/Qwen2.5-0.5B-Instruct", torch_dtype=torch.float32
)
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        per_device_train_batch_size=8,
        max_length=1024,
        bf16=False,
        gradient_checkpointing=False,
        optim="adamw_torch",
    ),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
