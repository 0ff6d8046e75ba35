import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

model = AutoModelForCausalLM.from_pretrained(
    "Qwen/Qwen2.5-7B-Instruct", attn_implementation="eager", dtype=torch.float16
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
    args=GRPOConfig(
        max_steps=500,
        per_device_train_batch_size=8,
        max_completion_length=256,
        num_generations=8,
        gradient_checkpointing=False,
        optim="adamw_torch",
        bf16=False,
    ),
    train_dataset=load_dataset("AI-MO/NuminaMath-TIR", split="train"),
)
trainer.train()
