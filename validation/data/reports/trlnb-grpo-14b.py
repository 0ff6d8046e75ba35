import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

quantization_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_compute_dtype=torch.float16,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
)
model = AutoModelForCausalLM.from_pretrained(
    "Qwen/Qwen3-14B",
    attn_implementation="sdpa",
    dtype=torch.float32,
    quantization_config=quantization_config,
)
peft_config = LoraConfig(
    r=32,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
    args=GRPOConfig(
        max_steps=500,
        per_device_train_batch_size=8,
        max_completion_length=256,
        num_generations=8,
        optim="paged_adamw_8bit",
        use_liger_kernel=True,
    ),
    train_dataset=load_dataset("AI-MO/NuminaMath-TIR", split="train"),
    peft_config=peft_config,
)
trainer.train()
