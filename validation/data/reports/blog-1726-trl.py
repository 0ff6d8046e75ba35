import torch
from datasets import load_dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float16,
)
model = AutoModelForCausalLM.from_pretrained(
    "meta-llama/Llama-2-7b-hf", quantization_config=quantization
)
model = prepare_model_for_kbit_training(model)
trainer = SFTTrainer(
    model=model,
    train_dataset=load_dataset("timdettmers/openassistant-guanaco", split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules="all-linear"),
    args=SFTConfig(
        per_device_train_batch_size=2,
        max_length=2048,
        fp16=True,
        bf16=False,
        gradient_checkpointing=True,
        optim="adamw_8bit",
    ),
)
trainer.train()
