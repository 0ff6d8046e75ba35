import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

quantization_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_compute_dtype=torch.float16,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
)
model = AutoModelForCausalLM.from_pretrained(
    "google/gemma-3-4b-it",
    attn_implementation="sdpa",
    dtype=torch.float16,
    quantization_config=quantization_config,
)
peft_config = LoraConfig(
    r=32,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=30,
        optim="paged_adamw_8bit",
        max_length=1024,
        use_liger_kernel=True,
        activation_offloading=True,
    ),
    train_dataset=load_dataset("HuggingFaceH4/Multilingual-Thinking", split="train"),
    peft_config=peft_config,
)
trainer.train()
