import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained(
    "meta-llama/Llama-2-7b-hf",
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    device_map={"": Accelerator().local_process_index},
)
trainer = SFTTrainer(
    model=model,
    train_dataset=load_dataset(
        "lvwerra/stack-exchange-paired", data_dir="data/finetune", split="train"
    ),
    peft_config=LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    ),
    args=SFTConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_length=1024,
        packing=True,
        bf16=True,
        gradient_checkpointing=False,
        optim="paged_adamw_32bit",
    ),
)
trainer.train()
